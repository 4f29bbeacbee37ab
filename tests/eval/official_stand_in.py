"""Stands for the official code: its interface and its names of weights, around an encoder of ours."""

from typing import Any

from torch import Tensor, nn

from sf_mllm import SparseFormerConfig, SparseFormerModel
from sf_mllm.encoder.weights_official import FAMILY_UNIT_NAMES, TOP_NAMES, UNIT_NAMES

_UNITS = {"focusing.narrow.": "layers.0.", "focusing.transition.": "layers.1.0.", "focusing.wide.": "layers.2."}
_INNER = {ours: theirs for theirs, ours in {**UNIT_NAMES, **FAMILY_UNIT_NAMES["bootstrapped"]}.items()}


class Attributes(dict):
    """A dictionary that is its own `__dict__`, which no deep copy survives."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.__dict__ = self


def route_name_to_config(name: str) -> dict[str, Any]:
    return {"model_type": name, "compatible_config": Attributes(shift=0)}


class SparseFormer(nn.Module):
    def __init__(self, model_type: str, compatible_config: Attributes, debug_returns: bool | None = None) -> None:
        super().__init__()
        self.ours = SparseFormerModel(SparseFormerConfig.from_name(model_type))
        self.compatible_config = compatible_config
        self.debug_returns = debug_returns

    def forward(self, x: Tensor) -> Any:
        output = self.ours(x)
        tokens = output.last_hidden_state.roll(self.compatible_config.shift, dims=1)
        return {"token_embedding": tokens} if self.debug_returns else output.pooler_output

    def state_dict(self, *_: Any, **__: Any) -> Any:  # shares the memory of the weights, as PyTorch's does
        state = {official_name(name): tensor for name, tensor in self.ours.state_dict().items()}
        return {key: tensor.flatten() if key.endswith("roi_offset_bias") else tensor for key, tensor in state.items()}


def official_name(name: str) -> str:
    """Turn a name of ours into the official one."""
    units = {**_UNITS, **{f"cortex.{block}.": f"layers.{block + 3}." for block in range(2)}}
    for ours, theirs in units.items():
        rest = name.removeprefix(ours)
        if rest != name:
            return theirs + next((v + rest[len(k) :] for k, v in _INNER.items() if rest.startswith(k)), rest)
    return next(theirs + name[len(ours) :] for theirs, ours in TOP_NAMES.items() if name.startswith(ours))
