"""The boundary F-measure in Python: suppression, thinning, matching, scores.

>>> import numpy as np
>>> line = np.zeros((20, 30), np.uint8)
>>> line[10, 5:25] = 200
>>> counts = get_preset("bsds", 9).counts(line, [line], max_distance=0.01)
>>> compute_scores(counts, best_image_counts(counts), linspace_thresholds(9), interpolate=True).odsF
1.0
"""

from mtcl.metrics.boundaries.matching import DistanceGraph
from mtcl.metrics.boundaries.presets import MAX_DISTANCE, NMS, PRESETS, Preset, get_preset, seg2bmap
from mtcl.metrics.boundaries.scoring import (
    Scores,
    best_image_counts,
    boundary_counts,
    compute_scores,
    linspace_thresholds,
    recall_precision_f,
)
from mtcl.metrics.boundaries.suppression import SuppressionConfig, nms
from mtcl.metrics.boundaries.thinning import thin_masks

__all__ = [
    "MAX_DISTANCE",
    "NMS",
    "PRESETS",
    "DistanceGraph",
    "Preset",
    "Scores",
    "SuppressionConfig",
    "best_image_counts",
    "boundary_counts",
    "compute_scores",
    "get_preset",
    "linspace_thresholds",
    "nms",
    "recall_precision_f",
    "seg2bmap",
    "thin_masks",
]
