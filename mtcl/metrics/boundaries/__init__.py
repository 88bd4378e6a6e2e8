"""The boundary F-measure of the field in Python: suppression, thinning, matching, scores.

>>> import numpy as np
>>> line = np.zeros((20, 30), np.uint8)
>>> line[10, 5:25] = 200
>>> counts = preset_named("bsds", 9).counts(line, [line], max_distance=0.01)
>>> scores(counts, best_of_image(counts), even_thresholds(9), interpolate=True).odsF
1.0
"""

from mtcl.metrics.boundaries.matching import Neighbours
from mtcl.metrics.boundaries.presets import MAX_DISTANCE, NMS, PRESETS, Preset, preset_named, seg2bmap
from mtcl.metrics.boundaries.scoring import Scores, best_of_image, boundary_counts, even_thresholds, measures, scores
from mtcl.metrics.boundaries.suppression import Suppression, nms
from mtcl.metrics.boundaries.thinning import thinned

__all__ = [
    "MAX_DISTANCE",
    "NMS",
    "PRESETS",
    "Neighbours",
    "Preset",
    "Scores",
    "Suppression",
    "best_of_image",
    "boundary_counts",
    "even_thresholds",
    "measures",
    "nms",
    "preset_named",
    "scores",
    "seg2bmap",
    "thinned",
]
