"""Steps whose loss or gradient is not finite: they are skipped, counted and reported, and too many end the training."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mtcl import distributed
from mtcl.errors import UserError


class SkippedStep(NamedTuple):
    """A step that was skipped: what was not finite, and the ids of the batch's images (of this process)."""

    step: int
    terms: list[str]
    ids: list[str]


class NonFiniteGuard:
    """Skips steps that are not finite without making the host wait for the device at every step.

    :meth:`record` leaves flags on the device, :meth:`flush` reads those of all steps since the last call. A forward
    pass that meets NaN leaves it in the running statistics of batch norms, which training does not read: ``flush``
    resets them to their values at the last call.

    Where losses are scaled for fp16, a gradient may overflow because the scale is too large. Such a step is skipped,
    too, but it is no failure: it is counted apart and neither counts for ``limit`` nor interrupts a row of failures.

    Args:
        model: whose batch norms are reset.
        limit: this many consecutive skipped steps end the training.
    """

    def __init__(self, model: nn.Module, limit: int):
        self.model, self.limit = model, limit
        self.count = self.num_consecutive = 0
        self.num_overflows = 0  # steps skipped because of the loss scale
        self.pending: list[tuple[int, list[str], list[str], Tensor, Tensor]] = []  # step, ids, names, flags, is_failure
        self.finite_statistics = self._copy_statistics()
        self.first_consecutive = SkippedStep(0, [], [])

    def record(
        self, step: int, ids: Sequence[str], finite: Mapping[str, Tensor], may_overflow: Tensor | None = None
    ) -> Tensor:
        """Record which of a step's numbers are finite.

        Args:
            step: number of the step.
            ids: of the batch's images.
            finite: name -> bool scalar on the device.
            may_overflow: bool scalar on the device: whether the loss scale explains what is not finite in this process.

        Returns:
            1.0 on the device if the step is to be skipped because of a number in any process, else 0.0: the
            ``found_inf`` of an optimiser.
        """
        flags = torch.stack(list(finite.values()))
        is_bad = ~flags.all()
        is_failure = is_bad if may_overflow is None else is_bad & ~may_overflow
        self.pending.append((step, list(ids), list(finite), flags, is_failure))
        return (distributed.all_reduce_sum(is_bad.float()) > 0).float()

    def flush(self) -> list[SkippedStep]:
        """Return the failures, steps skipped since the last call without an overflow. Waits for the device once."""
        pending, self.pending = self.pending, []
        if not pending:
            return []
        skipped = []
        flags_per_step = [flags for *_, flags, _ in pending]
        is_bad = [~flags.all() for flags in flags_per_step]
        is_failure = [is_failure for *_, is_failure in pending]
        counts = distributed.all_reduce_sum(torch.stack(is_bad + is_failure).float())
        values = torch.cat([counts.bool(), *flags_per_step]).tolist()
        is_skipped, is_failed, values = values[: len(pending)], values[len(pending) :], values[2 * len(pending) :]
        for (step, ids, names, *_), skips, bad in zip(pending, is_skipped, is_failed):
            row, values = values[: len(names)], values[len(names) :]
            if skips and not bad:
                self.num_overflows += 1
                continue
            self.num_consecutive = self.num_consecutive + 1 if bad else 0
            if bad:
                skipped.append(SkippedStep(step, [name for name, ok in zip(names, row) if not ok], ids))
                self.first_consecutive = skipped[-1] if self.num_consecutive == 1 else self.first_consecutive
                if self.num_consecutive >= self.limit:
                    break
        self.count += len(skipped)
        if skipped:
            for buffer, finite in zip(_running_statistics(self.model), self.finite_statistics):
                buffer.copy_(torch.where(buffer.isfinite(), buffer, finite))
        self.finite_statistics = self._copy_statistics()
        return skipped

    def check(self) -> None:
        """Raise ``UserError`` if too many consecutive steps were skipped, as of the last :meth:`flush`."""
        if self.num_consecutive >= self.limit:
            first = self.first_consecutive
            terms = ", the ".join(first.terms) or "numbers of another process"
            raise UserError(
                f"{self.num_consecutive} steps in a row were not finite and were skipped, from step {first.step} on "
                f"(the {terms}; images {', '.join(first.ids)}): lower the learning rate or the norm at which gradients "
                "are clipped, or check these images; checkpoints hold the last good state"
            )

    def _copy_statistics(self) -> list[Tensor]:
        return [buffer.detach().clone() for buffer in _running_statistics(self.model)]


def merge_skipped(parts: Sequence[SkippedStep]) -> SkippedStep:
    """Merge what several processes know about one skipped step."""
    terms = dict.fromkeys(term for part in parts for term in part.terms)
    return SkippedStep(parts[0].step, list(terms), [name for part in parts for name in part.ids])


def _running_statistics(model: nn.Module) -> list[Tensor]:
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
