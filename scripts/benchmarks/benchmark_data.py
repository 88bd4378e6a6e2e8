"""Measure how fast training images are loaded: synthetic rooms, NYUD-v2 cold and cached, and a plain implementation.

python scripts/benchmarks/benchmark_data.py [--root NYUDv2] [--size HEIGHTxWIDTH] [--images N] [--step] [--json OUT]

Rates are images per second of one core, the thread's own CPU time, so that a busy machine does not count. Without
--root an archive is generated: rooms at NYUD-v2's 425x560 in its formats. The rows:
  rooms, rendered / cached   the built-in scenes at 96x128, without augmentation
  plain                      the usual implementation: PIL, float32 from the start, np.unique for the class cap
  files                      this code, every file decoded at each access (data.memory_map=false)
  first epoch                this code while it fills its cache
  cached                     this code from the memory-mapped cache
--step adds the share of a training step (MobileNetV2, this machine) that waits for data.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mtcl.cli.arguments import CommandParser, non_negative_int, positive_int
from mtcl.cli.script import run
from mtcl.data import NYUD, Augment, AugmentedDataset, EpochBatchSampler, Rooms, collate, prepare_batch, train_loader
from mtcl.errors import UserError
from mtcl.models import EncoderDecoder, build_backbone
from mtcl.models.decoders import MultiHead
from mtcl.tasks import TASK_NAMES, Task, build_task

NAMES = ("semseg", "depth", "normals", "edge")
BATCH = 8
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def measure_rate(load: Callable[[], int]) -> float:
    """Return images per second of this thread's CPU time; ``load`` returns how many it loaded."""
    start = time.thread_time()
    count = load()
    return count / (time.thread_time() - start)


def measure_rooms(count: int = 200) -> dict[str, float]:
    """Measure the built-in rooms."""
    dataset = Rooms("train", TASK_NAMES, size=(96, 128), length=(count, 1))
    Rooms("val", TASK_NAMES, size=(96, 128), cache=False).read(0)  # make the textures

    def read() -> int:
        for index in range(count):
            dataset.read(index)
        return count

    return {"rooms, rendered": measure_rate(read), "rooms, cached": measure_rate(read)}


def build_nyud_tasks() -> dict[str, Task]:
    """Build the four tasks of NYUD-v2."""
    return {name: build_task(name, **options) for name, options in NYUD.task_options().items()}


def make_archive(root: Path, count: int) -> None:
    """Write ``count`` rooms in the files of the NYUDv2 archive."""
    dataset = Rooms("train", NAMES, size=(425, 560), length=(count, 1))
    for folder in ("images", "segmentation", "depth", "normals", "edge", "gt_sets"):
        (root / folder).mkdir(parents=True)
    for index, name in enumerate(dataset.ids):
        sample = dataset.read(index)
        noise = np.random.default_rng(index).normal(
            0, 4, sample.image.shape
        )  # as of a camera, so that PNG compresses as usual
        image = np.clip(sample.image + noise, 0, 255).astype(np.uint8)
        cv2.imwrite(str(root / f"images/{name}.png"), image[..., ::-1])
        cv2.imwrite(str(root / f"segmentation/{name}.png"), sample.labels["semseg"] + np.uint8(1))
        np.save(root / f"depth/{name}.npy", sample.labels["depth"])
        codes = np.round((sample.labels["normals"] + 1) * 127.5).astype(np.uint8)
        cv2.imwrite(str(root / f"normals/{name}.png"), codes[..., ::-1])
        cv2.imwrite(str(root / f"edge/{name}.png"), sample.labels["edge"] * np.uint8(255))
    (root / "gt_sets" / "train.txt").write_text("\n".join(dataset.ids), "utf-8")


