"""Any picture that people have, as the pixels a model takes."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mtcl.errors import UserError

MAX_PIXELS = 50_000_000
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def read_picture(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A picture file as uint8 RGB (H, W, 3): upright (EXIF), grey in three equal channels, 16 bits as 8, what is
    transparent on white. Of a file with several pictures the first.

    ``UserError``: no picture, damaged, or of more than ``max_pixels`` (found out before it is decoded).
    """
    try:
        with Image.open(path) as picture:
            check_pixels(path, picture.height, picture.width, max_pixels)
            return _rgb(path, ImageOps.exif_transpose(picture))
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has far too many pixels (the limit is {max_pixels:,}); make it smaller") from error
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        if isinstance(error, PermissionError | IsADirectoryError):
            raise UserError(f"{path} can't be read ({error.strerror})") from error
        raise UserError(f"{path} is damaged, or not a picture ({_line(error)})") from error
    except (ValueError, SyntaxError, EOFError, OverflowError, MemoryError) as error:  # Pillow's, of damaged files
        raise UserError(f"{path} is damaged, or not a picture ({_line(error)})") from error


def as_picture(array: np.ndarray, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An array as :func:`read_picture` gives it: uint8 or uint16, (H, W), (H, W, 3) RGB or (H, W, 4) RGBA."""
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


def check_pixels(what: object, height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise UserError(f"{what} has {width} x {height} pixels, more than the limit of {max_pixels:,}; make it smaller")


def _rgb(path: Path, picture: Image.Image) -> np.ndarray:
    if picture.mode in ("I", "I;16", "I;16B", "I;16L"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{path} holds values of 32 bits; save it with 8 or 16 bits")
        return as_picture(values.astype(np.uint16))
    if picture.mode == "F":
        raise UserError(f"{path} holds floating-point values; save it with 8 or 16 bits")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        return as_picture(np.asarray(picture.convert("RGBA")))
    return np.array(picture.convert("RGB"))


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
