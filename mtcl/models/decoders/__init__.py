"""Multi-task decoders, one file each."""

from mtcl.models.decoders.base import Decoder, DecoderOutput
from mtcl.models.decoders.multi_head import MultiHead

__all__ = ["Decoder", "DecoderOutput", "MultiHead"]
