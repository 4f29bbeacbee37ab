"""Linear layers that multiply in float8 with fixed scales, which are measured on images."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from sf_mllm.encoder.cortex import MLP
from sf_mllm.ops.float8 import LARGEST, Float8Layer, multiply, multiply_and_activate, quantise

MARGIN = 8.0
"""By how much an input may exceed the largest one of the calibration. What exceeds it is cut off, which spoils the
result soon; room costs nothing, since e4m3 rounds relative to a value down to the 28,672th part of its largest one:
the errors of the demo encoder and of a random one were the same with margins from 1 to 256. 256 other drawings exceeded
the largest inputs for one drawing 2.4 times, and those for 32 drawings 1.2 times."""
_SIZE_MULTIPLE = 16
_IMAGES_AT_ONCE = 16


class Float8Linear(nn.Module):
    """A linear layer for inference whose inputs and weights are e4m3, each of them with one scale.

    As the scale of the inputs is known before they are, torch.compile quantises them where they are computed. torchao
    does the same (`Float8StaticActivationFloat8WeightConfig`), but from 0.16 to 0.18 as a prototype, which may change
    with any version; this needs no other package.

    Args:
        layer: whose weights are taken.
        largest_input: 0-d; `MARGIN` times this is the largest absolute input that is not cut off.

    Attributes:
        weight: [out_features, in_features], e4m3.
        weight_scale: 0-d, fp32; what a 1 in `weight` stands for.
        input_scale: 0-d, fp32; what a 1 in the quantised input stands for.
        bias: [out_features], bf16, or None.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    bias: Tensor | None
    can_be_saved = False  # for StrictLoadingMixin

    def __init__(self, layer: nn.Linear, largest_input: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach()
        weight_scale = _scale_for(weight.abs().amax())
        self.register_buffer("weight", quantise(weight, weight_scale))
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("input_scale", _scale_for(MARGIN * largest_input.detach().float()))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().to(torch.bfloat16))

    @staticmethod
    def takes(layer: nn.Linear) -> bool:
        """Whether the sizes of a layer are such that devices multiply them in float8."""
        return layer.in_features % _SIZE_MULTIPLE == 0 and layer.out_features % _SIZE_MULTIPLE == 0

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features], rounded to bf16, in the dtype of the input."""
        return multiply(quantise(inputs, self.input_scale), self.parts()).to(inputs.dtype)

    def parts(self) -> Float8Layer:
        """Return what it multiplies by and adds."""
        return Float8Layer(self.weight, self.bias, self.input_scale, self.weight_scale)

    def extra_repr(self) -> str:
        """Sizes, as those of `nn.Linear`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A move of the model is meant for its float8 weights and their scales, too; a cast is not.
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after: Any = self._buffers[name]
            if after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self


class Float8MLP(MLP):
    """The MLP of a transformer block for inference, both layers of which are `Float8Linear`.

    With the kernels "triton" what is between them is never written in more than 8 bits.

    Args:
        mlp: whose parts are taken.
    """

    def __init__(self, mlp: MLP) -> None:
        nn.Module.__init__(self)
        self.kernels, self.activation = mlp.kernels, mlp.activation
        self.fc1, self.act, self.fc2 = mlp.fc1, mlp.act, mlp.fc2

    @staticmethod
    def takes(mlp: MLP) -> bool:
        """Whether both layers of an MLP are in float8."""
        return isinstance(mlp.fc1, Float8Linear) and isinstance(mlp.fc2, Float8Linear)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform each token of [B, T, D] by itself."""
        first, second = self.fc1, self.fc2
        assert isinstance(first, Float8Linear) and isinstance(second, Float8Linear)
        quantised = quantise(tokens, first.input_scale)
        hidden = multiply_and_activate(quantised, first.parts(), self.activation, second.input_scale, self.kernels)
        return multiply(hidden, second.parts()).to(tokens.dtype)


@torch.no_grad()
def measure_largest_inputs(
    model: nn.Module, layers: Iterable[nn.Module], pixel_values: Tensor
) -> dict[nn.Module, Tensor]:
    """Return the largest absolute input of layers over images.

    Args:
        model: that the layers are in.
        layers: which; those that the model does not call are missing in the result.
        pixel_values: [B, 3, H, W], as the model takes them.

    Returns:
        For each layer a 0-d tensor, fp32; NaN or infinite if an input was.
    """
    largest: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        here = inputs[0].abs().amax().float()
        largest[layer] = torch.maximum(largest.get(layer, here), here)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        for some in pixel_values.split(_IMAGES_AT_ONCE):
            model(some)
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put other modules in the place of some in a model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in replacements:
                setattr(parent, name, replacements[child])


def _scale_for(largest: Tensor) -> Tensor:
    """Return what a 1 stands for if this, 0-d, is to be the largest value of e4m3; where all is 0, any will do."""
    scale = largest.float() / LARGEST
    return torch.where(scale > 0, scale, 1.0)
