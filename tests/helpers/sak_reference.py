"""Restate as plainly as possible what SAK's public code saves and computes.

Key names with their shapes, and the network of both stages as a function of a state dict under those names, in
evaluation mode. Facts from github.com/innovator-zero/SAK: models/backbones/sak.py and vit.py, models/heads.py,
models/build_models.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.invpt_reference import Reference as InvPTReference
from helpers.invpt_reference import published_shapes as invpt_shapes
from helpers.published_shapes import Shapes


def published_shapes(
    tasks: dict[str, int],  # none in the first stage, whose names have no "backbone."
    teachers: list[str],
    size: tuple[int, int],
    dim: int,
    depth: int,
    teacher_width: int = 50,  # 0: as wide as the student, which takes no aligners
    router: str = "noisy",  # noisy | plain | none
) -> dict[str, tuple[int, ...]]:
    """Return key -> shape of a state dict of SAK on a ViT/16, whose adapters are a quarter as wide."""
    prefix = "backbone." if tasks else ""
    shapes = Shapes()
    for key, shape in invpt_shapes({}, size, dim, depth).items():
        if key.startswith("backbone.") and not key.startswith("backbone.norm."):
            shapes[f"{prefix}vit.{key.removeprefix('backbone.')}"] = shape

    for teacher in teachers:
        for i in range(depth + 1):
            adapter = f"{prefix}tsap.{teacher}.{i}"
            shapes[f"{adapter}.scale"] = (1,)
            shapes.layer(f"{adapter}.down", dim // 4, dim)
            shapes.layer(f"{adapter}.up", dim, dim // 4)
    for block in range(depth // 4 - 1, depth, depth // 4):
        for teacher in teachers:
            shapes.layer(f"{prefix}out_norms.{block}_{teacher}", dim)
            if teacher_width:
                shapes.layer(f"{prefix}ts_aligners.{block}_{teacher}", teacher_width, dim)
        for task in tasks:
            module = f"{prefix}mor.{block}_{task}.router.module"
            if router != "none":
                shapes.layer(f"{module}.0", dim // 2, dim)
                shapes.layer(f"{module}.1", dim // 2)
                shapes.layer(f"{module}.3", (1 + len(teachers)) * (2 if router == "noisy" else 1), dim // 2)
    for task, channels in tasks.items():
        head = f"heads.{task}"
        for level in range(4):
            shapes.layer(f"{head}.linears.{level}", dim // 4, dim)
        shapes.layer(f"{head}.linear_fuse.0", dim, dim, 3, 3)
        shapes.norm(f"{head}.linear_fuse.1", dim)
        shapes.layer(f"{head}.last_conv", channels, dim, 1, 1)
    return shapes


class Reference(InvPTReference):
    """The public network, of what its state dict has: tasks, teachers, routers and aligners."""

    def __init__(self, state: dict[str, Tensor], vit_heads: int):
        self.prefix = "backbone." if "backbone.vit.pos_embed" in state else ""
        names = [key.removeprefix(self.prefix).split(".") for key in state]
        super().__init__(state, list(dict.fromkeys(n[1] for n in names if n[0] == "heads")), vit_heads)
        self.teachers = list(dict.fromkeys(n[1] for n in names if n[0] == "tsap"))  # in the order of a router's scores
        self.depth = len({n[2] for n in names if n[:2] == ["vit", "blocks"]})
        self.blocks = sorted({int(n[1].split("_")[0]) for n in names if n[0] == "out_norms"})

    def __call__(self, image: Tensor) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
        """Each task's prediction of the picture's size, and each teacher's aligned maps, finest level first."""
        size = image.shape[-2:]
        mixtures: dict[str, list[Tensor]] = {task: [] for task in self.tasks}
        aligned: dict[str, list[Tensor]] = {teacher: [] for teacher in self.teachers}
        for block, stem, adapted in self.levels(image):
            for teacher in self.teachers:
                name = f"{self.prefix}ts_aligners.{block}_{teacher}"
                m = self.linear(name, adapted[teacher]) if f"{name}.weight" in self.state else adapted[teacher]
                aligned[teacher].append(self.to_map(m, image))
            experts = [stem, *(adapted[teacher] for teacher in self.teachers)]
            for task in self.tasks:
                weights = self.route(f"{self.prefix}mor.{block}_{task}.router.module", stem)
                mixture = sum(weight[:, None, None] * expert for weight, expert in zip(weights, experts, strict=True))
                mixtures[task].append(self.to_map(mixture, image))
        return {task: self.to(self.head(task, maps, size), size) for task, maps in mixtures.items()}, aligned

    def levels(self, image: Tensor) -> list[tuple[int, Tensor, dict[str, Tensor]]]:
        """The block of each level, the stem's tokens (B, N, C) after it, and each teacher's; of patches alone."""
        vit = f"{self.prefix}vit"
        x = self.conv(f"{vit}.patch_embed.proj", image, stride=16).flatten(2).transpose(1, 2)
        x = torch.cat([self.state[f"{vit}.cls_token"].expand(len(x), -1, -1), x], dim=1)
        x = x + self.state[f"{vit}.pos_embed"]
        paths = {teacher: self.adapt(teacher, 0, x) for teacher in self.teachers}
        levels = []
        for i in range(self.depth):
            x = self.vit_block(f"{vit}.blocks.{i}", x)
            for teacher in self.teachers:
                paths[teacher] = self.adapt(teacher, i + 1, paths[teacher] + x)
            if i in self.blocks:
                norms = {teacher: f"{self.prefix}out_norms.{i}_{teacher}" for teacher in self.teachers}
                levels.append((i, x[:, 1:], {t: self.norm(norms[t], paths[t][:, 1:], 1e-5) for t in self.teachers}))
        return levels

    def adapt(self, teacher: str, index: int, x: Tensor) -> Tensor:
        name = f"{self.prefix}tsap.{teacher}.{index}"
        inner = F.gelu(self.linear(f"{name}.down", x))
        return self.linear(f"{name}.up", inner) * self.state[f"{name}.scale"] + x

    def route(self, name: str, stem: Tensor) -> list[Tensor]:
        """Weight (B) of the stem and of each teacher; without a router all are 1. The noise is that of training."""
        count = 1 + len(self.teachers)
        if f"{name}.0.weight" not in self.state:
            return [stem.new_ones(len(stem))] * count
        hidden = F.gelu(self.norm(f"{name}.1", self.linear(f"{name}.0", stem), 1e-5))
        scores = self.linear(f"{name}.3", hidden).mean(dim=1)[:, :count]
        return list(scores.softmax(dim=1).unbind(dim=1))

    def head(self, task: str, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        parts = []
        for level, m in enumerate(maps):
            part = self.linear(f"heads.{task}.linears.{level}", m.movedim(1, -1)).movedim(-1, 1)
            parts.append(self.to(part, (size[0] // 4, size[1] // 4)))
        x = self.conv(f"heads.{task}.linear_fuse.0", torch.cat(parts, dim=1))
        x = F.gelu(self.batch_norm(f"heads.{task}.linear_fuse.1", x))
        return self.conv(f"heads.{task}.last_conv", x)

    @staticmethod
    def to_map(tokens: Tensor, image: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, (image.shape[2] // 16, image.shape[3] // 16))
