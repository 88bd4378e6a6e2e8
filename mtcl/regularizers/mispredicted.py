"""Choose a part of the K pixels where the model's prediction of the target is wrong.

After ContrastiveSeg (Wang et al., ICCV 2021), which takes half of its anchors from wrongly predicted pixels. Of a few
times K candidates of each image:

    wrong(i):  D_t(prediction_i, y_t,i) > positive_threshold_t, where the target t is labelled
    chosen:    fraction * K wrong ones and K minus that others; where either are fewer, the rest are of the other kind

Both kinds are spread evenly over the candidates, whose order is random, and stay in that order.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtcl.errors import ParameterError
from mtcl.regularizers.pairs import PixelLabels
from mtcl.regularizers.sampling import pixel_index
from mtcl.regularizers.sampling_ablations import take_pixels
from mtcl.tasks.base import Task

MISPREDICTED_CANDIDATES = 4  # times K pixels are drawn, of which K are chosen


def check_fraction(fraction: float, class_balanced: bool) -> None:
    """Refuse a fraction out of 0..1, and two rules at once of which pixels are chosen."""
    if not 0 <= fraction <= 1:
        raise ParameterError("mispredicted_fraction", f"={fraction} must be from 0 to 1")
    if fraction and class_balanced:
        raise ParameterError(
            "mispredicted_fraction", f"={fraction} chooses pixels, and so does class_balanced; use one"
        )


@torch.no_grad()
def choose_mispredicted(
    pixels: PixelLabels,
    predictions: Mapping[str, Tensor] | None,
    targets: Sequence[Task],
    thresholds: Tensor,
    count: int,
    fraction: float,
) -> PixelLabels:
    """Choose ``count`` of the candidates, up to ``fraction`` of them where the prediction of the target is wrong.

    Args:
        pixels: M candidates per image, in random order, at least ``count``.
        predictions: task -> raw prediction (B, C, H, W).
        targets: the target of each comparison.
        thresholds: (R,), the largest embedded distance of the target's labels that is not wrong.
        count: K.
        fraction: 0..1.

    Raises:
        ParameterError: no predictions.
    """
    if predictions is None:
        raise ParameterError("mispredicted_fraction", f"={fraction} needs the model's predictions; give them")
    wrong = find_mispredicted(pixels, predictions, targets, thresholds)
    return take_pixels(pixels, choose_candidates(wrong, count, round(fraction * count)))


def find_mispredicted(
    pixels: PixelLabels, predictions: Mapping[str, Tensor], targets: Sequence[Task], thresholds: Tensor
) -> Tensor:
    """Return where the prediction of each comparison's target is wrong: bool (R, B, M); nowhere without a label.

    Arguments are those of :func:`choose_mispredicted`.
    """
    embedded = {}
    for task in targets:
        if task.name not in embedded:
            raw = read_predictions(predictions[task.name], pixels.pixels[0])
            embedded[task.name] = task.embed_label(task.to_label(raw))
    predicted = torch.stack([embedded[task.name] for task in targets])  # (R, B, M, 3)
    # A void label is NaN, with which no comparison holds.
    return (predicted - pixels.target_label).norm(dim=-1) > thresholds[:, None, None]


def read_predictions(prediction: Tensor, pixels: Tensor) -> Tensor:
    """Read raw predictions (B, C, H, W) at drawn pixels (B, M, 2) without a copy of the map: fp32 (B, M, C)."""
    height, width = prediction.shape[-2:]
    row, column = pixel_index(pixels, (height, width))
    image = torch.arange(len(prediction), device=prediction.device)[:, None]
    return prediction[image, :, row, column].float()


def choose_candidates(wrong: Tensor, count: int, quota: int) -> Tensor:
    """Choose ``quota`` wrong candidates and ``count - quota`` others; where either are fewer, more of the other kind.

    Of n candidates of a kind, m are chosen at equal steps: the one of rank r where floor(m r / n) rises.

    Args:
        wrong: bool (..., M).
        count: at most M.
        quota: at most ``count``.

    Returns:
        different indices in ascending order, int64 (..., count).
    """
    total = wrong.shape[-1]
    num_wrong = wrong.sum(dim=-1, keepdim=True)
    num_others = torch.minimum(count - num_wrong.clamp(max=quota), total - num_wrong)
    chosen = torch.zeros_like(wrong)
    for kind, number in ((wrong, count - num_others), (~wrong, num_others)):
        steps = kind.cumsum(dim=-1) * number // kind.sum(dim=-1, keepdim=True).clamp(min=1)
        previous = torch.cat([torch.zeros_like(steps[..., :1]), steps[..., :-1]], dim=-1)
        chosen |= kind & (steps > previous)
    index = torch.arange(total, device=wrong.device)
    return torch.where(chosen, index, index + total).topk(count, largest=False, sorted=True).values
