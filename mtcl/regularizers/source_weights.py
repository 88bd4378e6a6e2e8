"""Weights of each target's sources: as a user gives them, or estimated from the labels of the first batches.

A weight is relative to those of the same target's other sources. It is the probability with which the source is drawn;
where every source of a target has a loss at each step, it is the source's part of their mean. An estimate is

    information(t <- s) = agreement(t <- s) - agreement(t <- another image's s), not below 0

of :mod:`~mtcl.regularizers.label_agreement`: what the source's labels say about the target's beyond the layout that
all images share. The paper draws uniformly; weights are ours.
"""

import logging
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtcl.distributed import all_reduce_sum, rank
from mtcl.errors import ParameterError
from mtcl.regularizers.label_agreement import count_right_orders, summarize_agreement
from mtcl.regularizers.sources import Comparison
from mtcl.tasks import TASK_NAMES
from mtcl.tasks.base import Task

log = logging.getLogger(__name__)

Table = list[list[float]]  # a row per target, a column per source
MAX_PIXELS = 256  # per image that an estimate reads


def read_source_weights(
    weights: Mapping[str, Mapping[str, float]], task_names: Sequence[str], allowed_sources: Sequence[list[int]]
) -> Table:
    """Return the weights of all targets and sources in use; pairs that are not in the mapping have 0.

    Args:
        weights: target -> source -> weight; tasks that are not in use are passed over.
        task_names: tasks in use.
        allowed_sources: result of :func:`~mtcl.regularizers.sources.list_allowed_sources`.

    Raises:
        ParameterError: an unknown task, a negative weight, or a weight of a pair that may not be drawn.
    """
    table = [[0.0] * len(task_names) for _ in task_names]
    for name in [*weights, *(source for row in weights.values() for source in row)]:
        if name not in TASK_NAMES:
            raise ParameterError(
                "source_weights", f" names {name}, which is no task; choose of {', '.join(task_names)}"
            )
    for target, row in weights.items():
        for source, weight in row.items():
            parameter = f"source_weights.{target}.{source}"
            if not 0 <= weight < float("inf"):
                raise ParameterError(parameter, f"={weight} must be a number of at least 0")
            if target not in task_names or source not in task_names:
                continue
            t, s = task_names.index(target), task_names.index(source)
            if weight and s not in allowed_sources[t]:
                problem = f"={weight} is of a pair that source_tasks or excluded_pairs rule out; leave it out"
                raise ParameterError(parameter, problem)
            table[t][s] = float(weight)
    return table


def select_weighted_sources(
    table: Table, task_names: Sequence[str], allowed_sources: Sequence[list[int]], targets: Collection[str]
) -> list[list[int]]:
    """Return each target's allowed sources of a weight above 0.

    Raises:
        ParameterError: one of the ``targets`` has none.
    """
    for name in targets:
        if name in task_names and not any(table[task_names.index(name)]):
            problem = f" leaves {name} without a source; give it one of a weight above 0, or leave it out of targets"
            raise ParameterError("source_weights", problem)
    return [[s for s in sources if table[t][s] > 0] for t, sources in enumerate(allowed_sources)]


class SourceWeights(nn.Module):
    """Weights that a user gives.

    Args:
        comparisons: what has a loss in a step, of :func:`~mtcl.regularizers.sources.list_comparisons`.
        task_names: targets, which are the sources as well.
        table: weights of all pairs; None: equal ones.
    """

    share: Tensor  # float32 (R,): part of each comparison among those of its target
    is_of_target: Tensor  # bool (T, R), of the targets that have comparisons

    def __init__(self, comparisons: Sequence[Comparison], task_names: Sequence[str], table: Table | None):
        super().__init__()
        self.comparisons, self.task_names = list(comparisons), list(task_names)
        self.rows: Table | None = None  # weights of each comparison's sources; None: equal ones
        self.targets = [c.target for c in comparisons]
        is_of_target = torch.tensor([[t == target for t in self.targets] for target in dict.fromkeys(self.targets)])
        self.register_buffer("is_of_target", is_of_target, persistent=False)
        self.register_buffer("share", torch.zeros(len(comparisons)), persistent=False)
        self.set_table(table)

    def set_table(self, table: Table | None) -> None:
        """Use the weights of a table, in which each target has a source with a weight above 0; None: equal ones."""
        self.rows = None
        if table is not None:
            rows = dict(zip(self.task_names, table))
            self.rows = [[rows[c.target][s] for s in c.sources] for c in self.comparisons]
        sums = [1.0] * len(self.targets) if self.rows is None else [sum(row) for row in self.rows]
        totals = {name: sum(x for x, t in zip(sums, self.targets) if t == name) for name in self.targets}
        self.share.copy_(torch.tensor([x / totals[t] for x, t in zip(sums, self.targets)]))

    def observe_labels(self, labels: Mapping[str, Tensor], pixels: Tensor) -> None:
        """Take in the labels of a training batch; weights that a user gives need none."""

    def average(self, losses: Tensor, has_loss: Tensor) -> Tensor:
        """Return the mean over targets of the weighted mean of their losses (R,), over those with one, bool (R,)."""
        weight = has_loss.to(losses) * self.share * self.is_of_target  # (T, R)
        total = weight.sum(dim=1)
        means = (weight * losses).sum(dim=1) / total.clamp(min=torch.finfo(total.dtype).tiny)
        return means.sum() / (total > 0).sum().clamp(min=1)


