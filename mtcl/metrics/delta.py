"""Delta_MTL, the mean relative gain of a multi-task model over single-task baselines."""

import math
from collections.abc import Mapping

from mtcl.errors import UserError


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
