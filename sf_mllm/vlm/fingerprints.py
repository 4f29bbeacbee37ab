"""Which encoder, decoder, tokenizer and number of visual tokens belong together.

A projector translates the tokens of one encoder for one decoder; with another of either it gives nonsense, and nothing
fails. So everything that training writes records its `Fingerprints`, and every load compares them: a projector of an
earlier run, adapters on their model, a resumed run, and the weights in a model directory.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self

from sf_mllm.errors import InputError

FINGERPRINTS_FILE = "fingerprints.json"
_SIGNS_PER_TENSOR = 2**16


@dataclass(frozen=True)
class Fingerprints:
    """Of the parts that a projector and adapters belong to; None stands for a part that is not known.

    Attributes:
        tokens_per_image: visual tokens of an image.
        encoder: `fingerprint` of the vision encoder.
        decoder: `fingerprint_decoder` of the language model.
        vocabulary: `fingerprint_vocabulary` of the tokenizer, `<image>` included.
        chat_template: `fingerprint_text` of the template.
    """

    tokens_per_image: int | None = None
    encoder: str | None = None
    decoder: str | None = None
    vocabulary: str | None = None
    chat_template: str | None = None

    @classmethod
    def from_record(cls, record: dict[str, Any] | None) -> Self:
        """Read what `to_record` gave; entries of other versions are left out, missing ones are unknown."""
        known = {entry.name for entry in fields(cls)}
        return cls() if record is None else cls(**{name: record[name] for name in record.keys() & known})

    def to_record(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        return asdict(self)

    def refuse_other(self, here: "Fingerprints", *, owner: str, otherwise: str) -> None:
        """Raise if these fingerprints, recorded in something that is loaded, are not those of the parts at hand.

        Args:
            here: of the parts at hand.
            owner: what is loaded, as the subject of the sentence: "The projector in 'runs/align'".
            otherwise: what to do if the recorded parts cannot be given.

        Raises:
            InputError: one differs that is known on both sides; says which, and what to do.
        """
        for name, part in _PARTS.items():
            recorded, present = getattr(self, name), getattr(here, name)
            if recorded is None or present is None or recorded == present:
                continue
            if name == "tokens_per_image":
                difference = f"an encoder of {recorded} tokens an image, and the one here gives {present}"
            else:
                difference = f"another {part} (fingerprint {recorded[:8]}, here {present[:8]})"
            raise InputError(f"{owner} belongs to {difference}; give the {part} that it was made with, or {otherwise}.")


_PARTS = {
    "tokens_per_image": "encoder",
    "encoder": "encoder",
    "decoder": "decoder",
    "vocabulary": "tokenizer",
    "chat_template": "chat template",
}


def fingerprint(model: nn.Module, leave_out: Collection[str] = ()) -> str | None:
    """Return a SHA-256 that tells a model's weights from others, whatever the precision they are held in.

    It covers names, shapes and the signs of up to 65,536 evenly spaced values of each tensor. No rounding changes a
    sign, so a checkpoint has one fingerprint in float32, bfloat16 and float16; training changes some signs from its
    first steps on. It reads little even of large models, and finds mix-ups, no forgeries.

    Args:
        model: weights on any device.
        leave_out: names of tensors that do not count.

    Returns:
        Hexadecimal digits; None where there are no whole values to read: on the meta device, quantised, or split.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if name in leave_out:
            continue
        if not _has_whole_values(tensor):
            return None
        values = tensor.detach().reshape(-1)
        # An odd stride, so that the values come from all columns of a matrix.
        stride = -(-values.numel() // _SIGNS_PER_TENSOR) | 1
        signs = torch.signbit(values[::stride]).cpu().numpy()
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(np.packbits(signs).tobytes())
    return digest.hexdigest()


def _has_whole_values(tensor: Tensor) -> bool:
    # By bitsandbytes; by torchao, whose tensors claim the type of the values that they stand for.
    is_quantised = tensor.element_size() == 1 or is_traceable_wrapper_subclass(tensor)
    is_split = hasattr(tensor, "ds_id") or hasattr(tensor, "full_tensor")  # by DeepSpeed's ZeRO-3, by FSDP
    return not (tensor.is_meta or is_quantised or is_split)


def fingerprint_decoder(decoder: PreTrainedModel) -> str | None:
    """Return the `fingerprint` of a text-only decoder, before or after it was joined to an encoder.

    Embedding and head are left out: they may have grown by a row for `<image>`, and the tokenizer's fingerprint stands
    for what their rows mean.

    Args:
        decoder: with its head or without.
    """
    base: Any = decoder.base_model
    embedding = base.get_input_embeddings().weight
    tables = [name for name, tensor in base.state_dict(keep_vars=True).items() if tensor is embedding]
    return fingerprint(base, leave_out=tables)


def fingerprint_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 of the tokenizer's tokens and their ids, added ones included."""
    return fingerprint_text(json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True))


def fingerprint_text(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_fingerprints(directory: Path, fingerprints: Fingerprints) -> None:
    """Put fingerprints into a directory that is being written, as `fingerprints.json`."""
    text = json.dumps(fingerprints.to_record(), indent=2)
    (directory / FINGERPRINTS_FILE).write_text(text + "\n", encoding="utf-8")


def read_fingerprints(directory: Path) -> Fingerprints:
    """Read the `fingerprints.json` of a directory.

    Raises:
        InputError: there is none, or it is damaged.
    """
    file = directory / FINGERPRINTS_FILE
    try:
        return Fingerprints.from_record(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise InputError(
            f"'{directory}' has no {FINGERPRINTS_FILE}, which says what it belongs to; copy the whole directory again."
        ) from error
    except (ValueError, AttributeError) as error:
        raise InputError(f"'{file}' is damaged; copy the whole directory again.") from error
