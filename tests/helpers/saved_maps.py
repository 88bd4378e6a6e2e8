"""Folders of saved maps and a dataset of them."""

from pathlib import Path

import cv2
import numpy as np

from mtcl.data import Sample


class Listed:
    """A reader of labels that are given: id -> task -> array."""

    def __init__(self, labels: dict[str, dict[str, np.ndarray]]) -> None:
        self.ids, self.labels = list(labels), labels

    def read(self, index: int) -> Sample:
        labels = self.labels[self.ids[index]]
        return Sample(self.ids[index], np.zeros((*next(iter(labels.values())).shape[:2], 3), np.uint8), labels)

    def summary(self) -> str:
        return ""

    def fingerprint(self) -> str:
        return ""


def write_png(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), values if values.ndim == 2 else values[..., ::-1])
