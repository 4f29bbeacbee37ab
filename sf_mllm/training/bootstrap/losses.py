"""What the bootstrap stage asks of a student, as plain functions: in fp32, one value for each image."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sf_mllm.ops.implementations import REFERENCE
from sf_mllm.ops.sampling import sample_points

_SMALLEST_SIZE = 0.02
"""In image sizes; narrower regions count as this wide, so that one place cannot belong to them alone."""
_TRANSPORT_BLUR = 0.003
"""In squared image sizes: how much nearer one place must be than another to be preferred."""
_TRANSPORT_ITERATIONS = 20
_EVEN_SHARE = 0.01
"""Of the content; dealt over the whole image alike."""
_EDGE = 0.02
"""In image sizes; points that were only asked to stay inside would half the time end up just outside."""


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


def average_in_rois(feature_map: Tensor, rois: Tensor, points_per_side: int = 4, *, kernels: str = REFERENCE) -> Tensor:
    """Average a feature map over a regular grid of points inside each RoI, clamped into the image.

    Args:
        feature_map: [B, D, H, W].
        rois: [B, N, 4], image-relative xyxy; may leave the image or be flipped. Detach them to ask a token what is in
            its region, not to move to where that is easy.
        points_per_side: the grid has this many points squared.
        kernels: implementation of `sample_points`.

    Returns:
        [B, N, D] in fp32.
    """
    corners = rois.float().unflatten(-1, (2, 2)).clamp(0, 1)  # [B, N, corner, (x, y)]
    low, high = corners.amin(dim=-2), corners.amax(dim=-2)  # [B, N, 2]
    steps = (torch.arange(points_per_side, device=rois.device, dtype=torch.float32) + 0.5) / points_per_side
    grid = torch.cartesian_prod(steps, steps)  # [P, 2], centres of equal cells
    points = low[..., None, :] + grid * (high - low)[..., None, :]  # [B, N, P, 2]
    sampled = sample_points(feature_map.float(), points, padding_mode="border", implementation=kernels)  # [B, N, P, D]
    return sampled.mean(dim=2)


def coverage_loss(feature_map: Tensor, rois: Tensor, kernels: str = REFERENCE) -> Tensor:
    """How badly a feature map is put together again from the averages inside the RoIs, mostly where it has content.

    Each place takes a mixture of the regions around it, nearer and smaller ones first, and counts by how far it differs
    from the mean over the image. So one large region does for an even area, and many small ones are needed where much
    happens. Only regions learn from it, not what tokens say.

    Args:
        feature_map: [B, D, H, W].
        rois: [B, N, 4], image-relative xyxy.
        kernels: implementation of `sample_points`.

    Returns:
        [B], 0 is a perfect copy, 1 as good as the mean over the image.
    """
    corners = rois.float().unflatten(-1, (2, 2))
    center = corners.mean(dim=-2)  # [B, N, 2]
    size = (corners[..., 1, :] - corners[..., 0, :]).abs().clamp(min=_SMALLEST_SIZE)
    # A region's share in a place: a normal density whose standard deviation is a quarter of the region's size.
    distance = (_places(feature_map)[:, None] - center[:, None]) / (size[:, None] / 4)  # [B, HW, N, 2]
    closeness = -distance.square().sum(dim=-1) / 2 - size.log().sum(dim=-1)[:, None]
    copy = closeness.softmax(dim=-1) @ average_in_rois(feature_map, rois, kernels=kernels)  # [B, HW, D]
    error = (feature_map.float().flatten(2).transpose(1, 2) - copy).square().sum(dim=-1)
    content = _content(feature_map)
    return (content * error).sum(dim=1) / content.square().sum(dim=1).clamp(min=1e-6)


def attraction_loss(feature_map: Tensor, rois: Tensor) -> Tensor:
    """How far the centres of the RoIs are from being dealt out over the content of a feature map.

    Content is where the features differ more from their mean over the image than they do on average; a little is spread
    over the whole image, so that there is some in an even one. The regions are dealt to content in proportion, each one
    to what is near it, by optimal transport; the loss is the squared distance to where each one is sent.

    Args:
        feature_map: [B, D, H, W].
        rois: [B, N, 4], image-relative xyxy.

    Returns:
        [B], means over regions, in squared image sizes.

    Source: entropic transport by Sinkhorn's iterations, arXiv 1306.0895.
    """
    center = rois.float().unflatten(-1, (2, 2)).mean(dim=-2)  # [B, N, 2]
    content = _content(feature_map)  # [B, HW]
    places = _places(feature_map)  # [HW, 2]
    excess = F.relu(content - content.mean(dim=1, keepdim=True))
    mass = (1 - _EVEN_SHARE) * excess / excess.sum(dim=1, keepdim=True).clamp(min=1e-6) + _EVEN_SHARE / len(places)
    with torch.no_grad():
        affinity = -(center[:, :, None] - places).square().sum(dim=-1) / _TRANSPORT_BLUR  # [B, N, HW]
        of_regions = torch.zeros_like(center[..., 0])
        for _ in range(_TRANSPORT_ITERATIONS):
            of_places = mass.log() - (affinity + of_regions[..., None]).logsumexp(dim=1)
            of_regions = -math.log(center.shape[1]) - (affinity + of_places[:, None]).logsumexp(dim=2)
        plan = (affinity + of_places[:, None]).softmax(dim=-1)  # [B, N, HW], where each region is sent
    return (center - plan @ places).square().sum(dim=-1).mean(dim=1)


def _places(feature_map: Tensor) -> Tensor:
    """Centres of the cells of a feature map [B, D, H, W] in reading order: [HW, (x, y)], image-relative."""
    rows, columns = (
        (torch.arange(length, device=feature_map.device, dtype=torch.float32) + 0.5) / length
        for length in feature_map.shape[-2:]
    )
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).flatten(0, 1)


def _content(feature_map: Tensor) -> Tensor:
    """Squared distance of each place's features from their mean over the image: [B, HW]."""
    full = feature_map.float().flatten(2)
    return (full - full.mean(dim=2, keepdim=True)).square().sum(dim=1)


