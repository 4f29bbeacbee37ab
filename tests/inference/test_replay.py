"""Recordings of forward passes; on a CPU they are lists of operations, replayed without the Python that made them."""

import functools
import inspect
import logging
import traceback

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, GenerationMixin, MistralConfig

from sf_mllm.bench.chat_models import load_chat_model
from sf_mllm.bench.images import Images
from sf_mllm.errors import InputError
from sf_mllm.inference import recordings
from sf_mllm.inference import replay as replay_module
from sf_mllm.inference.compiled_layers import CompiledLayers
from sf_mllm.inference.recordings import CudaGraphRecorder, Replayed
from sf_mllm.inference.replay import PROMPT_STEP, SHORTEST_CACHE, Replay, generation_config
from sf_mllm.inference.session import ChatSession
from tests.tape import TapeRecorder
from tests.tiny_vlm import make_image, make_sf_llava

CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
QUESTIONS = ("What is this?", "And how many are there of them?", "Why?")


@pytest.fixture
def replay(model_and_processor):
    recorder = TapeRecorder()
    replay = Replay(model_and_processor[0], recorder)
    yield replay, recorder
    replay.close()


@pytest.fixture(scope="module")
def model_and_processor():
    return make_sf_llava()


def converse(model_and_processor, replay=None, image=None, **options) -> list[str]:
    session = ChatSession(*model_and_processor, max_new_tokens=12, replay=replay, **options)
    session.set_image(make_image(3) if image is None else image)
    return ["".join(session.ask(question)) for question in QUESTIONS]


def test_replayed_conversations_are_those_without(model_and_processor, replay):
    replay, recorder = replay
    for seed in range(3):
        image = make_image(seed)
        expected = converse(model_and_processor, image=image)
        assert converse(model_and_processor, replay, image) == expected
    assert len(set(expected)) > 1
    assert recorder.recorded < 12 < 60 < recorder.played


