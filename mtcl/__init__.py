"""Contrastive multi-task dense prediction (after Yang, Ye, Xu, AAAI 2023).

Packages from the lowest to the highest, lower ones never import higher ones: ``losses``, ``metrics``, ``models``;
``tasks``, ``profiling``; ``data``, ``regularizers``; ``evaluation``, ``inference``; ``visualization``; ``training``;
``config``; ``results``; ``launch``; ``cli`` (see pyproject.toml, import-linter).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtcl.errors import UserError
from mtcl.version import __version__

if TYPE_CHECKING:
    from mtcl.inference import Predictor

__all__ = ["UserError", "__version__", "load"]


def load(
    source: str | Path,
    device: str = "auto",
    tasks: Sequence[str] | None = None,
    precision: str = "auto",
    backbone_weights: str | Path | None = None,
    **options: Any,
) -> "Predictor":
    """Load a trained model as a predictor.

    >>> predictor = mtcl.load("outputs/rooms/TIME")  # doctest: +SKIP
    >>> maps = predictor("image.jpg")  # or a PIL image, or uint8 RGB (H, W, 3)  # doctest: +SKIP
    >>> maps["depth"]  # float32 (H, W), metres; maps["semseg"]: uint8 (H, W), classes  # doctest: +SKIP

    Args:
        source: a checkpoint, a run's folder, an exported folder, a name on the Hugging Face hub, or ``rooms``: the
            small model of procedural rooms that comes with mtcl.
        device: auto, cpu or cuda.
        tasks: predict only these; None: all tasks of the model.
        precision: auto, bf16, fp16 or fp32.
        backbone_weights: of a frozen backbone that a checkpoint leaves out: a file, or ``hub``.
        **options: ``mode``, ``flip``, ``scales``, ``max_pixels``, see :class:`mtcl.inference.Predictor`.

    Raises:
        UserError: the source is none of these, or an option is out of range.
    """
    from mtcl.config import load as config_load  # here, for it imports torch and timm, which takes seconds

    return config_load.load(source, device, tasks, precision, backbone_weights, **options)
