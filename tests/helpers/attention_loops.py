"""InvPT's attention among tasks, fused and selective, one number at a time."""

import math

import torch
from torch import Tensor

from mtcl.models.decoders.invpt import TaskAttention


def looped_attention(
    module: TaskAttention, x: Tensor, heard: Tensor | None, key_fraction: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the output (T, h / 2, w / 2, C) and the scores for the next stage (H, T, h / 2, w / 2, K).

    Args:
        module: the attention, in evaluation mode.
        x: its input (T, h, w, C).
        heard: the previous stage's scores (H, T, h', w', K), if there are any.
        key_fraction: part of the keys that each query and head selects by ``heard``; None: all.
    """
    num_tasks, height, width, channels = x.shape
    heads, per_head = module.heads, channels // module.heads
    rows, columns = math.ceil(height / 2), math.ceil(width / 2)
    queries, places = [], []
    for t, shrink in enumerate(module.shrink.values()):
        weight, norm = shrink[0].weight, shrink[1]
        for i in range(rows):
            for j in range(columns):
                vector = torch.zeros(channels)
                for di in range(3):
                    for dj in range(3):
                        y, z = 2 * i + di - 1, 2 * j + dj - 1
                        if 0 <= y < height and 0 <= z < width:
                            vector += weight[:, 0, di, dj] * x[t, y, z]
                vector = (vector - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
                queries.append(module.query(vector))
                places.append((t, i, j))
    keys, values = [], []
    for t in range(num_tasks):
        for i in range(0, height, module.pool):
            for j in range(0, width, module.pool):
                mean = x[t, i : i + module.pool, j : j + module.pool].reshape(-1, channels).mean(dim=0)
                keys.append(module.key(mean))
                values.append(module.value(mean))
    scores = torch.zeros(heads, num_tasks, rows, columns, len(keys))
    for (t, i, j), q in zip(places, queries):
        for n, k in enumerate(keys):
            for h in range(heads):
                part = slice(h * per_head, (h + 1) * per_head)
                scores[h, t, i, j, n] = (q[part] * k[part]).sum() / math.sqrt(channels)
    previous = torch.zeros_like(scores)
    if heard is not None:
        for t, i, j in places:
            for n in range(len(keys)):
                for h in range(heads):
                    previous[h, t, i, j, n] = bilinear(heard[h, t, :, :, n], i, j, (rows, columns))
    if heard is not None and module.fuse is not None:
        fused = torch.zeros_like(scores)
        weight, bias = module.fuse.weight[:, :, 0, 0], module.fuse.bias
        for t, i, j in places:
            for n in range(len(keys)):
                fused[:, t, i, j, n] = weight @ torch.cat([scores[:, t, i, j, n], previous[:, t, i, j, n]]) + bias
        scores = fused
    output = torch.zeros(num_tasks, rows, columns, channels)
    passed = scores.clone()
    for t, i, j in places:
        mixed = []
        for h in range(heads):
            selected = list(range(len(keys)))
            if heard is not None and key_fraction is not None:
                best_first = sorted(selected, key=lambda n: -previous[h, t, i, j, n].item())
                selected = best_first[: math.ceil(key_fraction * len(keys))]
                for n in best_first[len(selected) :]:
                    passed[h, t, i, j, n] = previous[h, t, i, j, n]
            chances = [scores[h, t, i, j, n].exp() for n in selected]
            part = slice(h * per_head, (h + 1) * per_head)
            mixed.append(sum(c * values[n][part] for c, n in zip(chances, selected)) / sum(chances))
        output[t, i, j] = module.out(torch.cat(mixed))
    return output, passed


def bilinear(grid: Tensor, i: int, j: int, size: tuple[int, int]) -> Tensor:
    """The value at place (i, j) of ``grid`` resized to ``size``, pixel centres aligned."""
    corners = []
    for index, side, target in zip((i, j), grid.shape, size):
        at = min(max((index + 0.5) * side / target - 0.5, 0), side - 1)
        low = int(at)
        corners.append((low, min(low + 1, side - 1), at - low))
    (top, bottom, a), (left_column, right, b) = corners
    upper = (1 - b) * grid[top, left_column] + b * grid[top, right]
    lower = (1 - b) * grid[bottom, left_column] + b * grid[bottom, right]
    return (1 - a) * upper + a * lower
