import sys

import pytest
import torch

from sf_mllm.bench import chat, startup
from sf_mllm.bench.chat import ENCODER, FIRST, NEXT, PREPROCESS, STEPS, measure_chats
from sf_mllm.bench.conditions import Conditions
from sf_mllm.bench.images import Images
from sf_mllm.bench.rows import LOST_IN_NOISE
from sf_mllm.bench.startup import measure_startup
from sf_mllm.bench.stopwatch import ProcessTimes, time_process
from sf_mllm.bench.timing import Spread
from sf_mllm.errors import InputError
from sf_mllm.inference import replay
from tests.tape import TapeRecorder

CONDITIONS = Conditions(torch.device("cpu"), Images(), repeats=2, seconds=5)
RANDOM = "random:sparseformer-tiny"
SETTINGS = {"batches": [2], "precision": "float32", "modes": ["eager"], "new_tokens": 5, "text_tokens": 7}


def measure(*names, **changes):
    return list(measure_chats(names, CONDITIONS, **{**SETTINGS, **changes}))


def test_few_and_many_tokens_an_image_step_by_step(saved_model):
    rows = measure(str(saved_model), RANDOM, "random:llava-tiny", batches=[1, 2])
    assert [(row.batch, row.step) for row in rows[::3]] == [(batch, step) for batch in (1, 2) for step in STEPS]
    by_key = {(row.model, row.step, row.batch): row for row in rows}
    trained, ours, stock = (by_key[name, FIRST, 2] for name in (str(saved_model), RANDOM, "random:llava-tiny"))
    assert (trained.visual_tokens, ours.visual_tokens, stock.visual_tokens) == (6, 4, 36)
    assert (ours.prompt_tokens, stock.prompt_tokens) == (11, 43)
    assert (trained.weights, ours.weights, stock.weights) == (str(saved_model), "random", "random")
    assert ours.ratio_to == stock.ratio_to == str(saved_model)
    for row in rows:
        if row.step == PREPROCESS and row.weights == "random":
            assert row.outcome == "no image processor" and row.time_ms == ""
        elif row.outcome == LOST_IN_NOISE:  # a tiny model's tokens may be, on a busy machine
            assert row.step == NEXT and row.time_ms == row.tokens_per_s == ""
        else:
            assert row.outcome == "complete" and row.time_ms > 0 and 0 <= row.relative_error < 1e-3
            assert (row.tokens_per_s == "") == (row.step != NEXT)


def test_recorded_answers_are_checked_and_timed(saved_model, monkeypatch):
    recorders = []
    monkeypatch.setattr(replay, "CudaGraphRecorder", lambda: recorders.append(TapeRecorder()) or recorders[-1])
    with pytest.raises(InputError, match="Mode 'cuda-graphs' needs a CUDA device, got cpu; take eager"):
        measure(str(saved_model), modes=["eager", "cuda-graphs"])
    monkeypatch.setattr(chat, "_needs_cuda", lambda mode: False)
    rows = measure(str(saved_model), RANDOM, "random:llava-tiny", modes=["eager", "cuda-graphs"], batches=[1, 3])
    for (model, step, batch, mode), row in {(r.model, r.step, r.batch, r.mode): r for r in rows}.items():
        if row.outcome == "complete":
            assert 0 <= row.relative_error < 1e-3, (model, step, batch, mode)
    assert len(rows) == 2 * 2 * 3 * len(STEPS)
    assert len(recorders) == 2 * 2 * 3  # for the check and for the times, at each batch size, of each model
    assert all(recorder.recorded >= 3 and recorder.played > 4 for recorder in recorders)  # image, prompt, next token


def test_a_wrong_recording_is_not_timed(saved_model, monkeypatch):
    class Forgetful(TapeRecorder):
        def __call__(self, function):
            outputs, play = super().__call__(function)
            return outputs, lambda: play() if self.played < 4 else None

    monkeypatch.setattr(replay, "CudaGraphRecorder", Forgetful)
    monkeypatch.setattr(chat, "_needs_cuda", lambda mode: False)
    rows = measure(str(saved_model), modes=["cuda-graphs"])
    assert all(row.outcome.startswith("wrong: relative error") and row.time_ms == "" for row in rows)


def test_next_token_is_what_each_further_one_adds(monkeypatch):
    times = {"first token": Spread((10.0, 12.0)), "answer": Spread((30.0, 36.0))}
    monkeypatch.setattr(
        Conditions,
        "time_in_turns",
        lambda self, works: {name: times.get(name.rpartition(" ")[0], Spread((4.0, 4.0))) for name in works},
    )
    rows = {row.step: row for row in measure(RANDOM)}
    assert rows[FIRST].time_ms == 11 and rows[ENCODER].time_ms == 4
    assert rows[NEXT].time_ms == 5.5 and rows[NEXT].tokens_per_s == pytest.approx(2 * 1000 / 5.5, rel=1e-3)


def test_a_next_token_that_seems_to_take_no_time_is_called_noise(monkeypatch):
    times = {"first token": Spread((10.0, 40.0, 42.0)), "answer": Spread((30.0, 36.0, 38.0))}
    monkeypatch.setattr(
        Conditions,
        "time_in_turns",
        lambda self, works: {name: times.get(name.rpartition(" ")[0], Spread((4.0,) * 3)) for name in works},
    )
    rows = {(row.model, row.step): row for row in measure(RANDOM, "random:llava-tiny")}
    for model in (RANDOM, "random:llava-tiny"):
        noise = rows[model, NEXT]
        assert noise.outcome == LOST_IN_NOISE and noise.time_ms == noise.time_ratio == noise.tokens_per_s == ""
        assert rows[model, FIRST].outcome == "complete" and rows[model, FIRST].time_ms == 40


