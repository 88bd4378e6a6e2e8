"""Read single files as arrays: images, label images, .npy and .mat; every error names the file."""

import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import scipy.io
from PIL import Image

from mtcl import safe_files
from mtcl.errors import UserError, escape_control_characters

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_HDF5 = b"\x89HDF\r\n\x1a\n"
MAX_BYTES = 1 << 30  # of a file, or of what a packed one unpacks to
MAX_PIXELS = 50_000_000  # of an image
MAX_NESTING = 100  # PASCAL-Part has 7
_MATRIX, _PACKED = 14, 15  # kinds of elements of a .mat of format 5
_KINDS = frozenset({*range(1, 8), 9, 12, 13, _MATRIX, _PACKED, 16, 17, 18})
_ID = re.compile(r"[^./\\:][^/\\:]{0,199}")
INVALID_ID_MESSAGE = "which is not a valid id: an id is the name of its files without their ending, never a path"


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file of up to :data:`MAX_BYTES`; refuse a FIFO or device instead of blocking."""
    try:
        data = safe_files.read_bytes(path, MAX_BYTES)
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise file_error(path, error.__cause__) from error
        raise
    if _recorder.checksums is not None:
        _recorder.checksums[path] = zlib.crc32(data)
    return data


class _Recorder(threading.local):
    checksums: dict[Path, int] | None = None


_recorder = _Recorder()


@contextmanager
def record_checksums() -> Iterator[dict[Path, int]]:
    """Collect the CRC-32 of each file that :func:`read_bytes` reads in this thread within the context."""
    outer, inner = _recorder.checksums, dict[Path, int]()
    _recorder.checksums = inner
    try:
        yield inner
    finally:
        _recorder.checksums = outer
        if outer is not None:
            outer |= inner


def read_image(path: Path) -> np.ndarray:
    """Read an image as uint8 RGB (H, W, 3), as its pixels are stored (an EXIF orientation is not applied)."""
    return decode_image(path, read_bytes(path))


def decode_image(source: Path | str, data: bytes) -> np.ndarray:
    """Decode an image as :func:`read_image` does; ``source`` names it in errors."""
    return _decode(source, data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def decode_png(source: Path | str, data: bytes) -> np.ndarray:
    """Decode a PNG of 8 bits as uint8 (H, W) or RGB (H, W, 3); ``source`` names it in errors."""
    pixels = _decode(source, data, cv2.IMREAD_UNCHANGED)
    if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (3,)):
        raise UserError(f"{source} holds {describe_array(pixels)}, but this label has 8 bits and 1 or 3 channels.")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if pixels.ndim == 3 else pixels


def read_label_image(path: Path) -> np.ndarray:
    """Read a label image's numbers as uint8 (H, W): grey levels, or the indices of a palette."""
    data = read_bytes(path)
    bits, kind = (data[24], data[25]) if data.startswith(_PNG) and len(data) > 25 else (8, 0)
    if kind == 3:  # OpenCV would give the colours of the palette
        return read_png(path, data)
    pixels = _decode(path, data, cv2.IMREAD_UNCHANGED)
    if bits in (2, 4):  # OpenCV has scaled the levels to 0..255
        raise UserError(f"{path} is a grey image of {bits} bits; save this label with 8 bits.")
    if pixels.dtype != np.uint8 or pixels.ndim != 2:
        raise UserError(f"{path} holds {describe_array(pixels)}, but this label is an 8-bit image of 1 channel.")
    return pixels


def read_png(path: Path, data: bytes) -> np.ndarray:
    """Decode ``data``, a PNG that was read from ``path``, as it is stored: a palette image gives its indices."""
    check_pixels(path, data)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return np.array(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise _damaged_image_error(path) from error


def check_pixels(path: Path | str, data: bytes) -> None:
    """Raise ``UserError`` if a PNG or JPEG declares more than :data:`MAX_PIXELS`; nothing is decoded."""
    if data.startswith(_PNG):
        width, height = struct.unpack(">II", data[16:24].ljust(8, b"\0"))
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
                    width, height = image.size
        except Image.DecompressionBombError as error:
            raise UserError(f"{path} has more than the {MAX_PIXELS:,} pixels that an image may have.") from error
        except Exception as error:  # of damaged bytes Pillow raises nearly anything
            raise _damaged_image_error(path) from error
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{path} has {height}x{width} pixels (height x width), more than the {MAX_PIXELS:,} that an image may have."
        )


def read_color_label(path: Path) -> np.ndarray:
    """Read a label image of three 8-bit channels as uint8 RGB (H, W, 3), unchanged."""
    pixels = _decode(path, read_bytes(path), cv2.IMREAD_UNCHANGED)
    if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,):
        raise UserError(f"{path} holds {describe_array(pixels)}, but this label is an 8-bit image of 3 channels.")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def read_npy(path: Path) -> np.ndarray:
    """Read the array of a .npy file; pickled objects are refused."""
    data = read_bytes(path)
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # NumPy raises whatever the damaged header leads to, even MemoryError
        raise UserError(f"{path} is not a readable .npy file ({error}); unpack it again.") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} holds {describe_array(array)}, but a label is one array.")
    return array


