"""Tasks whose label is the number of a class: the base of semantic segmentation, human parts and saliency."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtcl.tasks.base import Task
from mtcl.tasks.palette import RGB, VOID_COLOUR, class_colours


def embed_scalar(label: Tensor) -> Tensor:
    """Map one value per pixel (..., K, 1) to points (..., K, 3) on a line."""
    return F.pad(label.float(), (0, 2))


class DiscreteTask(Task):
    """A task whose labels are equal or different, nothing in between: classes, and edge or not."""

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare labels (B, K, 1) and (B, L, 1): float32 (B, K, L), 0 where equal, 1 where different."""
        return (a != b.transpose(1, 2)).float()

    def embed_label(self, label: Tensor) -> Tensor:
        """Map labels to points; different ones are at least 1 apart, how far beyond means nothing."""
        return embed_scalar(label)

    def sampling_bin(self, label: Tensor) -> Tensor:
        """Return the label as the bin: int64 (..., K)."""
        return label[..., 0].long()


@dataclass(frozen=True)
class ClassTask(DiscreteTask):
    """A task of classes: arrays uint8 (H, W), batches int64 (B, H, W), predictions logits (B, C, H, W); 255 is void."""

    prediction_type: ClassVar[str] = "class"
    min_agreement_gain: ClassVar[float] = 0.2  # fraction of pixels, for a warning about another numbering

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes, in the order of the label values."""

    @property
    def colours(self) -> tuple[RGB, ...]:
        """Return the colours of the classes."""
        return class_colours(self.classes)

    def valid(self, label: Tensor) -> Tensor:
        """Return the mask of pixels that are not void: bool (B, H, W)."""
        return label != self.void

    def to_label(self, prediction: Tensor) -> Tensor:
        """Convert logits (..., K, C) to classes: int64 (..., K, 1)."""
        return prediction.argmax(dim=-1, keepdim=True)

    def predict_label(self, prediction: Tensor, confidence: float) -> Tensor:
        """Return the most probable class, void where its probability is below ``confidence``: int64 (B, H, W)."""
        probability, label = prediction.softmax(dim=1).max(dim=1)
        return torch.where(probability >= confidence, label, int(self.void))

    def collate(self, labels: np.ndarray) -> Tensor:
        """Convert stacked labels to int64 (B, H, W)."""
        return torch.from_numpy(labels).long()

    def decode(self, prediction: Tensor) -> np.ndarray:
        """Convert logits (C, H, W) to classes: uint8 (H, W)."""
        return prediction.argmax(dim=0).to(torch.uint8).cpu().numpy()

    def check_maps(self, maps: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> list[str]:
        """Describe classes that fit the labels far better when moved by one: another numbering."""
        predicted = np.concatenate([array.ravel() for array in maps]).astype(int)
        target = np.concatenate([array.ravel() for array in labels]).astype(int)
        predicted, target = predicted[target != self.void], target[target != self.void]
        if not predicted.size:
            return []
        as_is, *moved = (float((predicted - step == target).mean()) for step in (0, 1, -1))
        if max(moved) < 2 * as_is + self.min_agreement_gain:
            return []
        direction = "larger" if moved[0] > moved[1] else "smaller"
        return [
            f"look one {direction} than the classes of the labels ({as_is:.0%} of the pixels agree, moved by one "
            f"{max(moved):.0%}): classes are numbered from 0, as argmax gives them, without a void class"
        ]

    def draw(self, array: np.ndarray) -> np.ndarray:
        """Colour classes: uint8 RGB (H, W, 3)."""
        table = np.full((256, 3), VOID_COLOUR, np.uint8)
        table[: len(self.colours)] = self.colours
        return table[array]

    def legend(self, arrays: list[np.ndarray]) -> list[tuple[str, RGB]]:
        """Return the classes that occur, in their order, and the void if it does."""
        values = {int(value) for array in arrays for value in np.unique(array)}
        rows = [
            (name, colour) for value, (name, colour) in enumerate(zip(self.classes, self.colours)) if value in values
        ]
        return rows + [("void", VOID_COLOUR)] * (self.void in values)
