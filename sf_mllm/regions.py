"""Where the model looked, as a picture: its regions of interest (RoIs) over the image."""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_PANEL_SIDE = 720
_MARGIN = 24
_CAPTION_HEIGHT = 44
_SUPERSAMPLING = 2
_BACKGROUND = (18, 20, 26)
_TEXT = (228, 230, 236)
# Largest to smallest region: violet, blue, teal, yellow (viridis, CC0, sampled), light enough for dark pictures.
_RAMP = np.array([(124, 92, 214), (72, 134, 232), (38, 188, 168), (150, 220, 84), (253, 231, 60)], dtype=float)


def seen_area(image_size: tuple[int, int], image_processor: Any) -> tuple[float, float, float, float]:
    """Return the part of an image that is left after the image processor's resize and centre crop.

    Args:
        image_size: (width, height) of the image.
        image_processor: of transformers' kind: `do_resize` and `size`, `do_center_crop` and `crop_size`.

    Returns:
        (x1, y1, x2, y2) relative to the image; beyond 0..1 where the crop pads.
    """
    width, height = image_size
    scale_x = scale_y = 1.0
    if image_processor.do_resize:
        size = image_processor.size
        if size.shortest_edge:
            scale_x = scale_y = size.shortest_edge / min(width, height)
        else:
            scale_x, scale_y = size.width / width, size.height / height
    if not image_processor.do_center_crop:
        return 0.0, 0.0, 1.0, 1.0
    crop = image_processor.crop_size
    share_x = crop.width / (width * scale_x)
    share_y = crop.height / (height * scale_y)
    return (1 - share_x) / 2, (1 - share_y) / 2, (1 + share_x) / 2, (1 + share_y) / 2


def draw_regions(image: Image.Image, rois: Tensor) -> Image.Image:
    """Draw every region as a translucent box, and beside it how many regions cover each place.

    Args:
        image: RGB.
        rois: [N, 4], (x1, y1, x2, y2) relative to the image; parts outside are cut off.

    Returns:
        An RGB picture of two panels with captions, the longer side of a panel 720 px.
    """
    base = _resize(image, _PANEL_SIDE)
    size = base.size
    boxes = _sort_by_area(rois)
    side = np.sqrt(np.median(_areas(boxes)))

    panels = [
        (_boxes_panel(base, boxes, fill=16), f"{len(boxes)} regions, largest violet, smallest yellow"),
        (_coverage_panel(base, boxes), f"bright: covered by many regions (median side {side:.0%} of the image)"),
    ]
    canvas = Image.new("RGB", (2 * size[0] + 3 * _MARGIN, size[1] + _CAPTION_HEIGHT + 2 * _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for index, (panel, caption) in enumerate(panels):
        left = _MARGIN + index * (size[0] + _MARGIN)
        canvas.paste(panel, (left, _MARGIN))
        font = _fitting_font(caption, size[0])
        draw.text((left, _MARGIN + size[1] + _CAPTION_HEIGHT // 2), caption, _TEXT, font, anchor="lm")
    return canvas


def draw_boxes(image: Image.Image, rois: Tensor, side: int) -> Image.Image:
    """Draw the outline of every region, the largest violet, the smallest yellow: for pictures too small for more.

    Args:
        image: RGB.
        rois: [N, 4], (x1, y1, x2, y2) relative to the image; parts outside are cut off.
        side: longer side of the result in pixels.

    Returns:
        An RGB picture.
    """
    return _boxes_panel(_resize(image, side), _sort_by_area(rois), fill=0)


def _resize(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _sort_by_area(rois: Tensor) -> np.ndarray:
    """Put corners in order, and boxes from the largest to the smallest: [N, 4]."""
    boxes = rois.double().numpy()
    boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
    return boxes[np.argsort(-_areas(boxes), kind="stable")]


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _boxes_panel(base: Image.Image, boxes: np.ndarray, fill: int) -> Image.Image:
    """Draw boxes in their order, filled with an opacity of 0 to 255."""
    size = (base.width * _SUPERSAMPLING, base.height * _SUPERSAMPLING)
    panel = base.resize(size, Image.Resampling.BICUBIC).convert("RGBA")
    line_width = max(2, round(2 * _SUPERSAMPLING * max(base.size) / _PANEL_SIDE))
    pixels = boxes * np.array([*size, *size])
    for rank, box in enumerate(pixels):
        colour = _colour(rank / max(1, len(pixels) - 1))
        layer = Image.new("RGBA", size)
        ImageDraw.Draw(layer).rectangle(tuple(box), (*colour, fill), (*colour, 220), line_width)
        panel.alpha_composite(layer)
    return panel.convert("RGB").resize(base.size, Image.Resampling.LANCZOS)


def _coverage_panel(base: Image.Image, boxes: np.ndarray) -> Image.Image:
    x = (np.arange(base.width) + 0.5) / base.width
    y = (np.arange(base.height) + 0.5) / base.height
    in_columns = (boxes[:, :1] <= x) & (x < boxes[:, 2:3])  # [N, W]
    in_rows = (boxes[:, 1:2] <= y) & (y < boxes[:, 3:])  # [N, H]
    count = in_rows.T.astype(np.float32) @ in_columns.astype(np.float32)  # [H, W]
    brightness = 0.12 + 0.88 * count / max(1.0, count.max())
    return Image.fromarray(np.rint(np.asarray(base) * brightness[..., None]).astype(np.uint8))


def _colour(position: float) -> tuple[int, int, int]:
    place = position * (len(_RAMP) - 1)
    red, green, blue = (round(np.interp(place, range(len(_RAMP)), _RAMP[:, channel])) for channel in range(3))
    return red, green, blue


def _fitting_font(text: str, width: int) -> Any:
    """Return the default font, 22 px or as much smaller as the text needs to fit."""
    font_size = 22
    while font_size > 8 and ImageFont.load_default(font_size).getlength(text) > width:
        font_size -= 1
    return ImageFont.load_default(font_size)
