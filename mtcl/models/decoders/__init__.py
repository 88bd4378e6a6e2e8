"""Multi-task decoders, one file each: :class:`Decoder` says what they take, ``DenseOutput`` what they return."""

from mtcl.models.decoders.atrc import ATRC
from mtcl.models.decoders.base import Decoder
from mtcl.models.decoders.deeplab import DeepLab
from mtcl.models.decoders.diffusion_mtl import DiffusionMTL
from mtcl.models.decoders.dpt import DPT
from mtcl.models.decoders.invpt import InvPT
from mtcl.models.decoders.invpt_plus_plus import InvPTPlusPlus
from mtcl.models.decoders.linear import Linear
from mtcl.models.decoders.mqtransformer import MQTransformer
from mtcl.models.decoders.mtan import MTAN
from mtcl.models.decoders.mti_net import MTINet
from mtcl.models.decoders.multi_head import MultiHead
from mtcl.models.decoders.pad_net import PADNet
from mtcl.models.decoders.segnet import SegNet
from mtcl.models.decoders.task_diffusion import TaskDiffusion
from mtcl.models.decoders.task_expert import TaskExpert
from mtcl.models.decoders.task_tokens import TaskTokens

__all__ = [
    "ATRC",
    "DPT",
    "MTAN",
    "Decoder",
    "DeepLab",
    "DiffusionMTL",
    "InvPT",
    "InvPTPlusPlus",
    "Linear",
    "MQTransformer",
    "MTINet",
    "MultiHead",
    "PADNet",
    "SegNet",
    "TaskDiffusion",
    "TaskExpert",
    "TaskTokens",
]