class EstimatedSourceWeights(SourceWeights):
    """Weights that are estimated from the labels of the first batches, then fixed; equal ones until then.

    A pair of which no image has both labels has the mean weight of the target's other sources. The sources of a target
    without any such image, or whose sources say nothing beyond the layout, have equal weights, which is logged as a
    warning. The estimate is part of the state dict.

    Args:
        comparisons: as in :class:`SourceWeights`.
        tasks: name -> task; each is a target and a source.
        thresholds: task -> (positive, negative), of :func:`~mtcl.regularizers.pairs.choose_thresholds`.
        num_batches: number of batches whose labels are read.
    """

    sums: Tensor  # float64 (2 S + 1, T, 2), of :func:`count_right_orders`, of all processes
    num_observed: Tensor  # int64: batches

    def __init__(
        self,
        comparisons: Sequence[Comparison],
        tasks: Mapping[str, Task],
        thresholds: Mapping[str, tuple[float, float]],
        num_batches: int,
    ):
        super().__init__(comparisons, list(tasks), None)
        self.tasks, self.num_batches, self.count = dict(tasks), num_batches, 0
        self.embedded_thresholds = [[task.embedded_distance(d) for d in thresholds[n]] for n, task in tasks.items()]
        self.register_buffer("sums", torch.zeros(2 * len(tasks) + 1, len(tasks), 2, dtype=torch.float64))
        self.register_buffer("num_observed", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe_labels(self, labels: Mapping[str, Tensor], pixels: Tensor) -> None:
        """Take in the labels of a training batch, and after the last one fix the weights.

        All processes must call it. The host waits for the device once, at the last batch.

        Args:
            labels: task -> label in batch layout.
            pixels: (B, M, 2), uniform positions in each image; the first 256 are read.
        """
        if self.count >= self.num_batches:
            return
        sums = count_right_orders(labels, pixels[:, :MAX_PIXELS], self.tasks, self.embedded_thresholds)
        self.sums += all_reduce_sum(sums)
        self.count += 1
        self.num_observed.fill_(self.count)
        if self.count == self.num_batches:
            self._fix(is_logged=rank() == 0)

    def _fix(self, is_logged: bool) -> None:
        """Set the weights from the sums of all batches."""
        information = summarize_agreement(self.sums.cpu()).information
        table: Table = []
        unmeasured: list[str] = []
        uninformed: list[str] = []
        for t, name in enumerate(self.task_names):
            sources = sorted({s for c in self.comparisons if c.target == name for s in c.sources})
            values = information[t, sources]
            measured = values[~values.isnan()]
            weights = values.nan_to_num(measured.mean().item()) if len(measured) else torch.zeros_like(values)
            if sources and not weights.any():
                (uninformed if len(measured) else unmeasured).append(name)
                weights = torch.ones_like(values)
            row = [0.0] * len(self.task_names)
            for s, weight in zip(sources, weights.tolist()):
                row[s] = weight
            table.append(row)
        self.set_table(table)
        if is_logged:
            self._log(table, unmeasured, uninformed)

    def _log(self, table: Table, unmeasured: Sequence[str], uninformed: Sequence[str]) -> None:
        """Log the weights, and warn of targets whose sources could not be told apart."""
        pairs = [
            f"{target}<-{source} {weight:.3f}"
            for target, row in zip(self.task_names, table)
            for source, weight in zip(self.task_names, row)
            if weight
        ]
        if unmeasured:
            log.warning(
                "source_weights=auto: in %d batches no image has labels of %s together with those of one of its "
                "sources, which are drawn uniformly; give a mapping {target: {source: weight}}, as "
                "scripts/label_agreement.py prints it where images have all labels",
                self.num_batches,
                " or ".join(unmeasured),
            )
        if uninformed:
            log.warning(
                "source_weights=auto: no source says more about %s than the layout of images does, so its sources are "
                "drawn uniformly; leave it out with targets",
                " or ".join(uninformed),
            )
        if len(unmeasured) < len(set(self.targets)):
            log.info("weights of sources, by the labels of %d batches: %s", self.num_batches, ", ".join(pairs))

    def _load_from_state_dict(self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any) -> None:
        """Load the estimate; a state without one, of other weights, starts it afresh."""
        state_dict.setdefault(f"{prefix}sums", torch.zeros_like(self.sums))
        state_dict.setdefault(f"{prefix}num_observed", torch.zeros_like(self.num_observed))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.count = int(self.num_observed)
        if self.count >= self.num_batches:
            self._fix(is_logged=False)
        else:
            self.set_table(None)
