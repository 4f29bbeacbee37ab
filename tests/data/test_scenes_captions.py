import dataclasses

import pytest
import torch

from sf_mllm.data.scenes.caption_edits import wrong_captions
from sf_mllm.data.scenes.captions import (
    ANY,
    COUNT,
    LIST,
    RELATION,
    Captions,
    all_phrases,
    count_captions,
    full_captions,
    list_captions,
    may_hold,
    phrase_captions,
    phrases_hold,
    relation_captions,
)
from sf_mllm.data.scenes.domains import COLORS, DOMAINS, SHAPES, TEXTURES
from sf_mllm.data.scenes.draws import Draws
from sf_mllm.data.scenes.language import objects_of
from sf_mllm.data.scenes.sampling import ScenesConfig, choose, concatenate, sample_scenes, tensor_fields
from sf_mllm.data.scenes.words import BOS, EOS, PAD, WORDS, tokenize
from tests.data.scene_oracle import caption_holds

INDICES = torch.arange(500)


@pytest.fixture(scope="module", params=sorted(DOMAINS))
def scenes(request):
    return sample_scenes(INDICES, ScenesConfig(seed=21, domain=request.param))


@pytest.fixture(scope="module")
def captions(scenes):
    """A quarter of each kind."""
    kinds = (list_captions, phrase_captions, relation_captions, count_captions)
    parts = INDICES.chunk(len(kinds))
    return concatenate([kind(scenes.select(part), Draws(5, part)) for kind, part in zip(kinds, parts, strict=True)])


def in_words(captions: Captions) -> list[str]:
    return [" ".join(WORDS[token] for token in row if WORDS[token][0] != "<") for row in tokenize(captions).tolist()]


def make_caption(
    kind: int, phrases: list[dict[str, str]], number: int = ANY, relation: int = 0, domain: str = "plain"
) -> Captions:
    columns = DOMAINS[domain].attributes
    phrase = torch.full((1, 8, len(columns)), ANY)
    for row, words in enumerate(phrases):
        for column, (name, values) in enumerate(columns.items()):
            if name in words:
                phrase[0, row, column] = values.index(words[name])
    return Captions(
        kind=torch.tensor([kind]),
        phrase=phrase,
        used=torch.arange(8)[None] < max(len(phrases), 1),
        number=torch.tensor([number]),
        relation=torch.tensor([relation]),
        domain=domain,
    )


RED_CIRCLE = {"color": "red", "shape": "circle"}
TINY_K = {"size": "tiny", "color": "blue", "texture": "plain", "shape": "letter k", "place": "top-left"}
STRIPED_THREE = {"texture": "striped", "shape": "digit 3"}


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        (
            make_caption(LIST, [RED_CIRCLE | {"size": "large", "place": "top"}, {"color": "blue"}]),
            "large red circle top blue object",
        ),
        (make_caption(LIST, [RED_CIRCLE], number=1), "1 object red circle"),
        (make_caption(LIST, [RED_CIRCLE, {"shape": "star"}], number=2), "2 objects red circle star"),
        (make_caption(RELATION, [RED_CIRCLE, {"shape": "ring"}], relation=1), "red circle right of ring"),
        (make_caption(RELATION, [{"size": "small"}, RED_CIRCLE], relation=2), "small object above red circle"),
        (make_caption(COUNT, [{"color": "red", "shape": "cross"}], number=3), "3 red crosses"),
        (make_caption(COUNT, [RED_CIRCLE], number=1), "1 red circle"),
        (make_caption(COUNT, [{}], number=4), "4 objects"),
        (
            make_caption(LIST, [TINY_K, STRIPED_THREE], domain="clutter"),
            "tiny blue plain letter_k top-left striped digit_3",
        ),
        (
            make_caption(RELATION, [STRIPED_THREE, RED_CIRCLE], ANY, 4, "clutter"),
            "striped digit_3 in front of red circle",
        ),
        (make_caption(RELATION, [RED_CIRCLE, {}], ANY, 5, "clutter"), "red circle behind object"),
        (make_caption(COUNT, [STRIPED_THREE], 2, domain="clutter"), "2 striped digits_3"),
        (make_caption(COUNT, [STRIPED_THREE], 1, domain="clutter"), "1 striped digit_3"),
    ],
)
def test_captions_in_words(caption, words):
    assert in_words(caption) == [words]
    tokens = tokenize(caption)[0].tolist()
    length = len(words.split())
    assert tokens[0] == BOS and tokens[length + 1] == EOS
    assert tokens[length + 2 :] == [PAD] * (DOMAINS[caption.domain].context_length - length - 2)


