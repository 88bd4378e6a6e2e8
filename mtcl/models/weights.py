"""Check weights from an untrusted file before they are loaded into a model."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtcl.errors import UserError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def check_weights(weights: Any, expected: Mapping[str, Tensor], source: str | Path) -> None:
    """Check that weights fit a model and are finite.

    Args:
        weights: name -> tensor, to be loaded.
        expected: state dict of the model, for names, shapes and dtypes (it may be on "meta").
        source: of the weights, for messages.

    Raises:
        UserError: names the first tensor that does not fit, or is damaged.
    """
    if not isinstance(weights, Mapping):
        raise UserError(f"{source} holds no weights but a {type(weights).__name__}")
    misfit = f"the weights in {source} do not fit the model that its own config describes"
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    if missing or unexpected:
        first = f"{missing[0]} is missing" if missing else f"there is no {str(unexpected[0])[:80]} in the model"
        raise UserError(f"{misfit}: {first} ({len(missing)} missing, {len(unexpected)} too many)")
    for name, model in expected.items():
        tensor = weights[name]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UserError(f"{misfit}: {name} is no plain tensor")
        if tensor.shape != model.shape:
            raise UserError(f"{misfit}: {name} is {tuple(tensor.shape)} instead of {tuple(model.shape)}")
        check_tensor_values(name, tensor, model, source)


def check_tensor_values(name: str, tensor: Tensor, model: Tensor, source: str | Path) -> None:
    """Check that a tensor's dtype fits that of the model's, and that its values are finite.

    Otherwise torch would cast int8 or complex numbers silently, or every prediction would be NaN.

    Args:
        name: of the tensor in the state dict.
        tensor: to be loaded.
        model: the tensor of the model that it replaces.
        source: of the weights, for messages.

    Raises:
        UserError: the tensor does not fit, or is damaged.
    """
    if tensor.dtype not in (FLOATS if model.is_floating_point() else (*FLOATS, *INTEGERS)):  # counters may be floats
        raise UserError(
            f"the weights in {source} do not fit: {name} has numbers of type {tensor.dtype}, not {model.dtype}"
        )
    if tensor.is_meta:  # has a shape but no values
        return
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise UserError(f"the weights in {source} are damaged: {name} has values that are NaN or infinite")
    if name.endswith("running_var") and bool((tensor < 0).any()):
        raise UserError(f"the weights in {source} are damaged: {name} has negative variances")


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, 64 hexadecimal digits, of the names, shapes, types and values of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
