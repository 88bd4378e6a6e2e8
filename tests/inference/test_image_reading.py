"""Pictures of every kind that people have become uint8 RGB; what is none gives a sentence."""

import struct
import tracemalloc
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mtcl import UserError
from mtcl.inference.image_reading import SUFFIXES, convert_array, convert_pil_image, load_image

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = np.linspace(0, 255, 35).astype(np.uint8).reshape(5, 7)


def saved(folder: Path, name: str, array: np.ndarray | Image.Image, **options) -> Path:
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(folder / name, **options)
    return folder / name


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    part = alpha[..., None] / 255
    return np.round(rgb * part + 255 * (1 - part)).astype(np.uint8)


def grey_in_three(array: np.ndarray) -> np.ndarray:
    return np.stack([array] * 3, axis=-1)


def complaint(path: Path, **options) -> str:
    with pytest.raises(UserError) as error:
        load_image(path, **options)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def png_of(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.ppm", "a.tif", "no_ending", "lies.jpg", "ünï 100%d ✓.png"])
def test_colour(tmp_path, name):
    kind = "PNG" if Path(name).suffix in ("", ".jpg") else None
    pixels = load_image(saved(tmp_path, name, RGB, format=kind))
    assert pixels.dtype == np.uint8
    assert pixels.flags["C_CONTIGUOUS"]
    assert np.array_equal(pixels, RGB)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_grey_has_three_equal_channels(tmp_path, ending):
    assert np.array_equal(load_image(saved(tmp_path, f"a.{ending}", GREY)), grey_in_three(GREY))


def test_a_single_bit(tmp_path):
    bits = Image.fromarray(np.where(GREY > 127, 255, 0).astype(np.uint8)).convert("1", dither=0)
    expected = grey_in_three(np.where(GREY > 127, 255, 0))
    for name in ("a.png", "a.tif", "a.bmp"):
        assert np.array_equal(load_image(saved(tmp_path, name, bits)), expected)


def test_transparent_on_white(tmp_path):
    rgba = np.concatenate([RGB, ALPHA[..., None]], axis=-1)
    assert np.array_equal(load_image(saved(tmp_path, "rgba.png", rgba)), on_white(RGB, ALPHA))
    assert np.array_equal(convert_array(rgba), on_white(RGB, ALPHA))
    la = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    assert np.array_equal(load_image(saved(tmp_path, "la.png", la)), on_white(grey_in_three(GREY), ALPHA))
    assert np.array_equal(convert_pil_image(la), on_white(grey_in_three(GREY), ALPHA))


def test_palette(tmp_path):
    image = Image.fromarray((np.arange(35) % 4).astype(np.uint8).reshape(5, 7))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 1, 2, 3])
    colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [1, 2, 3]], np.uint8)[np.arange(35) % 4]
    colours = colours.reshape(5, 7, 3)
    assert np.array_equal(load_image(saved(tmp_path, "opaque.png", image)), colours)
    alpha = np.array([255, 0, 128, 255], np.uint8)
    path = saved(tmp_path, "tRNS.png", image, transparency=alpha.tobytes())
    assert np.array_equal(load_image(path), on_white(colours, alpha[np.arange(35) % 4].reshape(5, 7)))
    path = saved(tmp_path, "one.gif", image, transparency=1)
    one = np.where(np.arange(35) % 4 == 1, 0, 255).reshape(5, 7)
    assert np.array_equal(load_image(path), on_white(colours, one))


def test_a_colour_that_is_transparent(tmp_path):
    path = saved(tmp_path, "a.png", RGB, transparency=tuple(int(v) for v in RGB[2, 3]))
    expected = RGB.copy()
    expected[2, 3] = 255
    assert np.array_equal(load_image(path), expected)


def test_cmyk(tmp_path):
    plain = np.full((16, 16, 3), (200, 60, 20), np.uint8)
    path = saved(tmp_path, "a.jpg", Image.fromarray(plain).convert("CMYK"), quality=95)
    assert np.abs(load_image(path).astype(int) - plain).max() <= 6
    path = saved(tmp_path, "a.tif", Image.fromarray(RGB).convert("CMYK"))
    assert np.abs(load_image(path).astype(int) - RGB).max() <= 1


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_of_grey_as_eight(tmp_path, ending):
    deep = (GREY.astype(np.uint16) << 8) + 17
    assert np.array_equal(load_image(saved(tmp_path, f"a.{ending}", deep)), grey_in_three(GREY))
    assert np.array_equal(convert_array(deep), grey_in_three(GREY))
    assert np.array_equal(convert_pil_image(Image.fromarray(deep.astype(np.int32))), grey_in_three(GREY))


def test_big_endian_grey():
    deep = GREY.astype(np.uint16) << 8
    image = Image.frombytes("I;16B", (7, 5), deep.astype(">u2").tobytes())
    assert np.array_equal(convert_pil_image(image), grey_in_three(GREY))


def test_sixteen_bits_of_colour_as_eight(tmp_path):
    deep = (RGB.astype(np.uint16) << 8) + 200
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    (tmp_path / "a.png").write_bytes(png_of(7, 5, 16, 2, rows))
    assert np.array_equal(load_image(tmp_path / "a.png"), RGB)
    assert np.array_equal(convert_array(deep), RGB)


def test_what_has_no_eight_bits_is_refused(tmp_path):
    assert "floating-point" in complaint(saved(tmp_path, "a.tif", np.ones((4, 4), np.float32)))
    assert "32 bits" in complaint(saved(tmp_path, "b.tif", np.full((4, 4), 70000, np.int32)))


