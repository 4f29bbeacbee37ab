"""Time and memory of answers: preprocessing, encoder and projector, first token, every further token.

Protocol `chat-speed-1`: `generate` of transformers, greedy, with its cache, as it is or with forward passes recorded as
CUDA graphs (`sf_mllm.inference.replay`), which pads the prompt and takes a static cache. "first token" is from the
model's inputs on the device to one token: encoder, projector, prompt. "next token" is what each further one adds: the
time of an answer of N tokens without that of one token, called in the same round, over N - 1. Before anything is timed,
the logits of a short answer must be those of the same weights in float32, computed in one pass without a cache.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sf_mllm.bench.chat_models import ChatModel, find_chat_model, load_chat_model
from sf_mllm.bench.conditions import Conditions, refuse_repeated
from sf_mllm.bench.correctness import check_output
from sf_mllm.bench.precision import computing_in
from sf_mllm.bench.rows import COMPLETE, LOST_IN_NOISE, NO_PROCESSOR, Row, round_to
from sf_mllm.bench.timing import Spread, Work, forget_peak, held_bytes, peak_gib, to_gib, wait
from sf_mllm.errors import InputError
from sf_mllm.inference.replay import Replay, generation_config
from sf_mllm.vlm.build import cast_weights

PROTOCOL = "chat-speed-1"
PREPROCESS, ENCODER, FIRST, NEXT = "chat preprocess", "chat encoder", "first token", "next token"
STEPS = (PREPROCESS, ENCODER, FIRST, NEXT)
_ANSWER = "answer"
_CHECKED_TOKENS = 4
_RECORDED = {"cuda-graphs": False, "compiled-cuda-graphs": True}
"""Modes of `Replay`, and whether it compiles."""
_CALLS_TO_RECORD = 4  # as it is, compiled, recorded, replayed


@dataclass
class _Candidate:
    """A model, what is known of it, and why it cannot be measured."""

    row: Row
    chat: ChatModel | None = None
    own_bytes: int = 0
    error: Exception | None = None
    works: dict[str, Work] = field(default_factory=dict)
    replay: Replay | None = None


def measure_chats(
    names: Sequence[str],
    conditions: Conditions,
    *,
    batches: Sequence[int],
    precision: str,
    modes: Sequence[str],
    new_tokens: int,
    text_tokens: int,
    question: str | None = None,
) -> Iterator[Row]:
    """Yield a row for each step of each model in each mode, at each batch size.

    All models are on the device at the same time, to be called in turns.

    Args:
        names: of models; ratios are to the first one.
        conditions: where and how.
        batches: conversations of one call.
        precision: of the weights: float32, bfloat16 or float16.
        modes: of `choices.CHAT_MODES`.
        new_tokens: of an answer, at least 2.
        text_tokens: of the prompt of a random model.
        question: to ask the others; None: a short one.

    Raises:
        InputError: a random model is unknown, the device has no such mode, or answers are too short.
    """
    refuse_repeated(list(names), "Model")
    if new_tokens < 2:
        raise InputError(f"Answers of {new_tokens} tokens have no next token; take at least 2.")
    for mode in modes:
        if _needs_cuda(mode) and conditions.device.type != "cuda":
            raise InputError(f"Mode '{mode}' needs a CUDA device, got {conditions.device}; take eager.")
    for name in names:
        find_chat_model(name)
    load = functools.partial(
        load_chat_model,
        device=conditions.device,
        precision=precision,
        images=conditions.images,
        question=question,
        text_tokens=text_tokens,
    )
    candidates = []
    for name in names:
        row = Row(PROTOCOL, FIRST, name, precision=precision, threads=torch.get_num_threads())
        row.images = conditions.images.name
        candidates.append(candidate := _Candidate(row))
        held = held_bytes(conditions.device)
        try:
            candidate.chat = load(name)
            parameters = list(candidate.chat.model.parameters())
            row.weights = candidate.chat.weights
            candidate.chat.model.generation_config.eos_token_id = None  # so that all answers are of one length
            row.parameters_m = round_to(sum(p.numel() for p in parameters) / 1e6)
            row.weights_gib = to_gib(sum(p.numel() * p.element_size() for p in parameters))
        except InputError:
            raise
        except Exception as error:  # out of memory, or a defect
            candidate.error = error
        candidate.own_bytes = held_bytes(conditions.device) - held
    for mode, batch in itertools.product(modes, batches):
        yield from _compare(candidates, conditions, mode, batch, new_tokens)


def _needs_cuda(mode: str) -> bool:
    return mode in _RECORDED


def _compare(
    candidates: list[_Candidate], conditions: Conditions, mode: str, batch: int, new_tokens: int
) -> Iterator[Row]:
    """Measure all models in one mode at one batch size."""
    if _RECORDED.get(mode):
        torch._dynamo.reset()  # a limit on how often one function is compiled counts earlier batch sizes, too
    rows: dict[str, Row] = {}
    for candidate in candidates:
        row = rows[candidate.row.model] = replace(candidate.row, mode=mode, batch=batch)
        candidate.works.clear()
        try:
            if candidate.error is not None:
                raise candidate.error
            candidate.works = _prepare(row, candidate, conditions, new_tokens)
        except Exception as error:  # libraries raise almost any type; the others go on
            conditions.note_failure(row, error)
    times: dict[str, dict[str, Spread]] = {step: {} for step in STEPS}
    for step in (PREPROCESS, ENCODER):
        works = {c.row.model: c.works[step] for c in candidates if step in c.works}
        times[step] = conditions.time_in_turns(works)
    answers = {
        f"{step} {c.row.model}": c.works[step] for c in candidates for step in (FIRST, _ANSWER) if step in c.works
    }
    measured = conditions.time_in_turns(answers)
    for name in rows:
        if f"{FIRST} {name}" in measured:
            first = times[FIRST][name] = measured[f"{FIRST} {name}"]
            times[NEXT][name] = measured[f"{_ANSWER} {name}"].minus(first).per(new_tokens - 1)
    for candidate in candidates:
        if candidate.replay is not None:
            candidate.replay.close()
            candidate.replay = None
    reference = candidates[0].row.model
    is_noise = {name for name, difference in times[NEXT].items() if difference.median <= 0}
    for name in is_noise:
        del times[NEXT][name]
    for step in STEPS:
        for name, found in rows.items():
            row = replace(found, step=step)
            if name in times[step]:
                own = times[step][name]
                row.add_times(own, times[step].get(reference) if name != reference else None, reference)
                rate = round_to(1e3 * batch / own.median)
                if step == NEXT:
                    row.tokens_per_s = rate
                else:
                    row.images_per_s = rate
            elif step == PREPROCESS and found.outcome == COMPLETE:
                row.outcome = NO_PROCESSOR
            elif step == NEXT and name in is_noise:
                row.outcome = LOST_IN_NOISE
            yield row


def _prepare(row: Row, candidate: _Candidate, conditions: Conditions, new_tokens: int) -> dict[str, Work]:
    """Fill in what is known of a model at a batch size, check what it computes, and return what is to be timed."""
    chat, device = candidate.chat, conditions.device
    assert chat is not None and isinstance(row.batch, int)
    inputs = chat.make_inputs(row.batch)
    row.prompt_tokens = inputs["input_ids"].shape[1]
    row.height, row.width = inputs["pixel_values"].shape[-2:]
    row.visual_tokens = int((inputs["input_ids"][0] == chat.model.config.image_token_id).sum())
    row.relative_error = round_to(_check_answer(chat.model, inputs, row, device), 2)
    replay = candidate.replay = _record(chat.model, row.mode)

    def encode() -> None:
        with computing_in(row.precision, device):
            chat.model.get_image_features(pixel_values=inputs["pixel_values"])

    def answer(tokens: int) -> None:
        with computing_in(row.precision, device):
            _generate(chat.model, inputs if replay is None else replay.prepare(inputs, tokens), tokens)

    works: dict[str, Work] = {
        ENCODER: encode,
        FIRST: functools.partial(answer, 1),
        _ANSWER: functools.partial(answer, new_tokens),
    }
    if chat.has_processor:
        works[PREPROCESS] = functools.partial(chat.make_inputs, row.batch)
    forget_peak(device)
    others = held_bytes(device) - candidate.own_bytes
    for work in works.values():
        for _ in range(conditions.warmup):
            work()
    wait(device)
    row.peak_memory_gib = peak_gib(device, besides=others)
    return works


def _record(model: Any, mode: str) -> Replay | None:
    return Replay(model, compiled=_RECORDED[mode]) if mode in _RECORDED else None


def _check_answer(model: Any, inputs: dict[str, Tensor], row: Row, device: torch.device) -> float:
    """Return the relative error of the logits of a short answer.

    Raises:
        WrongResultError: it is too large.
    """
    replay, precision = _record(model, row.mode), row.precision
    with computing_in(precision, device):
        for _ in range(1 if replay is None else _CALLS_TO_RECORD):
            given = inputs if replay is None else replay.prepare(inputs, _CHECKED_TOKENS)
            answer = _generate(model, given, _CHECKED_TOKENS, output_logits=True)
    if replay is not None:
        replay.close()  # it holds the addresses of weights that are about to move
    logits = torch.stack(answer.logits, dim=1).float().cpu()  # [B, T, V]
    sequences = answer.sequences[:, -(inputs["input_ids"].shape[1] + _CHECKED_TOKENS) : -1]  # without padding
    whole = {
        **inputs,
        "input_ids": sequences,
        "attention_mask": torch.ones_like(sequences),
        "pixel_values": inputs["pixel_values"].float(),
    }
    dtype = getattr(torch, precision)
    cast_weights(model, torch.float32)
    try:
        with computing_in("float32", device):
            reference = model(**whole, use_cache=False, logits_to_keep=_CHECKED_TOKENS).logits.float().cpu()
    finally:
        cast_weights(model, dtype)
    return check_output(logits, reference, precision)


def _generate(model: Any, inputs: dict[str, Any], tokens: int, *, output_logits: bool = False) -> Any:
    """Answer greedily with exactly so many tokens."""
    settings = generation_config(tokens, use_cache=True, return_dict_in_generate=True, output_logits=output_logits)
    return model.generate(**inputs, generation_config=settings)
