"""Encode samples as files of a shard, without loss, and decode them.

A sample's files are ``ID.image.jpg`` (or ``.png``) and ``ID.TASK.png`` for labels of 8 bits or ``ID.TASK.npz`` for
floating-point labels; a label is in the NumPy layout of its task, after everything that a dataset class does to it.
"""

import io
import zipfile
from collections.abc import Collection

import cv2
import numpy as np

from mtcl.data.image_io import MAX_BYTES, decode_image, decode_png
from mtcl.data.sample import Sample
from mtcl.data.shards.tar_files import Members
from mtcl.errors import UserError

IMAGE = "image"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png")


def encode_sample(sample: Sample, image_file: tuple[str, bytes] | None = None) -> Members:
    """Return the files of a sample.

    Args:
        sample: image and labels.
        image_file: suffix and content of a JPEG or PNG that decodes to the image; None: the image becomes a PNG.
    """
    suffix, data = encode_array(sample.image) if image_file is None else image_file
    members = {f"{IMAGE}.{suffix}": data}
    for task, label in sample.labels.items():
        suffix, data = encode_array(label)
        members[f"{task}.{suffix}"] = data
    return members


def encode_array(array: np.ndarray) -> tuple[str, bytes]:
    """Return suffix and content of a file of an array: a PNG of uint8 (H, W[, 3]), else a compressed .npz."""
    if array.dtype == np.uint8:
        pixels = cv2.cvtColor(array, cv2.COLOR_RGB2BGR) if array.ndim == 3 else array
        _, encoded = cv2.imencode(".png", pixels)
        return "png", encoded.tobytes()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, array=array)
    return "npz", buffer.getvalue()


def decode_sample(name: str, members: Members, tasks: Collection[str], url: str) -> Sample:
    """Return the sample with the labels of ``tasks``.

    Args:
        name: id of the sample.
        members: its files.
        tasks: whose labels are decoded.
        url: where the shard is, for errors.

    Raises:
        UserError: a file is missing or damaged, or a label has another size than the image.
    """
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if f"{IMAGE}.{suffix}" in members), None)
    if suffix is None:
        raise UserError(f"{url} has no image of {name}; make this shard anew.")
    image = decode_image(f"{name}.{IMAGE}.{suffix} in {url}", members[f"{IMAGE}.{suffix}"])
    labels = {}
    for task in tasks:
        suffix = next((suffix for suffix in ("png", "npz") if f"{task}.{suffix}" in members), None)
        if suffix is None:
            raise UserError(f"{url} has no label {task} of {name}; make this shard anew.")
        source = f"{name}.{task}.{suffix} in {url}"
        label = (decode_png if suffix == "png" else decode_npz)(source, members[f"{task}.{suffix}"])
        if label.shape[:2] != image.shape[:2] or label.ndim > 3:
            raise UserError(f"{source} is an array {label.shape} for an image {image.shape}; make this shard anew.")
        labels[task] = label
    return Sample(name, image, labels)


def decode_npz(source: str, data: bytes) -> np.ndarray:
    """Return the array of a compressed .npz.

    Args:
        source: what the file is, for errors.
        data: its content.

    Raises:
        UserError: it is damaged, holds no floating-point array, or unpacks to more than :data:`MAX_BYTES`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size <= MAX_BYTES:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                array = arrays["array"]
    except Exception as error:  # NumPy raises whatever the damaged bytes lead to
        raise UserError(f"{source} is not a readable .npz file ({error}); make this shard anew.") from error
    if size > MAX_BYTES:
        raise UserError(f"{source} unpacks to more than the {MAX_BYTES:,} bytes that it may have.")
    if array.dtype != np.float32:
        raise UserError(f"{source} holds {array.dtype}, but such a label is float32; make this shard anew.")
    return array
