"""What each variant of `eval.compare_encoders` costs, with the device to itself; weights play no part.

Protocol `compare-speed-2`:

- `encoder_ms`: normalised pixels to visual tokens of the language model's width, tower, peer and projector.
- `first_token_ms`: pixels and one question to the first token of `generate`.
- `encoder_compiled`: whether these two are compiled and replayed as CUDA graphs, as chats are with `--compile`.
- `answer_memory_gib`: peak of a first token for a batch of 64, weights included.
- `train_step_ms`, `train_step_memory_gib`: forward and backward of one training batch, tower included, not compiled.

Times are medians. On a GPU weights are bfloat16 (float32 under bfloat16 autocast for the training step). In rows of
`compare-speed-1` nothing was replayed, and the language model was not compiled.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eval.compare_data import TRAINING_SEED, TensorConversations, Texts, render_scenes
from eval.compare_model import join_llava
from eval.compare_parts import Parts
from eval.compare_run import Run, encode_prompts
from sf_mllm.bench.timing import forget_peak, peak_gib, time_in_turns
from sf_mllm.constants import IMAGE_TOKEN
from sf_mllm.inference.replay import Replay, generation_config
from sf_mllm.vlm.adapters import add_adapters

PROTOCOL = "compare-speed-2"
BATCHES = (1, 64)
COLUMNS = (
    *(f"encoder_ms_{batch}" for batch in BATCHES),
    "encoder_compiled",
    *(f"first_token_ms_{batch}" for batch in BATCHES),
    "answer_memory_gib",
    "train_step_ms",
    "train_step_memory_gib",
)
_QUESTION = "What color is the small circle?"


def measure_speed(
    parts: Parts, run: Run, texts: dict[str, Texts], *, device: torch.device, compiled: bool, repeats: int
) -> dict[str, Any]:
    """Return what was measured, for the variant of a run: its settings and the figures named in `COLUMNS`.

    Args:
        parts: where models come from.
        run: whose variant and layer are measured.
        texts: the comparison's, for the length of a training batch.
        device: to work on.
        compiled: compile and record what `encoder_ms` and `first_token_ms` are of, on a CUDA device.
        repeats: of each measurement, after as many to warm up, at most ten.
    """
    torch._dynamo.reset()  # a limit on how often one function is compiled counts the variants before, too
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tower = parts.tower(run.variant, run.layer or 0, dtype)
    decoder, tokenizer = parts.decoder(dtype)
    peer = parts.peer(run.variant, tower, decoder)
    model: Any = join_llava(None if tower is None else tower.module, peer, decoder, tokenizer)
    model.model.multi_modal_projector.to(dtype)
    model.to(device).eval()
    pixel_values: Tensor | None = None
    image = ""
    settings = parts.settings
    figures: dict[str, Any] = {
        "protocol": PROTOCOL,
        "variant": run.variant,
        "tokens_per_image": peer.num_tokens,
        "teacher_layer": "" if run.layer is None else run.layer,
        **{name: getattr(settings, name) for name in ("size", "teacher", "decoder", "domain")},
        "encoders": " ".join(settings.encoders),
        **{name: getattr(settings, name) for name in ("batch_size", "lora_rank", "max_length")},
        **dict.fromkeys(COLUMNS, ""),
    }
    if tower is not None:
        pixels = render_scenes(parts.settings.domain, TRAINING_SEED, range(max(BATCHES)), parts.image_size, device)
        pixel_values = tower.prepare(pixels).to(dtype)
        image = IMAGE_TOKEN * peer.num_tokens + "\n"
    figures["encoder_compiled"] = compiled
    replay = Replay(model, compiled=True) if compiled else None

    def first_token(inputs: dict[str, Tensor]) -> Any:
        given = inputs if replay is None else replay.prepare(inputs, 1)
        return model.generate(**given, generation_config=generation_config(1))

    forget_peak(device)
    with torch.inference_mode():
        for batch in BATCHES:
            inputs = dict(encode_prompts(tokenizer, [image + _QUESTION] * batch).to(device))
            inputs.pop("token_type_ids", None)
            if pixel_values is not None:
                inputs["pixel_values"] = some = pixel_values[:batch].contiguous()
                encode = functools.partial(model.model.get_image_features, pixel_values=some, return_dict=True)
                figures[f"encoder_ms_{batch}"] = _median_ms(encode, device, repeats)
            figures[f"first_token_ms_{batch}"] = _median_ms(functools.partial(first_token, inputs), device, repeats)
    figures["answer_memory_gib"] = peak_gib(device)
    if replay is not None:
        replay.close()
    return figures | measure_training(parts, run, texts, device=device, repeats=repeats)


def measure_training(
    parts: Parts, run: Run, texts: dict[str, Texts], *, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Return time and memory of forward and backward of one training batch; arguments as for `measure_speed`."""
    settings = parts.settings
    tower = parts.tower(run.variant, run.layer or 0)
    decoder, tokenizer = parts.decoder()
    peer = parts.peer(run.variant, tower, decoder)
    joined = join_llava(None if tower is None else tower.module, peer, decoder, tokenizer)
    model: nn.Module = add_adapters(joined, rank=settings.lora_rank, alpha=2 * settings.lora_rank, dropout=0.0)  # type: ignore[arg-type]
    model.to(device).train()
    kind = texts["text" if tower is None else "image"]
    pixel_values = None
    if tower is not None:
        tower.module.eval()
        pixels = render_scenes(
            parts.settings.domain, TRAINING_SEED, range(settings.batch_size), parts.image_size, device
        )
        pixel_values = tower.prepare(pixels)
    conversations = TensorConversations(
        kind.rows(slice(settings.batch_size)),
        pixel_values,
        image_token_id=joined.config.image_token_id,
        num_tokens=peer.num_tokens,
        device=device,
    )
    batch = conversations.__getitems__(list(range(len(conversations))))

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        model.zero_grad()

    forget_peak(device)
    return {
        "train_step_ms": _median_ms(step, device, max(1, repeats // 4)),
        "train_step_memory_gib": peak_gib(device),
    }


def _median_ms(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Milliseconds of one call, the device's work included."""
    times = time_in_turns({"work": work}, device, repeats=repeats, warmup=min(repeats, 10))
    return round(times["work"].median, 3)
