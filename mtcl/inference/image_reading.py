"""Read images of common formats as uint8 RGB arrays."""

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
# Formats that Pillow may use, whatever the file's name: none that call other programs (EPS) or draw vectors.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")


def load_image(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read an image file.

    Args:
        path: of the file. Its content decides on the format, not its name; of several images the first is read.
        max_pixels: limit on height x width, checked before the image is decoded.

    Returns:
        uint8 RGB (H, W, 3): turned upright (EXIF), grey in three equal channels, 16 bits reduced to 8, transparent
        pixels on white.

    Raises:
        UserError: the file is no image, is damaged, or has too many pixels.
    """
    try:
        Image.init()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # about many pixels (there is a limit below) and metadata
            formats = [name for name in FORMATS if name in Image.OPEN]
            with open_regular(path) as file, Image.open(file, formats=formats) as image:
                return convert_pil_image(image, max_pixels, str(path))
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UserError(f"{path} does not exist") from error
        raise
    except Image.DecompressionBombError as error:
        limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))  # Pillow refuses more than twice its limit
        raise UserError(f"{path} has more pixels than the limit of {limit:,}; make it smaller") from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{path} is damaged, or not an image (its format is not among those that can be read)"
        ) from error
    except MemoryError as error:
        raise UserError(f"{path} has too many pixels for the memory of this machine; make it smaller") from error
    except Exception as error:  # for damaged files Pillow raises nearly any error
        raise UserError(f"{path} is damaged, or not an image ({_line(error)})") from error


def convert_pil_image(image: Image.Image, max_pixels: int = MAX_PIXELS, name: str = "this image") -> np.ndarray:
    """Convert a PIL image of any mode as :func:`load_image` does; ``name`` is used in messages."""
    check_pixels(name, image.height, image.width, max_pixels)
    try:
        image.load()
    except OSError as error:
        raise UserError(f"{name} is damaged, or not an image ({_line(error)})") from error
    transparent = image.has_transparency_data
    image = _upright(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{name} holds values of 32 bits; save it with 8 or 16 bits")
        return convert_array(values.astype(np.uint16), max_pixels)
    if image.mode == "F":
        raise UserError(f"{name} holds floating-point values; save it with 8 or 16 bits")
    return convert_array(np.asarray(image.convert("RGBA" if transparent else "RGB")), max_pixels)


def convert_array(array: np.ndarray, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Convert an array, uint8 or uint16, (H, W), (H, W, 3) RGB or (H, W, 4) RGBA, as :func:`load_image` does."""
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype not in (np.uint8, np.uint16) or not fits or 0 in array.shape:
        raise UserError(
            f"an image is uint8 (or uint16) of shape (H, W, 3), (H, W, 4) or (H, W), this array is {array.dtype} of "
            f"shape {array.shape}"
        )
    check_pixels("this array", array.shape[0], array.shape[1], max_pixels)
    array = (array >> 8).astype(np.uint8) if array.dtype == np.uint16 else array
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[2] == 4:
        opaque = array[..., 3:].astype(np.float32) / 255
        array = np.round(array[..., :3] * opaque + 255 * (1 - opaque)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def check_pixels(name: str, height: int, width: int, max_pixels: int) -> None:
    """Raise ``UserError`` for an image of more than ``max_pixels``, or of none."""
    if height * width > max_pixels:
        raise UserError(f"{name} has {width} x {height} pixels, more than the limit of {max_pixels:,}; make it smaller")
    if height * width == 0:
        raise UserError(f"{name} has {width} x {height} pixels; give an image")


def _upright(image: Image.Image) -> Image.Image:
    """Rotate an image as its EXIF data say; return it unchanged if they can't be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises nearly any error
        return image


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
