"""Any picture that people have, as the pixels a model takes."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mtcl.data.image_io import MAX_PIXELS
from mtcl.errors import UserError
from mtcl.safe_files import open_regular

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"
)  # fmt: skip
# What Pillow may take a file for, whatever its name: no formats that call other programs (EPS) or draw vectors.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")


def load_image(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A picture file as uint8 RGB (H, W, 3): upright (EXIF), grey in three equal channels, 16 bits as 8, what is
    transparent on white. Of a file with several pictures the first.

    ``UserError``: no picture, damaged, or of more than ``max_pixels`` (found out before it is decoded).
    """
    try:
        Image.init()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # of many pixels (the limit here is ours), of odd metadata
            formats = [name for name in FORMATS if name in Image.OPEN]
            with open_regular(path) as file, Image.open(file, formats=formats) as picture:
                return convert_pil_image(picture, max_pixels, str(path))
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UserError(f"{path} does not exist") from error
        raise
    except Image.DecompressionBombError as error:
        limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))  # Pillow's own is the double of that
        raise UserError(f"{path} has more pixels than the limit of {limit:,}; make it smaller") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is damaged, or not a picture (it has no format that is read here)") from error
    except MemoryError as error:
        raise UserError(f"{path} has too many pixels for the memory of this machine; make it smaller") from error
    except Exception as error:  # of damaged files Pillow raises nearly anything
        raise UserError(f"{path} is damaged, or not a picture ({_line(error)})") from error


def convert_pil_image(picture: Image.Image, max_pixels: int = MAX_PIXELS, what: str = "this picture") -> np.ndarray:
    """A PIL picture of any mode as :func:`load_image` gives it; ``what`` it is called in complaints."""
    check_pixels(what, picture.height, picture.width, max_pixels)
    try:
        picture.load()
    except OSError as error:
        raise UserError(f"{what} is damaged, or not a picture ({_line(error)})") from error
    transparent = picture.has_transparency_data
    picture = _upright(picture)
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{what} holds values of 32 bits; save it with 8 or 16 bits")
        return convert_array(values.astype(np.uint16), max_pixels)
    if picture.mode == "F":
        raise UserError(f"{what} holds floating-point values; save it with 8 or 16 bits")
    return convert_array(np.asarray(picture.convert("RGBA" if transparent else "RGB")), max_pixels)


def convert_array(array: np.ndarray, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An array as :func:`load_image` gives it: uint8 or uint16, (H, W), (H, W, 3) RGB or (H, W, 4) RGBA."""
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype not in (np.uint8, np.uint16) or not fits or 0 in array.shape:
        raise UserError(
            f"a picture is uint8 (or uint16) of shape (H, W, 3), (H, W, 4) or (H, W), this array is {array.dtype} of "
            f"shape {array.shape}"
        )
    check_pixels("this array", array.shape[0], array.shape[1], max_pixels)
    array = (array >> 8).astype(np.uint8) if array.dtype == np.uint16 else array
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[2] == 4:
        opaque = array[..., 3:].astype(np.float32) / 255
        array = np.round(array[..., :3] * opaque + 255 * (1 - opaque)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def check_pixels(what: str, height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise UserError(f"{what} has {width} x {height} pixels, more than the limit of {max_pixels:,}; make it smaller")
    if height * width == 0:
        raise UserError(f"{what} has {width} x {height} pixels; give a picture")


def _upright(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF says; where that can't be understood, as it lies."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # Pillow raises nearly anything
        return picture


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