def read_mat(path: Path, key: str) -> np.ndarray:
    """Read one variable of a MATLAB file.

    Args:
        path: a file of format 5 (structures included) or 7.3 (HDF5, plain arrays only).
        key: name of the variable.

    Raises:
        UserError: the file is damaged, too large, or lacks the variable.
    """
    data = read_bytes(path)
    try:
        if _is_hdf5(data):
            with h5py.File(io.BytesIO(data), "r") as file:
                dataset = read_dataset(file, key, path)
                return np.ascontiguousarray(dataset[()].T)  # MATLAB stores columns first
        data = _decompress_mat(path, data)
        content = scipy.io.loadmat(io.BytesIO(data), variable_names=[key])
        if key not in content:
            raise _missing_variable_error(path, key, [name for name, *_ in scipy.io.whosmat(io.BytesIO(data))])
    except UserError:
        raise
    except Exception as error:  # scipy raises whatever the damaged bytes lead to
        raise UserError(f"{path} is not a readable .mat file ({error}); unpack it again.") from error
    return content[key]


def read_dataset(file: h5py.File, key: str, path: Path, max_bytes: int = MAX_BYTES) -> h5py.Dataset:
    """Return an array of an HDF5 file, unread; it must lie in this file.

    HDF5 can point to other files (external links, external storage, virtual datasets), so a stranger's file could read
    any file of this machine.

    Args:
        file: the open file.
        key: the name of the array.
        path: the file's path, for the message.
        max_bytes: the largest size of the array.

    Raises:
        UserError: there is no such array, it lies elsewhere, or is larger.
    """
    link = file.get(key, getlink=True)
    if link is None:
        raise _missing_variable_error(path, key, list(file))
    if not isinstance(link, h5py.HardLink):
        raise UserError(f"{key} in {path} is a link to another place, which is not followed; save the array itself.")
    dataset = file[key]
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype == h5py.ref_dtype:
        raise UserError(f"{key} in {path} is a structure in MATLAB's format 7.3; save it again with -v7.")
    if dataset.external or dataset.is_virtual:
        raise UserError(f"{key} in {path} lies in other files, which are not read; save the array itself.")
    if dataset.nbytes > max_bytes:
        raise UserError(f"{key} in {path} has {dataset.nbytes:,} bytes, more than the {max_bytes:,} that it may have.")
    return dataset


def _decompress_mat(path: Path, data: bytes) -> bytes:
    """Return a .mat of format 5 with its variables decompressed; other formats unchanged.

    Raises:
        UserError: they unpack to more than :data:`MAX_BYTES`, or are nested deeper than :data:`MAX_NESTING` (scipy
        reads
            them by recursion in C, which ends the process).
    """
    if len(data) < 128 or 0 in data[:4]:  # format 4 has no packed variables and no structures
        return data
    order = ">" if data[126:128] == b"MI" else "<"
    parts, size, offset = [data[:128]], 0, 128
    while offset < len(data):
        kind, length = struct.unpack(f"{order}II", data[offset : offset + 8])
        variable = data[offset : offset + 8 + length]
        if len(variable) < 8 + length:
            raise ValueError("it is truncated")
        if kind == _PACKED:
            inflater = zlib.decompressobj()
            variable = inflater.decompress(variable[8:], max(MAX_BYTES - size, 1))  # 0 would be no limit
            if inflater.unconsumed_tail or size + len(variable) > MAX_BYTES:
                raise UserError(f"{path} unpacks to more than the {MAX_BYTES:,} bytes that such a file may have.")
        if _nesting_depth(variable, order) > MAX_NESTING:
            raise UserError(f"{path} holds structures nested deeper than {MAX_NESTING} levels; simplify them.")
        parts.append(variable)
        size += len(variable)
        offset += 8 + length
    return b"".join(parts)


def _nesting_depth(variable: bytes, order: str) -> int:
    """Count how deep the arrays of one variable are nested, at most a little beyond :data:`MAX_NESTING`.

    Raises:
        ValueError: an element is of an undefined kind, with whose number scipy would read memory out of bounds.
    """
    ends, offset, deepest = [len(variable)], 0, 0
    while offset + 8 <= len(variable) and deepest <= MAX_NESTING:
        while len(ends) > 1 and offset >= ends[-1]:
            ends.pop()
        kind, length = struct.unpack_from(f"{order}II", variable, offset)
        if kind & 0xFFFF not in _KINDS:
            raise ValueError(f"it has an element of the kind {kind & 0xFFFF}")
        offset += 8
        if kind == _MATRIX:
            ends.append(offset + length)
            deepest = max(deepest, len(ends) - 1)
        elif kind < 2**16:  # else the values are in the second half of the tag
            offset += length + -length % 8
    return deepest


