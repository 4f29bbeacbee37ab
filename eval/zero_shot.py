"""Zero-shot scores of an open_clip model, or of a SparseFormer in the place of its image tower.

Protocols `scenes-zero-shot-1`, `clutter-zero-shot-1`: held-out scenes of `sf_mllm.data.scenes.tasks`; every sample is
one rendered scene and a list of texts, exactly one of them true; the answer is the text with the highest cosine
similarity. Command: `python -m eval.zero_shot --clip DIR [--tasks clutter]`. With `--tasks FOLDER` a user's own tasks,
protocol `folder-zero-shot-1`: images are squeezed into a square.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sf_mllm.assets import resolve_demo
from sf_mllm.errors import InputError, report_input_errors

if TYPE_CHECKING:
    from torch import Tensor

    from sf_mllm.data.zero_shot_tasks import ZeroShotTask
    from sf_mllm.training.bootstrap.zero_shot import ZeroShotResult


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
    prompts: Sequence[str] = ("{}",),
) -> "list[ZeroShotResult]":
    """Score an image and a text encoder.

    Args:
        tasks: from `read_tasks` or `build_tasks`.
        encode_image: normalised pixels [B, 3, H, W] -> [B, E].
        encode_text: tokens [B, T] -> [B, E].
        tokenizer: texts -> tokens [B, T].
        image_size: side of the images in pixels.
        mean: per channel, of pixels in 0..1.
        std: per channel.
        device: where both encoders live.
        prompts: for names of classes, which take the place of "{}".
    """
    import torch

    from sf_mllm.training.bootstrap.zero_shot import ZeroShotScorer

    shift = torch.tensor(mean, device=device)[:, None, None]
    scale = torch.tensor(std, device=device)[:, None, None]
    scorer = ZeroShotScorer(
        tasks,
        lambda texts: encode_text(tokenizer(texts).to(device)),
        image_size=image_size,
        device=device,
        prompts=prompts,
    )
    return scorer.score(lambda pixels: encode_image((pixels.float() / 255 - shift) / scale))


def evaluate_directory(
    clip_directory: str | Path,
    encoder_directory: str | Path | None = None,
    *,
    tasks: str = "scenes",
    samples: int = 512,
    prompts: Sequence[str] = ("a photo of a {}.",),
    device: str = "cpu",
) -> "list[ZeroShotResult]":
    """Score an open_clip model directory, its image tower replaced by a SparseFormer if one is given.

    Args:
        clip_directory: with `open_clip_config.json`, weights and tokenizer.
        encoder_directory: of a `SparseFormerModel` with its image processor, or None for the model's own image tower.
        tasks: a built-in set or a folder, see `read_tasks`.
        samples: most samples a task.
        prompts: for names of classes.
        device: to run on.
    """
    import open_clip

    from sf_mllm.training.bootstrap.teacher_texts import name_classes, read_tasks

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
        width, own_width = encoder.config.projection_size, clip.visual.output_dim
        if width != own_width:
            raise InputError(
                f"The embeddings of encoder '{encoder_directory}' have {width} numbers, those of '{clip_directory}' "
                f"have {own_width}; give the CLIP that the encoder was made from."
            )
        processor = SparseFormerImageProcessor.from_pretrained(encoder_directory)
        mean, std = processor.image_mean, processor.image_std

        def encode_image(pixels: "Tensor") -> "Tensor":
            return encoder(pixels).pooler_output

    return evaluate(
        [name_classes(task) for task in read_tasks(tasks, samples)],
        encode_image,
        clip.encode_text,
        open_clip.get_tokenizer(name),
        image_size=image_size if isinstance(image_size, int) else image_size[0],
        mean=mean,
        std=std,
        device=device,
        prompts=prompts,
    )


@report_input_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.zero_shot", description="Zero-shot tasks, scene by scene.")
    parser.add_argument("--clip", required=True, help="open_clip model directory, or demo:clip")
    parser.add_argument("--encoder", help="SparseFormer directory to use as the image tower")
    parser.add_argument("--tasks", default="scenes", help="scenes, clutter, or a folder of your own (default: scenes)")
    parser.add_argument("--samples", type=int, default=512, help="most samples a task (default: 512)")
    parser.add_argument(
        "--prompt", action="append", help='for names of classes; repeat to average (default: "a photo of a {}.")'
    )
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--rows", type=Path, help="folder whose zero_shot.csv the results are appended to")
    options = parser.parse_args(arguments)
    results = evaluate_directory(
        options.clip,
        options.encoder,
        tasks=options.tasks,
        samples=options.samples,
        prompts=options.prompt or ("a photo of a {}.",),
        device=options.device,
    )
    for item in results:
        print(
            f"{item.task:14} {100 * item.accuracy:5.1f} %   chance {100 * item.chance:4.1f} %   {item.samples} samples"
        )
    if options.rows is not None:
        from eval.rows import append_rows
        from sf_mllm.data.scenes.tasks import TASK_SETS

        protocol = f"{options.tasks if options.tasks in TASK_SETS else 'folder'}-zero-shot-1"
        row = {"clip": options.clip, "encoder": options.encoder or "its own", "protocol": protocol}
        append_rows("zero_shot", [{**row, **asdict(item)} for item in results], options.device, options.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
