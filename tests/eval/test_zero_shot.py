import csv

import pytest
import torch
from torch import nn

from eval.zero_shot import evaluate, evaluate_directory, main
from scripts.demo.clip_model import build_model, build_tokenizer, create_directory, model_config, save_weights
from sf_mllm.constants import CLIP_MEAN, CLIP_STD
from sf_mllm.data.scenes.captions import full_captions
from sf_mllm.data.scenes.language import objects_of
from sf_mllm.data.scenes.render import render
from sf_mllm.data.scenes.tasks import build_tasks
from sf_mllm.data.scenes.words import tokenize
from sf_mllm.errors import InputError
from tests.data.scene_oracle import caption_holds
from tests.encoder.tiny import tiny_model

SAMPLES = 24
CHANCE = {
    "color": 1 / 8,
    "shape": 1 / 8,
    "size": 1 / 3,
    "count": 1 / 8,
    "one_attribute": 1 / 8,
    "swap": 1 / 2,
    "position": 1 / 9,
    "relation": 1 / 2,
    "retrieval": 1 / SAMPLES,
}


@pytest.fixture(scope="module")
def tasks():
    return build_tasks(SAMPLES, seed=99)


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clip") / "tiny"
    config = model_config(width=64, layers=1, text_layers=1, embed_dim=6)
    create_directory(directory, config)
    save_weights(build_model(config, seed=0), directory)
    return directory


def test_each_sample_has_exactly_one_true_text(tasks):
    assert [task.name for task in tasks] == list(CHANCE)
    for task in tasks[:-1]:
        rows = zip(objects_of(task.images.scenes), task.choices.tolist(), task.answers.tolist(), strict=True)
        for objects, choices, answer in rows:
            truth = [caption_holds(task.texts[choice], objects) for choice in choices]
            assert truth == [choice == answer for choice in choices], (task.name, choices, objects)
    retrieval = tasks[-1]
    captions = full_captions(retrieval.images.scenes, retrieval.images.scenes.count > 0)
    texts = [retrieval.texts[answer] for answer in retrieval.answers]
    torch.testing.assert_close(
        build_tokenizer(32)(texts, padding="max_length", return_tensors="pt").input_ids, tokenize(captions)
    )
    assert (retrieval.choices == retrieval.answers).all()


def test_true_text_has_no_favourite_place():
    for task in build_tasks(200, seed=98):
        if task.name in ("swap", "relation"):
            place = (task.choices == task.answers[:, None]).int().argmax(dim=1)
            assert 70 < place.sum() < 130


def score(tasks, offset):
    """Score encoders that know by heart which text belongs to which image, or the text `offset` places later."""
    texts = {}

    def tokenizer(batch):
        return torch.tensor([texts.setdefault(text, len(texts)) for text in batch])

    def encode_text(tokens):
        return nn.functional.one_hot(tokens, 2000).float()

    known = {}
    for task in tasks:
        pixels = render(task.images.scenes, 32).float() / 255
        for image, choices, answer in zip(pixels, task.choices.tolist(), task.answers.tolist(), strict=True):
            text = task.texts[choices[(choices.index(answer) + offset) % len(choices)]]
            known[task.name, round(image.double().sum().item(), 2)] = text

    results = []
    for task in tasks:

        def encode_image(pixels, task=task):
            sums = [round(image.double().sum().item(), 2) for image in pixels]
            return encode_text(tokenizer([known[task.name, value] for value in sums]))

        results += evaluate(
            [task], encode_image, encode_text, tokenizer, image_size=32, mean=(0, 0, 0), std=(1, 1, 1), device="cpu"
        )
    return {item.task: item for item in results}


def test_accuracy_counts_right_answers(tasks):
    right, wrong = score(tasks, 0), score(tasks, 1)
    for name, chance in CHANCE.items():
        assert right[name].accuracy == 1 and wrong[name].accuracy == 0, name
        assert right[name].chance == pytest.approx(chance) and right[name].samples == SAMPLES


def test_directory_is_scored_as_the_model_in_memory(clip_directory, tasks):
    from_directory = evaluate_directory(clip_directory, samples=SAMPLES)
    model = build_model(model_config(width=64, layers=1, text_layers=1, embed_dim=6), seed=0).half().float()
    hf_tokenizer = build_tokenizer(32)
    in_memory = evaluate(
        build_tasks(SAMPLES),
        model.encode_image,
        model.encode_text,
        lambda texts: hf_tokenizer(texts, padding="max_length", return_tensors="pt").input_ids,
        image_size=224,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        device="cpu",
    )
    assert from_directory == in_memory


def test_sparseformer_takes_the_place_of_the_image_tower(clip_directory, tmp_path, capsys):
    from sf_mllm import SparseFormerImageProcessor

    tiny_model().save_pretrained(tmp_path / "encoder")
    SparseFormerImageProcessor().save_pretrained(tmp_path / "encoder")
    arguments = ["--clip", str(clip_directory), "--encoder", str(tmp_path / "encoder"), "--samples", "8"]
    assert main([*arguments, "--rows", str(tmp_path)]) == 0
    with (tmp_path / "zero_shot.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == list(CHANCE)
    assert all(row["samples"] == "8" and 0 <= float(row["accuracy"]) <= 1 for row in rows)
    assert all(name in capsys.readouterr().out for name in ["retrieval"])


def test_an_encoder_of_another_teacher_is_refused(clip_directory, capsys):
    assert main(["--clip", str(clip_directory), "--encoder", "demo:sf_llava", "--samples", "2"]) == 2
    error = capsys.readouterr().err
    assert "have 512 numbers" in error and "give the CLIP that the encoder was made from" in error


def test_bad_input_is_one_sentence(tmp_path, capsys):
    assert main(["--clip", str(tmp_path)]) == 2
    assert "holds no open_clip_config.json" in capsys.readouterr().err
    with pytest.raises(InputError, match="0 samples"):
        build_tasks(0)
