"""Models: a timm backbone and a decoder, or anything else that is a :class:`DenseModel`."""

from mtcl.models.backbones import Backbone, build_backbone
from mtcl.models.base import DenseModel, EncoderDecoder
from mtcl.models.output import DenseOutput, EncodedImage
from mtcl.models.taskprompter import TaskPrompter

__all__ = ["Backbone", "DenseModel", "DenseOutput", "EncodedImage", "EncoderDecoder", "TaskPrompter", "build_backbone"]
