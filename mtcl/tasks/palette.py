"""Colours of classes and void pixels, shared by the tasks."""

from functools import cache

import cv2
import numpy as np

RGB = tuple[int, int, int]

VOID_COLOUR: RGB = (24, 24, 24)
BACKGROUND: RGB = (96, 98, 106)  # a class of that name stays quiet


def rgb(values: np.ndarray) -> RGB:
    """Convert one colour to the plain tuple of a legend."""
    red, green, blue = (int(value) for value in values)
    return red, green, blue


@cache
def class_colours(names: tuple[str, ...]) -> tuple[RGB, ...]:
    """Choose one colour per class, each the farthest in CIE Lab from the previous ones and from that of void pixels.

    So the first classes differ most, and a class keeps its colour however many follow it.
    """
    levels = np.linspace(0, 1, 13, dtype=np.float32)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    lab = cv2.cvtColor(candidates, cv2.COLOR_RGB2Lab)[:, 0]
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    pleasant = (lab[:, 0] > 35) & (lab[:, 0] < 90) & (chroma > 18) & (chroma < 75)
    candidates, lab = candidates[pleasant, 0], lab[pleasant]

    def distance_to(colour: RGB) -> np.ndarray:
        point = cv2.cvtColor(np.array([[colour]], np.float32) / 255, cv2.COLOR_RGB2Lab)[0, 0]
        return np.linalg.norm(lab - point, axis=1)

    nearest = np.minimum(distance_to(VOID_COLOUR), distance_to(BACKGROUND))
    colours: list[RGB] = []
    for name in names:
        colour = BACKGROUND if name == "background" else rgb(np.round(255 * candidates[nearest.argmax()]))
        nearest = np.minimum(nearest, distance_to(colour))
        colours.append(colour)
    return tuple(colours)
