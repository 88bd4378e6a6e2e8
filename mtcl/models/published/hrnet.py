"""Rules for the HRNet inside published checkpoints, and for the layers that its users in one public code share.

Sources: github.com/SimonVandenhende/Multi-Task-Learning-PyTorch, models (seg_hrnet.py, padnet.py);
github.com/brdav/atrc, src/model/backbones/hrnet.py. Both have the names of HRNet's own code, which timm kept.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mtcl.errors import UserError
from mtcl.models.published.translation import Rule, State
from mtcl.models.published.vit import IMAGENET_MEAN, IMAGENET_STD

ATTENTION = ".attention.0.weight"  # of a message: its gate's convolution


def get_hrnet_rules(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of an HRNet whose names begin with ``prefix``."""
    names = ("conv{n}.*", "bn{n}.*", "layer1.*", "transition{n}.*", "stage{n}.*")
    return tuple(Rule(f"{prefix}{name}", f"backbone.net.{name}") for name in names)


def count_channels(state: Mapping[str, Tensor], prefix: str) -> list[int]:
    """Return the channels of the four branches of an HRNet, finest first.

    Raises:
        UserError: the backbone is no HRNet.
    """
    weights = [state.get(f"{prefix}stage4.0.branches.{branch}.0.conv1.weight") for branch in range(4)]
    channels = [weight.shape[0] for weight in weights if weight is not None]
    if len(channels) < 4:
        raise UserError("the checkpoint has no fourth stage of four branches: its backbone is no HRNet")
    return channels


def get_hrnet_overrides() -> dict[str, Any]:
    """Return the config keys of the backbone: its own branches, resized bilinearly, and ImageNet's normalisation."""
    return {
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "upsample_mode": "bilinear",
        "kwargs": {"feature_location": ""},
    }


def join_messages(state: State) -> State:
    """Join the two convolutions of each message between tasks, of its features and of its gate, into one.

    Ours (:class:`~mtcl.models.decoders.blocks.Distillation`) has the features' channels first.
    """
    joined = dict(state)
    for key, gate in state.items():
        stem = key.removesuffix(ATTENTION)
        features = state.get(f"{stem}.conv.weight")
        if ".self_attention." in key and key.endswith(ATTENTION) and features is not None:
            del joined[key], joined[f"{stem}.conv.weight"]
            joined[f"{stem}.weight"] = torch.cat([features, gate])
    return joined


def split_fusion(state: State, layer: str, channels: Iterable[int]) -> State:
    """Split the 1x1 convolution of four maps, concatenated, into one for each map, and drop its bias.

    A batch norm follows, which takes the mean away: the bias goes from there with the opposite sign.

    Args:
        state: the authors' tensors.
        layer: name of the sequence of convolution (0) and batch norm (1).
        channels: of the maps.
    """
    split = dict(state)
    weight, bias, mean = (state.get(f"{layer}.{name}") for name in ("0.weight", "0.bias", "1.running_mean"))
    channels = list(channels)
    if weight is None or bias is None or mean is None or weight.shape[1] != sum(channels) or bias.shape != mean.shape:
        return split  # another network, which the rules refuse
    del split[f"{layer}.0.weight"], split[f"{layer}.0.bias"]
    split[f"{layer}.1.running_mean"] = mean - bias
    for index, part in enumerate(weight.split(channels, dim=1)):
        split[f"{layer}.0.{index}.weight"] = part.clone()
    return split


def add_background_logits(state: State, pattern: str) -> State:
    """Give layers of one logit, of a sigmoid, the logit of its complement in front: zero, which a softmax needs.

    Args:
        state: the authors' tensors.
        pattern: regular expression of the layers' names, without ``.weight`` and ``.bias``.
    """
    layers = re.compile(rf"(?:{pattern})\.(?:weight|bias)")
    return {
        key: torch.cat([torch.zeros_like(value), value]) if layers.fullmatch(key) and len(value) == 1 else value
        for key, value in state.items()
    }
