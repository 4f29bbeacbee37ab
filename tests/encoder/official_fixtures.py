"""Read the stored tensors of the official code."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ("v1_a", "btsp_augreg_a", "btsp_clip_a")


def read_fixture(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Return the official state dict, all other tensors, and the official configuration."""
    with safe_open(FIXTURES / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        config = json.loads(file.metadata()["config"])
    state = {key.removeprefix("state."): tensor for key, tensor in tensors.items() if key.startswith("state.")}
    return state, {key: tensor for key, tensor in tensors.items() if not key.startswith("state.")}, config
