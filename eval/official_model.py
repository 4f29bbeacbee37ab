"""The official SparseFormer from a user's clone of its repository, with random weights, as a tower.

Nothing of the clone is changed or copied: what its code lacks is made up for here, without altering what it computes.

- Its factory builds no model without a file of weights, so that the class is built with the factory's configuration.
- It gives tokens only where `debug_returns` is set. Both encoders are compared by their tokens, which a language model
  reads; the class embedding that is computed beside them falls away when the model is compiled.
- Its configuration is a dictionary that is its own `__dict__`, which `copy.deepcopy` empties: each unit gets the same
  values in a plain namespace.
- In bfloat16 it rounds the coordinates of its regions, too, which the code cannot do otherwise: features and
  coordinates of its sampling must have one type. Autocast to bfloat16 fails in it on CUDA devices, unless compiled.
"""

import importlib
import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sf_mllm.errors import InputError, first_line

URL = "https://github.com/showlab/sparseformer"
TESTED = "f4484c4"
"""Commit that this was written for."""
_PACKAGE = "official_sparseformer"
"""Name that the clone's package gets here, so that an installed `sparseformer` is not mistaken for it."""
_FOLDER = Path("sparseformer", "sparseformer")
_PARTS = ("config", "modeling")
TOLERANCES = {"bfloat16": 0.45}
"""Largest relative errors that pass in place of the benchmark's. With random weights tokens, whose coordinates are in
bfloat16, were 0.26 to 0.31 off for each of eight drawings (base, eager, on a CPU) and 0.29 for two (large). Tokens in
another order are 0.53 off, those of another drawing 0.87."""


class OfficialTokens(nn.Module):
    """Tokens of the official model, class token included, behind the final norm, as `EncoderTokens` gives ours.

    Args:
        model: built with `debug_returns`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, D]."""
        return self.model(pixel_values)["token_embedding"]


class OfficialCode:
    """The code of a clone.

    Args:
        checkout: directory of the clone.

    Raises:
        InputError: it is no such clone, or its code cannot be imported here.
    """

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        if not checkout.is_dir():
            raise InputError(f"Checkout '{checkout}' is no directory; give a clone of {URL}.")
        missing = [name for name in ("__init__", *_PARTS) if not (checkout / _FOLDER / f"{name}.py").is_file()]
        if missing:
            raise InputError(
                f"Checkout '{checkout}' lacks {_FOLDER / missing[0]}.py, so that it is no clone of {URL}; "
                f"`git clone {URL}` makes one."
            )
        try:
            self.config, self.modeling = _import_parts(checkout / _FOLDER)
        except Exception as error:  # of whatever the code imports
            raise self._explain(error, "imported") from error

    def build(self, name: str) -> nn.Module:
        """Build a published size with random weights; layers that start as zeros are drawn, too, so that regions move.

        Args:
            name: in full, as the configurations are named.

        Raises:
            InputError: the code knows no such size, or fails to build it.
        """
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                model = self.modeling.SparseFormer(**self.config.route_name_to_config(name), debug_returns=True)
                _draw_zeros(model.state_dict())
        except Exception as error:
            raise self._explain(error, f"used to build {name}") from error
        for unit in model.modules():
            config: Any = getattr(unit, "compatible_config", None)
            if config is not None:
                unit.compatible_config = SimpleNamespace(**config)
        return model.eval()

    def _explain(self, error: Exception, purpose: str) -> InputError:
        return InputError(
            f"The code in '{self.checkout}' cannot be {purpose} here ({type(error).__name__}: {first_line(error)}); "
            f"it needs timm, and commit {TESTED} of {URL} is known to work."
        )


def _import_parts(folder: Path) -> list[ModuleType]:
    """Import modules of a folder as those of a package `_PACKAGE`, in place of those of an earlier one."""
    for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
        del sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
    importlib.invalidate_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it switches autocast off by an old name
        spec.loader.exec_module(package)
        return [importlib.import_module(f"{_PACKAGE}.{part}") for part in _PARTS]


@torch.no_grad()
def _draw_zeros(state: dict[str, Tensor]) -> None:
    """Draw weights that are all zero, in place, with the spreads of `random_encoder`."""
    for key, weight in state.items():
        if key.endswith(".weight") and weight.dim() == 2 and not weight.any():
            nn.init.normal_(weight, std=0.1 * (weight.shape[1] ** -0.5 if "parameter_generator" in key else 1))
