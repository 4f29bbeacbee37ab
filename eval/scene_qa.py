"""Questions about held-out scenes, answered from the image (`--model`), by a decoder alone from a text, or both.

Protocols `scenes-qa-2` and `clutter-qa-1`: scenes of 1-8 objects of a seed that nothing is trained on, three questions
a scene, one question a conversation, greedy decoding. An answer is right if it equals the expected one up to letter
case, outer white space and a final full stop; in a description the order of the objects does not matter. "majority" is
the accuracy of always giving the type's most frequent answer. (`scenes-qa-1` asked in fewer ways.)
Command: `python -m eval.scene_qa --model DIR --decoder DIR --failures FILE.jsonl`.
"""

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sf_mllm.assets import resolve_demo
from sf_mllm.config import write_text_atomically
from sf_mllm.constants import IMAGE_TOKEN
from sf_mllm.errors import CommandLineParser, InputError, report_input_errors

if TYPE_CHECKING:
    from sf_mllm.data.scenes.language import SceneObject
    from sf_mllm.data.scenes.questions import SceneQuestion

HELD_OUT_SEED = 4_000_000_002
"""Seed of the evaluation scenes; nothing is trained on it."""

PROTOCOLS = {"plain": "scenes-qa-2", "clutter": "clutter-qa-1"}
"""By the domain of the scenes."""
QUESTIONS_PER_SCENE = 3
MAX_NEW_TOKENS = 128
_SCENES_AT_ONCE = 256


@dataclass
class AskedScene:
    """One question about one scene."""

    domain: str
    index: int  # of the scene under the seed
    objects: "Sequence[SceneObject]"
    question: "SceneQuestion"


@dataclass
class QAResult:
    """Score of one question type, or of all types with equal weight ("mean")."""

    type: str
    accuracy: float  # 0..1
    majority: float  # accuracy of always giving the most frequent answer
    samples: int


def held_out_questions(count: int, domain: str = "plain") -> list[AskedScene]:
    """Return the first `count` questions about the held-out scenes of a domain, always the same ones."""
    import torch

    from sf_mllm.data.scenes.export import question_rng
    from sf_mllm.data.scenes.language import objects_of
    from sf_mllm.data.scenes.questions import ask_questions
    from sf_mllm.data.scenes.sampling import ScenesConfig, sample_scenes

    asked: list[AskedScene] = []
    config = ScenesConfig(seed=HELD_OUT_SEED, domain=domain)
    for start in range(0, count, _SCENES_AT_ONCE):  # one question a scene is the least there can be
        indices = torch.arange(start, start + _SCENES_AT_ONCE)
        for index, objects in enumerate(objects_of(sample_scenes(indices, config)), start):
            for question in ask_questions(objects, question_rng(HELD_OUT_SEED, index), QUESTIONS_PER_SCENE):
                asked.append(AskedScene(domain, index, objects, question))
        if len(asked) >= count:
            break
    return asked[:count]


def is_right(question: "SceneQuestion", answer: str) -> bool:
    """Tell whether an answer is the expected one by the rules of the protocol."""

    def normal(text: str) -> Any:
        text = text.strip().lower().removesuffix(".")
        return sorted(text.replace(" and ", ", ").split(", ")) if question.type == "description" else text

    return normal(answer) == normal(question.answer)


def score(asked: Sequence[AskedScene], answers: Sequence[str]) -> list[QAResult]:
    """Return accuracy and majority baseline of each type, in alphabetical order, then their mean."""
    from sf_mllm.data.scenes.questions import majority_baseline

    hits: dict[str, list[bool]] = defaultdict(list)
    for item, answer in zip(asked, answers, strict=True):
        hits[item.question.type].append(is_right(item.question, answer))
    baseline = majority_baseline(item.question for item in asked)
    results = [
        QAResult(kind, sum(found) / len(found), baseline[kind][1], len(found)) for kind, found in sorted(hits.items())
    ]
    mean = QAResult(
        "mean",
        sum(result.accuracy for result in results) / len(results),
        sum(result.majority for result in results) / len(results),
        len(asked),
    )
    return [*results, mean]


def answer_from_images(model: Any, processor: Any, asked: Sequence[AskedScene], batch_size: int = 256) -> list[str]:
    """Let an image-text model answer.

    Args:
        model: in eval mode, on its device.
        processor: the model's.
        asked: questions of one call of `held_out_questions`; their scenes are rendered here, on the model's device.
        batch_size: questions answered at once.
    """
    import torch

    from sf_mllm.data.scenes.render import render
    from sf_mllm.data.scenes.sampling import ScenesConfig, sample_scenes

    config = ScenesConfig(seed=HELD_OUT_SEED, domain=asked[0].domain)

    def encode(batch: Sequence[AskedScene]) -> Any:
        scenes = sample_scenes(torch.tensor([item.index for item in batch]), config)
        images = list(render(scenes.to(model.device), config.image_size).cpu())
        prompts = [render_prompt(processor, f"{IMAGE_TOKEN}\n{item.question.question}") for item in batch]
        return processor(images=images, text=prompts, padding=True, padding_side="left", return_tensors="pt")

    return generate_answers(model, processor.tokenizer, encode, asked, batch_size)


