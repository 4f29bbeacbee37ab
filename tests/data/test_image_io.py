import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from sf_mllm.data.image_io import MAX_PIXELS, open_image
from sf_mllm.errors import InputError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture(autouse=True)
def _no_warning_leaks():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def make_picture(width: int = 24, height: int = 16) -> Image.Image:
    """A picture without symmetry: x in red, y in green."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 40)], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def assert_same_pixels(image: Image.Image, expected: Image.Image, tolerance: int = 0) -> None:
    assert (image.mode, image.size) == ("RGB", expected.size)
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(expected.convert("RGB"), dtype=int))
    assert difference.max() <= tolerance


def one_sentence(caught: pytest.ExceptionInfo[InputError]) -> str:
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_are_read_exactly(tmp_path, format):
    path = tmp_path / "picture.bin"  # the content decides, not the ending
    path.write_bytes(encoded(make_picture(), format))
    assert_same_pixels(open_image(path), make_picture())
    assert_same_pixels(open_image(str(path)), make_picture())


def test_bytes_and_file_objects():
    content = encoded(make_picture(), "PNG")
    assert_same_pixels(open_image(content), make_picture())
    assert_same_pixels(open_image(io.BytesIO(content)), make_picture())


def test_the_image_outlives_its_file(tmp_path):
    path = tmp_path / "picture.png"
    make_picture().save(path)
    image = open_image(path)
    path.unlink()
    assert_same_pixels(image, make_picture())


def test_cmyk_jpeg():
    image = open_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    assert_same_pixels(image, Image.new("RGB", (16, 16), RED), tolerance=2)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = open_image(encoded(Image.fromarray(values), "PNG"))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[-3.0, np.nan, 3.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0, 65535, 32896]], dtype=np.int32), [0, 255, 128]),
        (np.array([[0, 1_000_000, 600_000]], dtype=np.int32), [0, 255, 153]),
        (np.array([[-7, -7, -7]], dtype=np.int32), [0, 0, 0]),
    ],
)
def test_wide_grey_types(values, expected):
    image = open_image(encoded(Image.fromarray(values), "TIFF"))
    assert np.asarray(image)[0, :, 0].tolist() == expected


def test_palette():
    assert_same_pixels(
        open_image(encoded(make_picture().quantize(32), "PNG")), make_picture().quantize(32).convert("RGB")
    )


def test_palette_transparency_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    assert_same_pixels(
        open_image(encoded(image, "PNG", transparency=b"\x00\xff")),
        Image.fromarray(np.array([[WHITE, BLUE]], np.uint8)),
    )


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), 3 * (255,)),
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (0, 0, 0, 51), 3 * (204,)),
        ("LA", (0, 0), 3 * (255,)),
        ("LA", (90, 255), 3 * (90,)),
        ("L", 90, 3 * (90,)),
        ("1", 1, 3 * (255,)),
    ],
)
def test_grey_and_alpha_modes(mode, colour, expected):
    image = open_image(encoded(Image.new(mode, (3, 2), colour), "PNG"))
    assert_same_pixels(image, Image.new("RGB", (3, 2), expected))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_animations_give_their_first_frame(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if format == "WEBP" else {}
    image = open_image(encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options))
    assert_same_pixels(image, frames[0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(make_picture(), "PNG", exif=exif)
    assert_same_pixels(open_image(content), ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    if orientation == 6:  # the phone held upright: what was stored as the left column is the top row
        assert_same_pixels(open_image(content), make_picture().transpose(Image.Transpose.ROTATE_270))


def test_exif_orientation_of_sixteen_bit_grey():
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257
    image = open_image(encoded(Image.fromarray(values), "PNG", exif=exif))
    assert np.asarray(image)[..., 0].tolist() == [[3, 0], [4, 1], [5, 2]]


def test_broken_exif_costs_a_log_line_not_the_image(caplog):
    content = encoded(make_picture(), "PNG", exif=b"Exif\x00\x00no TIFF header")
    assert_same_pixels(open_image(content), make_picture())
    assert "unreadable EXIF" in caplog.text


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_sizes(size):
    assert_same_pixels(open_image(encoded(Image.new("RGB", size, BLUE), "PNG")), Image.new("RGB", size, BLUE))


def test_missing_file(tmp_path):
    with pytest.raises(InputError) as caught:
        open_image(tmp_path / "nothing.png")
    assert "nothing.png' does not exist" in one_sentence(caught)


def test_directory(tmp_path):
    with pytest.raises(InputError) as caught:
        open_image(tmp_path)
    assert "is a directory" in one_sentence(caught)


@pytest.mark.parametrize("path", ["a" * 5000, "nul\0byte.png"])
def test_impossible_paths(path):
    with pytest.raises(InputError) as caught:
        open_image(path)
    assert "does not exist" in one_sentence(caught)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty (0 bytes)"),
        (b"I am a text file.\n" * 50, "not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image in a known format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image in a known format"),
    ],
)
def test_files_that_are_no_image(tmp_path, content, expected):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_image(path)
    message = one_sentence(caught)
    assert expected in message and "picture.png" in message


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_at_any_place(tmp_path, format):
    content = encoded(make_picture(240, 160), format)
    path = tmp_path / "picture"
    for share in (0.02, 0.3, 0.6, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(InputError) as caught:
            open_image(path)
        one_sentence(caught)


def png_header(width: int, height: int) -> bytes:
    """A well-formed PNG of the given size whose pixel data are missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(30_000, 30_000), (10_001, 10_000)])
def test_too_many_pixels_are_refused_before_decoding(size):
    with pytest.raises(InputError) as caught:
        open_image(png_header(*size))
    assert f"at most {MAX_PIXELS // 1_000_000} million pixels" in one_sentence(caught)


def test_the_limit_itself_is_allowed():
    with pytest.raises(InputError) as caught:  # passes the size check, then misses its pixels
        open_image(png_header(10_000, 10_000))
    assert "damaged or incomplete" in one_sentence(caught)
