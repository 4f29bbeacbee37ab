"""The same rows in every form that a configuration can name."""

import json
import pickle
from dataclasses import replace

import datasets
import pytest
import torch

from sf_mllm.data.conversation_files import FileConversations
from sf_mllm.data.conversation_sources import ChosenConversations, JoinedConversations
from sf_mllm.data.conversation_specs import open_conversations
from sf_mllm.data.conversations import ConversationDataset
from sf_mllm.errors import InputError
from tests.tiny_text import make_tokenizer
from tests.tiny_vlm import NUM_TOKENS, make_image, make_image_processor

EMBEDDED = datasets.Features(
    {
        "id": datasets.Value("string"),
        "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        "images": [datasets.Image()],
    }
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows with one image, two images in two turns, and none, in a dozen forms beside their images."""
    folder = tmp_path_factory.mktemp("forms")
    for index in range(3):
        make_image(index).save(folder / f"{index}.png")
    asked = [
        (["<image>\nWhat colour is the squäre?", "green 日本"], ["0.png"]),
        (["How many <image>?", "3", "and <image> too?", "yes"], ["1.png", "2.png"]),
        (["Is it a circle?", "no, \U0001f600 a\nstar"], []),
    ]
    llava, chat = [], []
    for index, (texts, images) in enumerate(asked):
        speakers = [("human", "user"), ("gpt", "assistant")] * (len(texts) // 2)
        turns = [{"from": old, "value": text} for (old, _), text in zip(speakers, texts, strict=True)]
        messages = [{"role": new, "content": text} for (_, new), text in zip(speakers, texts, strict=True)]
        llava.append({"id": f"n{index}", "conversations": turns, "image": images})
        chat.append({"id": f"n{index}", "messages": messages, "images": images})
    (folder / "list.json").write_text(json.dumps(llava))
    (folder / "pretty.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(llava, indent=1, ensure_ascii=False).encode())
    lines = [json.dumps(row, ensure_ascii=False) for row in chat]
    (folder / "lines.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]), encoding="utf-8")
    (folder / "shard_0.ndjson").write_text(lines[0] + "\n", encoding="utf-8")
    (folder / "shard_1.ndjson").write_text("\r\n".join(lines[1:]), encoding="utf-8")

    paths = datasets.Dataset.from_list(llava)
    paths.to_parquet(folder / "paths.parquet")
    paths.save_to_disk(folder / "saved_paths")
    read = [row | {"images": [{"bytes": (folder / name).read_bytes()} for name in row["images"]]} for row in chat]
    embedded = datasets.Dataset.from_list(read, features=EMBEDDED)
    embedded.info.license = "CC0"
    embedded.to_parquet(folder / "embedded.parquet")
    embedded.save_to_disk(folder / "saved")
    (folder / "many").mkdir()
    embedded.select([0]).to_parquet(folder / "many" / "a.parquet")
    embedded.select([1, 2]).to_parquet(folder / "many" / "b.parquet")
    return folder


def read(source):
    return [source.read(index) for index in range(len(source))]


@pytest.fixture(scope="module")
def expected(folder):
    return read(open_conversations(str(folder / "list.json")))


@pytest.mark.parametrize("form", ["pretty.json", "lines.jsonl", "shard_*.ndjson", "shard_{0..1}.ndjson"])
def test_files_give_the_same_conversations(folder, expected, form):
    assert read(open_conversations(str(folder / form))) == expected


@pytest.mark.parametrize("form", ["paths.parquet", "saved_paths"])
def test_tables_of_names_give_the_same_conversations(folder, expected, form):
    assert read(open_conversations(str(folder / form), str(folder))) == expected


TABLES = ["embedded.parquet", "saved", "many", "many/*.parquet", "saved/data-00000-of-00001.arrow"]


@pytest.mark.parametrize("form", TABLES)
def test_tables_with_images_give_the_same_ids_and_pixels(folder, expected, form):
    tables = read(open_conversations(str(folder / form)))
    assert [replace(c, images=()) for c in tables] == [replace(c, images=()) for c in expected]

    def dataset(conversations):
        return ConversationDataset(
            conversations, make_tokenizer(), make_image_processor(), image_seq_length=NUM_TOKENS, max_length=200
        )

    for row, reference in zip(dataset(tables), dataset(expected), strict=True):
        assert (row["input_ids"], row["labels"]) == (reference["input_ids"], reference["labels"])
        torch.testing.assert_close(row["pixel_values"], reference["pixel_values"], rtol=0, atol=0)


def test_content_in_parts_is_the_same_in_lines_and_tables(folder, tmp_path):
    part = {"index": None, "text": None}
    asked = [part | {"type": "text", "text": "And this? "}, {"index": 0, "text": None, "type": "image"}]
    answered = [part | {"type": "text", "text": "green"}]
    row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}
    row["images"] = [str(folder / "1.png")]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    (lines,) = read(open_conversations(str(tmp_path / "rows.jsonl")))
    assert read(open_conversations(str(tmp_path / "rows.parquet"))) == [lines]
    assert [message.text for message in lines.messages] == ["And this? <image>\n", "green"]


def test_a_hub_name_is_loaded_by_datasets(folder, expected, monkeypatch):
    table = datasets.load_dataset("parquet", data_files=str(folder / "paths.parquet"), split="train").select([2, 0, 1])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or table)
    source = open_conversations("hf:someone/talks:validation", str(folder))
    assert asked == [(("someone/talks",), {"split": "validation"})]
    assert read(source) == [expected[2], expected[0], expected[1]]
    assert source.place(1) == "row 1 of 'hf:someone/talks:validation'"


def test_places_fingerprints_and_licences(folder):
    lines = open_conversations(str(folder / "lines.jsonl"))
    assert [lines.place(index) for index in range(3)] == [
        f"line {n} of '{folder}/lines.jsonl'"
        for n in (1, 3, 4)  # as editors count, empty lines included
    ]
    pretty = open_conversations(str(folder / "pretty.json"))
    assert pretty.place(2) == f"row 2 of '{folder}/pretty.json'"
    joined = JoinedConversations([lines, pretty], "both")
    assert (len(joined), joined.place(4), joined.locate(4)) == (6, pretty.place(1), (1, 1))
    assert joined.read(4) == joined.read(1)
    chosen = ChosenConversations(joined, torch.tensor([5, 0, 0]).numpy())
    assert [c.id for c in chosen] == ["n2", "n0", "n0"] and [c.id for c in chosen[:2]] == ["n2", "n0"]
    assert open_conversations(str(folder / "saved")).licence == "CC0"
    forms = ["list.json", "embedded.parquet", "saved", "many"]
    assert len({open_conversations(str(folder / form)).fingerprint for form in forms}) == len(forms)


def test_the_fingerprint_is_of_content_and_not_of_place(folder, tmp_path):
    (tmp_path / "other.json").write_bytes((folder / "list.json").read_bytes())
    same = open_conversations(str(tmp_path / "other.json"))
    assert same.fingerprint == open_conversations(str(folder / "list.json")).fingerprint
    (tmp_path / "other.json").write_bytes((folder / "list.json").read_bytes().replace(b"green", b"groan"))
    assert open_conversations(str(tmp_path / "other.json")).fingerprint != same.fingerprint
    table = datasets.load_from_disk(str(folder / "saved"))
    table.save_to_disk(tmp_path / "same")
    before = open_conversations(str(tmp_path / "same")).fingerprint
    changed = [row["messages"] for row in table]
    changed[2][1]["content"] = changed[2][1]["content"].replace("star", "scar")
    table.remove_columns("messages").add_column("messages", changed).save_to_disk(tmp_path / "changed")
    assert open_conversations(str(tmp_path / "changed")).fingerprint != before


def test_sources_can_be_sent_to_processes_that_share_nothing(folder, expected):
    for form in ("list.json", "saved_paths"):
        source = open_conversations(str(folder / form), str(folder))
        assert read(pickle.loads(pickle.dumps(source))) == expected


def test_a_row_longer_than_a_block_and_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("sf_mllm.data.conversation_files._BLOCK", 7)
    texts = ["é" * n + '\\" ], [ {' for n in range(1, 40)]
    rows = [{"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "1"}]} for t in texts]
    for ensure_ascii in (True, False):
        content = json.dumps(rows, ensure_ascii=ensure_ascii, indent=1)
        (tmp_path / "rows.json").write_text(f" \n{content}\n ", encoding="utf-8")
        assert [c.messages[0].text for c in read(FileConversations(tmp_path / "rows.json"))] == texts
    (tmp_path / "rows.json").write_text("[12345678901, 23456789012]")  # a number ends where another character follows
    numbers = FileConversations(tmp_path / "rows.json")
    assert len(numbers) == 2
    with pytest.raises(InputError, match="is a JSON int, not an object"):
        numbers.read(1)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "rows.json",
            "[{",
            r"not valid JSON \(Expecting property name.* in row 0, line 1\); repair it; name it .jsonl",
        ),
        ("rows.json", '[{},\n{"a": 1,\n "b": tru}]', r"Expecting value in row 1, line 3"),
        ("rows.json", "[{} {}]", "a comma is missing after row 0, line 1"),
        ("rows.json", "[{},]", "Expecting value in row 1"),
        ("rows.json", "[{}] x", "something follows the end of the list, line 1"),
        ("rows.json", "[{}", "a comma is missing after row 0"),
        ("rows.json", "{}", "does not start with a list of rows.*; name it .jsonl if it has one row a line"),
        ("rows.json", "", "does not start with a list"),
        ("rows.json", "[]", "holds no rows"),
        ("rows.json", "\xff", "can't decode byte"),
        ("rows.json", "[" * 100_000, "it is nested too deeply"),
        ("rows.jsonl", "[\n{}]", "a .jsonl file has one row a line; name it .json"),
        ("rows.jsonl", "\n \n", "holds no rows"),
    ],
)
def test_files_that_are_no_lists_of_rows_are_refused(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=reason) as caught:
        open_conversations(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("{tmp}/gone.json", "Instruction file '.*gone.json' does not exist; data.conversations takes a JSON list"),
        ("{tmp}/none_*.json", "means no file"),
        ("{tmp}/notes.txt", "not all of one known kind"),
        ("{tmp}", "means files that are not all of one known kind"),
        ("{tmp}/empty", "Folder '.*empty' holds no conversations"),
        ("{tmp}/broken.parquet", "cannot be read as parquet"),
        ("{tmp}/splits", "holds several splits; give one of them, for example .*splits/train"),
        ("{tmp}/columns", r"has no column 'conversations' or 'messages' \(columns: text\)"),
        ("{tmp}/both", "has both a column 'conversations' and 'messages'"),
        ("hf:nobody", "is not of the form hf:OWNER/NAME"),
    ],
)
def test_descriptions_that_mean_nothing_are_refused(tmp_path, spec, reason):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "a.json").write_text("[{}]")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    plain = datasets.Dataset.from_dict({"text": ["a"]})
    plain.save_to_disk(tmp_path / "columns")
    datasets.DatasetDict({"train": plain}).save_to_disk(tmp_path / "splits")
    datasets.Dataset.from_dict({"messages": ["a"], "conversations": ["b"]}).save_to_disk(tmp_path / "both")
    with pytest.raises(InputError, match=reason):
        open_conversations(spec.format(tmp=tmp_path))


def test_hostile_rows_of_lines_and_tables_fail_one_by_one(tmp_path):
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    lines = [good, '{"messages": [', "\x00", "null", '"text"', "[" * 100_000, good]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    source = open_conversations(str(tmp_path / "rows.jsonl"))
    reasons = []
    for index in range(len(source)):
        try:
            source.read(index)
            reasons.append("")
        except InputError as error:
            reasons.append(str(error))
    assert reasons[0] == reasons[-1] == ""
    assert reasons[1].startswith("is not valid JSON") and "is not valid JSON" in reasons[2]
    assert reasons[3:5] == ["is a JSON NoneType, not an object", "is a JSON str, not an object"]
    assert reasons[5] == "is not valid JSON (it is nested too deeply)"

    messages = json.loads(good)["messages"]
    asking = [{"role": "user", "content": "<image>"}, messages[1]]
    rows = [{"messages": None, "images": None}, {"messages": messages, "images": None}]
    rows += [{"messages": asking, "images": [None]}, {"messages": asking, "images": [{"bytes": None, "path": None}]}]
    rows += [{"messages": asking, "images": [{"bytes": b"no image", "path": None}]}]
    plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"messages": EMBEDDED["messages"], "images": [plain]})
    table = datasets.Dataset.from_list(rows, features=features)
    table.save_to_disk(tmp_path / "table")
    source = open_conversations(str(tmp_path / "table"))
    with pytest.raises(InputError, match="non-empty list of turns"):
        source.read(0)
    assert source.read(1).images == ()
    for index in (2, 3):
        with pytest.raises(InputError, match="'image' must be a file name"):
            source.read(index)
    (image,) = source.read(4).images
    assert image.exists()
    with pytest.raises(InputError, match=r"Image 0 in row 4 of '.*table' is not an image in a known format"):
        image.open()
