import json

import numpy as np
import pytest

from sf_mllm.config import load_run_config
from sf_mllm.errors import InputError
from sf_mllm.training.instruct import data as instruct_data
from sf_mllm.training.instruct.config import InstructConfig
from sf_mllm.training.instruct.data import prepare_data
from sf_mllm.training.instruct.sources import SourceSettings, parse_sources
from sf_mllm.training.run_folder import RunFolder
from sf_mllm.vlm.processing_sf_llava import SFLlavaProcessor
from tests.tiny_text import make_tokenizer
from tests.tiny_vlm import NUM_TOKENS, make_image, make_image_processor
from tests.training.tiny_instruct import arguments_of


@pytest.fixture(scope="module")
def processor():
    tokenizer = make_tokenizer()
    return SFLlavaProcessor(make_image_processor(), tokenizer, NUM_TOKENS, chat_template=tokenizer.chat_template)


@pytest.fixture
def write(tmp_path):
    """Write rows that say what number they have, about one image."""
    make_image(0).save(tmp_path / "0.png")

    def write_rows(name, numbers, image="0.png"):
        rows = [
            {
                "id": f"{name}-{number}",
                "image": image,
                "conversations": [
                    {"from": "human", "value": f"<image>\nHow many {name}?"},
                    {"from": "gpt", "value": f"{number}"},
                ],
            }
            for number in numbers
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        return rows

    return write_rows


def open_run(tmp_path, sources, **changes):
    values = {
        "output_dir": str(tmp_path / "run"),
        "encoder": "unused",
        "decoder": "unused",
        "data": {"conversations": sources, "held_out": 2, **changes},
        "train": {"max_steps": 1, "use_cpu": True},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    config = load_run_config(InstructConfig, tmp_path / "config.yaml")
    return config, RunFolder.open(config, config.output_dir)


def prepare(tmp_path, processor, sources, **changes):
    config, run = open_run(tmp_path, sources, **changes)
    return prepare_data(config, run, processor, arguments_of(config, run)), run


def ids(dataset):
    return [conversation.id for conversation in dataset.conversations]


def pretend_checkpoint(run):
    (run.checkpoints / "checkpoint-1").mkdir()
    (run.checkpoints / "checkpoint-1" / "trainer_state.json").write_text('{"global_step": 1}')


def test_sources_are_mixed_by_their_weights(tmp_path, write, processor):
    write("stars", range(20))
    write("moons", range(10))
    (tmp_path / "elsewhere").mkdir()
    make_image(1).save(tmp_path / "elsewhere" / "1.png")
    write("suns", range(10), image="1.png")
    sources = [
        str(tmp_path / "stars.json"),
        {"conversations": str(tmp_path / "moons.json"), "weight": 2, "licence": "CC BY 4.0"},
        {"conversations": str(tmp_path / "suns.json"), "weight": 0.5, "image_root": str(tmp_path / "elsewhere")},
    ]
    (training, held_out, counts), run = prepare(tmp_path, processor, sources)
    assert not set(ids(training)) & set(ids(held_out)) and len(held_out) == 2
    expected = 0
    for name, size, weight in (("stars", 20, 1), ("moons", 10, 2), ("suns", 10, 0.5)):
        seen = [row for row in ids(training) if row.startswith(name)]
        left = size - sum(row.startswith(name) for row in ids(held_out))
        expected += int(weight * left + 0.5)
        assert len(seen) == int(weight * left + 0.5)
        assert max(map(seen.count, seen)) == max(weight, 1)
    assert len(training) == expected
    record = run.record["data"]
    assert [entry["licence"] for entry in record["sources"]] == ["not stated", "CC BY 4.0", "not stated"]
    assert [entry["rows"] for entry in record["sources"]] == [20, 10, 10]
    assert sum(entry["rows_an_epoch"] for entry in record["sources"]) == record["rows_an_epoch"] == expected
    assert counts["rows"] == counts["images"] == 40 and record["dropped"] == {}
    assert not (run.path / "dropped.jsonl").exists()


def test_lengths_are_those_of_the_rows(tmp_path, write, processor):
    rows = write("stars", [7, *range(10**30, 10**30 + 9)])
    rows[3]["conversations"][1]["value"] = "3 green " * 9
    (tmp_path / "stars.json").write_text(json.dumps(rows))
    (training, held_out, _), _ = prepare(tmp_path, processor, str(tmp_path / "stars.json"), max_length=100)
    for dataset in (training, held_out):
        assert dataset.lengths.tolist() == [len(row["input_ids"]) for row in dataset]
    assert len({*training.lengths, *held_out.lengths}) == 2
    assert max([*training.lengths, *held_out.lengths]) == 100


def test_unusable_rows_are_refused_or_dropped_and_listed(tmp_path, write, processor, caplog):
    rows = write("stars", range(10))
    rows[1]["image"] = "gone.png"
    rows[2]["conversations"].pop()
    rows[4]["image"] = "broken.png"
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:100])
    (tmp_path / "stars.json").write_text(json.dumps(rows))
    path = str(tmp_path / "stars.json")
    with pytest.raises(InputError) as caught:
        prepare(tmp_path, processor, path)
    assert str(caught.value) == (
        "2 of 10 conversations cannot be trained on (1 malformed, 1 missing image); mend or remove them, check "
        f"data.image_root, or leave them out with data.drop_unusable=true: row 1 of '{path}': its image "
        f"'{tmp_path}/gone.png' does not exist; "
        f"row 2 of '{path}': turns must alternate human, gpt and end with gpt, but they are human."
    )

    (training, held_out, counts), run = prepare(tmp_path, processor, path, drop_unusable=True)
    assert sorted(ids(training) + ids(held_out)) == [f"stars-{n}" for n in (0, 3, 5, 6, 7, 8, 9)]
    dropped = [json.loads(line) for line in (run.path / "dropped.jsonl").read_text().splitlines()]
    assert [(row["place"], row["problem"]) for row in dropped] == [
        (f"row 1 of '{path}'", "missing image"),
        (f"row 2 of '{path}'", "malformed"),
        (f"row 4 of '{path}'", "damaged image"),
    ]
    assert all(row["source"] == path for row in dropped) and "broken.png' is damaged" in dropped[2]["reason"]
    assert run.record["data"]["dropped"] == {"malformed": 1, "missing image": 1, "damaged image": 1}
    assert counts["rows"] == 7
    assert "3 of 10 conversations cannot be used and are left out" in caplog.text


