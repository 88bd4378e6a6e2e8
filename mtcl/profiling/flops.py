"""Count a model's parameters and multiply-adds, without allocating or computing anything of its size."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mtcl.models import DenseModel


class Count(NamedTuple):
    """Parameters and multiply-adds of a model, which papers print as #Params and FLOPs."""

    parameters: int
    multiply_adds: int


class _Predict(nn.Module):
    """Call ``predict`` as ``forward``, the only method that ``functional_call`` takes."""

    def __init__(self, model: DenseModel):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return self.model.predict(image)


def count(model: DenseModel, size: Sequence[int]) -> Count:
    """Count the parameters of ``model`` and the multiply-adds of its ``predict`` of one image.

    Multiply-adds are those of convolutions and of matrix products (linear layers, attention, einsum). As in most
    papers, element-wise and neighbourhood operations count nothing: norms, activations, softmax, resizing, pooling.

    Args:
        model: on any device, the meta device included; its parameters do not change. Left in evaluation mode.
        size: height and width of the image.
    """
    model.eval()
    is_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention's own kernel: the counter does not know it
    try:
        return _count(model, size)
    finally:
        torch.backends.mha.set_fastpath_enabled(is_enabled)


def _count(model: DenseModel, size: Sequence[int]) -> Count:
    with (
        # Unlike the meta device, its tensors have a device that autocast knows.
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),  # attention as plain matrix products, whatever kernels the counter knows
        FlopCounterMode(display=False) as counter,
    ):
        state = {
            f"model.{name}": torch.empty_like(tensor, device="cpu")
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }
        functional_call(_Predict(model), state, (torch.empty(1, 3, *size, device="cpu"),))
    return Count(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)
