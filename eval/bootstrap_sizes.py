"""Full-size bootstrap runs with random weights: what the measurements of speed and of scaling have in common.

Random weights cost what trained ones cost. The images are drawings, saved as JPEG files: flat areas decode faster than
photographs do, so keep an eye on the share of time that a run waits for data.
"""

from dataclasses import dataclass
from pathlib import Path

from sf_mllm.cores import count_cores

CONFIGS = Path(__file__).parents[1] / "configs" / "bootstrap"


@dataclass(frozen=True)
class Size:
    """A shipped configuration, and how a GPU of 140 GB is filled with it."""

    config: str
    """File in configs/bootstrap."""
    micro_batch: int
    """Images of one forward and backward pass on one device."""
    overrides: tuple[str, ...] = ("teacher.pretrained=null", "teacher.allow_random=true")
    """What makes the configuration run without downloads."""

    @property
    def path(self) -> str:
        """Of the configuration file."""
        return str(CONFIGS / self.config)


SIZES = {
    "base": Size("openai_vit_b16.yaml", micro_batch=256),
    "large": Size("openai_vit_l14.yaml", micro_batch=128),
    "tiny": Size("demo.yaml", micro_batch=8, overrides=()),  # rehearses the measurement on a CPU
}


def run_overrides(
    size: Size,
    *,
    images: Path,
    output_dir: Path,
    steps: int,
    micro_batch: int,
    accumulation: int,
    compiled: bool,
) -> list[str]:
    """Return the overrides of a short run on drawings that is logged four times and saves no checkpoint."""
    return [
        *size.overrides,
        f"data.images={images}",
        "data.held_out=2",
        f"output_dir={output_dir}",
        f"train.max_steps={steps}",
        f"train.logging_steps={max(1, steps // 4)}",
        "train.save_strategy=no",
        "train.eval_strategy=no",
        f"train.per_device_train_batch_size={micro_batch}",
        f"train.per_device_eval_batch_size={micro_batch}",
        f"train.gradient_accumulation_steps={accumulation}",
        f"train.torch_compile={str(compiled).lower()}",
    ]


def draw_images(folder: Path, count: int, image_size: int) -> Path:
    """Draw scenes as JPEG files, unless they are there; return their folder."""
    from sf_mllm.data.scenes.export import export_scenes

    workers = count_cores() if count >= 256 else 1  # a worker takes seconds to start
    return export_scenes(folder, count=count, image_size=image_size, turns=1, workers=workers) / "images"
