"""Edges between the annotated objects of a frame."""

import numpy as np
import scipy.ndimage

# Pixels. Void up to twice as wide is a seam that the annotators left between objects; its two sides are one edge
# then, well within the 7.7 pixels (0.011 of the diagonal) by which the benchmark lets an edge be off.
SEAM = 5


def label_regions(labels: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """Number the objects, int32 (H, W): equal for pixels of one label (0: void) and instance; void is 0."""
    pairs = labels.astype(np.int32) * 2**16 + instances
    return np.where(labels > 0, pairs, 0)


def close_seams(regions: np.ndarray, seam: int = SEAM) -> np.ndarray:
    """Assign void (0) of regions (H, W) to the nearest region where it is at most 2 ``seam`` pixels wide.

    Wider void stays, in the shape it has: what a disk of that radius can't reach within the void is a seam.
    """
    void = regions == 0
    if not void.any() or void.all():
        return regions
    distance, nearest = scipy.ndimage.distance_transform_edt(void, return_indices=True)
    inner = distance > seam
    wide = scipy.ndimage.distance_transform_edt(~inner) < seam + 1 if inner.any() else inner
    return np.where(void & ~wide, regions[tuple(nearest)], regions)


def region_edges(regions: np.ndarray) -> np.ndarray:
    """Draw one-pixel lines, uint8 (H, W): 255 where the pixel to the right or below is of another region, else 0."""
    edges = np.zeros(regions.shape, bool)
    edges[:, :-1] |= regions[:, :-1] != regions[:, 1:]
    edges[:-1] |= regions[:-1] != regions[1:]
    return edges.astype(np.uint8) * np.uint8(255)
