"""Name a task's metrics, their units, which direction is better, and which of them represents the task."""

from dataclasses import dataclass

from mtcl.tasks.names import SCORES

DEPTH_ERRORS = ("rmse", "abs_rel", "sq_rel", "log_rmse", "abs_err", "rel_err")
LOWER_IS_BETTER = (*DEPTH_ERRORS, "mErr", "median", "loss", "not_finite")
UNRANKED_METRICS = ("threshold", "absent_classes")  # of odsF, of the labels: neither good nor bad
NOT_FINITE = "not_finite"  # number of pixels without a finite prediction


@dataclass(frozen=True)
class Column:
    """One metric of one task, or a Delta, whose ``task`` is empty and whose values are in percent already.

    ``unit``: %, m, deg, pixels or empty; values in % are fractions.
    """

    task: str
    metric: str
    higher_is_better: bool
    unit: str

    @property
    def key(self) -> str:
        """``task/metric``, or the name of a Delta."""
        return f"{self.task}/{self.metric}" if self.task else self.metric


def primary_metrics(task: str) -> tuple[str, ...]:
    """Return the metrics that may represent a task, best first.

    Edges have odsF only if boundaries were matched; depth has abs_err in place of rmse by the protocol ``mtan``.
    """
    scores = SCORES[task]
    return (scores.primary_metric, *((scores.fallback_metric,) if scores.fallback_metric else ()))


def make_column(task: str, metric: str) -> Column:
    """Return the column of a task's metric, with its unit and direction."""
    unit = "pixels" if metric == NOT_FINITE else SCORES[task].units.get(metric, "%")
    return Column(task, metric, metric not in LOWER_IS_BETTER, unit)
