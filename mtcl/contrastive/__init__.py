"""The cross-task contrastive regulariser: a training-only loss on any model's task features."""

from mtcl.contrastive.optimizer import SliceAdamW
from mtcl.contrastive.regularizer import Contrastive, Regularizer, RegularizerOutput
from mtcl.contrastive.sampling import Draw

__all__ = ["Contrastive", "Draw", "Regularizer", "RegularizerOutput", "SliceAdamW"]
