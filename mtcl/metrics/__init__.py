"""One metric per task: ``update(prediction, label)`` takes raw predictions and a batch's label.

``compute()`` gives {name: 0-d tensor}: fractions, degrees, metres, never percent. Every number is pooled over
all valid pixels of all updates (and ranks), so it depends neither on the order nor on the size of the
batches; the few that are means over pictures say so. It is NaN when nothing valid was seen.

The same rules hold for every task:

- Predictions that are NaN or infinite count as no prediction at all: no class, not salient, 0 m, a normal of length
  0 (90 degrees off). So a network gains nothing by giving up, and scores of different networks are over the same
  pixels. ``not_finite``, always among the results, is the number of valid pixels where that happened.
- Labels that are neither valid nor void are counted apart, and ``compute()`` raises ``UserError`` if there were any;
  a prediction of another size than its label raises it at once.
- ``update`` never makes the host wait for the device; ``compute`` does.
- Pixels are counted in int64, distances summed in float64, whatever the predictions' type.
- ``protocol=...`` gives a legacy variant, to reproduce an old row; the default, ``field``, is the usual one.
"""

from typing import Any

import torchmetrics

from mtcl.errors import UserError
from mtcl.metrics.depth import DepthMetric
from mtcl.metrics.edge import EdgeMetric
from mtcl.metrics.normals import NormalsMetric
from mtcl.metrics.saliency import SaliencyMetric
from mtcl.metrics.segmentation import HumanPartsMetric, SegmentationMetric

METRICS: dict[str, type[torchmetrics.Metric]] = {
    "semseg": SegmentationMetric,
    "human_parts": HumanPartsMetric,
    "sal": SaliencyMetric,
    "depth": DepthMetric,
    "normals": NormalsMetric,
    "edge": EdgeMetric,
}


def build_metric(task: str, **options: Any) -> torchmetrics.Metric:
    """The metric of the task of that name; ``options`` go to its constructor. ``UserError``: an unknown name.

    >>> build_metric("human_parts", num_classes=7)
    HumanPartsMetric()
    """
    if task not in METRICS:
        raise UserError(f"No metric for a task {task!r}: choose one of {', '.join(METRICS)}.")
    return METRICS[task](**options)


__all__ = [
    "METRICS",
    "DepthMetric",
    "EdgeMetric",
    "HumanPartsMetric",
    "NormalsMetric",
    "SaliencyMetric",
    "SegmentationMetric",
    "build_metric",
]
