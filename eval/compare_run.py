"""One run of `eval.compare_encoders`: train projector and LoRA on the tokens of one variant, then let it answer."""

import gc
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed

from eval.compare_data import (
    TRAINING_SEED,
    VALIDATION_SCENES,
    TensorConversations,
    Texts,
    encode_scenes,
    make_texts,
)
from eval.compare_model import join_llava
from eval.compare_parts import NO_IMAGE, OF_TEACHER, Parts, Settings, Tower
from eval.scene_qa import (
    HELD_OUT_SEED,
    PROTOCOLS,
    AskedScene,
    generate_answers,
    held_out_questions,
    render_prompt,
    score,
)
from sf_mllm.bench.rows import describe_provenance
from sf_mllm.bench.timing import forget_peak, held_bytes, now, peak_gib
from sf_mllm.compiler import mend_compiler
from sf_mllm.config import write_text_atomically
from sf_mllm.constants import IMAGE_TOKEN
from sf_mllm.cores import count_cores
from sf_mllm.data.scenes.questions import QUESTION_TYPES
from sf_mllm.training.arguments import make_training_arguments
from sf_mllm.training.instruct.trainer import InstructTrainer
from sf_mllm.training.progress import ProgressReporter
from sf_mllm.vlm.adapters import add_adapters

logger = logging.getLogger("sf_mllm.compare")

PROTOCOL = "compare-encoders-1"

_ANSWER_BATCH = 512
_MOST_WORKERS = 16


@dataclass(frozen=True)
class Run:
    """What is trained once; `layer` and `projector_learning_rate` are choices of which a variant may try several."""

    variant: str
    seed: int
    projector_learning_rate: float
    layer: int | None  # of the teacher; None for variants that do not read it

    @property
    def name(self) -> str:
        """Of the run's files."""
        layer = "" if self.layer is None else f"-layer{self.layer}"
        return f"{self.variant}{layer}-rate{self.projector_learning_rate:g}-seed{self.seed}"


def plan_runs(
    variants: Sequence[str], seeds: Sequence[int], rates: Sequence[float], layers: Sequence[int]
) -> list[Run]:
    """Return all runs, those of one variant one after the other; without an image there is no projector to try."""
    return [
        Run(variant, seed, rate, layer)
        for variant in variants
        for layer in (layers if variant in OF_TEACHER else (None,))
        for rate in (rates if variant != NO_IMAGE else rates[:1])
        for seed in seeds
    ]


def make_all_texts(settings: Settings, tokenizer: PreTrainedTokenizerBase, out: Path) -> dict[str, Texts]:
    """Make the training and validation conversations, or read them: with an image in front ("image") and without."""
    workers = min(count_cores(), _MOST_WORKERS)
    return {
        kind: make_texts(
            tokenizer,
            settings.domain,
            settings.scenes + VALIDATION_SCENES,
            with_images=kind == "image",
            max_length=settings.max_length,
            workers=workers,
            file=out / f"texts-{kind}.safetensors",
        )
        for kind in ("image", "text")
    }


def train_variant(
    parts: Parts, runs: Sequence[Run], out: Path, *, device: torch.device, compiled: bool, parallel: int
) -> None:
    """Train the runs of one variant that have no result yet; the tower sees each image once for all of them.

    Args:
        parts: where models come from.
        runs: of one variant.
        out: folder of the comparison.
        device: to work on.
        compiled: compile the model for training.
        parallel: processes that share the device, for the record.
    """
    settings = parts.settings
    asked = held_out_questions(settings.questions, settings.domain)
    texts = make_all_texts(settings, parts.tokenizer(), out)
    for layer in dict.fromkeys(run.layer for run in runs):
        missing = [run for run in runs if run.layer == layer and not result_file(out, run).is_file()]
        if not missing:
            continue
        began = now(device)
        seen = _see_images(parts, missing[0], asked, device)
        features_s = round(now(device) - began, 2)
        for run in missing:
            logger.info("%s", run.name)
            gc.collect()  # of the run before, whose memory would count as this one's
            result = _train_and_answer(parts, run, texts, seen, asked, out, device, compiled)
            shared = {"features_s": features_s, "compiled": compiled, "parallel": parallel, "outcome": "complete"}
            row = {**result, **shared, **describe_provenance(device.type)}
            write_text_atomically(result_file(out, run), json.dumps(row, indent=1))


def result_file(out: Path, run: Run) -> Path:
    """Where the result of a run lies once it is complete."""
    return out / "runs" / f"{run.name}.json"


@dataclass(frozen=True)
class _Seen:
    """Tokens [S, N, D] of the training scenes and of the held-out ones, with the tower that made them."""

    tower: Tower | None
    training: Tensor | None
    held_out: Tensor | None


def _see_images(parts: Parts, run: Run, asked: Sequence[AskedScene], device: torch.device) -> _Seen:
    tower = parts.tower(run.variant, run.layer or 0)
    if tower is None:
        return _Seen(None, None, None)
    tower.module.to(device)
    training, held_out = (
        encode_scenes(tower, parts.settings.domain, seed, count, image_size=parts.image_size, device=device)
        for seed, count in (
            (TRAINING_SEED, parts.settings.scenes + VALIDATION_SCENES),
            (HELD_OUT_SEED, asked[-1].index + 1),
        )
    )
    return _Seen(tower, training, held_out)


