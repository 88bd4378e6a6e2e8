"""Early stopping: end a training whose validation score has ceased to improve."""

import math
from collections.abc import Mapping
from typing import Any

from mtcl.errors import UserError


class EarlyStopping:
    """Counts the validations since the best score, and tells when they are too many.

    Args:
        patience: so many validations in a row without a better score end the training, 1 or more; None: they are
            counted, but end nothing.
        higher_is_better: direction of the score.

    Attributes:
        best: the best score, NaN before the first.
        wait_count: validations since the best score.
    """

    def __init__(self, patience: int | None, higher_is_better: bool):
        self.patience, self.higher_is_better = patience, higher_is_better
        self.best, self.wait_count = math.nan, 0

    @property
    def should_stop(self) -> bool:
        """Have there been ``patience`` validations in a row without a better score?"""
        return self.patience is not None and self.wait_count >= self.patience

    def update(self, score: float) -> None:
        """Take in the score of a validation. An equal score is no improvement, and NaN is none.

        Raises:
            UserError: there is a patience, but no validation has had a score yet.
        """
        self.check(score)
        is_better = score > self.best if self.higher_is_better else score < self.best
        if is_better or (math.isnan(self.best) and not math.isnan(score)):
            self.best, self.wait_count = score, 0
        else:
            self.wait_count += 1

    def check(self, score: float) -> None:
        """Raise ``UserError`` if there is a patience, but neither this validation nor an earlier one has a score."""
        if self.patience is not None and math.isnan(self.best) and math.isnan(score):
            raise UserError(
                "early stopping has no score to go by: the monitored metric is NaN (the validation images have no "
                "label of it, or no prediction is finite); monitor another metric, or set no patience"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"best": self.best, "wait_count": self.wait_count}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue from a checkpoint's state; from None, of a checkpoint without one, the count starts at 0."""
        if state is not None:
            self.best, self.wait_count = float(state["best"]), int(state["wait_count"])