def make_epoch_function(nyud: NYUD, tasks: dict[str, Task], size: tuple[int, int]) -> Callable[[], int]:
    """Return a function that loads one epoch of augmented batches in this thread, up to the normalised image."""
    dataset = AugmentedDataset(nyud, tasks, Augment(size), seed=0)

    def epoch() -> int:
        stream = iter(EpochBatchSampler(len(nyud.ids), BATCH, seed=0))
        for _ in range(len(nyud.ids) // BATCH):
            images = [views for views in map(dataset.__getitem__, next(stream)) if not isinstance(views, UserError)]
            samples = [sample for views in images for sample in views]
            prepare_batch(collate(samples, tasks, size, 1), MEAN.tolist(), STD.tolist(), "cpu")
        return len(nyud.ids) // BATCH * BATCH

    return epoch


class PlainPipeline:
    """Runs the same steps in a plain implementation: one after another, on full float32 arrays, as is usual."""

    def __init__(self, root: Path, ids: Sequence[str], size: tuple[int, int]) -> None:
        self.root, self.ids, self.size = root, ids, size
        self.rng = np.random.default_rng(0)

    def __call__(self) -> int:
        """Load one epoch."""
        for start in range(0, len(self.ids) - BATCH + 1, BATCH):
            samples = [self.sample(name) for name in self.ids[start : start + BATCH]]
            {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
        return len(self.ids) // BATCH * BATCH

    def read(self, folder: str, name: str) -> np.ndarray:
        """Read a PNG as float32."""
        return np.array(Image.open(self.root / folder / f"{name}.png")).astype(np.float32)

    def sample(self, name: str) -> dict[str, Tensor]:
        """Load and augment one sample."""
        semseg = self.read("segmentation", name)
        semseg[semseg == 0] = 256
        sample = {
            "image": self.read("images", name),
            "semseg": (semseg - 1)[..., None],
            "depth": np.load(self.root / "depth" / f"{name}.npy").astype(np.float32)[..., None],
            "normals": 2.0 * self.read("normals", name) / 255.0 - 1.0,
            "edge": (self.read("edge", name) / 255.0)[..., None],
        }
        sample = self.scale(sample)
        sample = self.crop(sample)
        if self.rng.random() < 0.5:
            sample = {key: np.ascontiguousarray(array[:, ::-1]) for key, array in sample.items()}
            sample["normals"][..., 0] *= -1
        sample["image"] = (self.distort(sample["image"]) / 255.0 - MEAN) / STD
        sample = self.pad(sample)
        sample["normals"][np.linalg.norm(sample["normals"], axis=-1) == 0] = 255
        sample["depth"][sample["depth"] == 0] = 255
        return {key: torch.from_numpy(array.transpose(2, 0, 1).copy()).float() for key, array in sample.items()}

    def scale(self, sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Scale a sample at random."""
        factor = self.rng.uniform(0.5, 2.0)
        scaled: dict[str, np.ndarray] = {}
        for key, array in sample.items():
            interpolation = cv2.INTER_LINEAR if key == "image" else cv2.INTER_NEAREST
            resized = cv2.resize(array, None, fx=factor, fy=factor, interpolation=interpolation)
            scaled[key] = resized if resized.ndim == 3 else resized[..., None]
        scaled["depth"] = scaled["depth"] / factor
        return scaled

    def crop(self, sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Crop a sample at random, again while one class fills most of the crop."""
        height, width = sample["image"].shape[:2]
        if height <= self.size[0] and width <= self.size[1]:
            return sample
        for _ in range(11):
            row = self.rng.integers(0, max(height - self.size[0], 0) + 1)
            column = self.rng.integers(0, max(width - self.size[1], 0) + 1)
            window = (slice(row, row + self.size[0]), slice(column, column + self.size[1]))
            values, counts = np.unique(sample["semseg"][window], return_counts=True)
            counts = counts[values != 255]
            if len(counts) > 1 and counts.max() < 0.75 * counts.sum():
                break
        return {key: array[window] for key, array in sample.items()}

    def distort(self, image: np.ndarray) -> np.ndarray:
        """Distort the colours at random."""

        def scale_values(array: np.ndarray, gain: float = 1, offset: float = 0) -> np.ndarray:
            return np.clip(array.astype(np.float32) * gain + offset, 0, 255).astype(np.uint8)

        image = image.astype(np.uint8)
        if self.rng.random() < 0.5:
            image = scale_values(image, offset=self.rng.uniform(-32, 32))
        first = self.rng.random() < 0.5
        if first and self.rng.random() < 0.5:
            image = scale_values(image, self.rng.uniform(0.5, 1.5))
        if self.rng.random() < 0.5:
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            hsv[..., 1] = scale_values(hsv[..., 1], self.rng.uniform(0.5, 1.5))
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if self.rng.random() < 0.5:
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            hue = hsv[..., 0].astype(np.int64) + int(self.rng.integers(-18, 18))
            hsv[..., 0] = (hue % 180).astype(np.uint8)
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if not first and self.rng.random() < 0.5:
            image = scale_values(image, self.rng.uniform(0.5, 1.5))
        return image.astype(np.float32)

    def pad(self, sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Pad a sample to the crop size."""
        height, width = sample["image"].shape[:2]
        pad_top, pad_left = max(self.size[0] - height, 0) // 2, max(self.size[1] - width, 0) // 2
        pad_bottom, pad_right = max(self.size[0] - height, 0) - pad_top, max(self.size[1] - width, 0) - pad_left
        void = {"semseg": 255.0, "edge": 255.0}
        return {
            key: np.pad(
                array, ((pad_top, pad_bottom), (pad_left, pad_right), (0, 0)), constant_values=void.get(key, 0.0)
            )
            for key, array in sample.items()
        }


def measure_waiting_share(
    dataset: NYUD, tasks: dict[str, Task], size: tuple[int, int], workers: int, steps: int = 12
) -> float:
    """Return the share of a training step that waits for its batch, after two steps to warm up."""
    backbone = build_backbone("mobilenetv2_100", weights=None)
    channels = {name: task.channels for name, task in tasks.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = EncoderDecoder(backbone, MultiHead(backbone.channels, backbone.strides, channels)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    stream = iter(train_loader(dataset, tasks, Augment(size), BATCH, seed=0, workers=workers, pin_memory=False))
    wait_s = total_s = 0.0
    for step in range(steps + 2):
        start = time.perf_counter()
        batch = next(stream)
        loaded = time.perf_counter()
        image, labels = prepare_batch(batch, model.mean, model.std, device)
        output = model(image)
        loss = torch.stack([task.weight * task.loss(output.predictions[n], labels[n]) for n, task in tasks.items()])
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if step >= 2:
            wait_s += loaded - start
            total_s += time.perf_counter() - start
    return wait_s / total_s


def measure_nyud(root: Path, cache: Path, size: tuple[int, int], limit: int | None) -> dict[str, float]:
    """Measure NYUD-v2 with the plain implementation, from files, in the first epoch and from the cache."""

    def open_dataset(folder: Path | None) -> NYUD:
        return NYUD(root, "train", NAMES, cache=folder, limit=limit)

    files = open_dataset(None)
    if set(files.suffixes.values()) != {".png", ".npy"} or files.suffixes["normals"] != ".png":
        raise UserError(
            f"{files.root} is not in the NYUDv2 archive's format, the only one that the plain implementation reads."
        )
    tasks = build_nyud_tasks()
    rates = {
        "plain": measure_rate(PlainPipeline(files.root, files.ids, size)),
        "files": measure_rate(make_epoch_function(files, tasks, size)),
    }
    rates["first epoch"] = measure_rate(make_epoch_function(open_dataset(cache), tasks, size))
    warm = make_epoch_function(open_dataset(cache), tasks, size)
    warm()  # checks every entry once
    rates["cached"] = measure_rate(warm)
    return rates


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(__doc__)
    parser.add_argument("--root", type=Path, help="NYUD-v2; default: rendered rooms")
    parser.add_argument("--size", default="448x576", help="of training crops, HEIGHTxWIDTH")
    parser.add_argument("--images", type=positive_int, default=96, help="how many images to use")
    parser.add_argument("--step", action="store_true", help="also measure a training step's wait for data")
    parser.add_argument("--workers", type=non_negative_int, default=1, help="of the training step's loader")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark and print its table."""
    args = parse_args()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        height, width = (int(side) for side in args.size.split("x"))
    except ValueError:
        raise UserError(f"--size {args.size} is not HEIGHTxWIDTH, e.g. 448x576.") from None
    size = (height, width)
    if min(size) < 1 or args.images < BATCH:
        raise UserError(f"--size {args.size} --images {args.images} is too small; give at least {BATCH} images.")
    with tempfile.TemporaryDirectory() as scratch:
        root, cache = args.root, Path(scratch) / "cache"
        if root is None:
            root = Path(scratch) / "NYUDv2"
            make_archive(root, args.images)
        rates = {**measure_rooms(), **measure_nyud(root, cache, size, args.images)}
        print(f"{platform.machine()}, {os.cpu_count()} cores, OpenCV {cv2.__version__}, torch {torch.__version__}")
        print(f"images per second of one core; training crops {height}x{width}, tasks {', '.join(NAMES)}")
        for name, value in rates.items():
            ratio = "" if name.startswith("rooms") else f"{value / rates['plain']:6.1f} x plain"
            print(f"{name:<16} {value:8.0f}  {ratio}".rstrip())
        results: dict[str, float] = dict(rates)
        if args.step:
            torch.set_num_threads(threads)
            dataset = NYUD(root, "train", NAMES, cache=cache, limit=args.images)
            results["waiting"] = measure_waiting_share(dataset, build_nyud_tasks(), size, args.workers)
            percent = 100 * results["waiting"]
            print(f"a training step waits for data {percent:.1f} % of its time (loader workers: {args.workers})")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    run(main)
