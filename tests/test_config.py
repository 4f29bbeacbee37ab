import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest
from omegaconf import MISSING

from sf_mllm.config import dump_run_config, load_run_config, to_plain, write_text_atomically
from sf_mllm.errors import InputError, first_line, nearest, report_input_errors


@dataclass
class Data:
    images: str = "scenes"
    count: int = 10
    scale: float = 1.0
    tag: str | None = None


@dataclass
class Run:
    seed: int = 0
    data: Data = field(default_factory=Data)
    train: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError(f"seed must not be negative, got {self.seed}.")


@dataclass
class Required:
    path: str = MISSING


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def refusal(*arguments) -> str:
    with pytest.raises(InputError) as caught:
        load_run_config(*arguments)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_file_over_default_and_command_line_over_file(write):
    path = write("seed: 3\ndata:\n  count: 20\ntrain:\n  max_steps: 5\n  learning_rate: 1e-3\n")
    config = load_run_config(Run, path, ["data.count=30", "data.tag=x", "train.max_steps=6", "train.new={a: [1, 2]}"])
    assert config == Run(
        seed=3,
        data=Data(images="scenes", count=30, scale=1.0, tag="x"),
        train={"max_steps": 6, "learning_rate": 1e-3, "new": {"a": [1, 2]}},
    )
    assert type(config.data) is Data and type(config.train) is dict


def test_empty_file_gives_the_defaults(write):
    assert load_run_config(Run, write("{}")) == Run()
    assert load_run_config(Run, write("")) == Run()


def test_null_and_later_overrides(write):
    assert load_run_config(Run, write("data: {tag: x}"), ["data.tag=null"]).data.tag is None
    assert load_run_config(Run, write(""), ["seed=1", "seed=2"]).seed == 2


def test_dump_reads_back_the_same(write, tmp_path):
    config = load_run_config(Run, write("data: {scale: 0.1}"), ["train.lr=1e-3"])
    dump_run_config(config, tmp_path / "out" / "config.yaml")
    assert load_run_config(Run, tmp_path / "out" / "config.yaml") == config
    assert to_plain(config) == dataclasses.asdict(config)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sed: 1", "unknown key 'sed'. Did you mean 'seed'? Valid keys: data, seed, train."),
        ("data: {cuont: 1}", "unknown key 'cuont' in section 'data'. Did you mean 'count'?"),
        ("data: {count: many}", "'data.count'"),
        ("data: 5", "data"),
        ("seed: 1.5", "'seed'"),
        ("seed: -1", "seed must not be negative, got -1"),
        ("- 1\n- 2", "must hold a mapping"),
        ("seed: [", "is not valid YAML"),
        ("just text", "unknown key 'just text'"),
    ],
)
def test_bad_file(write, text, expected):
    assert expected in refusal(Run, write(text))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sed=1", "Override 'sed=1': unknown key 'sed'. Did you mean 'seed'?"),
        ("data.cuont=1", "Did you mean 'count'?"),
        ("data.count.more=1", "data.count"),
        ("seed", "not of the form key=value"),
        ("--seed=1", "not of the form key=value"),
        ("=1", "not of the form key=value"),
        ("seed=x", "Override 'seed=x': bad value for key 'seed'"),
        ("seed=-1", "seed must not be negative"),
        ("train=[1", "cannot be read"),
    ],
)
def test_bad_override(write, override, expected):
    assert expected in refusal(Run, write(""), [override])


def test_missing_file_directory_and_value(write, tmp_path):
    assert "does not exist" in refusal(Run, tmp_path / "nothing.yaml")
    assert "does not exist" in refusal(Run, tmp_path)
    assert "without a value: path; give them as path=VALUE" in refusal(Required, write(""))
    assert load_run_config(Required, write(""), ["path=x"]).path == "x"


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.txt"
    write_text_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_nearest_and_first_line():
    assert nearest("cuont", ["count", "seed"]) == " Did you mean 'count'?"
    assert nearest("zzz", ["count", "seed"]) == ""
    assert first_line(ValueError("one.\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"


def test_input_errors_are_reported_as_one_line_and_others_are_not(capsys):
    @report_input_errors
    def command(error: Exception | None) -> int:
        if error is not None:
            raise error
        return 7

    assert command(None) == 7
    assert command(InputError("No such thing.")) == 2
    assert capsys.readouterr().err == "error: No such thing.\n"
    with pytest.raises(KeyError):
        command(KeyError("ours"))
