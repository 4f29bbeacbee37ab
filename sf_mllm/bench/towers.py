"""Vision towers by name: ours, their teachers, and those of open_clip, timm and transformers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sf_mllm.assets import DEMO_PREFIX
from sf_mllm.bench.choices import TOWER_FORMS
from sf_mllm.bench.library_towers import find_hf_tower, find_open_clip_tower, find_timm_tower
from sf_mllm.bench.our_towers import find_encoder_directory, find_published_encoder
from sf_mllm.bench.tower import TowerLoader
from sf_mllm.errors import InputError, nearest
from sf_mllm.ops.kernels import KERNEL_NAMES, load_kernels

_OURS = ("demo", f"{DEMO_PREFIX}sf_llava")
_SCHEMES: dict[str, Callable[[str], TowerLoader]] = {
    "sparseformer": find_published_encoder,
    "open_clip": find_open_clip_tower,
    "timm": find_timm_tower,
    "hf": find_hf_tower,
}


def find_tower(name: str) -> TowerLoader:
    """Look a tower up, without building it.

    Args:
        name: in one of the forms of `choices.TOWER_FORMS`.

    Raises:
        InputError: there is no such tower.
    """
    tower, at, kernels = name.rpartition("@")
    is_ours = tower in _OURS or tower.startswith("sparseformer:") or Path(tower).expanduser().is_dir()
    if at and (is_ours or kernels in KERNEL_NAMES) and not Path(name).expanduser().is_dir():
        if not is_ours:
            raise InputError(
                f"Tower '{name}' is no encoder of ours, whose kernels '@{kernels}' would set; leave it out."
            )
        load_kernels(kernels)
        loader = find_tower(tower)
        return lambda size: replace(loader(size), kernels=kernels)
    if name in _OURS:
        return find_encoder_directory(f"{DEMO_PREFIX}sf_llava")
    if name == f"{DEMO_PREFIX}clip":
        return find_open_clip_tower(name)
    scheme, colon, rest = name.partition(":")
    if colon and scheme in _SCHEMES:
        return _SCHEMES[scheme](rest)
    if Path(name).expanduser().is_dir():
        return find_encoder_directory(str(Path(name).expanduser()))
    known = ("demo", f"{DEMO_PREFIX}clip", "sparseformer:base", "sparseformer:large", *(f"{key}:" for key in _SCHEMES))
    raise InputError(f"Tower '{name}' is unknown.{nearest(name, known)} Towers are {TOWER_FORMS}.")
