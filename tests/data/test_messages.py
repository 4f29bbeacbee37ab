import json

import pytest

from sf_mllm.data.messages import Message, read_llava_json
from sf_mllm.errors import InputError


def row(**changes):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": " A star. "}]
    return {"id": "a7", "image": "star.png", "conversations": turns} | changes


def turns(*values, speakers=("human", "gpt")):
    return [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.fixture
def write(tmp_path):
    (tmp_path / "star.png").write_bytes(b"x")
    (tmp_path / "moon.png").write_bytes(b"x")

    def write_rows(*rows):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(list(rows)), encoding="utf-8")
        return path

    return write_rows


def test_reads_all_shapes_of_rows(write, tmp_path):
    several = turns("First <image> then", "ok", "now <image>?", "yes")
    path = write(
        row(),
        row(id=8, image=["star.png", "moon.png"], conversations=several),
        {"conversations": [{"from": "system", "value": "Be brief."}, *turns("Hello", "Hi")]},
    )
    single, multiple, text_only = read_llava_json(path)
    assert single.id == "a7"
    assert single.messages == (Message("user", "<image>\nWhat?"), Message("assistant", "A star."))
    assert single.image_paths == (tmp_path / "star.png",)
    assert (multiple.id, [path.name for path in multiple.image_paths]) == ("8", ["star.png", "moon.png"])
    assert [m.text for m in multiple.messages] == ["First <image> then", "ok", "now <image>?", "yes"]
    assert (text_only.id, text_only.image_paths) == ("2", ())
    assert [m.role for m in text_only.messages] == ["system", "user", "assistant"]


def test_images_are_looked_up_under_the_given_root(write, tmp_path):
    path = write(row())
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"images/star\.png' does not exist"):
        read_llava_json(path, tmp_path / "images")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row(image="gone.png"), r"row 1 \(id 'a7'\): its image '.*gone.png' does not exist"),
        (row(image=3), "'image' must be a file name"),
        (row(image=None), r"has 0 image\(s\) but its turns hold 1 <image>"),
        (row(image=["star.png", "moon.png"]), r"has 2 image\(s\) but its turns hold 1"),
        (row(conversations=[]), "non-empty list of turns"),
        ({"id": 1}, "non-empty list of turns"),
        (row(conversations=turns("<image>", "a", "b")), "must alternate human, gpt and end with gpt"),
        (row(conversations=turns("a", "<image>", speakers=("gpt", "human"))), "must alternate"),
        (row(conversations=[{"from": "system", "value": "x"}]), "must alternate"),
        (row(conversations=[{"from": "robot", "value": "x"}]), "turn 0 needs 'from'"),
        (row(conversations=["hello"]), "turn 0 needs 'from'"),
        (row(conversations=[{"from": ["human"], "value": "x"}]), "turn 0 needs 'from'"),
        (row(conversations=turns("<image> \ud800", "a")), r"turn 0 \(human\) holds half a character"),
        (row(image="x" * 5000), "does not exist"),
        (row(conversations=turns("<image>", None)), "turn 1 needs 'from'"),
        (row(conversations=turns("<image>", "  ")), r"turn 1 \(gpt\) is empty"),
        (row(conversations=turns("what", "<image>")), r"turn 1 \(gpt\) holds <image>"),
        ("text", "row 1: is a JSON str"),
    ],
)
def test_a_malformed_row_is_named_with_its_reason(write, bad, reason):
    with pytest.raises(InputError, match=reason) as caught:
        read_llava_json(write(row(), bad))
    assert str(caught.value).startswith("1 of 2 rows of ")


def test_many_malformed_rows_are_counted(write):
    with pytest.raises(InputError, match=r"^5 of 6 rows of .*row 0.*row 1.*row 2.*; and 2 more\.$"):
        read_llava_json(write(*[row(image="gone.png")] * 5, row()))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[{", "not valid JSON"),
        ("{}", "non-empty JSON list"),
        ("[]", "non-empty JSON list"),
        ("\xff", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, content, reason):
    (tmp_path / "rows.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=reason):
        read_llava_json(tmp_path / "rows.json")
    with pytest.raises(InputError, match="does not exist"):
        read_llava_json(tmp_path / "other.json")
