"""Plain scenes of a seed stay what they are: trained models, exports and reported scores refer to them by number."""

import hashlib
import random

import pytest
import torch
from torch import Tensor

from sf_mllm.data.scenes.caption_edits import wrong_captions
from sf_mllm.data.scenes.captions import (
    count_captions,
    full_captions,
    list_captions,
    may_hold,
    phrase_captions,
    relation_captions,
)
from sf_mllm.data.scenes.draws import Draws
from sf_mllm.data.scenes.language import describe, describe_briefly, describe_for_reading, objects_of
from sf_mllm.data.scenes.questions import ask_questions
from sf_mllm.data.scenes.render import render
from sf_mllm.data.scenes.sampling import Scenes, ScenesConfig, sample_scenes
from sf_mllm.data.scenes.words import WORDS, tokenize

INDICES = torch.arange(300)
FIRST_WORDS = 54  # the vocabulary may grow at its end only


def digest(*values: Tensor | str) -> str:
    sha = hashlib.sha256()
    for value in values:
        data = value.encode() if isinstance(value, str) else value.to(torch.int64).contiguous().numpy().tobytes()
        sha.update(data)
    return sha.hexdigest()[:16]


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return sample_scenes(INDICES, ScenesConfig(seed=3, min_objects=2))


def test_attributes_stay(scenes):
    names = ("count", "size", "color", "shape", "x", "y", "radius", "angle", "tint", "place", "rgb")
    background = ("background", "background_rgb", "background_angle", "background_noise")
    assert digest(*(getattr(scenes, name) for name in names + background)) == "de1ae24dd4d6a94c"


def test_pictures_stay(scenes):
    """Block means, as the last bit of a pixel may differ between processors."""
    images = render(scenes.select(slice(0, 4)), 96).float()
    means = images.view(4, 3, 4, 24, 4, 24).mean(dim=(3, 5)).mean(dim=1).flatten(1)
    expected = torch.tensor(
        [
            [
                218.9,
                217.1,
                213.6,
                224.8,
                221.3,
                229.8,
                220.3,
                221.6,
                209.0,
                171.5,
                212.7,
                226.0,
                214.3,
                215.5,
                224.0,
                227.9,
            ],
            [
                181.5,
                181.7,
                182.9,
                183.7,
                165.0,
                182.6,
                180.3,
                169.7,
                182.8,
                183.5,
                182.9,
                181.8,
                180.2,
                173.9,
                178.0,
                183.7,
            ],
            [
                165.9,
                129.5,
                95.6,
                117.4,
                153.6,
                153.6,
                102.0,
                115.8,
                105.0,
                115.1,
                123.2,
                160.3,
                96.6,
                105.9,
                144.4,
                169.9,
            ],
            [39.7, 39.7, 39.7, 39.7, 54.2, 45.8, 39.7, 39.7, 39.7, 47.1, 39.7, 39.7, 39.7, 39.7, 49.4, 39.7],
        ]
    )
    torch.testing.assert_close(means, expected, rtol=0, atol=0.2)


def test_captions_and_their_truth_stay(scenes):
    draws, wrong_draws = Draws(5, INDICES), Draws(6, INDICES)
    captions = [full_captions(scenes, scenes.count > 3)]
    captions += [make(scenes, draws) for make in (list_captions, phrase_captions, relation_captions, count_captions)]
    captions += [wrong_captions(group, wrong_draws) for group in captions]
    assert digest(*(tokenize(group) for group in captions)) == "38ddbd708e902b93"
    assert digest(*(may_hold(group, scenes, all_pairs=True) for group in captions)) == "01041215179b5004"
    assert digest(" ".join(WORDS[:FIRST_WORDS])) == "43192455cf2167e8"


def test_words_and_questions_stay(scenes):
    texts = []
    for index, objects in enumerate(objects_of(scenes)):
        texts += [describe(objects), describe_briefly(objects)]
        texts += [describe_for_reading(objects, random.Random(index))]
        texts += [" ".join(question) for question in ask_questions(objects, random.Random(index), 9)]
    assert digest("\n".join(texts)) == "5f08c8743fc60c4c"
