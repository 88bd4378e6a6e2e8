"""Contrastive multi-task dense prediction (after Yang, Ye, Xu, AAAI 2023).

Floors, lower never imports higher:
``losses``, ``metrics`` <- ``tasks`` <- ``data`` <- ``models`` <- ``contrastive`` <- ``training`` <-
``inference`` <- ``entry``
(train.py, evaluate.py, scripts).
"""

from typing import TYPE_CHECKING, Any

from mtcl.errors import UserError

if TYPE_CHECKING:
    from mtcl.inference import Predictor

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "load"]


def load(source: Any, **options: Any) -> "Predictor":
    """A trained model as a predictor: see :func:`mtcl.entry.loading.load` and :class:`mtcl.inference.Predictor`.

    >>> predictor = mtcl.load("outputs/rooms/TIME")  # doctest: +SKIP
    >>> maps = predictor("picture.jpg")  # doctest: +SKIP
    >>> maps["depth"]  # float32 (H, W), metres  # doctest: +SKIP
    """
    from mtcl.entry import loading  # everything else of the package is below it

    return loading.load(source, **options)