def turned(orientation: int, array: np.ndarray) -> np.ndarray:
    """How a picture lies in a file whose EXIF says so (the inverse of what is to be done)."""
    ways = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    return np.ascontiguousarray(ways[orientation](array))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for ending in ("png", "tif", "webp"):
        image = Image.fromarray(turned(orientation, RGB))
        path = saved(tmp_path, f"a.{ending}", image, exif=exif, **({"lossless": True} if ending == "webp" else {}))
        assert np.array_equal(load_image(path), RGB), ending
        with Image.open(path) as opened:
            assert np.array_equal(convert_pil_image(opened), RGB), ending
            assert np.array_equal(convert_pil_image(ImageOps.exif_transpose(opened)), RGB), "turned once only"
    grey = saved(tmp_path, "deep.png", turned(orientation, GREY.astype(np.uint16) << 8), exif=exif)
    assert np.array_equal(load_image(grey), grey_in_three(GREY))
    smooth = np.kron(np.array([[0, 90], [180, 250]], np.uint8), np.ones((16, 24), np.uint8))
    jpeg = saved(tmp_path, "a.jpg", turned(orientation, smooth), exif=exif, quality=95)
    assert np.abs(load_image(jpeg).astype(int) - grey_in_three(smooth)).max() < 12


def test_exif_that_is_rubbish(tmp_path):
    path = saved(tmp_path, "a.jpg", np.zeros((8, 8, 3), np.uint8), exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff rubbish")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(path).shape == (8, 8, 3)


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_the_first_of_several(tmp_path, ending):
    first, second = (Image.new("RGB", (6, 4), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    path = tmp_path / f"a.{ending}"
    first.save(path, save_all=True, append_images=[second], **({"lossless": True} if ending == "webp" else {}))
    with Image.open(path) as opened:
        assert opened.n_frames == 2
    assert np.array_equal(load_image(path), np.asarray(first))


@pytest.mark.parametrize("ending", sorted({s for s in SUFFIXES if s not in (".jpeg", ".tiff", ".pgm")}))
def test_damage_is_told(tmp_path, ending):
    options = {"compression": "tiff_lzw"} if ending == ".tif" else {}
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    source = saved(tmp_path, f"whole{ending}", noise, **options)
    assert load_image(source).shape == (40, 40, 3)
    data = source.read_bytes()
    path = tmp_path / f"cut{ending}"
    path.write_bytes(data[: len(data) // 2])
    if ending != ".jp2":  # its first half is a coarser picture
        assert "damaged, or not an image" in complaint(path)
    path.write_bytes(data[:20])
    assert "damaged, or not an image" in complaint(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", bytes(1000), b"%!PS-Adobe"]
)
def test_no_picture(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    assert "damaged, or not an image" in complaint(path)


def test_formats_that_run_other_programs_are_not_opened(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with Image.open(path) as opened:
        assert opened.format == "EPS"  # Pillow alone would hand it to Ghostscript
    assert "its format is not among those that can be read" in complaint(path)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]), st.data())
def test_a_few_wrong_bytes_never_end_in_a_traceback(tmp_path_factory, kind, data):
    buffer = BytesIO()
    Image.fromarray(RGB).save(buffer, kind, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")
    content = bytearray(buffer.getvalue())
    for _ in range(3):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "a"
    path.write_bytes(content)
    try:
        pixels = load_image(path, max_pixels=10**6)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert pixels.dtype == np.uint8
        assert pixels.shape[2:] == (3,)


def test_files_that_are_none(tmp_path, monkeypatch):
    assert "does not exist" in complaint(tmp_path / "none.png")
    assert "is not a regular file" in complaint(tmp_path)
    (tmp_path / "loop.png").symlink_to("loop.png")
    complaint(tmp_path / "loop.png")
    path = saved(tmp_path, "a.png", RGB)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.open", refuse)  # tests may run as root, who may read anything
    assert "can't be read (Permission denied)" in complaint(path)


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (12_000, 12_000), (8_000, 7_000)])
def test_huge_is_refused_before_it_is_decoded(tmp_path, width, height):
    path = tmp_path / "a.png"
    path.write_bytes(png_of(width, height, 8, 2, bytes(1000)))  # were it decoded, this would be damage
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = complaint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "than the limit of 50,000,000" in text
    assert peak < 10**6


def test_the_limit_can_be_set(tmp_path):
    path = saved(tmp_path, "a.png", RGB)
    assert load_image(path, max_pixels=35).shape == (5, 7, 3)
    assert "7 x 5 pixels, more than the limit of 34" in complaint(path, max_pixels=34)
    for picture in (RGB, Image.fromarray(RGB)):
        with pytest.raises(UserError, match="7 x 5 pixels, more than the limit of 34"):
            (convert_array if isinstance(picture, np.ndarray) else convert_pil_image)(picture, max_pixels=34)
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_of(20_000, 20_000, 8, 2, b""))
    assert "the limit of 178,956,970" in complaint(bomb, max_pixels=10**9)  # then Pillow's own


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), bool),
        np.zeros((4, 4, 3), np.int64),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 5, 6), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_arrays_that_are_no_picture(array):
    with pytest.raises(UserError, match="this array is"):
        convert_array(array)


def test_pillow_without_pixels():
    with pytest.raises(UserError, match="0 x 5 pixels"):
        convert_pil_image(Image.new("RGB", (0, 5)))


def test_every_mode_of_pillow():
    grey = Image.fromarray(GREY)
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "LA", "PA", "RGBX", "I;16"):
        image = Image.merge("LA", [grey, grey]).convert("PA") if mode == "PA" else grey.convert(mode)
        pixels = convert_pil_image(image)
        assert (pixels.shape, pixels.dtype) == ((5, 7, 3), np.uint8), mode
