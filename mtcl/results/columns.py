"""Name a task's numbers: metrics, units, which is better, which of them stands for the task."""

from dataclasses import dataclass
from typing import Any

from mtcl.tasks import NYUD40, TASK_NAMES, build_task

# Primary metrics and units do not depend on the classes.
OPTIONS: dict[str, dict[str, Any]] = {"semseg": {"class_names": NYUD40}}
TASKS = {name: build_task(name, **OPTIONS.get(name, {})) for name in TASK_NAMES}
LOWER_IS_BETTER = ("rmse", "abs_rel", "sq_rel", "log_rmse", "mErr", "median", "loss", "not_finite")
UNRANKED_METRICS = ("threshold", "absent_classes")  # of odsF, of the labels: neither good nor bad
NOT_FINITE = "not_finite"  # pixels without a finite prediction; a metric beside a task's own


@dataclass(frozen=True)
class Column:
    """One metric of one task, or a Delta (``task`` is empty, values are in percent already)."""

    task: str
    metric: str
    higher_is_better: bool
    unit: str  # %, m, deg, pixels or none; a fraction is shown in %

    @property
    def key(self) -> str:
        return f"{self.task}/{self.metric}" if self.task else self.metric


def primary_metrics(task: str) -> tuple[str, ...]:
    """The metrics that may stand for a task, best first: edges have odsF only where boundaries were matched."""
    own = TASKS[task].primary_metric
    return tuple(dict.fromkeys(("odsF", own, "loss"))) if task == "edge" else (own,)


def make_column(task: str, metric: str) -> Column:
    unit = "pixels" if metric == NOT_FINITE else TASKS[task].units.get(metric, "%")
    return Column(task, metric, metric not in LOWER_IS_BETTER, unit)
