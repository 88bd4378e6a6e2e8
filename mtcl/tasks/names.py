"""Name the tasks, and say which of its metrics represents each and in which units they are; needs no torch."""

from collections.abc import Collection, Mapping
from typing import NamedTuple


class TaskScores(NamedTuple):
    """The metrics of a task as tables show them.

    Attributes:
        primary_metric: the one that tables and the monitored metric of a run use.
        higher_is_better: whether that is so for the primary metric.
        units: metric -> unit; the metrics that are not listed are fractions, shown in percent.
        fallback_metric: stands for the primary metric where that is not computed; lower is better.
        fallback_protocol: the protocol of the task's metric that computes the fallback in place of the primary metric;
            None: the fallback is always computed.
    """

    primary_metric: str
    higher_is_better: bool
    units: Mapping[str, str]
    fallback_metric: str | None = None
    fallback_protocol: str | None = None

    def choose_metric(self, available: Collection[str]) -> tuple[str, bool]:
        """Return the metric that represents the task among the ``available`` ones, and whether higher is better."""
        fallback = self.fallback_metric
        if fallback is None or self.primary_metric in available:
            return self.primary_metric, self.higher_is_better
        if self.fallback_protocol is not None and fallback not in available:
            return self.primary_metric, self.higher_is_better
        return fallback, False


CLASS_UNITS = {"not_finite": "", "absent_classes": ""}
DEPTH_UNITS = {"rmse": "m", "abs_rel": "", "sq_rel": "m", "log_rmse": "", "not_finite": ""}
DEPTH_UNITS |= {"abs_err": "", "rel_err": ""}  # abs_err is in the unit of the label: metres, or an inverse depth
SCORES: dict[str, TaskScores] = {
    "semseg": TaskScores("mIoU", True, CLASS_UNITS),
    "human_parts": TaskScores("mIoU", True, CLASS_UNITS),
    "sal": TaskScores("maxF", True, CLASS_UNITS),
    "depth": TaskScores("rmse", False, DEPTH_UNITS, fallback_metric="abs_err", fallback_protocol="mtan"),
    "normals": TaskScores("mErr", False, {"mErr": "deg", "median": "deg", "rmse": "deg", "not_finite": ""}),
    "edge": TaskScores("odsF", True, {"loss": "", "threshold": "", "not_finite": ""}, fallback_metric="loss"),
}
TASK_NAMES = tuple(SCORES)  # in the order in which they are always listed
IMAGE_WEIGHTINGS = ("pixels", "images", "tasks_per_label")  # of mtcl.tasks.image_weights
