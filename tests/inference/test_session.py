import time

import pytest
import torch

from sf_mllm.errors import InputError
from sf_mllm.inference.session import ChatSession
from tests.tiny_vlm import NUM_TOKENS, make_image, make_sf_llava


@pytest.fixture(scope="module")
def model_and_processor():
    return make_sf_llava()


def make_session(model_and_processor, **options) -> ChatSession:
    return ChatSession(*model_and_processor, **({"max_new_tokens": 8} | options))


def answer(session: ChatSession, prompt: str) -> str:
    return "".join(session.ask(prompt))


def generate_plainly(model_and_processor, messages, images, **options) -> str:
    """The same turn without a session: template, processor, generate, decode."""
    model, processor = model_and_processor
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=images, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, **({"do_sample": False} | options))
    return processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def user(*content) -> dict:
    return {
        "role": "user",
        "content": [{"type": "image"} if c is None else {"type": "text", "text": c} for c in content],
    }


def test_streamed_answers_equal_plain_generation_over_two_turns(model_and_processor):
    session = make_session(model_and_processor)
    image = make_image(3)
    session.set_image(image)
    first = answer(session, " What is this? ")
    messages = [user(None, "What is this?")]
    assert first and first == generate_plainly(model_and_processor, messages, [image])

    second = answer(session, "And how many?")
    messages += [{"role": "assistant", "content": [{"type": "text", "text": first.strip()}]}, user("And how many?")]
    assert second == generate_plainly(model_and_processor, messages, [image])


def test_text_only_question(model_and_processor):
    session = make_session(model_and_processor)
    expected = generate_plainly(model_and_processor, [user("Hello?")], None)
    assert answer(session, "Hello?") == expected


def test_image_changes_the_answer_and_starts_anew(model_and_processor):
    session = make_session(model_and_processor)
    without = answer(session, "What?")
    session.set_image(make_image(0))
    assert answer(session, "What?") != without
    assert answer(session, "What?") != without
    session.set_image(make_image(1))
    expected = generate_plainly(model_and_processor, [user(None, "What?")], [make_image(1)])
    assert answer(session, "What?") == expected


def test_clear_keeps_the_image(model_and_processor):
    session = make_session(model_and_processor)
    session.set_image(make_image(0))
    first = answer(session, "What?")
    answer(session, "And?")
    session.clear()
    assert answer(session, "What?") == first


def test_statistics(model_and_processor):
    session = make_session(model_and_processor)
    assert session.statistics is None
    answer(session, "What?")
    text_only = session.statistics.prompt_tokens
    session.set_image(make_image(0))
    answer(session, "What?")
    newline = 1  # the template puts one after the image
    assert session.statistics.prompt_tokens == text_only + NUM_TOKENS + newline
    assert session.statistics.new_tokens == 8
    assert 0 < session.statistics.seconds_to_first_text <= session.statistics.seconds


def test_closing_early_stops_and_keeps_what_was_said(model_and_processor):
    session = make_session(model_and_processor, max_new_tokens=100)
    stream = session.ask("What?")
    said = next(stream)
    stream.close()
    assert session.statistics.new_tokens < 100

    messages = [user("What?"), {"role": "assistant", "content": [{"type": "text", "text": said.strip()}]}, user("And?")]
    session.max_new_tokens = 8
    assert answer(session, "And?") == generate_plainly(model_and_processor, messages, None)


def test_failure_in_the_model_reaches_the_caller_and_leaves_the_conversation(model_and_processor, monkeypatch):
    session = make_session(model_and_processor)
    first = answer(session, "What?")
    session.clear()
    model, _ = model_and_processor
    with monkeypatch.context() as patch:
        patch.setattr(model.model.language_model, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answer(session, "What?")
    assert answer(session, "What?") == first


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("  ", "empty"),
        ("a <image> b", "<image>"),
        ("long " * 300, "more than the language model"),
        ("caf\udce9", "not valid text"),
    ],
)
def test_unusable_questions(model_and_processor, prompt, expected):
    session = make_session(model_and_processor)
    with pytest.raises(InputError, match=expected):
        session.ask(prompt)
    assert answer(session, "Hello?") == answer(make_session(model_and_processor), "Hello?")


def test_answers_end_where_the_language_model_ends(model_and_processor):
    session = make_session(model_and_processor, max_new_tokens=10_000)
    answer(session, "What?")
    statistics = session.statistics
    assert statistics.prompt_tokens + statistics.new_tokens <= 256  # max_position_embeddings of the tiny model


def test_sampling_repeats_with_its_seed(model_and_processor):
    answers = [answer(make_session(model_and_processor, temperature=2.0, seed=seed), "What?") for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_regions_are_the_final_rois(model_and_processor):
    model, processor = model_and_processor
    session = make_session(model_and_processor)
    with pytest.raises(InputError, match="no image"):
        session.regions()
    image = make_image(5)
    session.set_image(image)
    pixel_values = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.model.vision_tower(pixel_values).rois[0, -1]
    torch.testing.assert_close(session.regions(), expected)


def test_regions_need_an_encoder_with_rois(model_and_processor, monkeypatch):
    session = make_session(model_and_processor)
    session.set_image(make_image(5))
    monkeypatch.setattr(session.model, "get_image_features", lambda **_: object())
    with pytest.raises(InputError, match="no regions"):
        session.regions()


def test_pieces_arrive_while_the_model_still_writes(model_and_processor):
    session = make_session(model_and_processor, max_new_tokens=100)
    model, _ = model_and_processor
    times = []
    hook = model.lm_head.register_forward_hook(lambda *_: (times.append(time.perf_counter()), time.sleep(0.002))[0])
    try:
        pieces = [time.perf_counter() for _ in session.ask("What?")]
    finally:
        hook.remove()
    assert len(pieces) > 1 and pieces[0] < times[-1]
