"""What a run ran on: source revision, library versions, device, memory."""

import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "sf_mllm",
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "peft",
    "open_clip_torch",
    "timm",
    "datasets",
    "webdataset",
)


def describe_revision() -> dict[str, Any]:
    """Return {"revision", "revision_is_dirty"} of the checkout that holds this package; None outside a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None  # an installed copy is no checkout
    status = _git(package, "status", "--porcelain", "--untracked-files=no")
    return {
        "revision": _git(package, "rev-parse", "HEAD") if inside else None,
        "revision_is_dirty": bool(status) if inside and status is not None else None,
    }


def describe_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide results."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def describe_device() -> str:
    """Return the accelerators' names, or the processor and the number of threads used."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    if torch.backends.mps.is_available():
        return "mps"
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def peak_memory_gib() -> float:
    """Return the peak memory of this process: on the CUDA device if there is one, else resident."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)


def _git(directory: Path, *arguments: str) -> str | None:
    """Return git's output, or None without git or outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
