"""Datasets of a few pixels in the layout of MTAN's releases."""

from pathlib import Path

import numpy as np


def make_arrays(seed: int, num_classes: int, size: tuple[int, int], inverse: bool) -> dict[str, np.ndarray]:
    """Folder -> the array of one image as the releases store it: fractions, classes from 0 with -1, (H, W, 1) depth."""
    rng = np.random.default_rng(seed)
    depth = rng.uniform(0, 0.49, size) if inverse else rng.uniform(0.7, 9.9, size)
    vectors = rng.normal(size=(*size, 3))
    vectors *= rng.uniform(0.4, 1, (*size, 1)) / np.linalg.norm(vectors, axis=-1, keepdims=True)
    void = rng.random((3, *size)) < 0.2
    arrays = {
        "image": rng.integers(0, 256, (*size, 3)) / 255,
        "label": np.where(void[0], -1, rng.integers(0, num_classes, size)).astype(float),
        "depth": np.where(void[1], 0, depth)[..., None].astype(np.float32),
    }
    return arrays if inverse else {**arrays, "normal": np.where(void[2, ..., None], 0, vectors)}


def write_release(root: Path, counts=(3, 2), num_classes=13, size=(6, 8), inverse=False) -> Path:
    """Write as many training and validation images as ``counts`` says; image n of a list has the seed n or 1000 + n."""
    for start, subset, count in zip((0, 1000), ("train", "val"), counts):
        for number in range(count):
            for folder, array in make_arrays(start + number, num_classes, size, inverse).items():
                path = root / subset / folder / f"{number}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, array)
    return root
