"""Boundary triplets: anchors at boundaries of the source's labels, compared with their 5x5 patch on the feature map.

After FSRE-Depth (Jung et al., ICCV 2021) and TriDepth (Chen et al., WACV 2023), whose source is semantic segmentation
and whose target is depth; here any source and any target. The K drawn positions are centres of patches:

    positive(j), negative(j)  by the source's label distance of the patch's cell j from its centre, as elsewhere
    anchor:  the centre is labelled, and its patch has at least 4 positives and 4 negatives
    d+ = sqrt(2 - 2 mean_j z . z_j) over positives,   d- = sqrt(2 - 2 max_j z . z_j) over negatives
    L  = mean over anchors of d+ + max(0, negative_margin - d-)

z . mean_j z_j is the mean cosine: the mean of the positives' unit vectors is not normalized again.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtcl.regularizers.pairs import PixelLabels
from mtcl.regularizers.sampling import Draw
from mtcl.regularizers.triplet import AnchorLosses, CriterionOutput, mean_over_anchors
from mtcl.tasks.base import Task

Size = tuple[int, int]
PATCH = 5  # cells of a patch's side
CELLS = PATCH**2
CENTRE = CELLS // 2
MIN_RELATED = 4  # positives, and negatives, of an anchor
MIN_SQUARED_DISTANCE = 1e-4  # below it there is no gradient: in fp32 it would be rounding, and infinite at 0


class Patches(NamedTuple):
    """The cells of the patches of K centres, patch by patch in row-major order: N = 25 K."""

    cell: Tensor  # int64 (B, N): row-major index in the feature map; outside of it that of the nearest cell
    inside: Tensor  # bool (B, N): whether the cell is in the map and its centre in the labels
    pixels: Tensor  # float32 (B, N, 2): row and column of the cell's centre as fractions of the labels


def place_patches(pixels: Tensor, map_size: Size, size: Size, frame: Size) -> Patches:
    """Place a patch around the cell of a feature map in which each drawn pixel lies.

    Args:
        pixels: (B, K, 2), fractions of the labels.
        map_size: height and width of the feature map.
        size: height and width of the labels.
        frame: height and width in pixels that the feature map covers, at least ``size``.
    """
    offset = torch.arange(PATCH, device=pixels.device) - PATCH // 2
    indices, insides, fractions = [], [], []
    for axis, (cells, pixel_count, covered) in enumerate(zip(map_size, size, frame)):
        centre = (pixels[..., axis] * pixel_count * (cells / covered)).long().clamp(max=cells - 1)
        index = centre[..., None] + offset  # (B, K, 5)
        clamped = index.clamp(0, cells - 1)
        position = ((clamped + 0.5) * (covered / cells)).long()
        insides.append((index == clamped) & (position < pixel_count))
        indices.append(clamped)
        fractions.append((position.clamp(max=pixel_count - 1) + 0.5) / pixel_count)
    row, column = fractions[0][..., :, None], fractions[1][..., None, :]
    fraction = torch.stack(torch.broadcast_tensors(row, column), dim=-1)  # (B, K, 5, 5, 2)
    return Patches(
        (indices[0][..., :, None] * map_size[1] + indices[1][..., None, :]).flatten(1),
        (insides[0][..., :, None] & insides[1][..., None, :]).flatten(1),
        fraction.flatten(1, 3),
    )


def sample_patches(
    features: Mapping[str, Tensor],
    targets: Sequence[Task],
    draw: Draw,
    size: Size,
    frame: Size,
    read: Callable[[Draw], PixelLabels],
    project: Callable[[int, Tensor, Tensor], Tensor],
) -> tuple[Tensor, PixelLabels]:
    """Sample the patches around the drawn pixels on each comparison's own feature map.

    Args:
        features: task -> F_t (B, C_t, h, w).
        targets: the target of each comparison.
        draw: sources, and K positions.
        size: height and width of the labels.
        frame: height and width in pixels that the features cover.
        read: reads the sources' labels at the pixels of a draw.
        project: (comparison, sampled features, sources) -> unit vectors.

    Returns:
        z (R, B, 25 K, D), and the labels of these cells.
    """
    placed = {}  # by size of the map, which targets usually share
    for map_size in {feature.shape[-2:]: None for feature in features.values()}:
        with torch.no_grad():
            patches = place_patches(draw.pixels, (map_size[0], map_size[1]), size, frame)
            pixels = read(Draw(draw.sources, patches.pixels))
            placed[map_size] = patches, pixels._replace(valid=pixels.valid & patches.inside)
    z, rows = [], []
    for i, task in enumerate(targets):
        feature = features[task.name]
        patches, pixels = placed[feature.shape[-2:]]
        rows.append([x[i % len(x)] for x in pixels if x is not None])
        z.append(project(i, gather_cells(feature, patches.cell), pixels.source[i]))
    return torch.stack(z), PixelLabels(*(torch.stack(x) for x in zip(*rows)))


def gather_cells(feature: Tensor, cell: Tensor) -> Tensor:
    """Gather cells (B, N) of a feature map (B, C, h, w) without a copy of the map: (B, N, C)."""
    batch, channels, height, width = feature.shape
    if feature.is_contiguous(memory_format=torch.channels_last):
        image = torch.arange(batch, device=feature.device)[:, None] * (height * width)
        rows = feature.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, (cell + image).flatten())
        return rows.view(*cell.shape, channels)
    return feature.flatten(2).gather(2, cell[:, None].expand(-1, channels, -1)).transpose(1, 2)


def take_centres(pixels: PixelLabels) -> PixelLabels:
    """Take the patches' centres, K per image, from the labels of all their cells."""
    return PixelLabels(
        pixels.source,
        pixels.pixels[:, :, CENTRE::CELLS],
        pixels.pixel_id[:, :, CENTRE::CELLS],
        pixels.label[:, :, CENTRE::CELLS],
        pixels.valid[:, :, CENTRE::CELLS],
        pixels.target_label[:, :, CENTRE::CELLS],
    )


