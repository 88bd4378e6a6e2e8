"""Image files for tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, height: int = 30, width: int = 40) -> Path:
    colours = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(colours).save(path)
    return path
