"""Scores a model on a validation list: every task's metrics over un-padded pictures, and a few pictures to look at."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from mtcl import distributed
from mtcl.data import Batch, SampleMeta, prepare_batch
from mtcl.models import DenseModel
from mtcl.runtime import autocast
from mtcl.tasks.base import Task

Metrics = dict[str, dict[str, float]]  # task -> metric -> value
PredictFunction = Callable[
    [Batch], Mapping[str, Tensor]
]  # a batch -> task -> raw predictions (B, C, H, W) in its frame
PredictionCallback = Callable[
    [str, Mapping[str, Tensor]], object
]  # a picture's id, task -> its raw prediction (C, H, W), un-padded


class VisualSample(NamedTuple):
    """One sample to draw: everything un-padded, labels and predictions in NumPy label layout."""

    id: str
    image: np.ndarray  # uint8 RGB (H, W, 3)
    labels: dict[str, np.ndarray]
    predictions: dict[str, np.ndarray]


class EvaluationResult(NamedTuple):
    metrics: Metrics
    visual_samples: list[VisualSample]
    num_images: int


class Evaluator:
    """``loader`` gives evaluation batches; the first ``num_shown`` samples come back for drawing.

    ``options``: task -> options of its metric; ``quick``: those that differ in a validation between training steps.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        loader: DataLoader,
        device: torch.device,
        precision: str = "auto",
        num_visual_samples: int = 0,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        quick: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self.tasks, self.loader, self.device = dict(tasks), loader, device
        self.precision, self.num_visual_samples = precision, num_visual_samples
        self.options, self.quick = dict(options or {}), dict(quick or {})

    def run(
        self, model: DenseModel, on_prediction: PredictionCallback | None = None, quick: bool = False
    ) -> EvaluationResult:
        """The model's metrics, see :meth:`score`. Leaves the model in the mode it was in."""

        def predict(batch: Batch) -> Mapping[str, Tensor]:
            image, _ = prepare_batch({**batch, "labels": {}}, model.mean, model.std, self.device)
            with autocast(self.device, self.precision):
                return model.predict(image)

        was_training = model.training
        model.eval()
        evaluation = self.score(predict, on_prediction, quick)
        model.train(was_training)
        return evaluation

    @torch.inference_mode()
    def score(
        self, predict: PredictFunction, on_prediction: PredictionCallback | None = None, quick: bool = False
    ) -> EvaluationResult:
        """Metrics, in fractions, degrees, metres, of whatever predicts; ``keep`` is given every picture's
        predictions in float32."""
        metrics = {name: task.metric(**self._options(name, quick)).to(self.device) for name, task in self.tasks.items()}
        visual_samples: list[VisualSample] = []
        count = 0
        for batch in tqdm(self.loader, desc="evaluate", leave=False, mininterval=1, disable=distributed.rank() > 0):
            predictions = predict(batch)
            labels = {name: label.to(self.device, non_blocking=True) for name, label in batch["labels"].items()}
            for rows, top, left, height, width in _windows(batch["meta"]):
                area = (rows, ..., slice(top, top + height), slice(left, left + width))
                for name, metric in metrics.items():
                    metric.update(predictions[name][area].float(), labels[name][area])
            wanted = range(min(self.num_visual_samples - len(visual_samples), len(batch["meta"])))
            visual_samples += [_show(batch, predictions, row, self.tasks) for row in wanted]
            if on_prediction is not None:
                for row, sample in enumerate(batch["meta"]):
                    on_prediction(
                        sample.id, {name: predictions[name][row][_area(sample)].float() for name in self.tasks}
                    )
            count += len(batch["meta"])
        # Of several processes each has its own pictures: torchmetrics adds up their states.
        values = {name: {k: float(v) for k, v in metric.compute().items()} for name, metric in metrics.items()}
        return EvaluationResult(
            values, visual_samples, int(distributed.all_reduce_sum(torch.tensor(count, device=self.device)))
        )

    def is_comparable(self, monitor: str) -> bool:
        """Whether ``task/metric`` of a quick evaluation and of a whole one are on one scale."""
        task, metric = monitor.split("/")
        return metric == "loss" or not {"thresholds", "every"} & set(self.quick.get(task, {}))

    def _options(self, name: str, quick: bool) -> dict[str, Any]:
        return {**self.options.get(name, {}), **(self.quick.get(name, {}) if quick else {})}


def _windows(meta: list[SampleMeta]) -> list[tuple[slice, int, int, int, int]]:
    """(rows, top, left, height, width): neighbouring samples that lie alike in their frame are scored together."""
    windows: list[tuple[slice, int, int, int, int]] = []
    for row, sample in enumerate(meta):
        place = (*sample.offset, *sample.native_size)
        if windows and windows[-1][1:] == place:
            windows[-1] = (slice(windows[-1][0].start, row + 1), *place)
        else:
            windows.append((slice(row, row + 1), *place))
    return windows


def _area(sample: SampleMeta) -> tuple[Any, ...]:
    """The index that cuts a sample's picture out of its frame (..., H, W)."""
    (top, left), (height, width) = sample.offset, sample.native_size
    return ..., slice(top, top + height), slice(left, left + width)


def _show(batch: Batch, predictions: Mapping[str, Tensor], row: int, tasks: Mapping[str, Task]) -> VisualSample:
    sample = batch["meta"][row]
    area = _area(sample)

    def label(name: str) -> np.ndarray:
        array = batch["labels"][name][row][area].numpy()
        if array.ndim == 2:
            return array.astype(np.uint8)
        return np.ascontiguousarray(array.transpose(1, 2, 0)) if array.shape[0] > 1 else array[0]

    return VisualSample(
        sample.id,
        batch["image"][row][area].permute(1, 2, 0).contiguous().numpy(),
        {name: label(name) for name in tasks},
        {name: task.decode(predictions[name][row][area].float()) for name, task in tasks.items()},
    )
