"""Make `from_pretrained` strict: weights that do not fit exactly are refused, not completed with random ones."""

import os
from collections.abc import Iterable
from typing import Any

from sf_mllm.errors import InputError


class StrictLoadingMixin:
    """Put before `PreTrainedModel` in the bases of a model class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, but raise when keys are missing, left over or of another shape.

        Raises:
            InputError: naming the keys.
        """
        with_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # refused below, by name, with the other differences
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        refuse_misfit(cls.__name__, pretrained_model_name_or_path, info)
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, but raise where nothing could load the result.

        Raises:
            InputError: the cortex was quantised after loading.
        """
        if not all(getattr(module, "can_be_saved", True) for module in self.modules()):  # type: ignore[attr-defined]
            raise InputError("A quantised encoder cannot be saved; save it before quantize_cortex, or load it again.")
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


def refuse_misfit(class_name: str, path: str | os.PathLike[str], loading_info: dict[str, Any]) -> None:
    """Raise if a checkpoint did not fit its model exactly.

    Args:
        class_name: of the model, for the message.
        path: of the checkpoint, for the message.
        loading_info: what `from_pretrained(..., output_loading_info=True)` returns beside the model.

    Raises:
        InputError: keys are missing, left over or of another shape; names them.
    """
    other_shape = [
        f"{key} is {list(found)} instead of {list(expected)}"
        for key, found, expected in loading_info["mismatched_keys"]
    ]
    problems = [
        f"{len(keys)} {what} ({list_some(keys)})"
        for what, keys in (
            ("missing keys", loading_info["missing_keys"]),
            ("unexpected keys", loading_info["unexpected_keys"]),
            ("keys of another shape", other_shape),
        )
        if keys
    ]
    if problems:
        raise InputError(
            f"The weights in '{path}' do not fit a {class_name}: {'; '.join(problems)}; "
            "check that config.json and the weights belong together."
        )


def list_some(keys: Iterable[object], limit: int = 4) -> str:
    """Join the first few keys, sorted, and say how many more there are."""
    names = sorted(str(key) for key in keys)
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
