"""Use an exported program as the model was scored: put an image into its frame, run, cut, decode.

``scripts/export.py`` writes this file beside every program. It needs NumPy and OpenCV, and ONNX Runtime for a
``model.onnx`` or PyTorch for a ``model.pt2``; nothing of mtcl.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np

Run = Callable[[np.ndarray], Mapping[str, np.ndarray]]
FACTS = "mtcl.json"


def open_program(path: str) -> tuple[Run, dict[str, Any]]:
    """Load a program: a function of float32 (1, 3, height, width) that returns the outputs by task, and its facts."""
    if path.endswith(".onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        names = [output.name for output in session.get_outputs()]
        facts = json.loads(session.get_modelmeta().custom_metadata_map[FACTS])
        return lambda image: dict(zip(names, session.run(names, {"image": image}))), facts
    import torch

    stored = {FACTS: ""}
    program = torch.export.load(path, extra_files=stored).module()

    def run(image: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return {name: raw.numpy() for name, raw in program(torch.from_numpy(image)).items()}

    return run, json.loads(stored[FACTS])


def predict(run: Run, image: np.ndarray, facts: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Predict all tasks of an image as ``mtcl.load`` does.

    Args:
        run: the program, as :func:`open_program` gives it.
        image: uint8 RGB (H, W, 3), upright.
        facts: what is stored with the program.

    Returns:
        task -> map of the image's height and width: uint8 classes, float32 metres, float32 unit vectors (H, W, 3),
        float32 probabilities.
    """
    size = image.shape[:2]
    small = shrink(image, facts)
    outputs = run_framed(run, small, facts)
    return {name: DECODERS[facts["kinds"][name]](outputs[name], size) for name in facts["tasks"]}


def shrink(image: np.ndarray, facts: Mapping[str, Any]) -> np.ndarray:
    """Shrink an image that is much larger than those of the training, or than a program of one size takes."""
    size = image.shape[:2]
    frame = facts["size"]
    if facts["any_size"]:
        (short, long), (frame_short, frame_long) = sorted(size), sorted(frame)
        limit = facts["as_it_is"]
        fits = short * long <= limit * frame_short * frame_long and long <= limit * frame_long
        factor = min(1.0, frame_short / short, frame_long / long)
    else:
        fits = all(n <= limit for n, limit in zip(find_frame(size, facts)[1], facts["frame"]))
        factor = min(1.0, frame[0] / size[0], frame[1] / size[1])
    if fits:
        return image
    height, width = (max(1, round(side * factor)) for side in size)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def find_frame(size: tuple[int, ...], facts: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Find the (top, left) of an image of that size in its frame, and the frame's (height, width)."""
    # It is centred in the training frame, or in its own size rounded up where that is larger ...
    sides = [max(least, round_up(side, facts["rounding"])) for side, least in zip(size, facts["size"])]
    offset = [(side - length) // 2 for side, length in zip(sides, size)]
    # ... and what the backbone needs beyond that is added at the right and bottom.
    return offset, [round_up(side, facts["multiple"]) for side in sides]


def round_up(length: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-length // multiple) * multiple


def run_framed(run: Run, image: np.ndarray, facts: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Run the program on an image in its frame; the outputs float32 (C, H, W) cut to the image."""
    height, width = image.shape[:2]
    (top, left), frame = find_frame((height, width), facts)
    if not facts["any_size"]:
        frame = facts["frame"]
    area = (..., slice(top, top + height), slice(left, left + width))
    filled = np.empty((1, 3, *frame), np.float32)
    filled[:] = 255 * np.array(facts["mean"], np.float32)[:, None, None]  # 0 once it is normalised
    filled[area] = image.transpose(2, 0, 1)
    return {name: raw[0][area] for name, raw in run(filled).items()}


def enlarge(plane: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Bring (h, w) to ``size``."""
    return cv2.resize(plane, size[::-1], interpolation=cv2.INTER_LINEAR) if plane.shape != size else plane


def decode_classes(raw: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Find the class with the largest logit, one class after the other: all of them, enlarged, could be huge."""
    classes, best = np.zeros(size, np.uint8), enlarge(raw[0], size).copy()
    for number, logits in enumerate(raw[1:], start=1):
        logits = enlarge(logits, size)
        classes[logits > best] = number
        np.maximum(best, logits, out=best)
    return classes


def decode_metres(raw: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Take metres as they are."""
    return enlarge(raw[0], size)


def decode_directions(raw: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Make vectors (H, W, 3) of length 1."""
    units = [enlarge(plane, size) for plane in normalise(raw)]
    return np.ascontiguousarray(normalise(np.stack(units)).transpose(1, 2, 0))


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Divide vectors (3, H, W) by their lengths."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=0), 1e-12)


def decode_probability(raw: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Take the sigmoid of a logit."""
    return (1 / (1 + np.exp(-np.clip(enlarge(raw[0], size), -80, 80)))).astype(np.float32)


DECODERS: dict[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray]] = {
    "class": decode_classes,
    "metres": decode_metres,
    "direction": decode_directions,
    "probability": decode_probability,
}