def read_ids(path: Path, description: str) -> list[str]:
    """Read the ids of a list file, one per line, in order; ``description`` names the list in errors."""
    try:
        ids = read_bytes(path).decode("utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}); {description} holds one id per line."
        ) from error
    if not ids:
        raise UserError(f"{path} lists no image; {description} must hold one id per line.")
    if (invalid := find_invalid_id(ids)) is not None:
        raise UserError(
            f"{path} lists {escape_control_characters(invalid[:80])!r}, {INVALID_ID_MESSAGE}; correct {description}."
        )
    if len(set(ids)) < len(ids):
        ids_so_far: set[str] = set()
        repeated = next(name for name in ids if name in ids_so_far or ids_so_far.add(name))  # type: ignore[func-returns-value]
        raise UserError(f"{path} lists {repeated} more than once; take out the repeated lines.")
    return ids


def find_invalid_id(ids: Iterable[str]) -> str | None:
    """Return the first of ``ids`` that is no plain file name, None if all are.

    Ids are joined to folders, for reading and for writing: a path in their place would leave the folder.
    """
    return next((name for name in ids if not _ID.fullmatch(name) or not name.isprintable()), None)


def validate_depth(array: np.ndarray, path: Path, unit: str = "metres") -> np.ndarray:
    """Return depth as float32 (H, W), 0 where there is no finite positive value; ``unit`` is for the error."""
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f" or not array.size:
        raise UserError(
            f"{path} holds {describe_array(array)}, but depth is one floating-point array (height, width) in {unit}."
        )
    valid = (array > 0) & (array < np.inf)
    return (array if valid.all() else np.where(valid, array, 0)).astype(np.float32, copy=False)


def validate_normals(array: np.ndarray, path: Path) -> np.ndarray:
    """Return normal vectors as float32 (H, W, 3), zero where one is not finite."""
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype.kind != "f" or not array.size:
        raise UserError(
            f"{path} holds {describe_array(array)}, but normals are floating-point vectors (height, width, 3)."
        )
    finite = np.isfinite(array).all(axis=2, keepdims=True)
    return np.where(finite, array, 0).astype(np.float32)


def validate_classes(values: np.ndarray, path: Path, num_classes: int) -> np.ndarray:
    """Map class ids 0 (void), 1 ... ``num_classes`` to uint8 (H, W): void is 255, id v is class v - 1."""
    is_map = isinstance(values, np.ndarray) and values.ndim == 2 and values.size > 0 and values.dtype.kind in "ufi"
    if not is_map or (values.dtype.kind == "f" and (values != np.floor(values)).any()):
        raise UserError(
            f"{path} holds {describe_array(values)}, but classes are one array (height, width) of whole numbers."
        )
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= num_classes):
        raise UserError(
            f"{path} holds the class id {low if low < 0 else high:g}, but num_classes={num_classes} allows 0 to "
            f"{num_classes}; increase num_classes or correct the file."
        )
    return values.astype(np.uint8, copy=False) - np.uint8(1)  # wraps 0 around to 255


def validate_edges(array: np.ndarray, path: Path) -> np.ndarray:
    """Return edges as uint8 (H, W) in {0, 1}: 1 above half of the range, which is 0..255 or 0..1."""
    is_map = array.ndim == 2 and array.size > 0 and array.dtype.kind in "ufib"
    if not is_map or (array.dtype.kind == "f" and not np.isfinite(array).all()):
        raise UserError(f"{path} holds {describe_array(array)}, but edges are one array (height, width) of numbers.")
    half = 127.5 if array.max(initial=0) > 1 else 0.5
    edges = array > (half if array.dtype.kind == "f" else int(half))  # whole numbers are compared as such
    return edges.view(np.uint8)


def file_error(path: Path, error: OSError) -> UserError:
    """Return the ``UserError`` for a file that the system can't read."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} does not exist; check the path, or unpack the full dataset.")
    return UserError(f"{path} can't be read ({error.strerror}); correct its permissions, or unpack it again.")


def describe_array(array: Any) -> str:
    """Describe an array by its type and shape, for an error message."""
    return f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__


def _decode(path: Path | str, data: bytes, flag: int) -> np.ndarray:
    """Decode a PNG or JPEG that is complete and not too large."""
    # OpenCV fills what a truncated file lacks with grey, and only prints a warning.
    is_complete = b"IEND" in data[-4096:] if data.startswith(_PNG) else b"\xff\xd9" in data[-4096:]
    is_png_or_jpeg = data.startswith((_PNG, _JPEG))
    if is_png_or_jpeg and is_complete:
        check_pixels(path, data)
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag) if is_png_or_jpeg and is_complete else None
    if pixels is None:
        raise _damaged_image_error(path)
    return pixels


def _damaged_image_error(path: Path | str) -> UserError:
    """Return the error for an image that can't be decoded."""
    return UserError(f"{path} is not a readable image (truncated or damaged); unpack it again.")


def _missing_variable_error(path: Path, key: str, variables: list[str]) -> UserError:
    """Return the error for a file without the variable ``key``."""
    variables = [name for name in variables if not name.startswith("#")]
    return UserError(f"{path} has no variable {key}; it holds {', '.join(variables) or 'nothing'}.")


def _is_hdf5(data: bytes) -> bool:
    """Return whether a .mat file is of format 7.3."""
    return data.startswith((_HDF5, b"MATLAB 7.3")) or data[512:520] == _HDF5
