"""Contrastive multi-task dense prediction (after Yang, Ye, Xu, AAAI 2023).

Floors, lower never imports higher:
``losses``, ``metrics`` <- ``tasks`` <- ``data`` <- ``models`` <- ``contrastive`` <- ``training`` <-
``inference`` <- ``entry``
(train.py, evaluate.py, scripts).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtcl.errors import UserError

if TYPE_CHECKING:
    from mtcl.inference import Predictor

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "load"]


def load(
    source: str | Path,
    device: str = "auto",
    tasks: Sequence[str] | None = None,
    precision: str = "auto",
    **options: Any,
) -> "Predictor":
    """A trained model as a predictor.

    ``source``: a checkpoint, a run's folder, an exported folder, or a name on the Hugging Face hub. ``device``: auto,
    cpu or cuda. ``tasks``: only those. ``precision``: auto, bf16 or fp32. ``options``: ``large``, ``flip``, ``scales``,
    ``max_pixels``, see :class:`mtcl.inference.Predictor`. ``UserError``: what was given is none of this.

    >>> predictor = mtcl.load("outputs/rooms/TIME")  # doctest: +SKIP
    >>> maps = predictor("picture.jpg")  # or a PIL picture, or uint8 RGB (H, W, 3)  # doctest: +SKIP
    >>> maps["depth"]  # float32 (H, W), metres; maps["semseg"]: uint8 (H, W), classes  # doctest: +SKIP
    """
    from mtcl.entry import loading  # everything else of the package is below it

    return loading.load(source, device, tasks, precision, **options)