def test_every_caption_fits_the_context(scenes, captions):
    domain = DOMAINS[scenes.domain]
    longest = sample_scenes(INDICES, ScenesConfig(seed=21, min_objects=7, domain=scenes.domain))
    tokens = tokenize(full_captions(longest, longest.count > 0))
    assert tokens.shape == (500, domain.context_length)
    assert ((tokens == EOS).sum(dim=1) == 1).all() and (tokens != PAD).sum(dim=1).max() == domain.context_length
    assert len(set(WORDS)) == len(WORDS)
    is_short = captions.used.sum(dim=1) <= torch.where(captions.kind == RELATION, 2, 1)
    is_short &= (captions.kind != LIST) | (captions.number == ANY)
    longest = (tokenize(captions)[is_short] != PAD).sum(dim=1).max()
    assert domain.short_length - 2 <= longest <= domain.short_length  # the longest relation is rare
    phrases = tokenize(phrase_captions(scenes, Draws(5, INDICES)))
    assert (phrases != PAD).sum(dim=1).max() == domain.phrase_length


def test_captions_are_true_and_of_all_kinds(scenes, captions):
    shares = torch.bincount(captions.kind, minlength=3) / len(captions)
    assert shares.min() > 0.1
    objects = objects_of(scenes)
    texts = in_words(captions)
    assert all(caption_holds(text, items) for text, items in zip(texts, objects, strict=True))
    assert may_hold(captions, scenes).all()


def test_truth_agrees_with_reading_the_words(scenes, captions):
    """Against permutations of objects: exact for relations and counts, never "false" for a true list."""
    wrong = wrong_captions(captions, Draws(6, INDICES))
    objects = objects_of(scenes)
    some = torch.arange(0, 500, 12)
    disagreements = 0
    for group in (captions, wrong):
        texts = in_words(group)
        truth = may_hold(group, scenes, all_pairs=True)
        torch.testing.assert_close(truth.diagonal(), may_hold(group, scenes), rtol=0, atol=0)
        for text_index in some.tolist():
            for scene_index in {text_index, *range(0, 500, 25)}:
                if len(objects[scene_index]) > 6 and group.kind[text_index] == LIST:
                    continue  # the reader tries all permutations
                expected = caption_holds(texts[text_index], objects[scene_index])
                found = truth[text_index, scene_index].item()
                if group.kind[text_index] == LIST and found and not expected:
                    disagreements += 1
                else:
                    assert found == expected, (texts[text_index], objects[scene_index])
    assert disagreements <= 5


def test_all_phrases_are_different_and_their_truth_is_that_of_any_caption(scenes):
    phrases = all_phrases("cpu", scenes.domain)
    tokens = tokenize(phrases)
    expected = {"plain": 8 * 8 * (1 + 9), "clutter": 8 * 44 * (1 + 9 + 4 + 4)}
    assert len(phrases) == expected[scenes.domain] == len(tokens.unique(dim=0))
    assert (tokens[:, DOMAINS[scenes.domain].phrase_length :] == PAD).all()
    some, few = torch.arange(0, len(phrases), 7), scenes.select(slice(0, 40))
    picked = dataclasses.replace(phrases, **{name: values[some] for name, values in tensor_fields(phrases).items()})
    truth = phrases_hold(picked, few)
    torch.testing.assert_close(truth, may_hold(picked, few, all_pairs=True), rtol=0, atol=0)
    assert truth.any() and not truth.all(dim=1).any()