def test_a_resumed_run_uses_what_the_first_start_found(tmp_path, write, processor, monkeypatch):
    rows = write("stars", range(10))
    rows[1]["image"] = "late.png"
    (tmp_path / "stars.json").write_text(json.dumps(rows))
    path = str(tmp_path / "stars.json")
    (training, held_out, counts), run = prepare(tmp_path, processor, path, drop_unusable=True)
    pretend_checkpoint(run)
    make_image(1).save(tmp_path / "late.png")  # it would change the order of the rest of the run
    monkeypatch.setattr(instruct_data, "check_conversations", lambda *_, **__: pytest.fail("checked again"))
    (again, held_out_again, counts_again), _ = prepare(tmp_path, processor, path, drop_unusable=True)
    assert (ids(again), ids(held_out_again), counts_again) == (ids(training), ids(held_out), counts)
    assert np.array_equal(again.lengths, training.lengths)


def test_a_first_start_looks_at_images_again(tmp_path, write, processor):
    write("stars", range(10), image="late.png")
    path = str(tmp_path / "stars.json")
    with pytest.raises(InputError, match=r"late.png' does not exist"):
        prepare(tmp_path, processor, path)
    make_image(1).save(tmp_path / "late.png")
    assert len(prepare(tmp_path, processor, path)[0][0]) == 8


def test_a_resumed_run_refuses_data_that_changed(tmp_path, write, processor):
    write("stars", range(10))
    write("moons", range(10))
    sources = [str(tmp_path / "stars.json"), str(tmp_path / "moons.json")]
    _, run = prepare(tmp_path, processor, sources)
    pretend_checkpoint(run)
    write("moons", range(1, 11))
    with pytest.raises(InputError, match=r"^'.*moons.json' changed since this run began; restore it"):
        prepare(tmp_path, processor, sources)
    write("moons", range(10))
    prepare(tmp_path, processor, sources)