class GraphCounter:
    """Stands in for the compiler's back end, and for a recorder that the compiler must not meet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=self, fullgraph=True))

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]):
        self.graphs.append(graph)
        return graph.forward

    def record(self, function):
        """No tape: operations under a dispatch mode are not compiled."""
        before = len(self.graphs)
        outputs, is_first = function(), [True]
        assert len(self.graphs) == before, "CUDA does not allow to compile while it records"

        def play() -> None:
            for own, new in [] if is_first else zip(tree_leaves(outputs), tree_leaves(function()), strict=True):
                if isinstance(own, Tensor):
                    own.copy_(new)
            is_first.clear()

        return outputs, play


def test_compiled_conversations_are_those_without(model_and_processor, monkeypatch):
    expected = converse(model_and_processor)
    counter = GraphCounter(monkeypatch)
    replay = Replay(model_and_processor[0], counter.record, compiled=True)
    for _ in range(3):
        assert converse(model_and_processor, replay) == expected
    for length in range(1, 40, 12):
        session = ChatSession(*model_and_processor, max_new_tokens=3, replay=replay)
        "".join(session.ask("what " * length))
    replay.close()
    assert len(counter.graphs) == 4  # encoder, projector, prompts of any length, further tokens


def test_compiled_answers_of_another_llava_to_several_images(monkeypatch):
    """LLaVA-1.5 leaves the class token of its ViT out: what its projector reads is a view with gaps."""
    chat = load_chat_model("random:llava-tiny", torch.device("cpu"), "float32", Images(), question=None, text_tokens=8)
    inputs = chat.make_inputs(3)
    expected = chat.model.generate(**inputs, generation_config=generation_config(3))[:, -3:]
    counter = GraphCounter(monkeypatch)
    replay = Replay(chat.model, counter.record, compiled=True)
    for _ in range(4):
        with torch.inference_mode():
            answer = chat.model.generate(**replay.prepare(inputs, 3), generation_config=generation_config(3))
        assert torch.equal(answer[:, -3:], expected)
    replay.close()
    assert len(counter.graphs) == 4


def test_layers_get_their_forward_back_and_keep_one_of_somebody_else(model_and_processor, monkeypatch):
    language_model = model_and_processor[0].model.language_model
    first, second = language_model.layers
    calls, graphs = [], []
    own = first.forward
    first.forward = other = lambda *args, **kwargs: calls.append("other") or own(*args, **kwargs)
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    try:
        with torch.inference_mode():
            expected = language_model(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state
            output = CompiledLayers(language_model)(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state
        assert torch.equal(output, expected) and calls == ["other", "other"] and len(graphs) == 1
        assert first.forward is other and "forward" not in vars(second)
    finally:
        del first.forward


def test_a_compiled_encoder_gets_the_fastest_kernels_for_as_long(model_and_processor, monkeypatch):
    model, _ = model_and_processor
    tower = model.model.vision_tower
    monkeypatch.setattr(replay_module, "choose_kernels", lambda name, device: "triton")
    kernels = []
    for compiled in (False, True):
        replay = Replay(model, TapeRecorder(), compiled=compiled)
        kernels.append(tower.kernels)
        replay.close()
        kernels.append(tower.kernels)
    assert kernels == ["torch", "torch", "triton", "torch"]


def test_an_image_is_looked_at_once_and_before_the_answer(model_and_processor, replay, unrecorded):
    replay, _ = replay
    model, processor = model_and_processor
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": make_image(1)}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    looks, tower = [], model.model.vision_tower.forward
    model.model.vision_tower.forward = lambda *args, **kwargs: looks.append(None) or tower(*args, **kwargs)
    try:
        for turn in range(3):
            given = replay.prepare(inputs, 4)
            assert len(looks) == turn + 1
            with torch.inference_mode():
                model.generate(**given, generation_config=generation_config(4))
            assert len(looks) == turn + 1
        model.get_image_features(pixel_values=inputs["pixel_values"])
        assert len(looks) == 4
        too_many = {**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}
        with torch.inference_mode(), pytest.raises(ValueError, match="2 images give 12 features but the text holds 6"):
            model.generate(**replay.prepare(too_many, 4), generation_config=generation_config(4))
    finally:
        del model.model.vision_tower.forward


def turn(processor, *images) -> dict[str, Tensor]:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "What is this?"}]
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return dict(processor.apply_chat_template([{"role": "user", "content": content}], **settings))


@pytest.fixture
def unrecorded(monkeypatch):
    """Python runs each time."""
    monkeypatch.setattr(Replayed, "__call__", lambda self, *args, **kwargs: self._function(*args, **kwargs))


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_what_is_begun_is_what_generate_asks_for(model_and_processor, replay, unrecorded, monkeypatch, num_images):
    replay, _ = replay
    model, processor = model_and_processor
    inputs = turn(processor, *(make_image(seed) for seed in range(num_images)))
    forwards, own_forward = [], replay._model_forward
    monkeypatch.setattr(replay, "_model_forward", lambda **given: forwards.append(given) or own_forward(**given))
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:].tolist()
    assert len(forwards) == 4
    for is_taken in (True, False):
        forwards.clear()
        given = replay.prepare(inputs, 4)
        assert len(forwards) == 1
        if not is_taken:  # then generate makes everything itself, and has to make the same
            begun = replay._begun
            replay._begun = None
        with torch.inference_mode():
            answer = model.generate(**given, generation_config=generation_config(4))
        assert answer[0, -4:].tolist() == expected
        assert len(forwards) == (4 if is_taken else 5)
    first, again = forwards[:2]
    for name in ("input_ids", "position_ids"):
        assert torch.equal(first[name], again[name])
    mask = again["attention_mask"]
    assert torch.equal(begun.mask, mask) and mask.shape[-1] == SHORTEST_CACHE
    # What is begun attends to the places of the prompt alone, in the same memory.
    length = mask.shape[2]
    assert torch.equal(first["attention_mask"], mask[..., :length]) and not mask[..., length:].any()
    for name in ("keys", "values"):
        front, whole = (getattr(forward[CACHE].layers[1], name) for forward in (first, again))
        assert front.data_ptr() == whole.data_ptr() and torch.equal(front, whole[:, :, :length])


def test_generate_does_not_wait_for_what_is_begun(model_and_processor, replay):
    """What asks a device for a value waits for all that it has been given to do."""
    replay, _ = replay
    model, processor = model_and_processor
    inputs = turn(processor, make_image(1))

    class Waits(TorchDispatchMode):
        places: list[str]

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if any(name in str(function) for name in ("item", "is_nonzero", "_local_scalar", "equal.default")):
                frames = [frame for frame in traceback.extract_stack() if "transformers" in frame.filename]
                self.places.append(frames[-1].name)
            return function(*args, **(kwargs or {}))

    given = replay.prepare(inputs, 1)
    with torch.inference_mode(), Waits() as waits:
        waits.places = []
        model.generate(**given, generation_config=generation_config(1))
    # That the answer has ended needs its token. What transformers asks besides is about settings and, from 5.24 on,
    # about the prompt, before it prepares the forward pass.
    asked = set(waits.places) - {"_prepare_special_tokens", "generate", "_get_logits_processor"}
    assert asked == {"__call__"}


class LoggedStream:
    """Stands for a CUDA stream: says who waits for whom, and what runs in it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.device = name, log, torch.device("cuda:0")

    def wait_stream(self, other: "LoggedStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def __enter__(self) -> None:
        self.log.append(f"in {self.name}")

    def __exit__(self, *exception) -> None:
        self.log.append(f"out of {self.name}")


def test_what_is_begun_has_a_stream_of_its_own_and_is_waited_for(model_and_processor, replay, unrecorded, monkeypatch):
    replay, _ = replay
    model, processor = model_and_processor
    inputs, log = turn(processor, make_image(1)), []
    host, own = LoggedStream("host", log), LoggedStream("aside", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: host)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(replay, "_stream", own)
    language_model, tower = model.model.language_model, model.model.vision_tower
    forward, look = language_model.forward, tower.forward
    language_model.forward = lambda *args, **kwargs: log.append("language model") or forward(*args, **kwargs)
    tower.forward = lambda *args, **kwargs: log.append("encoder") or look(*args, **kwargs)
    take = replay._take_begun
    replay._take_begun = lambda *args, **kwargs: log.append("generate asks") or take(*args, **kwargs)
    aside = lambda part: ["aside waits for host", "in aside", part, "out of aside"]  # noqa: E731
    begun = [*aside("encoder"), *aside("language model")]
    try:
        for _ in range(2):
            with torch.inference_mode():
                model.generate(**replay.prepare(inputs, 2), generation_config=generation_config(2))
            assert log == [*begun, "generate asks", "host waits for aside", "generate asks", "language model"]
            log.clear()
        with torch.inference_mode():
            replay.prepare(inputs, 2)
            log.clear()
            replay.prepare(inputs, 2)  # what was begun before is never asked for
        assert log == ["host waits for aside", *begun]
    finally:
        del language_model.forward, tower.forward, replay._take_begun


def test_other_settings_than_were_begun_with_are_answered_too(model_and_processor, replay):
    replay, _ = replay
    model, processor = model_and_processor
    inputs = turn(processor, make_image(1))
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:]
    for _ in range(3):
        with torch.inference_mode():
            output = model.generate(
                **replay.prepare(inputs, 4),
                generation_config=generation_config(4),
                output_hidden_states=True,
                return_dict_in_generate=True,
            )
        assert torch.equal(output.sequences[0, -4:], expected)
        assert len(output.hidden_states) == 4 and output.hidden_states[0] is not None


