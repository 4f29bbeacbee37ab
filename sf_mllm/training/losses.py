"""What the bootstrap stage asks of a student, as plain functions: in fp32, one value for each image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sf_mllm.ops.sampling import sample_points


def embedding_loss(student_embeddings: Tensor, teacher_embeddings: Tensor) -> Tensor:
    """One minus the cosine between image embeddings.

    Args:
        student_embeddings: [B, proj], any scale.
        teacher_embeddings: [B, proj].

    Returns:
        [B].
    """
    return 1 - F.cosine_similarity(student_embeddings.float(), teacher_embeddings.float(), dim=-1)


def classification_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """Kullback-Leibler divergence of a student's class probabilities from its teacher's.

    Unlike a cosine it knows that a shift of all logits means nothing and that the largest ones decide.

    Args:
        student_logits: [B, classes].
        teacher_logits: [B, classes].
        temperature: divides all logits, so that classes the teacher thinks unlikely are learned too; the result is
            multiplied by its square, which keeps the size of the gradients.

    Returns:
        [B], in nats at temperature 1.

    Source: Hinton et al., arXiv 1503.02531.
    """
    student, teacher = (F.log_softmax(x.float() / temperature, dim=-1) for x in (student_logits, teacher_logits))
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)


def token_loss(latents: Tensor, targets: Tensor) -> Tensor:
    """One minus the cosine between latent tokens and what the teacher sees at their place.

    Args:
        latents: [B, N, D], normalised by the student's final norm.
        targets: [B, N, D], see `average_in_rois`.

    Returns:
        [B], means over tokens.
    """
    return 1 - F.cosine_similarity(latents.float(), targets.float(), dim=-1).mean(dim=-1)


def average_in_rois(feature_map: Tensor, rois: Tensor, points_per_side: int = 4) -> Tensor:
    """Average a feature map over a regular grid of points inside each RoI, clamped into the image.

    No gradient reaches the RoIs: a token must learn to say what is in its region, not to move to where that is easy.

    Args:
        feature_map: [B, D, H, W].
        rois: [B, N, 4], image-relative xyxy; may leave the image or be flipped.
        points_per_side: the grid has this many points squared.

    Returns:
        [B, N, D] in fp32.
    """
    corners = rois.detach().float().unflatten(-1, (2, 2)).clamp(0, 1)  # [B, N, corner, (x, y)]
    low, high = corners.amin(dim=-2), corners.amax(dim=-2)  # [B, N, 2]
    steps = (torch.arange(points_per_side, device=rois.device, dtype=torch.float32) + 0.5) / points_per_side
    grid = torch.cartesian_prod(steps, steps)  # [P, 2], centres of equal cells
    points = low[..., None, :] + grid * (high - low)[..., None, :]  # [B, N, P, 2]
    return sample_points(feature_map.float(), points, padding_mode="border").mean(dim=2)


def roi_hinge_loss(rois: Tensor) -> Tensor:
    """How far RoI edges lie outside the image, in image sizes: zero inside, linear outside.

    Args:
        rois: [B, ..., 4], image-relative.

    Returns:
        [B], means over all edges.
    """
    return (F.relu(-rois.float()) + F.relu(rois.float() - 1)).flatten(1).mean(dim=1)
