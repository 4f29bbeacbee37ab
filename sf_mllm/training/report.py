"""What training runs did, as one HTML page: curves, final figures, settings, and where the encoder looks.

python -m sf_mllm.training.report RUN_DIR [RUN_DIR ...] --out report.html
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from sf_mllm.errors import CommandLineParser, InputError, report_input_errors


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
    from sf_mllm.training.report_data import read_runs
    from sf_mllm.training.report_page import make_page

    write_text_atomically(out, make_page(read_runs([Path(path) for path in run_paths])))


def require_matplotlib() -> None:
    """Check what a report needs before hours are spent on a run.

    Raises:
        InputError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("A report needs matplotlib, which is not installed; pip install matplotlib.")


@report_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, write the page, return the exit status."""
    parser = CommandLineParser(
        prog="python -m sf_mllm.training.report",
        description="Draw what bootstrap runs measured, as one HTML page; several runs are compared.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="run folder, for example runs/bootstrap/demo")
    parser.add_argument("--out", default="report.html", help="file to write (default: report.html)")
    options = parser.parse_args(argv)
    write_report(options.runs, options.out)
    print(f"The report is {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
