"""The one place where an image file becomes an RGB image, whatever its format and however broken it is."""

import io
import logging
import os
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sf_mllm.errors import InputError, first_line

logger = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000
"""Largest width x height that is decoded; an RGB image of this size takes 300 MB."""

# Raster formats only: Pillow would also start Ghostscript for an EPS file, which no picture of a data set needs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
_WHITE = (255, 255, 255, 255)


def open_image(source: str | os.PathLike[str] | bytes | BinaryIO, name: str = "The image") -> Image.Image:
    """Decode an image into 8-bit RGB, upright, fully loaded and independent of its file.

    The EXIF orientation is applied, transparency is composited on white, 16-bit grey is scaled (not clipped) to 8 bit,
    and of an animation the first frame is taken.

    Args:
        source: path of an image file, its content, or a binary file object positioned at its start.
        name: what messages call an image that has no path.

    Raises:
        InputError: there is no such file, it is no image, it is damaged, or it has more than `MAX_PIXELS` pixels.
    """
    if isinstance(source, str | os.PathLike):
        name = f"Image file '{os.fspath(source)}'"
        if os.path.isdir(source):
            raise InputError(f"{name} is a directory; give the path of one image.")
        if not os.path.isfile(source):
            raise InputError(f"{name} does not exist; give the path of an image.")
        try:
            file: BinaryIO = open(source, "rb")
        except OSError as error:
            raise InputError(f"{name} cannot be opened: {error.strerror}.") from error
        with file:
            return _decode(file, name)
    return _decode(io.BytesIO(source) if isinstance(source, bytes) else source, name)


def _decode(file: BinaryIO, name: str) -> Image.Image:
    if not file.read(1):
        raise InputError(f"{name} is empty (0 bytes).")
    file.seek(-1, os.SEEK_CUR)
    Image.init()  # fills the table of formats this build of Pillow can read
    formats = [known for known in _FORMATS if known in Image.OPEN]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about size and metadata; what matters is raised or logged below
        try:
            image = Image.open(file, formats=formats)
            pixels = image.width * image.height
        except UnidentifiedImageError as error:
            raise InputError(f"{name} is not an image in a known format ({', '.join(formats)}).") from error
        except Image.DecompressionBombError as error:
            raise InputError(_too_large(name)) from error
        except Exception as error:  # a broken header can surface as almost any type
            raise InputError(f"{name} has a damaged header: {first_line(error)}.") from error
        if pixels > MAX_PIXELS:
            raise InputError(_too_large(name, image.size))
        try:
            image.load()
            return _to_rgb(_upright(image, name))
        except Exception as error:  # so can a broken body
            raise InputError(f"{name} is damaged or incomplete and cannot be decoded: {first_line(error)}.") from error


def _upright(image: Image.Image, name: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # unreadable metadata say nothing about the pixels
        logger.warning("%s has unreadable EXIF data (%s); taken as upright.", name, first_line(error))
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _scale_to_8_bit(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)
    return image.convert("RGB")


def _scale_to_8_bit(image: Image.Image) -> Image.Image:
    """Map grey values of a wide type to 0..255: by the type's range where it has one, else by the image's own."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
    low, high = 0.0, 1.0 if image.mode == "F" else 65535.0
    if values.min() < low or values.max() > high:  # 32-bit integers and floats come without a fixed range
        low, high = float(values.min()), float(values.max())
    return Image.fromarray(np.rint((values - low) * (255.0 / ((high - low) or 1.0))).astype(np.uint8))


def _too_large(name: str, size: tuple[int, int] | None = None) -> str:
    actual = f" ({size[0]}x{size[1]})" if size else ""
    limit = MAX_PIXELS // 1_000_000
    return f"{name} is too large{actual}: at most {limit} million pixels are accepted; scale it down first."