def point_hinge_loss(sampling_points: tuple[Tensor, ...]) -> Tensor:
    """How far sampling points lie outside the image or on its very edge, in image sizes.

    Args:
        sampling_points: [B, N, P, 2] of each sampling, image-relative.

    Returns:
        [B], means over all coordinates; zero from `_EDGE` inside the image on, and linear outside of that.
    """
    points = torch.stack(sampling_points, dim=1).float()
    return (F.relu(_EDGE - points) + F.relu(points - (1 - _EDGE))).flatten(1).mean(dim=1)


def roi_hinge_loss(rois: Tensor) -> Tensor:
    """How far RoI edges lie outside the image, in image sizes: zero inside, linear outside.

    Args:
        rois: [B, ..., 4], image-relative.

    Returns:
        [B], means over all edges.
    """
    return (F.relu(-rois.float()) + F.relu(rois.float() - 1)).flatten(1).mean(dim=1)


def size_hinge_loss(rois: Tensor) -> Tensor:
    """How much narrower RoIs are than N of one size that tile the image, in image sizes: linear below, zero above.

    A copy of the features gets sharper with smaller regions, down to a few pixels of a part of an object; what is asked
    for here keeps the object's surroundings, and with them its middle, in view.

    Args:
        rois: [B, N, 4], image-relative xyxy.

    Returns:
        [B], means over regions and axes.
    """
    corners = rois.float().unflatten(-1, (2, 2))
    size = (corners[..., 1, :] - corners[..., 0, :]).abs()
    return F.relu(1 / math.sqrt(rois.shape[1]) - size).flatten(1).mean(dim=1)
