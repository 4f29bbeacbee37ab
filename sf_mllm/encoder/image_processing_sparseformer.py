"""Image preprocessing of a SparseFormer."""

from typing import Any

from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from sf_mllm.constants import CLIP_MEAN, CLIP_STD
from sf_mllm.encoder.published import published_config


class SparseFormerImageProcessor(TorchvisionBackend):
    """Resizes the whole image to a square and normalises it.

    Nothing is cut off, so regions of interest, which are relative to the image, hold for the original picture too. Set
    `size={"shortest_edge": S}` to keep the aspect ratio: the encoder takes any size and always returns the same number
    of tokens, but the images of one batch must then have one shape. Add `do_center_crop=True` and `crop_size` for the
    usual CLIP preprocessing.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = list(CLIP_MEAN)
    image_std = list(CLIP_STD)
    size = {"height": 224, "width": 224}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = False
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "SparseFormerImageProcessor":
        """Return the preprocessing of a published checkpoint: shorter side to 256 (bilinear), centre crop of 224.

        Args:
            name: as in `SparseFormerConfig.from_name`.
            **overrides: attributes to change.

        Raises:
            InputError: no published checkpoint has that name.
        """
        published_config(name)
        if "_v1_" in name:
            mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
        elif "_augreg_" in name:
            mean, std = [0.5] * 3, [0.5] * 3
        else:
            mean, std = list(CLIP_MEAN), list(CLIP_STD)
        settings: dict[str, Any] = {
            "size": {"shortest_edge": 256},
            "resample": PILImageResampling.BILINEAR,
            "do_center_crop": True,
            "image_mean": mean,
            "image_std": std,
        }
        return cls(**{**settings, **overrides})
