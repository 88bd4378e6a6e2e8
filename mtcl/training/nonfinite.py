"""Steps whose loss or gradient is not finite: they are skipped, counted and written down, and end a run that makes
nothing else."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mtcl import distributed
from mtcl.errors import UserError


class SkippedStep(NamedTuple):
    step: int
    terms: list[str]  # what was not finite
    ids: list[str]  # the batch's pictures (of this process)


class NonFiniteGuard:
    """Keeps an eye on every step without making the host wait: :meth:`look` leaves flags on the device, :meth:`settle`
    reads those of all steps since the last time.

    A forward pass that meets NaN leaves it in the running statistics of batch norms, which training does not read:
    ``settle`` puts them back to where they were the last time. ``limit``: so many skipped steps in a row end the run.
    """

    def __init__(self, model: nn.Module, limit: int):
        self.model, self.limit = model, limit
        self.count = self.num_consecutive = 0
        self.seen: list[tuple[int, list[str], list[str], Tensor]] = []
        self.good = self._copied()
        self.first = SkippedStep(0, [], [])  # of those in a row

    def record(self, step: int, ids: Sequence[str], finite: Mapping[str, Tensor]) -> Tensor:
        """Take down which of a step's numbers are finite (bool scalars by name). 1.0 where the step, in any process, is
        to be skipped, else 0.0: an optimiser's ``found_inf``."""
        flags = torch.stack(list(finite.values()))
        self.seen.append((step, list(ids), list(finite), flags))
        return (distributed.all_reduce_sum((~flags.all()).float()) > 0).float()

    def flush(self) -> list[SkippedStep]:
        """The steps skipped since the last time."""
        seen, self.seen = self.seen, []
        if not seen:
            return []
        skipped = []
        own = [flags for *_, flags in seen]
        any_bad = distributed.all_reduce_sum(torch.stack([(~flags.all()).float() for flags in own]))
        read = torch.cat([any_bad.bool(), *own]).tolist()  # waits for the device, once
        together, read = read[: len(own)], read[len(own) :]
        for (step, ids, names, _), bad in zip(seen, together):
            row, read = read[: len(names)], read[len(names) :]
            self.num_consecutive = self.num_consecutive + 1 if bad else 0
            if bad:
                skipped.append(SkippedStep(step, [name for name, ok in zip(names, row) if not ok], ids))
                self.first = skipped[-1] if self.num_consecutive == 1 else self.first
                if self.num_consecutive >= self.limit:
                    break
        self.count += len(skipped)
        if skipped:
            for buffer, good in zip(_statistics(self.model), self.good):
                buffer.copy_(torch.where(buffer.isfinite(), buffer, good))
        self.good = self._copied()
        return skipped

    def check(self) -> None:
        """UserError where too many steps in a row were skipped, by the last :meth:`settle`."""
        if self.num_consecutive >= self.limit:
            first = self.first
            terms = ", the ".join(first.terms) or "numbers of another process"
            raise UserError(
                f"{self.num_consecutive} steps in a row were not finite and were skipped, from step {first.step} on (the "
                f"{terms}; pictures {', '.join(first.ids)}): lower optimizer.lr or trainer.clip_norm, or look at these "
                "pictures; checkpoints hold the last good state"
            )

    def _copied(self) -> list[Tensor]:
        return [buffer.detach().clone() for buffer in _statistics(self.model)]


def merge_skipped(parts: Sequence[SkippedStep]) -> SkippedStep:
    """What several processes know of one skipped step."""
    terms = dict.fromkeys(term for part in parts for term in part.terms)
    return SkippedStep(parts[0].step, list(terms), [name for part in parts for name in part.ids])


def _statistics(model: nn.Module) -> list[Tensor]:
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
