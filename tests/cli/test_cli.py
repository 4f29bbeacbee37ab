"""The command as a user meets it: exit status, stdout and stderr."""

import io

import pytest
from PIL import Image

from sf_mllm.cli import chat
from sf_mllm.cli.__main__ import main
from sf_mllm.data.image_io import open_image
from sf_mllm.inference.loading import load_model
from sf_mllm.inference.session import ChatSession
from tests.tiny_vlm import make_image


@pytest.fixture
def image_path(tmp_path):
    path = tmp_path / "picture of mine.png"
    make_image(0).save(path)
    return path


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def run(saved_model, monkeypatch, capfd):
    """Run the command on the tiny model; `lines` come through a pipe. Returns (status, stdout, stderr)."""

    def run(*arguments: str, lines: str = "", stdin: io.StringIO | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", stdin or io.StringIO(lines))
        status = main(["--model", str(saved_model), "--device", "cpu", "--max-new-tokens", "6", *arguments])
        output, errors = capfd.readouterr()
        return status, output, errors

    return run


def answers(saved_model, image_path, *conversation: str) -> list[str]:
    session = ChatSession(*load_model(saved_model, device="cpu"), max_new_tokens=6)
    if image_path is not None:
        session.set_image(open_image(image_path))
    return ["".join(session.ask(question)).lstrip() for question in conversation]


def assert_refused(result: tuple[int, str, str], expected: str) -> None:
    status, output, errors = result
    assert status == 2 and output == ""
    assert errors.startswith("error: ") and errors.count("\n") == 1 and expected in errors


def test_one_answer_and_nothing_else(run, saved_model, image_path):
    status, output, errors = run("--image", str(image_path), "--prompt", "What is this?")
    assert (status, errors) == (0, "")
    assert output == answers(saved_model, image_path, "What is this?")[0] + "\n"


def test_question_without_image(run, saved_model):
    status, output, errors = run("--prompt", "Hello?")
    assert (status, output, errors) == (0, answers(saved_model, None, "Hello?")[0] + "\n", "")


def test_verbose_reports_to_stderr_only(run, image_path):
    plain = run("--image", str(image_path), "--prompt", "What?")
    status, output, errors = run("--image", str(image_path), "--prompt", "What?", "--verbose")
    assert (status, output) == plain[:2]
    assert "float32 on cpu" in errors and "6 written" in errors


def test_piped_questions_are_one_conversation(run, saved_model, image_path):
    status, output, errors = run("--image", str(image_path), lines="What is this?\n\n  And that?  \n")
    assert (status, errors) == (0, "")
    assert output == "".join(f"{text}\n" for text in answers(saved_model, image_path, "What is this?", "And that?"))


def test_commands(run, saved_model, image_path, tmp_path):
    lines = f"/image {image_path}\nWhat?\n/clear\nWhat?\n/regions {tmp_path / 'r.png'}\n/help\n/quit\nnever asked\n"
    status, output, errors = run(lines=lines)
    (expected,) = answers(saved_model, image_path, "What?")
    assert (status, output) == (0, f"{expected}\n{expected}\n")
    assert "(40x32); new conversation" in errors and "forgotten" in errors
    assert all(command in errors for command in chat.COMMANDS)
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.width > 1000


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/imgae x.png", "Did you mean '/image'?"),
        ("/image", "needs the path"),
        ("/image nothing.png", "'nothing.png' does not exist"),
        ("/regions", "no image"),
        ("/clear all", "takes no argument"),
        ("a <image> b", "<image>"),
    ],
)
def test_bad_line_costs_a_sentence_and_the_loop_goes_on(run, saved_model, line, expected):
    status, output, errors = run(lines=f"{line}\nHello?\n")
    assert status == 2
    assert errors.startswith("error: ") and errors.count("\n") == 1 and expected in errors
    assert output == answers(saved_model, None, "Hello?")[0] + "\n"


def test_regions_do_not_replace_a_file_of_the_user(run, image_path):
    before = image_path.read_bytes()
    status, output, errors = run("--image", str(image_path), lines=f"/regions {image_path}\n")
    assert (status, output) == (2, "") and "exists already" in errors and errors.count("\n") == 1
    assert image_path.read_bytes() == before


def test_regions_may_be_drawn_again(run, image_path, tmp_path):
    lines = f"/regions {tmp_path / 'r.png'}\n" * 2
    assert run("--image", str(image_path), lines=lines)[0] == 0


def test_regions_that_cannot_be_saved(run, image_path, tmp_path):
    for target in (tmp_path / "nowhere" / "r.png", tmp_path / "r.unknown"):
        status, output, errors = run("--image", str(image_path), lines=f"/regions {target}\n")
        assert (status, output) == (2, "") and "cannot be saved" in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--image", "nothing.png", "--prompt", "x"], "does not exist"),
        (["--prompt", "  "], "empty"),
        (["--prompt", "x", "--model", "no/such/model"], "does not exist"),
        (["--prompt", "x", "--device", "gpu"], "Device 'gpu' is unknown"),
        (["--prompt", "x", "--cuda-graphs"], "--cuda-graphs needs a CUDA device, got cpu; leave it out."),
        (["--prompt", "x", "--compile"], "--compile needs a CUDA device, got cpu; leave it out."),
        (["--prompt", "x", "--dtype", "float61"], "Did you mean 'float16'?"),
        (["--prompt", "x", "--temperature", "-1"], "must be 0 or a positive number, got '-1'"),
        (["--prompt", "x", "--temperature", "nan"], "must be 0 or a positive number"),
        (["--prompt", "x", "--temperature", "warm"], "warm"),
        (["--prompt", "x", "--max-new-tokens", "0"], "must be a whole number, at least 1, got '0'"),
        (["--prompt", "x", "--max-new-tokens", "many"], "must be a whole number, at least 1, got 'many'"),
        (["--prompt", "x", "--seed", "one"], "must be a whole number from 0 to 4294967295, got 'one'"),
        (["--prompt", "x", "--seed", "-1"], "must be a whole number from 0 to 4294967295, got '-1'"),
        (["--prompt", "x", "--seed", str(2**64)], "must be a whole number from 0"),
        (["--prompt", "x", "--model", ""], "does not exist"),
        (["--promt", "x"], "Did you mean '--prompt'?"),
        (["--prompt"], "expected one argument"),
        (["picture.png"], "'picture.png' is unknown"),
        ([], "There is no question"),
    ],
)
def test_bad_usage(run, arguments, expected):
    assert_refused(run(*arguments), expected)


def test_sampling_options_reach_the_session(run):
    sampled = [run("--prompt", "x", "--temperature", "2", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]


def test_ctrl_c_ends_a_single_answer_without_a_traceback(run, monkeypatch):
    def interrupted(self, prompt):
        yield "so far"
        raise KeyboardInterrupt

    monkeypatch.setattr(ChatSession, "ask", interrupted)
    status, output, errors = run("--prompt", "x")
    assert (status, output, errors) == (130, "so far", "")


def test_ctrl_c_in_a_conversation_stops_the_answer_only(run, monkeypatch):
    def interrupted(self, prompt):
        yield "so far"
        if prompt == "first":
            raise KeyboardInterrupt

    monkeypatch.setattr(ChatSession, "ask", interrupted)
    status, output, errors = run(stdin=Terminal("first\nsecond\n"))
    assert (status, output) == (0, "> so far\n> so far\n> \n")
    assert "(stopped)" in errors and "error" not in errors
