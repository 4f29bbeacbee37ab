from pathlib import Path

import pytest

from sf_mllm.data.messages import ImageFile, Message, parse_conversation
from sf_mllm.errors import InputError
from tests.tiny_vlm import make_image

ROOT = Path("/pictures")


def row(**changes):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": " A star. "}]
    return {"id": "a7", "image": "star.png", "conversations": turns} | changes


def chat(*contents, roles=("user", "assistant"), **others):
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]} | others


def turns(*values, speakers=("human", "gpt")):
    return [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)]


def parse(row, number=0):
    return parse_conversation(row, number=number, image_root=ROOT)


def test_reads_all_shapes_of_llava_rows():
    single = parse(row())
    assert single.id == "a7"
    assert single.messages == (Message("user", "<image>\nWhat?"), Message("assistant", "A star."))
    assert single.images == (ImageFile(ROOT / "star.png"),)

    several = turns("First <image> then", "ok", "now <image>?", "yes")
    multiple = parse(row(id=8, image=["star.png", "/moon.png"], conversations=several))
    assert (multiple.id, multiple.images) == ("8", (ImageFile(ROOT / "star.png"), ImageFile(Path("/moon.png"))))
    assert [m.text for m in multiple.messages] == ["First <image> then", "ok", "now <image>?", "yes"]

    text_only = parse({"conversations": [{"from": "system", "value": "Be brief."}, *turns("Hello", "Hi")]}, number=2)
    assert (text_only.id, text_only.images) == ("2", ())
    assert [m.role for m in text_only.messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    "same",
    [
        chat("<image>\nWhat?", "A star.", id="a7", images=["star.png"]),
        chat("<image>\nWhat?", " A star.\n", id="a7", image="star.png", images=[]),
        chat([{"type": "image"}, {"type": "text", "text": "What?"}], "A star.", id="a7", images=["star.png"]),
        chat(
            [{"type": "image", "image": "star.png"}, {"type": "text", "text": "What?"}],
            [{"type": "text", "text": "A star."}],
            id="a7",
        ),
        chat([{"type": "image", "path": "star.png"}, {"type": "text", "text": "What?"}], "A star.", id="a7"),
        row(image=None, images=["star.png"]),
    ],
)
def test_the_same_row_in_other_forms(same):
    assert parse(same) == parse(row())


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row(image=3), "'image' must be a file name"),
        (row(image=[None]), "'image' must be a file name"),
        (row(image=["star.png", ""]), "'image' must be a file name"),
        (row(image=make_image(0)), "'image' must be a file name"),
        (row(image=None), r"has 0 image\(s\) but its turns hold 1 <image>"),
        (row(image=["star.png", "moon.png"]), r"has 2 image\(s\) but its turns hold 1"),
        (row(images=["moon.png"]), "names images in several places"),
        (row(conversations=[]), "non-empty list of turns"),
        (row(conversations="hello"), "non-empty list of turns"),
        ({"id": 1}, "non-empty list of turns"),
        (row() | chat("a", "b"), "either 'conversations' or 'messages'"),
        (
            row(conversations=turns("<image>", "a", "b")),
            "must alternate human, gpt and end with gpt, but they are human, gpt, human",
        ),
        (row(conversations=turns("a", "<image>", speakers=("gpt", "human"))), "must alternate"),
        (row(conversations=[{"from": "system", "value": "x"}]), "must alternate"),
        (row(conversations=[{"from": "robot", "value": "x"}]), "turn 0 needs 'from'"),
        (row(conversations=["hello"]), "turn 0 needs 'from'"),
        (row(conversations=[{"from": ["human"], "value": "x"}]), "turn 0 needs 'from'"),
        (row(conversations=turns("<image> \ud800", "a")), r"turn 0 \(human\) holds half a character"),
        (row(conversations=turns("<image>", None)), "turn 1 needs 'from'"),
        (row(conversations=turns("<image>", "  ")), r"turn 1 \(gpt\) is empty"),
        (row(conversations=turns("what", "<image>")), r"turn 1 \(gpt\) holds <image>"),
        ("text", "is a JSON str"),
        (chat("hello"), "must alternate user, assistant and end with assistant, but they are user"),
        (chat("hello", 3), "turn 1 needs 'role' .* and 'content'"),
        (chat("hello", "x", roles=("user", "tool")), "turn 1 needs 'role'"),
        (chat("hello", []), r"turn 1 \(assistant\) is empty"),
        (chat(["hello"], "x"), "turn 0 has a part that is neither"),
        (chat([{"type": "video"}], "x"), "turn 0 has a part that is neither"),
        (chat([{"type": "text", "text": None}], "x"), "turn 0 has a part that is neither"),
        (chat([{"type": "image", "image": {"bytes": b""}}], "x"), "put embedded images under 'images'"),
        (chat([{"type": "image", "image": "a.png"}], "x", images=["a.png"]), "names images in several places"),
        (chat("x", [{"type": "image"}]), r"turn 1 \(assistant\) holds <image>"),
    ],
)
def test_a_malformed_row_is_refused_with_its_reason(bad, reason):
    with pytest.raises(InputError, match=reason):
        parse(bad)


def test_an_image_file_exists_or_not(tmp_path):
    make_image(0).save(tmp_path / "star.png")
    there = ImageFile(tmp_path / "star.png")
    assert there.exists() and there.open().tobytes() == make_image(0).tobytes()
    assert not ImageFile(tmp_path / ("x" * 5000)).exists()
    assert not ImageFile(tmp_path / "a\0b").exists()
