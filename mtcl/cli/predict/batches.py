"""Predict batches of images, with a way out where the memory is too small."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from mtcl.inference import Predictor
from mtcl.runtime import is_out_of_memory


def split_groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of ``size`` items; the last may be shorter."""
    stream = iter(items)
    while group := list(islice(stream, size)):
        yield group


def predict_group(predictor: Predictor, images: Sequence[np.ndarray]) -> list[dict[str, np.ndarray] | None]:
    """Return the maps of every image, predicted one by one where memory is too small for all; None where for one."""
    try:
        return [*predictor.predict_batch(images)]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return [None] if len(images) == 1 else [predict_group(predictor, [image])[0] for image in images]


def explain_too_large(source: object, image: np.ndarray, predictor: Predictor) -> str:
    """Say that an image needs too much memory, and what to do."""
    advice = "use --mode resize" if predictor.mode != "resize" else "make it smaller, or use --device cpu"
    height, width = image.shape[:2]
    return f"{source}: {width} x {height} pixels are too many for the memory of {predictor.device}; {advice}"
