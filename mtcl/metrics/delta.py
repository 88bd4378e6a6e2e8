"""Delta_MTL and Delta_p, mean relative gains of a multi-task model over single-task baselines."""

import math
from collections.abc import Mapping

from mtcl.errors import UserError

# Metrics of each task by the protocol of MTAN and LibMTL, and whether higher is better.
MTAN_METRICS: Mapping[str, Mapping[str, bool]] = {
    "semseg": {"mIoU": True, "pixel_accuracy": True},
    "depth": {"abs_err": False, "rel_err": False},
    "normals": {"mErr": False, "median": False, "within_11.25": True, "within_22.5": True, "within_30": True},
}


def delta_mtl(
    values: Mapping[str, float], baseline: Mapping[str, float], higher_is_better: Mapping[str, bool]
) -> float:
    """Compute (100 / T) sum_t s_t (M_t - B_t) / B_t in percent, s_t = 1 where higher is better, else -1.

    Source: MTI/evaluation/evaluate_utils.py:38-63.

    >>> delta_mtl({"semseg": 0.75, "depth": 0.5}, {"semseg": 0.5, "depth": 0.5}, {"semseg": True, "depth": False})
    25.0

    Args:
        values: M, task -> its one metric.
        baseline: B, the same tasks in the same units.
        higher_is_better: at least the same tasks.

    Returns:
        Percent; NaN if a value is NaN.

    Raises:
        UserError: the tasks differ, there are none, or a baseline is 0 or less.
    """
    if not values or set(values) != set(baseline):
        ours, theirs = (", ".join(sorted(tasks)) or "none" for tasks in (values, baseline))
        raise UserError(f"Delta_MTL needs the same tasks on both sides, not {ours} against {theirs}.")
    for task, value in baseline.items():
        if value <= 0:
            raise UserError(f"The baseline of {task} is {value:g}: a relative difference needs one above 0.")
    signed = [(1 if higher_is_better[t] else -1) * (values[t] - baseline[t]) / baseline[t] for t in values]
    return 100 * math.fsum(signed) / len(signed) if all(map(math.isfinite, signed)) else math.nan


def delta_p(values: Mapping[str, Mapping[str, float]], baseline: Mapping[str, Mapping[str, float]]) -> float:
    """Compute (100 / T) sum_t (1 / M_t) sum_m s_tm (N_tm - B_tm) / B_tm in percent, over :data:`MTAN_METRICS`.

    Unlike :func:`delta_mtl` it counts all of a task's metrics: their relative gains are averaged within the task, then
    over the tasks; s_tm is 1 where higher is better, else -1. Other metrics of a task are ignored.

    Source: LibMTL/LibMTL/utils.py, ``count_improvement``, with the metrics of LibMTL/examples/nyu/main.py. (Nash-MTL's
    Delta_m is the plain mean over all metrics instead, which weights normals by their five.)

    Args:
        values: N, task -> metric -> value by ``protocol="mtan"``.
        baseline: B, the same tasks.

    Returns:
        Percent; NaN if a value is NaN.

    Raises:
        UserError: the tasks differ, there are none, a metric is missing, or a baseline is 0 or less.
    """
    if not values or set(values) != set(baseline):
        ours, theirs = (", ".join(sorted(tasks)) or "none" for tasks in (values, baseline))
        raise UserError(f"Delta_p needs the same tasks on both sides, not {ours} against {theirs}.")
    gains = []
    for task in values:
        directions = MTAN_METRICS.get(task)
        if directions is None:
            raise UserError(f"{task} has no metric of the protocol mtan; Delta_p is over {', '.join(MTAN_METRICS)}.")
        for side in (values, baseline):
            if missing := [name for name in directions if name not in side[task]]:
                raise UserError(f"{task} lacks {missing[0]}; score all runs by protocol=mtan.")
        for name in directions:
            if baseline[task][name] <= 0:
                value = baseline[task][name]
                raise UserError(f"The baseline of {task}/{name} is {value:g}: a relative difference needs one above 0.")
        signed = [
            (1 if higher else -1) * (values[task][name] - baseline[task][name]) / baseline[task][name]
            for name, higher in directions.items()
        ]
        gains.append(math.fsum(signed) / len(signed) if all(map(math.isfinite, signed)) else math.nan)
    return 100 * math.fsum(gains) / len(gains) if all(map(math.isfinite, gains)) else math.nan
