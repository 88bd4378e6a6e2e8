"""Choose which parts of a backbone are trained."""

from mtcl.errors import ParameterError
from mtcl.models.backbones import Backbone


def set_trainable(backbone: Backbone, trainable: str) -> None:
    """Choose what of a backbone is trained; call it when the model around the backbone is complete.

    Frozen are parameters and buffers: no gradient, no update of running statistics, no dropout and no drop path. The
    forward pass of a frozen backbone builds no graph, unless a model weaves trained tokens through its blocks.

    Args:
        backbone: changed in place.
        trainable: ``full`` (all of it) or ``frozen`` (nothing).

    Raises:
        ParameterError: ``trainable`` is unknown.
    """
    if trainable not in ("full", "frozen"):
        raise ParameterError("trainable", f"={trainable} is not known; choose full or frozen")
    if trainable == "full":
        return
    backbone.requires_grad_(False)
    backbone.is_frozen = True
    backbone.train(backbone.training)
