"""The cross-task contrastive regulariser: a training-only loss on any model's task features."""

from mtcl.regularizers.auxiliary import AuxiliaryHeads
from mtcl.regularizers.base import Regularizer, RegularizerOutput
from mtcl.regularizers.contrastive import Contrastive
from mtcl.regularizers.distillation import Distillation
from mtcl.regularizers.jtr import JointTaskRegularization
from mtcl.regularizers.label_discovery import LabelDiscovery
from mtcl.regularizers.masked_adamw import MaskedAdamW
from mtcl.regularizers.mtpsl import CrossTaskConsistency
from mtcl.regularizers.pseudo_labels import PseudoLabels
from mtcl.regularizers.rep_mtl import TaskSaliency
from mtcl.regularizers.sampling import Draw
from mtcl.regularizers.weighting import GradientNormWeight

__all__ = [
    "AuxiliaryHeads",
    "Contrastive",
    "CrossTaskConsistency",
    "Distillation",
    "Draw",
    "GradientNormWeight",
    "JointTaskRegularization",
    "LabelDiscovery",
    "MaskedAdamW",
    "PseudoLabels",
    "Regularizer",
    "RegularizerOutput",
    "TaskSaliency",
]
