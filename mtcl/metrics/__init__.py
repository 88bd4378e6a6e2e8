"""One metric per task: ``update(prediction, label)`` takes raw predictions and a batch's label.

``compute()`` returns {name: 0-d tensor}: fractions, degrees, metres, never percent. Every number is pooled
over all valid pixels of all updates (and ranks), so it depends neither on the order nor on the size of the
batches; the few that are means over images say so. It is NaN when no pixel was valid.

The same rules hold for every task:

- A prediction that is NaN or infinite counts as no prediction at all: no class, not salient, 0 m, a normal of
  length 0 (90 degrees off). So a network gains nothing by giving up, and scores of different networks are over
  the same pixels. ``not_finite``, always among the results, is the number of valid pixels where that happened.
- Labels that are neither valid nor void are counted separately, and ``compute()`` raises ``UserError`` if there
  were any; a prediction of another size than its label raises it at once.
- ``update`` never makes the host wait for the device; ``compute`` does.
- Pixels are counted in int64, distances summed in float64, whatever the predictions' type.
- ``protocol=...`` selects a legacy variant, to reproduce an old row; the default, ``standard``, is the usual one.

``mtcl.tasks.build_metric`` builds a metric by its task's name.
"""

from typing import TYPE_CHECKING

from mtcl.lazy_imports import import_on_use

if TYPE_CHECKING:
    from mtcl.metrics.depth import DepthMetric
    from mtcl.metrics.edge import EdgeMetric
    from mtcl.metrics.normals import NormalsMetric
    from mtcl.metrics.saliency import SaliencyMetric
    from mtcl.metrics.segmentation import HumanPartsMetric, SegmentationMetric

__getattr__ = import_on_use(
    __name__,
    {
        "DepthMetric": "mtcl.metrics.depth",
        "EdgeMetric": "mtcl.metrics.edge",
        "HumanPartsMetric": "mtcl.metrics.segmentation",
        "NormalsMetric": "mtcl.metrics.normals",
        "SaliencyMetric": "mtcl.metrics.saliency",
        "SegmentationMetric": "mtcl.metrics.segmentation",
    },
)

__all__ = [
    "DepthMetric",
    "EdgeMetric",
    "HumanPartsMetric",
    "NormalsMetric",
    "SaliencyMetric",
    "SegmentationMetric",
]
