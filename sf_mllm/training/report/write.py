"""What training runs did, as one HTML page: curves, final figures, settings, and where the encoder looks."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from sf_mllm.errors import InputError


def write_report(run_paths: Sequence[str | Path], out: str | Path) -> None:
    """Write the report of one run, or of several side by side; the page needs no other file.

    Args:
        run_paths: run folders, finished or not.
        out: the HTML file.

    Raises:
        InputError: a folder holds no run, nothing was logged yet, or matplotlib is missing.
    """
    require_matplotlib()
    from sf_mllm.config import write_text_atomically
    from sf_mllm.training.report.data import read_runs
    from sf_mllm.training.report.page import make_page

    write_text_atomically(out, make_page(read_runs([Path(path) for path in run_paths])))


def require_matplotlib() -> None:
    """Check what a report needs before hours are spent on a run.

    Raises:
        InputError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("A report needs matplotlib, which is not installed; pip install matplotlib.")
