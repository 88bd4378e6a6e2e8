"""A folder of tiny pictures, and words for a tiny distillation on it."""

from pathlib import Path

import cv2
import numpy as np

from helpers.shrunken import shrunk

TEACHERS = "++regularizer.options.teachers={first:{name:test_resnet},second:{name:test_vit}}"
STUDENT = ["backbone=vit_small", *shrunk("sak", "vit_small"), "++backbone.kwargs.drop_path_rate=0.1"]
STUDENT += ["backbone.weights=none", "decoder.teachers=[first,second]", TEACHERS]


def write_images(folder: Path, count: int = 8) -> Path:
    """Pictures of several sizes, one of them in a subfolder, beside files that are none."""
    rng = np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    for index in range(count):
        name = f"more/{index}.png" if index == 1 else f"{index}.jpg"
        cv2.imwrite(str(folder / name), rng.integers(0, 256, (40 + 8 * index, 64, 3)))
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.jpg").write_text("no picture")
    return folder


def list_overrides(images: Path, *more: str) -> list[str]:
    return [
        f"data.root={images}", "data.size=[32,48]", "data.batch_size=2", "data.eval_batch_size=2", "data.workers=0",
        "data.options.num_val=2", "trainer.max_steps=4", "trainer.val_interval=2", "trainer.checkpoint_interval=2",
        "trainer.log_interval=1", "trainer.device=cpu", "schedule.warmup_steps=0", *STUDENT, *more,
    ]  # fmt: skip
