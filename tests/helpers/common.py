"""Paths, tiny configs and what a command printed."""

import copy
import functools
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from omegaconf import DictConfig

from mtcl.config.compose import compose_config

ROOT = Path(__file__).resolve().parents[2]


TINY = ["trainer.device=cpu", "debug=tiny", "data.size=[32,64]", "backbone=test_resnet"]
TINY += ["decoder.width=16", "decoder.head_width=8", "regularizer=contrastive"]
TINY += ["trainer.num_panels=0"]  # drawing them takes a third of so short a run; the tests of them ask for some


class Result(NamedTuple):
    code: int
    out: str
    err: str


def composed(*overrides: str, name: str = "train") -> DictConfig:
    """Compose a config as the command line does, without checking its values; each caller gets a copy."""
    return copy.deepcopy(_compose_once(overrides, name))


@functools.cache
def _compose_once(overrides: tuple[str, ...], name: str) -> DictConfig:
    return compose_config(overrides, ROOT / "configs", name, check=False)


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml"))


def assert_fails(result: Result, *fragments: str) -> None:
    """Exit code 1, and one sentence that has these words in it."""
    assert result.code == 1, result
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err
    for word in fragments:
        assert word in lines[0], lines[0]


def tiny_nyud(folder):
    """Four pictures of noise in the archive's layout."""
    rng = np.random.default_rng(0)
    kinds = {"images": (64, 96, 3), "segmentation": (64, 96), "normals": (64, 96, 3), "edge": (64, 96)}
    for kind, shape in kinds.items():
        (folder / kind).mkdir(parents=True)
        for name in "abcd":
            cv2.imwrite(
                str(folder / kind / f"{name}.png"), rng.integers(0, 41 if kind == "segmentation" else 256, shape)
            )
    (folder / "depth").mkdir()
    (folder / "gt_sets").mkdir()
    for name in "abcd":
        np.save(folder / "depth" / f"{name}.npy", rng.uniform(1, 5, (64, 96)).astype(np.float32))
    for part in ("train", "val"):
        (folder / "gt_sets" / f"{part}.txt").write_text("a\nb\nc\nd\n")
    return folder


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << position % 8]))
