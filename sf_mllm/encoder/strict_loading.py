"""Make `from_pretrained` strict: a checkpoint that does not fit exactly is refused, not completed with random weights."""

from typing import Any

from typing_extensions import Self

from sf_mllm.errors import InputError


class StrictLoadingMixin:
    """Put before `PreTrainedModel` in the bases of a model class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load as transformers does, but raise when keys are missing, left over or of another shape.

        Raises:
            InputError: naming the keys.
        """
        with_info = kwargs.pop("output_loading_info", False)
        ignored_prefixes = kwargs.pop("ignored_key_prefixes", ())
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        unexpected = [key for key in info["unexpected_keys"] if not key.startswith(tuple(ignored_prefixes))]
        problems = [
            f"{len(keys)} {what} ({_some(keys)})"
            for what, keys in (
                ("missing keys", info["missing_keys"]),
                ("unexpected keys", unexpected),
                ("keys of another shape", [str(entry) for entry in info["mismatched_keys"]]),
            )
            if keys
        ]
        if problems:
            raise InputError(
                f"The weights in '{pretrained_model_name_or_path}' do not fit a {cls.__name__}: {'; '.join(problems)}. "
                "Check that config.json and the weights belong together."
            )
        return (model, info) if with_info else model


def _some(keys: Any, limit: int = 4) -> str:
    names = sorted(str(key) for key in keys)
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