def test_copies_of_a_held_out_row_are_not_trained_on(tmp_path, write, processor):
    write("stars", range(10))
    (tmp_path / "copy.json").write_text((tmp_path / "stars.json").read_text())
    sources = [str(tmp_path / "stars.json"), {"conversations": str(tmp_path / "copy.json"), "weight": 3}]
    (training, held_out, _), _ = prepare(tmp_path, processor, sources)
    assert not set(ids(held_out)) & set(ids(training))
    assert len(set(ids(training))) == 10 - len(set(ids(held_out)))


@pytest.mark.parametrize(("num_rows", "expected"), [(3, 1), (20, 2), (400, 16)])
def test_by_default_few_rows_give_few_held_out_ones(tmp_path, write, processor, num_rows, expected):
    write("stars", range(num_rows))
    (training, held_out, _), _ = prepare(tmp_path, processor, str(tmp_path / "stars.json"), held_out=None)
    assert (len(training), len(held_out)) == (num_rows - expected, expected)


@pytest.mark.parametrize(
    ("sources", "changes", "reason"),
    [
        ("{tmp}/stars.json", {"held_out": 10}, "holds 10 conversations and data.held_out=10 of them are kept out"),
        (["{tmp}/stars.json", "{tmp}/bad.json"], {"drop_unusable": True}, "No row of '.*bad.json' can be used"),
        (
            ["{tmp}/stars.json", {"conversations": "{tmp}/one.json", "weight": 0.01}],
            {},
            "Of '.*one.json' no row is left to train on, with weight 0.01 and data.held_out=2; raise the weight",
        ),
        (["{tmp}/stars.json", "{tmp}/gone.json"], {}, "Instruction file '.*gone.json' does not exist"),
    ],
)
def test_data_that_cannot_be_used_is_refused(tmp_path, write, processor, sources, changes, reason):
    write("stars", range(10))
    write("one", range(3))
    (tmp_path / "bad.json").write_text("[1, 2]")
    text = json.dumps(sources).replace("{tmp}", str(tmp_path))
    with pytest.raises(InputError, match=reason):
        prepare(tmp_path, processor, json.loads(text), **changes)


def test_what_sources_may_look_like():
    assert parse_sources("a.json", "images") == [SourceSettings("a.json", "images")]
    entries = [{"conversations": "a.json", "image_root": None}, {"conversations": "scenes", "weight": 2}]
    assert parse_sources(entries, "images") == [
        SourceSettings("a.json", "images"),
        SourceSettings("scenes", "images", 2.0),
    ]
    assert parse_sources({"conversations": "b", "image_root": "other", "licence": "CC0"}, "images") == [
        SourceSettings("b", "other", 1.0, "CC0")
    ]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "is an empty list"),
        (3, r"data.conversations\[0\] is 3; give a path"),
        (["a", None], r"data.conversations\[1\] is None"),
        ([{"conversation": "a"}], r"\[0\]: unknown key 'conversation'. Did you mean 'conversations'\?"),
        ([{"conversations": "a", "license": "x"}], r"Did you mean 'licence'\?"),
        ([{"weight": 2}], "names no data"),
        ([{"conversations": ""}], "names no data"),
        ([{"conversations": "a", "weight": 0}], "weight must be a number above 0, got 0"),
        ([{"conversations": "a", "weight": "2"}], "weight must be a number above 0, got '2'"),
        ([{"conversations": "a", "weight": True}], "weight must be a number above 0, got True"),
        ([{"conversations": "a", "weight": float("nan")}], "weight must be a number"),
        ([{"conversations": "a", "weight": float("inf")}], "weight must be a number"),
        ([{"conversations": "a", "image_root": 3}], "image_root must be a text, got 3"),
        (["scenes", "scenes"], "names 'scenes' several times"),
    ],
)
def test_sources_that_mean_nothing_are_refused(value, reason):
    with pytest.raises(InputError, match=reason):
        parse_sources(value)


def test_the_configuration_refuses_them_at_once(tmp_path):
    with pytest.raises(InputError, match=r"weight must be a number above 0, got -1"):
        open_run(tmp_path, [{"conversations": "a.json", "weight": -1}])
    with pytest.raises(InputError, match=r"data\.held_out must be at least 1, got 0"):
        open_run(tmp_path, "a.json", held_out=0)
    with pytest.raises(
        InputError,
        match=r"leaves required keys without a value: data\.conversations; give them as data\.conversations=VALUE",
    ):
        open_run(tmp_path, "???")
