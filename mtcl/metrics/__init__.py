"""One metric per task: ``update(prediction, label)`` takes raw predictions and a batch's label.

``compute()`` gives {name: 0-d tensor}: fractions, degrees, metres, never percent. Every number is pooled over
all valid pixels of all updates (and ranks), so it depends neither on the order nor on the size of the
batches. It is NaN when nothing valid was seen.
"""

from typing import Any

import torchmetrics

from mtcl.errors import UserError
from mtcl.metrics.depth import DepthMetric
from mtcl.metrics.edge import EdgeMetric
from mtcl.metrics.normals import NormalsMetric
from mtcl.metrics.saliency import SaliencyMetric
from mtcl.metrics.segmentation import SegmentationMetric

METRICS: dict[str, type[torchmetrics.Metric]] = {
    "semseg": SegmentationMetric,
    "human_parts": SegmentationMetric,
    "sal": SaliencyMetric,
    "depth": DepthMetric,
    "normals": NormalsMetric,
    "edge": EdgeMetric,
}


def build_metric(task: str, **options: Any) -> torchmetrics.Metric:
    """The metric of the task of that name; ``options`` go to its constructor. ``UserError``: an unknown name.

    >>> build_metric("human_parts", num_classes=7)
    SegmentationMetric()
    """
    if task not in METRICS:
        raise UserError(f"No metric for a task {task!r}: choose one of {', '.join(METRICS)}.")
    return METRICS[task](**options)


__all__ = [
    "METRICS",
    "DepthMetric",
    "EdgeMetric",
    "NormalsMetric",
    "SaliencyMetric",
    "SegmentationMetric",
    "build_metric",
]
