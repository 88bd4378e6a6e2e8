"""Restate as plainly as possible what TaskDiffusion's public code saves and computes.

Key names with their shapes, and the network as functions of a state dict under those names, one image at a time. Batch
norms use their running statistics. Labels are read as ours are: void pixels are left out, padding is void.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.invpt_reference import Reference as InvPTReference
from helpers.invpt_reference import published_shapes as invpt_shapes
from helpers.published_shapes import Shapes

CLASSES = ("semseg", "human_parts", "sal")
LEVELS = 4
PYRAMID = "heads.fpn_encoder"
Maps = dict[str, Tensor]  # task -> map


def published_shapes(
    tasks: dict[str, int],  # in their order
    size: tuple[int, int],
    dim: int,
    depth: int,
    width: int,
    blocks: int = 3,
) -> dict[str, tuple[int, ...]]:
    """Return key -> shape of TaskDiffusion on a ViT/16, whose names are those of InvPT but for the class token."""
    shapes = Shapes({k: v for k, v in invpt_shapes(tasks, size, dim, depth).items() if k.startswith("backbone.")})
    del shapes["backbone.cls_token"]

    def timed(name: str, into: int, inner: int, kernel: int, out: int = 0, second_kernel: int = 1) -> None:
        shapes.layer(f"{name}.conv_1", inner, into, kernel, kernel)
        shapes.norm(f"{name}.norm", inner)
        shapes.layer(f"{name}.time_mlp.1", 2 * inner, width)
        if out:
            shapes.layer(f"{name}.conv_2", out, inner, second_kernel, second_kernel)

    part = width // 4
    joint = [task for task in tasks if task != "sal"]
    label_width = width + part if "sal" in tasks else width
    shapes["heads.time_mlp.0.weights"] = (8,)
    shapes.layer("heads.time_mlp.1", width, 17)
    shapes.layer("heads.time_mlp.3", width, width)
    shapes.layer("heads.embed_all", width, part * len(joint), 1, 1)
    for level in range(LEVELS):
        shapes.layer(f"backbone.fea_fuse.{level}", width, dim, 1, 1)
        shapes.layer(f"heads.transforms.conv_transforms.{level}", width, width + label_width, 1, 1)
        for i in range(2):
            timed(f"{PYRAMID}.share_fpn.fpn_conv.{level}.{i}", width, width, 3, out=width)
        timed(f"{PYRAMID}.mask_task.{level}", width, len(tasks) ** 2, 3)
    for task, channels in tasks.items():
        for level in range(LEVELS):
            for i, kernel in ((0, 3), (3, 1), (4, 3), (7, 1)):
                shapes.layer(f"{PYRAMID}.feat_task.{level}.{task}.{i}", width, width, kernel, kernel)
            shapes.norm(f"{PYRAMID}.feat_task.{level}.{task}.1", width)
            shapes.norm(f"{PYRAMID}.feat_task.{level}.{task}.5", width)
            timed(f"{PYRAMID}.specific_head.{level}.{task}", width, width, 1)
        timed(f"{PYRAMID}.fpn_mask.{task}", LEVELS * width, width, 1, out=LEVELS, second_kernel=3)
        for block in range(blocks):
            timed(f"heads.encoders.{block}.{task}", width, width, 3, out=width)
        if task in CLASSES:
            shapes[f"heads.embedding_tables.{task}.weight"] = (channels + 1, part)
        else:
            shapes.layer(f"heads.embedding_tables.{task}", part, channels, 1, 1)
            shapes[f"heads.invalid_embedding_tables.{task}.weight"] = (1, part)
        shapes.layer(f"heads.pred_heads.{task}", channels, width, 3, 3)
        shapes.layer(f"heads.aux_heads.{task}.0.conv_1", width, LEVELS * width, 3, 3)
        shapes.layer(f"heads.aux_heads.{task}.0.conv_2", width, width, 1, 1)
        shapes.layer(f"heads.aux_heads.{task}.0.conv_3", width, LEVELS * width, 1, 1)
        shapes.norm(f"heads.aux_heads.{task}.0.norm", width)
        shapes.layer(f"heads.aux_heads.{task}.1", channels, width, 3, 3)
    return shapes


def log_snr(time: float) -> float:
    angle = (time + 0.0002) / (1 + 0.00025) * math.pi / 2
    return -math.log(max(math.cos(angle) ** -2 - 1, 1e-5))


def mix(snr: float) -> tuple[float, float]:
    """Factors of signal and noise at a logarithm of their ratio."""
    return math.sqrt(1 / (1 + math.exp(-snr))), math.sqrt(1 / (1 + math.exp(snr)))


class Reference(InvPTReference):
    """The public network. ``maps``: of one image, (1, C, h, w) of each level."""

    def predict(self, image: Tensor, noise: Tensor, steps: int = 3) -> Maps:
        """Predictions of the picture's size."""
        size = image.shape[-2:]
        features = [tokens.transpose(1, 2).unflatten(2, (size[0] // 16, size[1] // 16)) for tokens in self.vit(image)]
        return {task: self.to(x, size) for task, x in self.sample(features, noise, steps).items()}

    def sample(self, maps: list[Tensor], noise: Tensor, steps: int) -> Maps:
        """Predictions at four times the maps' size."""
        levels, clean_maps = self.encode(maps)
        noised = noise
        for step in range(steps):
            now, then = log_snr(1 - step / steps), log_snr(max(1 - (step + 2) / steps, 0.0))
            last = step == steps - 1
            predictions = self.decode(levels, clean_maps, noised, now, last)
            if last:
                return predictions
            (alpha, sigma), (next_alpha, next_sigma) = mix(now), mix(then)
            label_map = self.join({t: self.embed_prediction(t, p) for t, p in predictions.items()})
            noised = next_alpha * label_map + next_sigma * (noised - alpha * label_map) / sigma
        raise AssertionError

    def train_pass(
        self, maps: list[Tensor], labels: dict[str, Tensor], frame: tuple[int, int], time: float, noise: Tensor
    ) -> tuple[Maps, Maps]:
        """Predictions and auxiliary ones at four times the maps' size; labels of one image in batch layout."""
        levels, clean_maps = self.encode(maps)
        alpha, sigma = mix(log_snr(time))
        grid = levels[0].shape[-2:]
        label_map = self.join({t: self.embed_label(t, labels[t], frame, grid) for t in self.tasks})
        predictions = self.decode(levels, clean_maps, alpha * label_map + sigma * noise, log_snr(time), True)
        auxiliary = {}
        for task in self.tasks:
            x = self.grow(torch.cat([level[task] for level in clean_maps], dim=1))
            name = f"heads.aux_heads.{task}.0"
            hidden = F.gelu(self.batch_norm(f"{name}.norm", self.conv(f"{name}.conv_1", x)))
            x = self.conv(f"{name}.conv_2", hidden) + self.conv(f"{name}.conv_3", x)
            auxiliary[task] = self.conv(f"heads.aux_heads.{task}.1", x)
        return predictions, auxiliary

    def encode(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Maps]]:
        levels = [self.conv(f"backbone.fea_fuse.{i}", x) for i, x in enumerate(maps)]
        clean_maps = []
        for i, x in enumerate(levels):
            clean_maps.append({})
            for task in self.tasks:
                y = x
                for n in (0, 4):
                    name = f"{PYRAMID}.feat_task.{i}.{task}"
                    y = F.gelu(self.batch_norm(f"{name}.{n + 1}", self.conv(f"{name}.{n}", y)))
                    y = self.conv(f"{name}.{n + 3}", y)
                clean_maps[-1][task] = y
        return levels, clean_maps

    def decode(self, levels: list[Tensor], clean_maps: list[Maps], noised: Tensor, snr: float, enlarge: bool) -> Maps:
        frequencies = self.state["heads.time_mlp.0.weights"]
        angles = 2 * math.pi * snr * frequencies
        time = torch.cat([torch.tensor([snr], dtype=angles.dtype), angles.sin(), angles.cos()])[None]
        time = self.linear("heads.time_mlp.3", F.gelu(self.linear("heads.time_mlp.1", time)))
        mixed: dict[str, list[Tensor]] = {task: [] for task in self.tasks}
        for i, x in enumerate(levels):
            x = self.conv(f"heads.transforms.conv_transforms.{i}", torch.cat([x, noised], dim=1))
            for n in range(2):
                x = self.timed_block(f"{PYRAMID}.share_fpn.fpn_conv.{i}.{n}", x, time)
            gates = self.timed(f"{PYRAMID}.mask_task.{i}", x, time).sigmoid()
            for k, task in enumerate(self.tasks):
                total = 0.0
                for m, other in enumerate(self.tasks):
                    gate = gates[:, k * len(self.tasks) + m]
                    total = total + gate[:, None] * clean_maps[i][other]
                mixed[task].append(self.timed(f"{PYRAMID}.specific_head.{i}.{task}", total, time))
        predictions = {}
        blocks = sum(key.startswith("heads.encoders.") and key.endswith(f".{task}.conv_1.bias") for key in self.state)
        for task in self.tasks:
            shares = self.timed_block(f"{PYRAMID}.fpn_mask.{task}", torch.cat(mixed[task], dim=1), time).softmax(dim=1)
            x = sum(shares[:, i : i + 1] * mixed[task][i] for i in range(LEVELS))
            for n in range(blocks):
                if enlarge and n == blocks - 1:
                    x = self.grow(x)
                x = x + self.timed_block(f"heads.encoders.{n}.{task}", x, time)
            predictions[task] = self.conv(f"heads.pred_heads.{task}", x)
        return predictions

    def timed(self, name: str, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.linear(f"{name}.time_mlp.1", F.silu(time))[..., None, None].chunk(2, dim=1)
        return self.batch_norm(f"{name}.norm", self.conv(f"{name}.conv_1", x)) * (scale + 1) + shift

    def timed_block(self, name: str, x: Tensor, time: Tensor) -> Tensor:
        return self.conv(f"{name}.conv_2", F.gelu(self.timed(name, x, time)))

    def grow(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)

    def embed_prediction(self, task: str, prediction: Tensor) -> Tensor:
        name = f"heads.embedding_tables.{task}"
        if task in CLASSES:
            classes = prediction.argmax(dim=1)
            if task == "sal":
                classes = (prediction.softmax(dim=1)[:, 1] > 0.85).long()
            return self.state[f"{name}.weight"][classes].permute(0, 3, 1, 2)
        if task == "depth":
            return self.conv(name, prediction.clamp(0, 80))
        return self.conv(name, F.normalize(prediction, dim=1) if task == "normals" else prediction.sigmoid())

    def embed_label(self, task: str, label: Tensor, frame: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """Cell by cell: a class is that of the middle pixel, another label the mean of the four in the middle."""
        name = f"heads.embedding_tables.{task}"
        height, width = frame[0] // grid[0], frame[1] // grid[1]
        out = torch.empty(1, self.state[f"{name}.weight"].shape[1 if task in CLASSES else 0], *grid).to(self.dtype)
        for row in range(grid[0]):
            for column in range(grid[1]):
                y, x = row * height + height // 2, column * width + width // 2
                out[0, :, row, column] = self.embed_pixels(task, name, label, y, x)
        return out

    def embed_pixels(self, task: str, name: str, label: Tensor, y: int, x: int) -> Tensor:
        def inside(row: int, column: int) -> bool:
            return row < label.shape[-2] and column < label.shape[-1]

        if task in CLASSES:
            table = self.state[f"{name}.weight"]
            value = int(label[y, x]) if inside(y, x) else 255
            return table[-1 if value == 255 else value]
        pixels = [label[:, r, c] for r in (y - 1, y) for c in (x - 1, x) if inside(r, c)]
        valid = [p for p in pixels if ((p != 255) if task == "edge" else (p != 0)).any()]
        void = self.state[f"heads.invalid_embedding_tables.{task}.weight"][0]
        if not valid:
            return void
        mean = torch.stack(valid).mean(dim=0).to(self.dtype)
        embedded = self.state[f"{name}.weight"][:, :, 0, 0] @ mean + self.state[f"{name}.bias"]
        return len(valid) / 4 * embedded + (1 - len(valid) / 4) * void

    def join(self, parts: Maps) -> Tensor:
        joint = self.conv("heads.embed_all", torch.cat([p for t, p in parts.items() if t != "sal"], dim=1))
        merged = torch.cat([parts["sal"], joint], dim=1) if "sal" in parts else joint
        return 0.01 * (2 * merged.sigmoid() - 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.state["heads.time_mlp.0.weights"].dtype
