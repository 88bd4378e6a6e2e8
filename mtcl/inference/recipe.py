"""Run an exported program as the model was evaluated: frame the image, run, crop, decode.

``mtcl export`` writes this file beside every program. It needs NumPy and OpenCV, and ONNX Runtime for a
``model.onnx`` or PyTorch for a ``model.pt2``; nothing of mtcl.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np

Run = Callable[[np.ndarray], Mapping[str, np.ndarray]]
METADATA_KEY = "mtcl.json"


def open_program(path: str) -> tuple[Run, dict[str, Any]]:
    """Load a program as a function of float32 (1, 3, height, width) that returns outputs by task, and its metadata."""
    if path.endswith(".onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        names = [output.name for output in session.get_outputs()]
        metadata = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
        return lambda image: dict(zip(names, session.run(names, {"image": image}))), metadata
    import torch

    stored = {METADATA_KEY: ""}
    program = torch.export.load(path, extra_files=stored).module()

    def run(image: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return {name: raw.numpy() for name, raw in program(torch.from_numpy(image)).items()}

    return run, json.loads(stored[METADATA_KEY])


def predict(run: Run, image: np.ndarray, metadata: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Predict all tasks of an image as ``mtcl.load`` does.

    Args:
        run: the program, as :func:`open_program` gives it.
        image: uint8 RGB (H, W, 3), upright.
        metadata: stored with the program.

    Returns:
        task -> map of the image's height and width: uint8 classes, float32 metres, float32 unit vectors (H, W, 3),
        float32 probabilities.
    """
    size = image.shape[:2]
    small = shrink(image, metadata)
    outputs = run_framed(run, small, metadata)
    return {name: DECODERS[metadata["kinds"][name]](outputs[name], size) for name in metadata["tasks"]}


def shrink(image: np.ndarray, metadata: Mapping[str, Any]) -> np.ndarray:
    """Shrink an image that is much larger than the training images, or than a program of fixed size accepts."""
    size = image.shape[:2]
    frame = metadata["size"]
    if metadata["any_size"]:
        (short, long), (frame_short, frame_long) = sorted(size), sorted(frame)
        limit = metadata["as_it_is"]
        fits = short * long <= limit * frame_short * frame_long and long <= limit * frame_long
        factor = min(1.0, frame_short / short, frame_long / long)
    else:
        fits = all(n <= limit for n, limit in zip(find_frame(size, metadata)[1], metadata["frame"]))
        factor = min(1.0, frame[0] / size[0], frame[1] / size[1])
    if fits:
        return image
    height, width = (max(1, round(side * factor)) for side in size)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def find_frame(size: tuple[int, ...], metadata: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Find the (y, x) of an image of that size in its frame, and the frame's (height, width)."""
    # It is centred in the training frame, or in its own size rounded up where that is larger ...
    sides = [max(least, round_up(side, metadata["rounding"])) for side, least in zip(size, metadata["size"])]
    offset = [(side - length) // 2 for side, length in zip(sides, size)]
    # ... and further padding for the backbone is added at the right and bottom.
    return offset, [round_up(side, metadata["multiple"]) for side in sides]


def round_up(length: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-length // multiple) * multiple


def run_framed(run: Run, image: np.ndarray, metadata: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Run the program on an image in its frame; return the outputs float32 (C, H, W) cropped to the image."""
    height, width = image.shape[:2]
    (y, x), frame = find_frame((height, width), metadata)
    if not metadata["any_size"]:
        frame = metadata["frame"]
    area = (..., slice(y, y + height), slice(x, x + width))
    filled = np.empty((1, 3, *frame), np.float32)
    filled[:] = 255 * np.array(metadata["mean"], np.float32)[:, None, None]  # 0 after normalisation
    filled[area] = image.transpose(2, 0, 1)
    return {name: raw[0][area] for name, raw in run(filled).items()}


def enlarge(plane: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Resize a map (h, w) to ``size``."""
    return cv2.resize(plane, size[::-1], interpolation=cv2.INTER_LINEAR) if plane.shape != size else plane


def decode_classes(raw: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Return the class with the largest logit; classes are enlarged one at a time to save memory."""
    classes, best = np.zeros(size, np.uint8), enlarge(raw[0], size).copy()
    for number, logits in enumerate(raw[1:], start=1):
        logits = enlarge(logits, size)
        classes[logits > best] = number
        np.maximum(best, logits, out=best)
    return classes


def decode_metres(raw: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Return metres, or inverse depth, (H, W)."""
    return enlarge(raw[0], size)


def decode_directions(raw: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Return unit vectors (H, W, 3)."""
    units = [enlarge(plane, size) for plane in normalise(raw)]
    return np.ascontiguousarray(normalise(np.stack(units)).transpose(1, 2, 0))


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Divide vectors (3, H, W) by their lengths."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=0), 1e-12)


def decode_probability(raw: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Return the sigmoid of a logit."""
    return (1 / (1 + np.exp(-np.clip(enlarge(raw[0], size), -80, 80)))).astype(np.float32)


DECODERS: dict[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray]] = {
    "class": decode_classes,
    "metres": decode_metres,
    "inverse_depth": decode_metres,
    "direction": decode_directions,
    "probability": decode_probability,
}
