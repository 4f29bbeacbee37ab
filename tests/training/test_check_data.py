import json
import re
import subprocess
import sys

import pytest

from sf_mllm.training.check_data import __main__ as check_data
from tests.tiny_text import make_tokenizer
from tests.tiny_vlm import NUM_TOKENS, make_encoder, make_image

LONG = "What colour is the square? " * 30


def talk(*texts, **others):
    speakers = ("human", "gpt")
    return {"conversations": [{"from": speakers[i % 2], "value": text} for i, text in enumerate(texts)]} | others


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """An encoder and a decoder of which only the configuration and the tokenizer are there."""
    folder = tmp_path_factory.mktemp("parts")
    make_encoder().config.save_pretrained(folder / "encoder")
    make_tokenizer().save_pretrained(folder / "decoder")
    return folder


@pytest.fixture
def write(parts, tmp_path):
    make_image(0).save(tmp_path / "0.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])

    def write_config(*sources, **changes):
        entries = []
        for number, rows in enumerate(sources):
            (tmp_path / f"{number}.json").write_text(json.dumps(rows))
            entries.append(str(tmp_path / f"{number}.json"))
        values = {
            "output_dir": str(tmp_path / "run"),
            "encoder": str(parts / "encoder"),
            "decoder": str(parts / "decoder"),
            "data": {"conversations": entries, "held_out": 1, "max_length": 120, **changes},
        }
        (tmp_path / "config.yaml").write_text(json.dumps(values))
        return str(tmp_path / "config.yaml")

    return write_config


GOOD = [talk("<image>\nWhat?", f"{n}", image="0.png") for n in range(5)]
BAD = [
    talk("Hello", "Hi"),
    talk("<image>", "x", image="gone.png"),
    talk("<image>", "x", image="cut.png"),
    talk("Hello"),
    talk("How many?", "green " * 100),
    talk(LONG, "green"),
]


def test_good_data_is_accepted(write, capsys, tmp_path):
    assert check_data.main([write(GOOD), "--json", str(tmp_path / "report.json"), "data.held_out=2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        f"An image is {NUM_TOKENS} tokens; max_length is 120.\nsource 1: {tmp_path}/0.json  (licence: "
    )
    assert out.endswith("\nTraining would accept this data: 3 rows an epoch, 2 held out.\n")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["accepted"] and report["unusable"] == []
    assert report["sources"][0]["licence"] == "not stated"
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_is_counted_for_each_source(write, capsys, tmp_path):
    file = tmp_path / "report.json"
    assert check_data.main(["--json", str(file), write(GOOD, BAD)]) == 1
    report = json.loads(file.read_text())
    assert not report["accepted"]
    expected = {
        "rows": 6,
        "turns": 10,
        "images": 2,
        "missing_images": 1,
        "damaged_images": 1,
        "malformed_rows": 1,
        "refused_rows": 0,
        "truncated_rows": 2,
        "unsupervised_rows": 1,
        "unusable_rows": 4,
        "weight": 1.0,
    }
    bad = report["sources"][1]
    assert {key: bad[key] for key in expected} == expected
    assert bad["lost_answer_tokens"] > 0 and "rows_an_epoch" not in bad
    assert bad["tokens_min"] <= bad["tokens_median"] <= bad["tokens_95_percent"] <= bad["tokens_max"]
    assert report["total"]["rows"] == 11 and report["total"]["tokens"] == bad["tokens"] + report["sources"][0]["tokens"]
    assert [row["place"][:5] for row in report["unusable"]] == ["row 1", "row 2", "row 3", "row 5"]
    out = capsys.readouterr().out
    table = {
        line[:34].strip(): line.split()[-3:] for line in out.splitlines() if line.startswith(("  ", "rows", "mal"))
    }
    assert table["missing"] == ["0", "1", "1"] and table["damaged"] == ["0", "1", "1"]
    assert table["malformed rows"] == ["0", "1", "1"] and table["rows an epoch"] == ["-", "-", "-"]
    assert "Rows that cannot be used:\n  row 1 of '" in out
    verdict = out.splitlines()[-1]
    assert verdict.startswith("Training would refuse this data: 4 of 11 conversations cannot be trained on (")
    advice = "mend or remove them, check data.image_root, raise data.max_length, or leave them out with "
    assert f"; {advice}data.drop_unusable=true: " in verdict


def test_rows_that_are_to_be_dropped_are_no_reason_to_refuse(write, capsys):
    assert check_data.main([write(GOOD, BAD), "data.drop_unusable=true"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("Training would accept this data: 6 rows an epoch, 1 held out. 4 rows are left out.\n")


def test_weights_and_licences_are_reported(write, capsys, tmp_path):
    config = write(GOOD)
    entry = f"[{{conversations: {tmp_path}/0.json, weight: 1.5, licence: CC BY 4.0}}]"
    assert check_data.main([config, f"data.conversations={entry}"]) == 0
    out = capsys.readouterr().out
    assert "(licence: CC BY 4.0)" in out
    assert "6 rows an epoch, 1 held out" in out  # of the four that are left, half come twice


def test_too_few_rows_are_refused(write, capsys):
    assert check_data.main([write(GOOD), "data.held_out=5"]) == 1
    assert "lower data.held_out or add rows." in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["data.conversations=gone.json"], 1, "Instruction file 'gone.json' does not exist"),
        (["encoder=nowhere"], 2, "Encoder directory 'nowhere' does not exist"),
        (["encoder={parts}/decoder"], 2, "Encoder directory '.*decoder' has no config.json"),
        (["decoder=./nowhere"], 2, "Decoder directory './nowhere' does not exist"),
        (["decoder={parts}/encoder"], 2, "Decoder '.*' cannot be loaded"),
        (["chat_template=vicunna"], 2, "Did you mean 'vicuna'"),
        (["data.convrsations=a"], 2, "Did you mean 'conversations'"),
        (["data.conversations=[]"], 2, "is an empty list"),
        (["data.drop_unusable=maybe"], 2, "bad value for key 'data.drop_unusable'"),
        (["--fast"], 2, "--help lists the options"),
        (["--json", "{parts}/encoder/config.json/report.json"], 2, "The report cannot be written to"),
    ],
)
def test_what_is_typed_wrong_is_reported_in_one_line(write, parts, capsys, arguments, status, reason):
    arguments = [argument.replace("{parts}", str(parts)) for argument in arguments]
    assert check_data.main([write(GOOD), *arguments]) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(reason, error), error


def test_the_demo_is_checked_by_name(tmp_path):
    command = [sys.executable, "-m", "sf_mllm.training.check_data", "configs/finetune/demo.yaml"]
    overrides = [f"output_dir={tmp_path}/run", "data.scenes_count=20"]
    result = subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "An image is 49 tokens; max_length is 320." in result.stdout
    assert "18 rows an epoch, 2 held out." in result.stdout
