"""Models: a timm backbone and a decoder, or anything else that is a :class:`DenseModel`."""

from typing import TYPE_CHECKING

from mtcl.lazy_imports import import_on_use

if TYPE_CHECKING:
    from mtcl.models.backbones import Backbone, build_backbone
    from mtcl.models.base import DenseModel, EncoderDecoder
    from mtcl.models.output import DenseOutput, EncodedImage
    from mtcl.models.sak import SwissArmyKnife
    from mtcl.models.taskprompter import TaskPrompter

__getattr__ = import_on_use(
    __name__,
    {
        "Backbone": "mtcl.models.backbones",
        "DenseModel": "mtcl.models.base",
        "DenseOutput": "mtcl.models.output",
        "EncodedImage": "mtcl.models.output",
        "EncoderDecoder": "mtcl.models.base",
        "SwissArmyKnife": "mtcl.models.sak",
        "TaskPrompter": "mtcl.models.taskprompter",
        "build_backbone": "mtcl.models.backbones",
    },
)

__all__ = [
    "Backbone",
    "DenseModel",
    "DenseOutput",
    "EncodedImage",
    "EncoderDecoder",
    "SwissArmyKnife",
    "TaskPrompter",
    "build_backbone",
]