def _train_and_answer(
    parts: Parts,
    run: Run,
    texts: dict[str, Texts],
    seen: _Seen,
    asked: Sequence[AskedScene],
    out: Path,
    device: torch.device,
    compiled: bool,
) -> dict[str, Any]:
    settings = parts.settings
    model, tokenizer, num_tokens = build_model(parts, run, seen.tower)
    kind = texts["text" if seen.tower is None else "image"]
    training, validation = (
        TensorConversations(
            kind.rows(rows),
            None if seen.training is None else seen.training[rows],
            image_token_id=model.config.image_token_id,
            num_tokens=num_tokens,
            device=device,
        )
        for rows in (slice(settings.scenes), slice(settings.scenes, None))
    )
    trained_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    is_cuda = device.type == "cuda"
    forget_peak(device)
    before = held_bytes(device)
    (out / "runs").mkdir(exist_ok=True)
    trainer = make_trainer(model, settings, run, training, out, device, compiled)
    began = time.monotonic()
    trainer.train()
    training_s = time.monotonic() - began
    memory = peak_gib(device, besides=before)
    validation_loss = trainer.evaluate(validation)["eval_loss"]

    answering = model.merge_and_unload().eval()
    answering = answering.to(device, torch.bfloat16 if is_cuda else torch.float32)
    with torch.compiler.set_stance("force_eager"):  # prompts have many lengths
        answers = answer(answering, tokenizer, asked, seen.held_out, num_tokens)
    results = {result.type: result for result in score(asked, answers)}
    return {
        "protocol": PROTOCOL,
        "questions_protocol": PROTOCOLS[settings.domain],
        "variant": run.variant,
        "seed": run.seed,
        "tokens_per_image": num_tokens,
        "teacher_layer": "" if run.layer is None else run.layer,
        "projector_learning_rate": run.projector_learning_rate,
        **{name: " ".join(value) if name == "encoders" else value for name, value in asdict(settings).items()},
        "trained_parameters": trained_parameters,
        "validation_loss": round(validation_loss, 5),
        # Rehearsals ask so few questions that types may be missing.
        **{f"accuracy_{kind}": _accuracy(results, kind) for kind in ("mean", *QUESTION_TYPES)},
        "majority_mean": round(results["mean"].majority, 4),
        "training_s": round(training_s, 2),
        "train_memory_gib": memory,
    }


def _accuracy(results: dict[str, Any], kind: str) -> float | str:
    return round(results[kind].accuracy, 4) if kind in results else ""


def build_model(parts: Parts, run: Run, tower: Tower | None) -> tuple[Any, PreTrainedTokenizerBase, int]:
    """Return the model that trains, its tokenizer and its number of visual tokens.

    The adapters start alike in all variants of a seed.

    Args:
        parts: where models come from.
        run: what is trained.
        tower: whose tokens the model will read; it does not become a part of it.
    """
    decoder, tokenizer = parts.decoder()
    set_seed(run.seed)
    peer = parts.peer(run.variant, tower, decoder)
    model: Any = join_llava(None, peer, decoder, tokenizer)
    set_seed(run.seed)  # again: projectors of different widths draw different numbers
    rank = parts.settings.lora_rank
    return add_adapters(model, rank=rank, alpha=2 * rank, dropout=0.0), tokenizer, peer.num_tokens


def make_trainer(
    model: Any,
    settings: Settings,
    run: Run,
    conversations: TensorConversations,
    out: Path,
    device: torch.device,
    compiled: bool = False,
) -> InstructTrainer:
    """Build stage two's Trainer, with the rates and the schedule of configs/finetune/demo_model.yaml."""
    train: dict[str, Any] = {
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "adam_beta2": 0.98,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": False,  # the data lies on the device
        "logging_steps": max(1, settings.steps // 10),
        "save_strategy": "no",
    }
    if device.type == "cpu":
        train["use_cpu"] = True
    if compiled:
        mend_compiler()
        for layer in model.get_base_model().model.language_model.layers:  # one graph for all, in seconds
            layer.compile(dynamic=False)
    trainer = InstructTrainer(
        projector_learning_rate=run.projector_learning_rate,
        model=model,
        args=make_training_arguments(train, out / "trainer", run.seed),
        train_dataset=conversations,
        data_collator=lambda batch: batch,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressReporter(out / "runs" / f"{run.name}.metrics.jsonl"))
    return trainer


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[AskedScene],
    features: Tensor | None,
    num_tokens: int,
    batch_size: int = _ANSWER_BATCH,
) -> list[str]:
    """Let a model answer, from the tokens that its tower has made of the held-out scenes, or without an image.

    Args:
        model: of `join_llava`, in eval mode, on its device.
        tokenizer: its own.
        asked: questions of `held_out_questions`.
        features: [S, N, D], of the scenes 0 .. S - 1; None without images.
        num_tokens: visual tokens of an image.
        batch_size: questions answered at once.
    """
    image = "" if features is None else IMAGE_TOKEN * num_tokens + "\n"

    def encode(batch: Sequence[AskedScene]) -> Any:
        inputs = encode_prompts(tokenizer, [image + item.question.question for item in batch])
        if features is not None:
            inputs["pixel_values"] = features[[item.index for item in batch]]
        return inputs

    return generate_answers(model, tokenizer, encode, asked, batch_size)


def encode_prompts(tokenizer: Any, contents: Sequence[str]) -> Any:
    """Tokenise user turns up to where the answer starts, padded on the left, as training has seen them."""
    prompts = [render_prompt(tokenizer, content) for content in contents]
    bos = tokenizer.bos_token
    return tokenizer(
        prompts,
        padding=True,
        padding_side="left",
        # as in `data.chat.encode_conversation`
        add_special_tokens=bos is None or not prompts[0].startswith(bos),
        return_tensors="pt",
    )
