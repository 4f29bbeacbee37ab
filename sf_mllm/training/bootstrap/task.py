"""Stage one's task: what a student is asked, with its frozen teacher, images and losses."""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sf_mllm.data.quantised_patches import dequantise
from sf_mllm.encoder.modeling_sparseformer import SparseFormerOutput
from sf_mllm.ops.implementations import REFERENCE
from sf_mllm.training.bootstrap.config import LossConfig
from sf_mllm.training.bootstrap.losses import (
    attraction_loss,
    average_in_rois,
    classification_loss,
    coverage_loss,
    embedding_loss,
    point_hinge_loss,
    roi_hinge_loss,
    size_hinge_loss,
    token_loss,
)
from sf_mllm.training.bootstrap.teachers import Teacher, TeacherOutput


class BootstrapTask:
    """What a student is asked: to agree with a frozen teacher about images, without labels or text.

    Args:
        teacher: sees each image at its own size.
        weights: of the losses.
        kernels: what reads the teacher's features inside regions, an implementation of `sample_points`.
    """

    def __init__(self, teacher: Teacher, weights: LossConfig, kernels: str = REFERENCE) -> None:
        self.teacher = teacher
        self.weights = weights
        self.kernels = kernels

    def targets(self, batch: dict[str, Tensor]) -> TeacherOutput:
        """Return what the teacher says about a batch of crops, from a store if the batch comes from one.

        Args:
            batch: "pixel_values", [B, 3, R, R], uint8; with a store also what `TeacherStore.read` returns.
        """
        if "teacher_patches" in batch:
            feature_map = dequantise(batch["teacher_patches"], batch["teacher_scales"])
            return TeacherOutput(batch["teacher_embedding"].float(), feature_map)
        return self.teacher(self.normalise(batch["pixel_values"], self.teacher.preprocessing.image_size))

    def losses(self, output: SparseFormerOutput, target: TeacherOutput) -> dict[str, Tensor]:
        """Compare a student's output with the teacher's on the same crops.

        Args:
            output: of the student on `self.normalise(batch["pixel_values"])`, with sampling points.
            target: `self.targets(batch)`.

        Returns:
            Each loss that has a weight, unweighted, [B], by the name of its weight.
        """
        tokens, embedding = output.last_hidden_state, output.pooler_output
        rois, points = output.rois, output.sampling_points
        assert tokens is not None and embedding is not None and rois is not None and points is not None
        final_rois, latents = rois[:, -1], tokens[:, -rois.shape[2] :]
        losses: dict[str, Callable[[], Tensor]] = {
            "tokens": lambda: token_loss(
                latents, average_in_rois(target.feature_map, final_rois.detach(), kernels=self.kernels)
            ),
            "coverage": lambda: coverage_loss(target.feature_map, final_rois, self.kernels),
            "attraction": lambda: attraction_loss(target.feature_map, final_rois),
            "roi_hinge": lambda: roi_hinge_loss(rois),
            "size_hinge": lambda: size_hinge_loss(final_rois),
            "point_hinge": lambda: point_hinge_loss(points),
        }
        if self.teacher.output_kind == "logits":
            losses["classification"] = lambda: classification_loss(embedding, target.embedding)
        else:
            losses["embedding"] = lambda: embedding_loss(embedding, target.embedding)
        return {name: loss() for name, loss in losses.items() if getattr(self.weights, name)}

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Weighted sum, mean over images."""
        return torch.stack([getattr(self.weights, name) * loss.mean() for name, loss in losses.items()]).sum()

    def normalise(self, images: Tensor, size: int | None = None) -> Tensor:
        """Turn uint8 images into the pixels that teacher and student were made for; they share mean and deviation.

        The result lies in memory as `channels_last`, which convolutions on a GPU read fastest.

        Args:
            images: [B, 3, R, R], uint8.
            size: side to resize to; None keeps R.
        """
        pixels = images.to(torch.float32, memory_format=torch.channels_last) / 255
        if size is not None and size != images.shape[-1]:
            pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (
            _per_channel(values, images.device)
            for values in (self.teacher.preprocessing.mean, self.teacher.preprocessing.std)
        )
        return (pixels - mean) / std


@lru_cache
def _per_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """Return [3, 1, 1] on a device; kept, since each copy from the host would make the host wait for the device."""
    return torch.tensor(values, device=device).view(3, 1, 1)
