"""The regions of a few held-out images at the first and at the last evaluation of a run, kept for its report."""

import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

NUM_IMAGES = 8

_FOLDER = "regions"
_FIRST, _LAST = "first.safetensors", "last.safetensors"


@dataclass
class RegionSnapshot:
    """Where an encoder looked at one step."""

    step: int
    pixel_values: Tensor  # [B, 3, H, W], uint8
    rois: Tensor  # [B, N, 4], final regions, image-relative xyxy


def save_snapshot(run_path: Path, snapshot: RegionSnapshot) -> None:
    """Write a snapshot as the run's last one, and as its first one unless that is of an earlier step."""
    folder = run_path / _FOLDER
    folder.mkdir(exist_ok=True)
    first = _read_step(folder / _FIRST)
    if first is None or snapshot.step <= first:  # a run that began anew takes the place of the one before
        _write(folder / _FIRST, snapshot)
    _write(folder / _LAST, snapshot)


def load_snapshots(run_path: Path) -> list[RegionSnapshot]:
    """Return the first and the last snapshot; one if they are the same, none if the run was never evaluated."""
    snapshots = [_read(run_path / _FOLDER / name) for name in (_FIRST, _LAST) if (run_path / _FOLDER / name).is_file()]
    return snapshots[:1] if len(snapshots) == 2 and snapshots[0].step == snapshots[1].step else snapshots


def _write(path: Path, snapshot: RegionSnapshot) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    tensors = {"pixel_values": snapshot.pixel_values.contiguous(), "rois": snapshot.rois.contiguous()}
    save_file(tensors, temporary, metadata={"step": str(snapshot.step)})
    os.replace(temporary, path)


def _read_step(path: Path) -> int | None:
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"])


def _read(path: Path) -> RegionSnapshot:
    with safe_open(path, framework="pt") as file:
        return RegionSnapshot(int(file.metadata()["step"]), file.get_tensor("pixel_values"), file.get_tensor("rois"))
