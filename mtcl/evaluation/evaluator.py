"""Evaluate a model on a validation list: every task's metrics over unpadded images, and a few samples to draw."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mtcl import distributed
from mtcl.data import Batch, SampleMeta
from mtcl.evaluation.model_input import prepare_input
from mtcl.models import DenseModel
from mtcl.progress import progress_bar
from mtcl.runtime import autocast, choose_float64_device
from mtcl.tasks.base import Task

Metrics = dict[str, dict[str, float]]  # task -> metric -> value
PredictFunction = Callable[[Batch], Mapping[str, Tensor]]  # batch -> task -> raw predictions (B, C, H, W) in its frame
# An image's id, task -> its raw prediction (C, H, W), unpadded.
PredictionCallback = Callable[[str, Mapping[str, Tensor]], object]


class VisualSample(NamedTuple):
    """One sample to draw: everything unpadded, labels and predictions in NumPy label layout."""

    id: str
    image: np.ndarray  # uint8 RGB (H, W, 3)
    labels: dict[str, np.ndarray]
    predictions: dict[str, np.ndarray]


class EvaluationResult(NamedTuple):
    """Metrics of an evaluation, and what to draw of it."""

    metrics: Metrics
    visual_samples: list[VisualSample]
    num_images: int  # of all processes


class Evaluator:
    """Evaluates models, or anything that predicts, on one list of images.

    Args:
        tasks: name -> task.
        loader: gives evaluation batches.
        device: where the model is, and where the metrics are computed: they sum in float64, so for Apple's GPUs on the
            CPU.
        precision: of the model, see :func:`mtcl.runtime.autocast`.
        num_visual_samples: number of samples, the first of the list, that are returned for drawing.
        options: task -> options of its metric.
        fast_options: task -> options that replace those in a fast validation between training steps.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        loader: DataLoader,
        device: torch.device,
        precision: str = "auto",
        num_visual_samples: int = 0,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        fast_options: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self.tasks, self.loader, self.device = dict(tasks), loader, device
        self.precision, self.num_visual_samples = precision, num_visual_samples
        self.options, self.fast_options = dict(options or {}), dict(fast_options or {})

    def run(
        self, model: DenseModel, on_prediction: PredictionCallback | None = None, fast: bool = False
    ) -> EvaluationResult:
        """Evaluate a model, which keeps its mode (training or evaluation); see :meth:`score`."""

        def predict(batch: Batch) -> Mapping[str, Tensor]:
            image, _ = prepare_input({**batch, "labels": {}}, model, self.device)
            with autocast(self.device, self.precision):
                return model.predict(image)

        was_training = model.training
        model.eval()
        evaluation = self.score(predict, on_prediction, fast)
        model.train(was_training)
        return evaluation

    @torch.inference_mode()
    def score(
        self, predict: PredictFunction, on_prediction: PredictionCallback | None = None, fast: bool = False
    ) -> EvaluationResult:
        """Score the predictions of a function on all images of the list.

        Args:
            predict: batch -> task -> raw predictions (B, C, H, W) in the batch's frame.
            on_prediction: called with the id and the unpadded float32 predictions (C, H, W) of every image.
            fast: use ``fast_options``.

        Returns:
            metrics in fractions, degrees and metres, with the samples to draw.
        """
        device = choose_float64_device(self.device)
        metrics = {name: task.metric(**self._options(name, fast)).to(device) for name, task in self.tasks.items()}
        visual_samples: list[VisualSample] = []
        count = 0
        for batch in progress_bar(self.loader, desc="evaluate", leave=False, disable=distributed.rank() > 0):
            predictions = {name: prediction.to(device) for name, prediction in predict(batch).items()}
            labels = {name: label.to(device, non_blocking=True) for name, label in batch["labels"].items()}
            for rows, (y, x, height, width) in _group_by_window(batch["meta"]):
                area = (rows, ..., slice(y, y + height), slice(x, x + width))
                for name, metric in metrics.items():
                    metric.update(predictions[name][area].float(), labels[name][area])
            rows_to_draw = range(min(self.num_visual_samples - len(visual_samples), len(batch["meta"])))
            visual_samples += [_to_visual_sample(batch, predictions, row, self.tasks) for row in rows_to_draw]
            if on_prediction is not None:
                for row, sample in enumerate(batch["meta"]):
                    area = _image_area(sample)
                    on_prediction(sample.id, {name: predictions[name][row][area].float() for name in self.tasks})
            count += len(batch["meta"])
        # Each process scores a different part of the images: torchmetrics adds up their states.
        values = {name: {k: float(v) for k, v in metric.compute().items()} for name, metric in metrics.items()}
        num_images = int(distributed.all_reduce_sum(torch.tensor(count, device=self.device)))
        return EvaluationResult(values, visual_samples, num_images)

    def is_comparable(self, monitor: str) -> bool:
        """Return whether ``task/metric`` of a fast and of a full evaluation are on one scale."""
        task, metric = monitor.split("/")
        return metric == "loss" or not {"thresholds", "every"} & set(self.fast_options.get(task, {}))

    def _options(self, name: str, fast: bool) -> dict[str, Any]:
        return {**self.options.get(name, {}), **(self.fast_options.get(name, {}) if fast else {})}


Window = tuple[int, int, int, int]  # y, x, height, width of an image in its frame


def _group_by_window(meta: list[SampleMeta]) -> list[tuple[slice, Window]]:
    """Group neighbouring samples whose images lie at equal windows of their frames, to be scored together."""
    groups: list[tuple[slice, Window]] = []
    for row, sample in enumerate(meta):
        window = (*sample.offset, *sample.native_size)
        if groups and groups[-1][1] == window:
            groups[-1] = (slice(groups[-1][0].start, row + 1), window)
        else:
            groups.append((slice(row, row + 1), window))
    return groups


def _image_area(sample: SampleMeta) -> tuple[Any, ...]:
    """Return the index that cuts a sample's image out of its frame (..., H, W)."""
    (y, x), (height, width) = sample.offset, sample.native_size
    return ..., slice(y, y + height), slice(x, x + width)


def _to_visual_sample(
    batch: Batch, predictions: Mapping[str, Tensor], row: int, tasks: Mapping[str, Task]
) -> VisualSample:
    sample = batch["meta"][row]
    area = _image_area(sample)

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
