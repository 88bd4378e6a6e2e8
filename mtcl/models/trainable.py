"""Choose which parts of a backbone are trained, and number its layers from the image on."""

from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from timm.models._manipulate import group_with_matcher
from torch import nn

from mtcl.errors import ParameterError, UserError
from mtcl.models.backbone_options import TRAINABLE, TRAINABLE_CHOICES
from mtcl.models.backbones import Backbone, get_complete_name
from mtcl.models.lora import add_adapters, remove_inserted_names


def set_trainable(backbone: Backbone, trainable: str, lora: Mapping[str, Any] | None = None) -> None:
    """Choose what of a backbone is trained; call it when the model around the backbone is complete.

    Frozen are parameters and buffers: no gradient, no update of running statistics, no dropout and no drop path. The
    forward pass of a frozen backbone builds no graph, unless a model weaves trained tokens through its blocks.

    Args:
        backbone: changed in place.
        trainable: ``full`` (all of it), ``frozen`` (nothing), ``last_N`` (the last N blocks of a ViT, the last N
            stages of another network, as timm groups them) or ``lora`` (adapters, :mod:`mtcl.models.lora`).
        lora: for ``lora``: arguments of :func:`mtcl.models.lora.add_adapters`.

    Raises:
        ParameterError: ``trainable`` is unknown, there are fewer than N blocks or stages, or no layers to adapt.
    """
    if not TRAINABLE.fullmatch(trainable):
        raise ParameterError("trainable", f"={trainable} is not known; choose {TRAINABLE_CHOICES}")
    if trainable == "full":
        return
    if trainable == "frozen":
        backbone.requires_grad_(False)
        backbone.is_frozen, backbone.frozen_modules = True, ("",)
    elif trainable == "lora":
        add_adapters(backbone, **(lora or {}))
    else:
        _freeze_first_stages(backbone, int(trainable.removeprefix("last_")))
    backbone.train(backbone.training)


def _freeze_first_stages(backbone: Backbone, num_trained: int) -> None:
    """Freeze all but the last blocks or stages; patch embedding and stem count as none."""
    try:
        stages = number_layers(backbone, coarse=True)
    except UserError as error:
        raise ParameterError(
            "trainable", f"=last_{num_trained} needs layers: {error}; choose full or frozen"
        ) from error
    num_stages = max(stages.values())
    if num_trained > num_stages:
        raise ParameterError(
            "trainable",
            f"=last_{num_trained} is more than backbone {backbone.name} has: {num_stages} blocks or stages; choose "
            f"last_1 to last_{num_stages}, or full",
        )
    frozen = {name for name, stage in stages.items() if stage <= num_stages - num_trained}
    for name, parameter in backbone.net.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    backbone.frozen_modules = tuple(_find_modules(backbone.net, frozen))


def _find_modules(module: nn.Module, names: set[str], prefix: str = "") -> Iterator[str]:
    """Yield the outermost submodules whose parameters are all among ``names``.

    Layers without parameters beside them (dropout of a ViT's tokens, pooling of a stem) count as such.
    """
    for child_name, child in module.named_children():
        path = f"{prefix}{child_name}"
        is_named = [f"{path}.{name}" in names for name, _ in child.named_parameters()]
        if all(is_named):
            yield path
        elif any(is_named):
            yield from _find_modules(child, names, f"{path}.")


def number_layers(backbone: Backbone, coarse: bool = False) -> dict[str, int]:
    """Number the layers of a backbone from 0 (its stem, or the patch embedding) to the last one, as timm groups them.

    Args:
        backbone: its parameters are those of timm's model, beside which there may be adapters.
        coarse: blocks of a ViT and stages of other networks, and layers behind the last stage count to it; otherwise
            each block of a stage is a layer.

    Returns:
        Name of a parameter of ``backbone.net`` -> number; every number up to the largest is used.

    Raises:
        UserError: timm knows no layers of this model.
    """
    with torch.device("meta"):
        complete: Any = timm.create_model(backbone.name, **backbone.kwargs)
    try:
        matcher = complete.group_matcher(coarse=coarse)
    except (AttributeError, AssertionError) as error:
        raise UserError(f"timm knows no layers of backbone {backbone.name}") from error
    unmatched = "?"  # timm puts what belongs to no block into one group behind them all
    parameters = iter([*complete.named_parameters(), (unmatched, None)])
    groups = group_with_matcher(parameters, matcher, reverse=True)
    by_name = {get_complete_name(name): group for name, group in groups.items()}
    names = {name: get_complete_name(remove_inserted_names(name)) for name, _ in backbone.net.named_parameters()}
    numbers = {name: by_name[complete_name] for name, complete_name in names.items()}
    if coarse and (inside := [number for number in numbers.values() if number != groups[unmatched]]):
        numbers = {name: min(number, max(inside)) for name, number in numbers.items()}
    rank = {number: index for index, number in enumerate(sorted(set(numbers.values())))}
    return {name: rank[number] for name, number in numbers.items()}