def test_answers_have_the_wanted_length_whatever_ends_them(saved_model, monkeypatch):
    lengths = []
    generate = chat._generate

    def note_length(model, inputs, tokens, **settings):
        answer = generate(model, inputs, tokens, **settings)
        lengths.append((tokens, answer.sequences.shape[1] - inputs["input_ids"].shape[1]))
        # Whatever the random model would say first ends its answers.
        model.generation_config.eos_token_id = model.generation_config.eos_token_id and int(answer.sequences[0, -1])
        return answer

    monkeypatch.setattr(chat, "_generate", note_length)
    measure(str(saved_model))
    assert {wanted for wanted, _ in lengths} == {1, 4, 5} and all(wanted == found for wanted, found in lengths)


def test_answers_with_a_wrong_cache_are_not_timed(monkeypatch):
    generate = chat._generate

    def forget_the_image(model, inputs, tokens, **settings):
        other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
        return generate(model, other, tokens, **settings)

    monkeypatch.setattr(chat, "_generate", forget_the_image)
    rows = measure(RANDOM)
    assert len(rows) == len(STEPS)
    assert all(row.outcome.startswith("wrong: relative error") and row.time_ms == "" for row in rows)


def test_weights_are_cast_for_the_check_and_back(saved_model, monkeypatch):
    dtypes = []
    monkeypatch.setattr(chat, "check_output", lambda logits, reference, precision: dtypes.append(precision) or 0.0)
    seen = []
    generate = chat._generate
    monkeypatch.setattr(
        chat, "_generate", lambda model, *rest, **more: seen.append(model.dtype) or generate(model, *rest, **more)
    )
    rows = measure(str(saved_model), precision="bfloat16")
    assert set(seen) == {torch.bfloat16} and dtypes == ["bfloat16"]
    assert {row.outcome for row in rows} <= {"complete", LOST_IN_NOISE}  # what it is about is done before the timing


def test_what_does_not_fit_is_a_row_and_the_others_go_on(saved_model, monkeypatch):
    load = chat.load_chat_model

    def fill_memory(name, **settings):
        if name == RANDOM:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return load(name, **settings)

    monkeypatch.setattr(chat, "load_chat_model", fill_memory)
    rows = measure(RANDOM, str(saved_model))
    assert {row.outcome for row in rows if row.model == RANDOM} == {"out of memory"}
    assert {row.outcome for row in rows if row.model != RANDOM} <= {"complete", LOST_IN_NOISE}


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (["random:7b"], {}, "Random chat model 'random:7b' is unknown"),
        ([RANDOM, RANDOM], {}, "given twice"),
        ([RANDOM], {"new_tokens": 1}, "have no next token"),
        (["/nowhere"], {}, "Model directory '/nowhere' does not exist"),
    ],
)
def test_what_cannot_be_had_is_refused(names, changes, message):
    with pytest.raises(InputError, match=message):
        measure(*names, **changes)


class TestStartup:
    def test_first_output_end_memory_and_status(self):
        code = (
            "import sys, time; print(flush=True); time.sleep(.2); print('x', flush=True); time.sleep(.3); sys.exit(3)"
        )
        times = time_process([sys.executable, "-c", code])
        assert times.status == 3 and times.errors == ""
        assert times.first_output_ms >= 200 and times.end_ms - times.first_output_ms >= 290

    def test_memory_is_the_processs_own(self, monkeypatch):
        monkeypatch.setattr(startup.subprocess, "run", _run_without_chat(startup.subprocess.run))
        small, large = (startup.run_chat([code]).peak_bytes for code in ("print(1)", "print(len(b'x' * 10**8))"))
        assert small < 60e6 < 100e6 < large < 200e6  # this process holds far more

    def test_rows(self, monkeypatch):
        asked = []

        def run_chat(arguments):
            asked.append(arguments)
            number = len(asked)
            return ProcessTimes(100.0 * number, 1000.0 * number, 2**30, 0, "")

        monkeypatch.setattr(startup, "run_chat", run_chat)
        rows = list(measure_startup("demo", repeats=3, question="Why?"))
        assert [row.step for row in rows] == ["start to help", "start to first word", "start to end of answer"]
        assert [row.time_ms for row in rows] == [3000, 700, 7000]  # the first run of each command does not count
        assert {row.peak_memory_gib for row in rows} == {1} and {row.repeats for row in rows} == {3}
        assert asked[0] == ["--help"] and asked[-1][-2:] == ["--prompt", "Why?"]

    def test_a_chat_that_fails_says_why(self):
        with pytest.raises(InputError, match=r"^The chat failed: Argument '--imagee' is unknown.*options\.$"):
            startup.run_chat(["--imagee", "x"])


def _run_without_chat(run):
    """Take the last word of a command as Python code instead of as an argument of the chat."""

    def changed(command, **settings):
        start = command.index("sf_mllm.cli")
        return run([*command[: start - 1], "-c", command[-1]], **settings)

    return changed
