"""The cross-task contrastive regulariser: a training-only loss on any model's task features."""

from mtcl.contrastive.balance import GradientShare
from mtcl.contrastive.mtpsl import CrossTaskConsistency
from mtcl.contrastive.optimizer import SliceAdamW
from mtcl.contrastive.regularizer import Contrastive, Regularizer, RegularizerOutput
from mtcl.contrastive.sampling import Draw

__all__ = [
    "Contrastive",
    "CrossTaskConsistency",
    "Draw",
    "GradientShare",
    "Regularizer",
    "RegularizerOutput",
    "SliceAdamW",
]
