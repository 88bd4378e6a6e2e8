"""Check weights that somebody else may have written, before they go into a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtcl.errors import UserError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def check_weights(weights: Any, expected: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise ``UserError`` where weights are not those of a model, or no model can compute with them.

    Args:
        weights: what is to be loaded: name -> tensor.
        expected: the model's own state dict; of it names, shapes and kinds of numbers count (it may lie on "meta").
        source: where the weights come from, for messages.
    """
    if not isinstance(weights, Mapping):
        raise UserError(f"{source} holds no weights but a {type(weights).__name__}")
    misfit = f"the weights in {source} do not fit the model that its own config describes"
    missing = [name for name in expected if name not in weights]
    further = [name for name in weights if name not in expected]
    if missing or further:
        first = f"{missing[0]} is missing" if missing else f"there is no {str(further[0])[:80]} in the model"
        raise UserError(f"{misfit}: {first} ({len(missing)} missing, {len(further)} too many)")
    for name, model in expected.items():
        tensor = weights[name]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UserError(f"{misfit}: {name} is no plain tensor")
        if tensor.shape != model.shape:
            raise UserError(f"{misfit}: {name} is {tuple(tensor.shape)} instead of {tuple(model.shape)}")
        check_tensor_values(name, tensor, model, source)


def check_tensor_values(name: str, tensor: Tensor, model: Tensor, source: str | Path) -> None:
    """Raise ``UserError`` where the numbers of a tensor can't take the place of the model's.

    They are cast in silence otherwise (int8, complex), or every prediction would be NaN.
    """
    if tensor.dtype not in (FLOATS if model.is_floating_point() else (*FLOATS, *WHOLE)):  # counters may be floats
        raise UserError(
            f"the weights in {source} do not fit: {name} has numbers of type {tensor.dtype}, not {model.dtype}"
        )
    if tensor.is_meta:  # has a shape and no numbers
        return
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise UserError(f"the weights in {source} are damaged: {name} has values that are NaN or infinite")
    if name.endswith("running_var") and bool((tensor < 0).any()):
        raise UserError(f"the weights in {source} are damaged: {name} has negative variances")