def boundary_triplet(z: Tensor, pixels: PixelLabels, thresholds: Tensor, negative_margin: float) -> CriterionOutput:
    """Compute d+ + max(0, negative_margin - d-) of each patch's centre against the patch, see the module.

    Args:
        z: unit vectors (R, B, 25 K, D) of the patches' cells.
        pixels: their labels; cells outside of the map are invalid.
        thresholds: (S, 2), as for :func:`~mtcl.regularizers.pairs.make_pairs`.
        negative_margin: distance from which a negative costs nothing, 0..2.

    Returns:
        losses, and diagnostics in which d_ap and d_an are 2 - 2 cos, as those of the other criteria; an anchor is
        active while its hardest negative is nearer than the margin.
    """
    patch = z.unflatten(2, (-1, CELLS))  # (R, B, K, 25, D)
    cosine = (patch @ patch[..., CENTRE, :, None])[..., 0]  # (R, B, K, 25)
    with torch.no_grad():
        label, valid = (x.unflatten(2, (-1, CELLS)) for x in (pixels.label, pixels.valid))
        distance = (label - label[..., CENTRE : CENTRE + 1, :]).norm(dim=-1)
        related = valid & valid[..., CENTRE : CENTRE + 1]
        related &= torch.arange(CELLS, device=z.device) != CENTRE
        limit = thresholds[pixels.source][..., None, :]  # (R, B, 1, 1, 2)
        positive, negative = related & (distance <= limit[..., 0]), related & (distance >= limit[..., 1])
        anchor = (positive.sum(dim=-1) >= MIN_RELATED) & (negative.sum(dim=-1) >= MIN_RELATED)
    share = positive.to(cosine)
    d_ap = 2 - 2 * (cosine * share).sum(dim=-1) / share.sum(dim=-1).clamp(min=1)
    d_an = 2 - 2 * torch.where(negative, cosine, -1.0).amax(dim=-1)
    near, far = (d.clamp(min=MIN_SQUARED_DISTANCE).sqrt() for d in (d_ap, d_an))
    loss = near + torch.relu(negative_margin - far)
    return mean_over_anchors(AnchorLosses(loss, far < negative_margin, d_ap, d_an, anchor))