def test_answers_may_come_within_inference_mode_and_outside(model_and_processor, replay):
    """Caches take their memory within, and nothing outside may write there without care."""
    replay, _ = replay
    model, processor = model_and_processor
    inputs = turn(processor, make_image(1))
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, -3:]
    for mode in 2 * (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            answer = model.generate(**replay.prepare(inputs, 3), generation_config=generation_config(3))
        assert torch.equal(answer[0, -3:], expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_gets_back_what_it_had(model_and_processor, compiled, monkeypatch):
    model, _ = model_and_processor
    parts = (model.model.vision_tower, model.model.multi_modal_projector, model.model.language_model)
    modules = (model, model.model, *parts)
    had = [dict(vars(module)) for module in modules]
    hooked = {module: functools.partial(module.forward) for module in (model, parts[0])}
    for module, forward in hooked.items():
        module.forward = forward
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # a tape cannot hold what is compiled
    try:
        expected = converse(model_and_processor)
        replay = Replay(model, TapeRecorder(), compiled=compiled)
        assert model.forward is not hooked[model]
        assert converse(model_and_processor, replay) == converse(model_and_processor, replay) == expected
        assert [vars(part).get("forward") for part in parts[1:]] == [own.get("forward") for own in had[3:]]
        replay.close()
        assert all(module.forward is forward for module, forward in hooked.items())
    finally:
        for module in hooked:
            del module.forward
    assert [dict(vars(module)) for module in modules] == had


def test_prompts_of_many_lengths_share_recordings(model_and_processor, replay):
    replay, recorder = replay
    model, processor = model_and_processor
    session = ChatSession(model, processor, max_new_tokens=3, replay=replay)
    plain = ChatSession(model, processor, max_new_tokens=3)
    for length in range(1, 30, 2):
        question = "what " * length
        assert "".join(session.ask(question)) == "".join(plain.ask(question))
        assert session.statistics.prompt_tokens == plain.statistics.prompt_tokens
        assert session.statistics.new_tokens == plain.statistics.new_tokens
        session.clear()
        plain.clear()
    assert plain.statistics.prompt_tokens % PROMPT_STEP  # padded at the end at least
    assert recorder.recorded <= 3  # two lengths of prompts, one of further tokens


def test_a_prompt_that_needs_no_padding(model_and_processor, replay):
    replay, _ = replay
    plain = ChatSession(*model_and_processor, max_new_tokens=6)
    session = ChatSession(*model_and_processor, max_new_tokens=6, replay=replay)
    for length in range(1, 99):
        question = "a" * length
        expected = "".join(plain.ask(question))
        plain.clear()
        if plain.statistics.prompt_tokens % PROMPT_STEP == 0:
            break
    assert plain.statistics.prompt_tokens % PROMPT_STEP == 0
    for _ in range(3):
        assert "".join(session.ask(question)) == expected
        session.clear()


def test_the_recording_that_was_not_used_for_longest_makes_room(shift, monkeypatch):
    module, _, recorder = shift
    monkeypatch.setattr(recordings, "_MAX_RECORDINGS", 2)
    with torch.inference_mode():
        for length in (1, 1, 2, 2, 1, 3, 3, 1, 2):  # 3 takes the place of 2
            module(torch.ones(length, 3))
    assert (recorder.recorded, recorder.played) == (3, 5)


def test_a_batch_of_different_prompts(model_and_processor, replay):
    replay, _ = replay
    model, processor = model_and_processor
    turns = [[{"role": "user", "content": [{"type": "text", "text": "what " * count}]}] for count in (1, 9, 4)]
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "padding": True}
    inputs = dict(processor.apply_chat_template(turns, return_tensors="pt", **settings))
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert len(expected.unique(dim=0)) == 3
    for _ in range(4):
        with torch.inference_mode():
            given = replay.prepare(inputs, 8)
            answers = model.generate(**given, **options)[:, given["input_ids"].shape[1] :]
        assert torch.equal(answers, expected)


def test_a_longer_conversation_gets_a_larger_cache(model_and_processor, replay):
    replay, recorder = replay
    inputs = {name: torch.ones(1, 200, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    small = replay.prepare(inputs, 8)[CACHE]
    assert replay.prepare(inputs, SHORTEST_CACHE - 4 * PROMPT_STEP)[CACHE] is small
    large = replay.prepare(inputs, SHORTEST_CACHE - 4 * PROMPT_STEP + 1)[CACHE]
    assert large is not small and large.get_max_length() == 2 * SHORTEST_CACHE
    assert replay.prepare(inputs, 8)[CACHE] is large  # shorter ones do not take it away
    expected = converse(model_and_processor)
    assert converse(model_and_processor, replay) == converse(model_and_processor, replay) == expected
    for batch in (2, 3):  # which takes the cache away, and the recordings that hold it
        before = recorder.recorded
        assert replay.prepare({name: values.repeat(batch, 1) for name, values in inputs.items()}, 8)[CACHE] is not large
        assert converse(model_and_processor, replay) == converse(model_and_processor, replay) == expected
        assert recorder.recorded - before == 3  # two lengths of prompts, further tokens; the image's needs no cache


def test_sampled_answers_and_regions(model_and_processor, replay):
    replay, _ = replay
    options = {"temperature": 1.5, "seed": 7}
    expected = converse(model_and_processor, **options)
    assert expected != converse(model_and_processor)
    for _ in range(3):
        assert converse(model_and_processor, replay, **options) == expected
    sessions = [ChatSession(*model_and_processor, replay=replay), ChatSession(*model_and_processor)]
    for seed in range(4):
        for session in sessions:
            session.set_image(make_image(seed))
        torch.testing.assert_close(sessions[0].regions(), sessions[1].regions())


class Shift(nn.Module):
    """Adds what it has learned, and tells how often Python has been here."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(3))
        self.calls = 0

    def forward(self, values: Tensor, *, factor: float = 1.0, cache: object = None) -> dict[str, object]:
        self.calls += 1
        return {"sum": values * factor + self.shift, "cache": cache}


@pytest.fixture
def shift():
    module, recorder = Shift(), TapeRecorder()
    module.forward = forward = Replayed(module.forward, recorder, "Shift")
    return module, forward, recorder


def test_outputs_are_copies_and_python_is_left_out(shift):
    module, _, recorder = shift
    with torch.inference_mode():
        outputs = [module(torch.full((2, 3), float(value)))["sum"] for value in range(6)]
    for value, output in enumerate(outputs):
        assert torch.equal(output, torch.full((2, 3), value + 1.0))
    assert (module.calls, recorder.recorded, recorder.played) == (2, 1, 5)


def test_the_first_output_is_no_view_of_what_the_next_call_overwrites():
    recorded = Replayed(lambda values: values[1:], TapeRecorder(), "Tail")
    with torch.inference_mode():
        outputs = [recorded(torch.full((3,), float(value))) for value in range(4)]
    assert [output.tolist() for output in outputs] == [[value] * 2 for value in range(4)]


def test_nothing_is_compiled_while_it_is_recorded(monkeypatch):
    counter = GraphCounter(monkeypatch)
    double = lambda values: values * 2  # noqa: E731
    recorded = Replayed(double, counter.record, "Double", torch.compile(double, dynamic=False))
    with_gaps = torch.arange(24.0).view(2, 3, 4)[:, 1:]
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(recorded(with_gaps), with_gaps * 2)
    assert len(counter.graphs) == 1


@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_recordings_of_one_mode_serve_the_other(shift, modes):
    module, _, recorder = shift
    for mode in (modes[0], modes[0], modes[1]):
        with mode():
            output = module(torch.ones(2, 3))["sum"]
            output += 1  # as in the mode that it was asked for in
            assert output.is_inference() == (mode is torch.inference_mode) and output.unique().tolist() == [3]
    assert (module.calls, recorder.recorded, recorder.played) == (2, 1, 2)


def test_another_shape_type_or_setting_is_another_recording(shift):
    module, forward, recorder = shift
    ones = torch.ones(2, 3)
    kinds = [
        (ones, {}),
        (torch.ones(1, 3), {}),
        (ones.double(), {}),
        (ones, {"factor": 2.0}),
        (ones.T.contiguous().T, {}),
    ]
    with torch.inference_mode():
        for _ in range(3):
            for values, settings in kinds:
                given = module(values, **settings)["sum"]
                assert torch.equal(given, values * settings.get("factor", 1.0) + 1) and given.dtype == values.dtype
        assert recorder.recorded == len(kinds) == 5
        forward.forget()
        module(ones)
        module(ones)
    assert recorder.recorded == 6


def test_what_cannot_be_replayed_is_run_as_it_is(shift):
    module, _, recorder = shift
    values = torch.ones(2, 3)
    for _ in range(3):  # gradients
        module(values)["sum"].sum().backward()
    assert module.shift.grad.tolist() == [6.0] * 3
    with torch.inference_mode():
        growing = DynamicCache()
        for settings in ({"cache": growing}, {"cache": {1}}):  # what grows, and what cannot be told apart
            for _ in range(3):
                assert module(values, **settings)["cache"] == settings["cache"]
        assert (module.calls, recorder.recorded) == (9, 0)


def test_a_module_that_cannot_be_recorded_is_named_once_and_works(caplog):
    def refuse(function):
        raise RuntimeError("operation not permitted when capturing\nmore")

    module = Shift()
    module.forward = Replayed(module.forward, refuse, "Shift")
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        outputs = [module(torch.full((2, 3), float(value)))["sum"] for value in range(5)]
    assert [output[0, 0].item() for output in outputs] == [1, 2, 3, 4, 5]
    assert caplog.messages == [
        "Shift cannot be recorded as a CUDA graph and is run as it is: operation not permitted when capturing."
    ]


def test_a_model_of_other_parts_or_with_sliding_windows_is_refused(model_and_processor):
    model, _ = model_and_processor
    with pytest.raises(InputError, match="no LLaVA of transformers"):
        Replay(model.model.language_model)
    text = model.config.text_config
    try:
        model.config.text_config = MistralConfig(sliding_window=8, num_hidden_layers=2)
        with pytest.raises(InputError, match="has sliding windows; take it as it is"):
            Replay(model)
    finally:
        model.config.text_config = text
    assert "forward" not in vars(model.model.vision_tower)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recording_that_fails_leaves_nothing_behind():
    record, values, stream = CudaGraphRecorder(), torch.ones(3, device="cuda"), torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            record(lambda: values * values.sum().item())  # waits for the device
        assert torch.cuda.current_stream() == stream
    output, play = record(lambda: values * 2)
    values.fill_(3)
    play()
    assert output.tolist() == [6, 6, 6]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_recorded_graphs_on_a_gpu(compiled, caplog):
    model, processor = make_sf_llava()
    model.cuda()
    images = [make_image(seed) for seed in range(4)]
    expected = [converse((model, processor), image=image) for image in images]
    record, recorded = CudaGraphRecorder(), []
    replay = Replay(model, lambda function: recorded.append(record(function)) or recorded[-1], compiled=compiled)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):  # with an end token, so that `generate` waits for its own stream while the prompt is read
            for image, answers in zip(images, expected, strict=True):
                assert converse((model, processor), replay, image) == answers
    assert len(recorded) >= 3 and not caplog.messages  # image, prompt and further tokens
    replay.close()
    assert converse((model, processor), image=images[0]) == expected[0]
