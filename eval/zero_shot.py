"""Zero-shot scores on held-out scenes, of an open_clip model or of a SparseFormer in the place of its image tower.

Protocol `scenes-zero-shot-1`: every sample is one rendered scene and a list of texts, exactly one of them true; the
answer is the text with the highest cosine similarity. The tasks "swap", "position" and "relation" need colours, shapes
and places to be bound to objects; a bag of words stays at chance there. Command: `python -m eval.zero_shot --clip DIR`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from sf_mllm.assets import resolve_demo
from sf_mllm.errors import InputError, report_input_errors

if TYPE_CHECKING:
    from torch import Tensor

    from sf_mllm.data.scene_tasks import ZeroShotTask

PROTOCOL = "scenes-zero-shot-1"

_CHUNK = 256


@dataclass
class ZeroShotResult:
    """Score of one task."""

    task: str
    accuracy: float  # 0..1
    samples: int
    chance: float  # accuracy of guessing


def evaluate(
    tasks: "Sequence[ZeroShotTask]",
    encode_image: "Callable[[Tensor], Tensor]",
    encode_text: "Callable[[Tensor], Tensor]",
    tokenizer: "Callable[[list[str]], Tensor]",
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: str,
) -> list[ZeroShotResult]:
    """Score an image and a text encoder.

    Args:
        tasks: from `build_tasks`.
        encode_image: normalised pixels [B, 3, H, W] -> [B, E].
        encode_text: tokens [B, T] -> [B, E].
        tokenizer: texts -> tokens [B, T].
        image_size: side of the rendered images in pixels.
        mean: per channel, of pixels in 0..1.
        std: per channel.
        device: where both encoders live.
    """
    import torch
    import torch.nn.functional as F

    from sf_mllm.data.scene_render import render

    shift = torch.tensor(mean, device=device)[:, None, None]
    scale = torch.tensor(std, device=device)[:, None, None]
    results = []
    with torch.no_grad():
        for task in tasks:
            number_of = {text: number for number, text in enumerate(dict.fromkeys(chain.from_iterable(task.choices)))}
            texts = list(number_of)
            text_features = torch.cat(
                [encode_text(tokenizer(texts[i : i + _CHUNK]).to(device)) for i in range(0, len(texts), _CHUNK)]
            )
            image_features = []
            for start in range(0, len(task.scenes), _CHUNK):
                scenes = task.scenes.select(slice(start, start + _CHUNK)).to(device)
                pixels = render(scenes, image_size).float() / 255
                image_features.append(encode_image((pixels - shift) / scale))
            similarity = F.normalize(torch.cat(image_features).float()) @ F.normalize(text_features.float()).T
            numbers = torch.tensor([[number_of[text] for text in row] for row in task.choices], device=device)  # [B, C]
            predicted = numbers.gather(1, similarity.gather(1, numbers).argmax(dim=1, keepdim=True))
            answers = numbers.gather(1, torch.tensor(task.answers, device=device)[:, None])
            accuracy = (predicted == answers).double().mean().item()
            results.append(ZeroShotResult(task.name, accuracy, len(task.scenes), 1 / numbers.shape[1]))
    return results


def evaluate_directory(
    clip_directory: str | Path, encoder_directory: str | Path | None = None, *, samples: int = 512, device: str = "cpu"
) -> list[ZeroShotResult]:
    """Score an open_clip model directory, its image tower replaced by a SparseFormer if one is given.

    Args:
        clip_directory: with `open_clip_config.json`, weights and tokenizer.
        encoder_directory: of a `SparseFormerModel` with its image processor, or None for the model's own image tower.
        samples: per task.
        device: to run on.
    """
    import open_clip

    from sf_mllm.data.scene_tasks import build_tasks

    clip_directory = Path(resolve_demo(str(clip_directory)))
    if not (clip_directory / "open_clip_config.json").is_file():
        raise InputError(
            f"'{clip_directory}' holds no open_clip_config.json; give the directory of an open_clip model."
        )
    name = f"local-dir:{clip_directory}"
    clip = open_clip.create_model(name, device=device, require_pretrained=True).eval()
    preprocessing = clip.visual.preprocess_cfg
    encode_image, mean, std = clip.encode_image, preprocessing["mean"], preprocessing["std"]
    image_size = preprocessing["size"]
    if encoder_directory is not None:
        from sf_mllm.encoder.image_processing_sparseformer import SparseFormerImageProcessor
        from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel

        encoder_directory = resolve_demo(str(encoder_directory))
        encoder = SparseFormerModel.from_pretrained(encoder_directory).to(device).eval()
        processor = SparseFormerImageProcessor.from_pretrained(encoder_directory)
        mean, std = processor.image_mean, processor.image_std

        def encode_image(pixels: "Tensor") -> "Tensor":
            return encoder(pixels).pooler_output

    return evaluate(
        build_tasks(samples),
        encode_image,
        clip.encode_text,
        open_clip.get_tokenizer(name),
        image_size=image_size if isinstance(image_size, int) else image_size[0],
        mean=mean,
        std=std,
        device=device,
    )


def format_results(results: Sequence[ZeroShotResult]) -> str:
    """Return one line with all accuracies in percent, chance in brackets."""
    return "  ".join(f"{item.task} {100 * item.accuracy:.1f} ({100 * item.chance:.1f})" for item in results)


@report_input_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.zero_shot", description="Zero-shot tasks on held-out scenes.")
    parser.add_argument("--clip", required=True, help="open_clip model directory, or demo:clip")
    parser.add_argument("--encoder", help="SparseFormer directory to use as the image tower")
    parser.add_argument("--samples", type=int, default=512, help="per task (default: 512)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--rows", type=Path, help="folder whose zero_shot.csv the results are appended to")
    options = parser.parse_args(arguments)
    results = evaluate_directory(options.clip, options.encoder, samples=options.samples, device=options.device)
    for item in results:
        print(
            f"{item.task:14} {100 * item.accuracy:5.1f} %   chance {100 * item.chance:4.1f} %   {item.samples} samples"
        )
    if options.rows is not None:
        from eval.rows import append_rows

        row = {"clip": options.clip, "encoder": options.encoder or "its own", "protocol": PROTOCOL}
        append_rows("zero_shot", [{**row, **asdict(item)} for item in results], options.device, options.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
