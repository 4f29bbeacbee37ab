"""The vocabulary of captions, and captions as tokens."""

import torch
from torch import Tensor

from sf_mllm.data.scenes.captions import ANY, COUNT, RELATION, Captions
from sf_mllm.data.scenes.domains import (
    COLORS,
    DOMAINS,
    GLYPHS,
    MAX_OBJECTS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    plural_noun,
)
from sf_mllm.data.scenes.draws import constant

PAD, BOS, EOS, UNKNOWN = range(4)


def as_word(name: str) -> str:
    """Write the name of a glyph as one word, "letter_k": what makes it one token, and "a" no article."""
    return name.replace(" ", "_")


WORDS = (
    *("<pad>", "<bos>", "<eos>", "<unk>"),
    *(*SIZES, *COLORS, *SHAPES, *PLACES, *map(plural_noun, SHAPES), *map(str, range(MAX_OBJECTS + 1))),
    *("object", "objects", "of", "above", "below"),
    *("tiny", *TEXTURES, *map(as_word, GLYPHS), *(as_word(plural_noun(glyph)) for glyph in GLYPHS)),
    *("in", "front", "behind"),
)
"""The caption vocabulary of all domains; the token of a word is its index. It grows at its end only."""

_TOKENS = {word: token for token, word in enumerate(WORDS)}
_OBJECT, _OBJECTS = _TOKENS["object"], _TOKENS["objects"]
_RELATIONS = tuple(
    tuple(_TOKENS[word] for word in words) + (PAD,) * (3 - len(words))
    for words in (("left", "of"), ("right", "of"), ("above",), ("below",), ("in", "front", "of"), ("behind",))
)
_WORD_ORDER = ("size", "color", "texture", "shape", "place")


def tokenize(captions: Captions) -> Tensor:
    """Turn captions into tokens.

    Returns:
        [B, context length of the domain] int64: <bos>, words, <eos>, padding.
    """
    domain, device = DOMAINS[captions.domain], captions.kind.device
    attributes = domain.attributes
    is_count = captions.kind == COUNT
    is_plural = captions.number != 1
    columns = {}
    for column, (name, values) in enumerate(attributes.items()):
        # ANY is -1 and reads the last entry.
        tokens = (*(_TOKENS[as_word(value)] for value in values), _OBJECT if name == "shape" else PAD)
        columns[name] = constant(tokens, device)[captions.phrase[..., column]]  # [B, 8]
        if name == "shape":
            plurals = (*(_TOKENS[as_word(plural_noun(value))] for value in values), _OBJECTS)
            plural = constant(plurals, device)[captions.phrase[:, 0, column]]
            columns[name][:, 0] = torch.where(is_count & is_plural, plural, columns[name][:, 0])
    phrase = torch.stack([columns[name] for name in _WORD_ORDER if name in columns], dim=-1)  # [B, 8, A]
    phrase = torch.where(captions.used[..., None], phrase, PAD)

    number = torch.where(captions.number == ANY, PAD, captions.number + _TOKENS["0"])
    noun = torch.where(is_plural, _OBJECTS, _OBJECT)
    noun = torch.where((captions.number == ANY) | is_count, PAD, noun)
    relation = constant(_RELATIONS, device)[captions.relation]  # [B, 3]
    relation = torch.where((captions.kind == RELATION)[:, None], relation, PAD)

    bos = torch.full_like(number, BOS)
    words = torch.cat(
        (torch.stack((bos, number, noun), dim=1), phrase[:, 0], relation, phrase[:, 1:].flatten(1)), dim=1
    )  # [B, 3 + A + 3 + 7 * A], with gaps
    words = torch.cat((words, torch.full_like(words[:, :1], EOS)), dim=1)
    order = (words == PAD).to(torch.int8).argsort(dim=1, stable=True)  # words to the front, in their order
    return words.gather(1, order)[:, : domain.context_length]
