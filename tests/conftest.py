import gc
import os
from pathlib import Path

import pytest

from sf_mllm.cores import count_cores

# Models of tests are so small that threads cost more than they give, and several processes share the cores. Torch reads
# this when it is imported, and so does what tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

gc.disable()  # two fifths of the time of all imports were its own; it is on again before the first test


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which may be absent
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each core, at most four; none for a single file, which would wait for their imports."""
    is_single_file = len(config.args) == 1 and Path(config.args[0].partition("::")[0]).is_file()
    return 0 if is_single_file else min(count_cores(), 4)


def pytest_collection_finish() -> None:
    """Let garbage collection, for which each Trainer asks, skip all that was imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory):
    """Directory of a tiny random model; tests that damage it work on a copy."""
    from tests.tiny_vlm import make_sf_llava  # torch is imported after its number of threads is known

    directory = tmp_path_factory.mktemp("models") / "tiny"
    model, processor = make_sf_llava()
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