def answer_from_texts(model: Any, tokenizer: Any, asked: Sequence[AskedScene], batch_size: int = 256) -> list[str]:
    """Let a text-only decoder answer from a description in the place of the image.

    Args:
        model: causal language model in eval mode, on its device.
        tokenizer: the model's.
        asked: questions of `held_out_questions`.
        batch_size: questions answered at once.
    """
    from sf_mllm.data.scenes.export import question_rng
    from sf_mllm.data.scenes.language import describe_for_reading

    def encode(batch: Sequence[AskedScene]) -> Any:
        texts = [describe_for_reading(item.objects, question_rng(HELD_OUT_SEED, item.index)) for item in batch]
        prompts = [
            render_prompt(tokenizer, f"{text}\n{item.question.question}")
            for text, item in zip(texts, batch, strict=True)
        ]
        return tokenizer(prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")

    return generate_answers(model, tokenizer, encode, asked, batch_size)


def format_results(results: Sequence[QAResult], from_words: Sequence[QAResult] | None = None) -> str:
    """Return a table for people, with the scores of a decoder that reads words beside those from images."""
    lines = [f"{'type':<14}{'accuracy':>9}{'majority':>10}{'samples':>9}" + "  from words" * (from_words is not None)]
    for number, r in enumerate(results):
        words = f"{from_words[number].accuracy:>12.1%}" if from_words else ""
        lines.append(f"{r.type:<14}{r.accuracy:>9.1%}{r.majority:>10.1%}{r.samples:>9}{words}")
    return "\n".join(lines)


def format_failures(asked: Sequence[AskedScene], answers: Mapping[str, Sequence[str]]) -> str:
    """Return every wrong answer as a line of JSON.

    Args:
        asked: the questions.
        answers: to all of them, by what was read: "image" or "text".
    """
    rows = [
        {
            "reads": reads,
            "domain": item.domain,
            "scene": item.index,
            "type": item.question.type,
            "question": item.question.question,
            "given": answer,
            "expected": item.question.answer,
        }
        for reads, given in answers.items()
        for item, answer in zip(asked, given, strict=True)
        if not is_right(item.question, answer)
    ]
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def render_prompt(renderer: Any, content: str) -> str:
    """Return the text up to where the answer to one user turn starts; `renderer` is a processor or a tokenizer."""
    return renderer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )


def generate_answers(
    model: Any,
    tokenizer: Any,
    encode: Callable[[Sequence[AskedScene]], Any],
    asked: Sequence[AskedScene],
    batch_size: int,
) -> list[str]:
    """Answer greedily, in the order of `asked`; long answers share batches, so that short ones need not wait for them.

    Args:
        model: in eval mode, on its device.
        tokenizer: the model's.
        encode: some questions to the model's inputs, padded on the left.
        asked: questions of `held_out_questions`.
        batch_size: questions answered at once.
    """
    import torch

    order = sorted(range(len(asked)), key=lambda position: len(asked[position].question.answer))
    answers = [""] * len(asked)
    waiting = iter(order)
    while batch := list(islice(waiting, batch_size)):
        inputs = encode([asked[position] for position in batch]).to(model.device)
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for position, text in zip(batch, texts, strict=True):
            answers[position] = text.strip()
    return answers


@report_input_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = CommandLineParser(prog="python -m eval.scene_qa", description="Questions about held-out scenes.")
    parser.add_argument("--model", help="model directory of stage two, or demo:sf_llava: answers from the image")
    parser.add_argument("--decoder", help="decoder directory, or demo:decoder: answers from a text, without the image")
    parser.add_argument("--domain", choices=sorted(PROTOCOLS), default="plain", help="of the scenes (default: plain)")
    parser.add_argument("--questions", type=int, default=5000, help="default: 5000")
    parser.add_argument("--batch-size", type=int, default=256, help="default: 256")
    parser.add_argument("--device", help="cuda, mps, cpu; default: the best there is")
    parser.add_argument("--dtype", help="float32, bfloat16, float16; default: bfloat16 on cuda, else float32")
    parser.add_argument("--failures", type=Path, help="JSON lines file for the wrong answers")
    parser.add_argument("--rows", type=Path, help="folder whose scene_qa.csv the results are appended to")
    options = parser.parse_args(arguments)
    if options.model is None and options.decoder is None:
        raise InputError("There is nothing to ask; give --model, --decoder or both.")
    if options.questions < 1 or options.batch_size < 1:
        raise InputError("--questions and --batch-size must be at least 1.")

    from sf_mllm.inference.loading import choose_device, choose_dtype, load_model
    from sf_mllm.training.instruct.parts import load_decoder

    asked = held_out_questions(options.questions, options.domain)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    answers: dict[str, list[str]] = {}
    if options.model:
        model, processor = load_model(options.model, options.device, options.dtype)
        answers["image"] = answer_from_images(model, processor, asked, options.batch_size)
    if options.decoder:
        decoder, tokenizer = load_decoder(options.decoder, dtype)
        answers["text"] = answer_from_texts(decoder.to(device).eval(), tokenizer, asked, options.batch_size)

    results = {reads: score(asked, given) for reads, given in answers.items()}
    if len(results) == 2:
        print(format_results(results["image"], results["text"]))
    else:
        print(format_results(*results.values()))
    if options.failures:
        write_text_atomically(options.failures, format_failures(asked, answers))
        print(f"Wrong answers are in {options.failures}")
    if options.rows:
        from eval.rows import append_rows

        rows = []
        for reads, scores in results.items():
            source = options.model if reads == "image" else options.decoder
            common = {
                "model": source,
                "weights_sha256": _digest_weights(Path(resolve_demo(source))),
                "reads": reads,
                "protocol": PROTOCOLS[options.domain],
                "precision": str(dtype).removeprefix("torch."),
            }
            rows += [{**common, **asdict(result)} for result in scores]
        append_rows("scene_qa", rows, device.type, options.rows)
    return 0


def _digest_weights(directory: Path) -> str:
    """Return the first digits of the SHA-256 of the weight files; "unknown" for a model on the hub."""
    files = sorted(directory.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12] if files else "unknown"


if __name__ == "__main__":
    sys.exit(main())
