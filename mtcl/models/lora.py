"""Low-rank adapters of a backbone's attention, through the library peft (an optional package).

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022: a frozen weight W is used as

    W + alpha / rank * B A,        A (rank, inputs), B (outputs, rank), B = 0 at the start

and A and B are trained.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtcl.errors import ParameterError, UserError
from mtcl.models.backbones import Backbone

INSTALL = "pip install 'mtcl[lora]'"
INPUTS = ("qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj")  # timm's names of an attention's projections
OUTPUTS = ("proj", "o_proj", "out_proj")
ADAPTER = re.compile(r"(.*)\.lora_A\.default\.weight")  # a state dict's name of A, as peft gives it
INSERTED = re.compile(r"\.base_layer\.|\.lora_[AB]\.default\.")  # what peft inserts into names


def add_adapters(
    backbone: Backbone, rank: int = 8, alpha: float = 16, dropout: float = 0.0, targets: Sequence[str] | None = None
) -> None:
    """Freeze a backbone and add trainable adapters to linear layers of it, which do not change its output at first.

    Args:
        backbone: changed in place; call this when the model around it is complete.
        rank: of an adapter.
        alpha: an adapter's output is multiplied by alpha / rank.
        dropout: probability with which an adapter's inputs are dropped in training, 0 to below 1.
        targets: names of linear layers, or the last parts of names (``qkv``, ``mlp.fc1``); None: all projections of
            attention.

    Raises:
        ParameterError: peft is not installed, or the backbone has no such layer.
    """
    names = _find_targets(backbone, targets)
    try:
        import peft
    except ImportError as error:
        raise ParameterError("trainable", f"=lora needs peft: {INSTALL}") from error
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)  # type: ignore[arg-type]
    peft.inject_adapter_in_model(config, backbone.net)
    for name, parameter in backbone.net.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    norms = nn.modules.batchnorm._BatchNorm
    backbone.frozen_modules = tuple(n for n, module in backbone.net.named_modules() if isinstance(module, norms))


def _find_targets(backbone: Backbone, targets: Sequence[str] | None) -> list[str]:
    """Return the names of the layers that get adapters."""
    attention = list(_find_attention(backbone.net))
    if targets is None:
        if not attention:
            raise ParameterError(
                "trainable",
                f"=lora adapts the projections of attention, and backbone {backbone.name} has none that it calls; "
                "choose a ViT or a Swin, or name linear layers in lora.targets",
            )
        return attention
    linear = [name for name, module in backbone.net.named_modules() if isinstance(module, nn.Linear)]
    bypassed = {name for name in linear if _is_bypassed(backbone.net, name)}
    names = [name for name in linear if name not in bypassed and f".{name}".endswith(tuple(f".{t}" for t in targets))]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise ParameterError(
                "lora.targets",
                f"={target} is no linear layer that backbone {backbone.name} calls; the end of a name such as "
                f"{(attention or linear or ['(none)'])[0]} will do, or null",
            )
    return names


def _find_attention(net: nn.Module) -> Iterator[str]:
    """Yield the names of the linear projections of attention layers, without those that are not called."""
    for path, module in net.named_modules():
        children = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
        if children.intersection(INPUTS):
            for name in (*INPUTS, *OUTPUTS):
                if name in children and not _is_bypassed(net, full := f"{path}.{name}"):
                    yield full


def _is_bypassed(net: nn.Module, name: str) -> bool:
    """Return whether timm reads a layer's weight instead of calling it, as attention with separate biases does."""
    parent_name, _, child = name.rpartition(".")
    parent: Any = net.get_submodule(parent_name)
    if isinstance(parent, nn.MultiheadAttention):
        return True
    has_biases = isinstance(getattr(parent, "q_bias", None), Tensor)
    return child == "qkv" and has_biases and not getattr(parent, "qkv_bias_separate", False)


def is_base_weight(name: str) -> bool:
    """Return whether an entry of a model's state dict is one of its backbone, and of no adapter."""
    return name.startswith("backbone.") and ".lora_" not in name


def remove_inserted_names(name: str) -> str:
    """Return a parameter's name without what adapters insert: an adapter has the name of the weight it belongs to."""
    return INSERTED.sub(".", name)


@torch.no_grad()
def merge_adapters(weights: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Merge adapters into the weights that they belong to.

    Args:
        weights: a model's state dict; without adapters it is returned as it is.
        alpha: of the adapters.

    Returns:
        The state dict of the model without adapters, which gives the same output.

    Raises:
        UserError: an adapter lacks a part, or its parts do not fit each other.
    """
    if not all(isinstance(name, str) for name in weights):
        raise UserError("a name among the weights is no text")
    merged = {remove_inserted_names(n): value for n, value in weights.items() if ".lora_" not in n}
    for name, first in weights.items():
        if match := ADAPTER.fullmatch(name):
            layer = f"{match[1]}.weight"
            second, weight = weights.get(f"{match[1]}.lora_B.default.weight"), merged.get(layer)
            try:
                if weight.shape != (second.shape[0], first.shape[1]):  # type: ignore[union-attr]
                    raise ValueError(weight.shape)  # type: ignore[union-attr]
                update = second @ first * (alpha / len(first))  # type: ignore[operator]
                merged[layer] = (weight + update.to(weight)).to(weight.dtype)  # type: ignore[operator, union-attr]
            except Exception as error:  # of torch, for tensors that do not fit
                raise UserError(f"the adapter of {layer} does not fit the weights") from error
    return merged