def test_wrong_captions_change_one_thing(scenes, captions):
    wrong = wrong_captions(captions, Draws(6, INDICES))
    original, edited = in_words(captions), in_words(wrong)
    changed = [a != b for a, b in zip(original, edited, strict=True)]
    assert sum(changed) > 0.97 * len(changed)
    for before, after in zip(original, edited, strict=True):
        if len(before.split()) == len(after.split()):
            differing = sum(a != b for a, b in zip(before.split(), after.split(), strict=True))
            assert differing <= 2, (before, after)
    changed_words = {word for a, b in zip(original, edited, strict=True) for word in set(b.split()) - set(a.split())}
    is_shape = [word in SHAPES for word in changed_words]
    assert sum(is_shape) == len(SHAPES)
    if scenes.domain == "clutter":  # every kind of word gets in, glyphs in the place of glyphs
        assert {*TEXTURES, "tiny", "front", "behind"} < changed_words
        assert sum(word.startswith(("digit", "letter")) for word in changed_words) > 30
    assert may_hold(wrong, scenes).float().mean() < 0.1
    objects = objects_of(scenes)
    for index in (captions.kind != LIST).nonzero()[:, 0].tolist():
        assert caption_holds(edited[index], objects[index]) == may_hold(wrong, scenes)[index].item()


def test_exchanged_words_that_mean_the_same_are_no_negative():
    scene = sample_scenes(torch.arange(1), ScenesConfig(seed=0, min_objects=2, max_objects=2))
    color, shape = scene.color.clone(), scene.shape.clone()
    color[0, :2] = torch.tensor([COLORS.index("red"), COLORS.index("blue")])
    shape[0, :2] = SHAPES.index("star")
    scene = dataclasses.replace(scene, color=color, shape=shape)
    red, blue = {"color": "red"}, {"color": "blue"}
    assert may_hold(make_caption(LIST, [blue, red]), scene).all()
    assert not may_hold(make_caption(LIST, [red, red]), scene).any()  # there is one red object only
    assert not may_hold(make_caption(LIST, [red, blue], number=3), scene).any()
    assert may_hold(make_caption(COUNT, [{"shape": "star"}], number=2), scene).all()
    left_of = make_caption(RELATION, [red, blue], relation=0)
    assert may_hold(left_of, scene).item() == (scene.x[0, 0] < scene.x[0, 1]).item()


def test_occlusion_is_true_one_way_round_only():
    scenes = sample_scenes(torch.arange(60), ScenesConfig(seed=4, domain="clutter", min_objects=2))
    captions = relation_captions(scenes, Draws(9, torch.arange(60)))
    is_depth = (captions.kind == RELATION) & (captions.relation >= 4)
    assert 0.1 < is_depth.float().mean() < 0.5
    assert may_hold(captions, scenes).all()
    turned = dataclasses.replace(captions, relation=captions.relation ^ 1)
    named_apart = (captions.phrase[:, 0] != captions.phrase[:, 1]).any(dim=1)
    assert not may_hold(turned, scenes)[is_depth & named_apart & (scenes.count == 2)].any()
    swapped = dataclasses.replace(turned, phrase=captions.phrase[:, [1, 0, 2, 3, 4, 5, 6, 7]])
    assert may_hold(swapped, scenes).all()  # "a in front of b" is "b behind a"


def test_choose_takes_rows():
    one, two = make_caption(LIST, [RED_CIRCLE]), make_caption(COUNT, [{}], number=4)
    mixed = choose(torch.tensor([True, False]), concatenate((one, one)), concatenate((two, two)))
    assert in_words(mixed) == ["red circle", "4 objects"]
