import io

import pytest

from sf_mllm.cli.terminal import completions, parse_path, read_lines
from sf_mllm.errors import InputError

COMMANDS = ("/image", "/regions", "/clear")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("my photo.jpg", "it's.png", "plain.png", "odd[1].png"):
        (tmp_path / name).touch()
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("plain.png", "plain.png"),
        ("my photo.jpg", "my photo.jpg"),
        ("my\\ photo.jpg", "my photo.jpg"),
        ("'my photo.jpg'", "my photo.jpg"),
        ('"my photo.jpg" ', "my photo.jpg"),
        ("it's.png", "it's.png"),
        ("it's missing.png", "it's missing.png"),
        ("not there.png", "not there.png"),
    ],
)
def test_paths_as_people_type_or_drop_them(folder, typed, expected):
    assert parse_path(typed) == expected


def test_tilde(folder):
    assert parse_path("~/plain.png") == str(folder / "plain.png")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/", ["/image ", "/regions ", "/clear "]),
        ("/im", ["/image "]),
        ("/image p", ["/image pictures/", "/image plain.png"]),
        ("/image my ", ["/image my photo.jpg"]),
        ("/image odd[", ["/image odd[1].png"]),
        ("/regions pl", ["/regions plain.png"]),
        ("/clear p", []),
        ("what is p", []),
        ("wh", []),
    ],
)
def test_completion(folder, line, expected):
    assert completions(line, COMMANDS) == expected


def test_completion_in_the_home_directory(folder):
    assert completions("/image ~/plai", COMMANDS) == [f"/image {folder / 'plain.png'}"]


def test_pipe(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(" one \n\n\ntwo"))
    assert list(read_lines(False, COMMANDS)) == ["one", "two"]


def test_pipe_that_is_not_text(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xd8\xff\xe0"), encoding="utf-8"))
    with pytest.raises(InputError, match="not utf-8 text"):
        list(read_lines(False, COMMANDS))


def test_keyboard(monkeypatch, capsys):
    typed = iter([" one ", KeyboardInterrupt(), "", "two", EOFError()])

    def read(prompt):
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sf_mllm.cli.terminal._enable_completion", lambda commands: None)
    assert list(read_lines(True, COMMANDS)) == ["one", "two"]
    assert "Ctrl-D" in capsys.readouterr().err
