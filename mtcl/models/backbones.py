"""Backbones: any timm model that gives features, CNN or transformer, behind one interface."""

import difflib
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import model_entrypoint
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from mtcl.errors import UserError, describe_load_error
from mtcl.models.backbone_options import check_backbone_kwargs
from mtcl.models.weights import check_tensor_values

RGB = tuple[float, float, float]


class Backbone(nn.Module):
    """A timm model's feature maps: (B, 3, H, W) -> list of (B, C_i, H / stride_i, W / stride_i), finest first.

    H and W must be multiples of :attr:`multiple`. The output of a ViT's last block goes through its final
    normalisation, as trained; the maps of earlier blocks have none.
    """

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.net = net
        info: Any = net.feature_info
        self.channels: list[int] = list(info.channels())
        self.strides: list[int] = [int(s) for s in info.reduction()]
        self.multiple = max(self.strides)
        self.mean: RGB = (mean[0], mean[1], mean[2])
        self.std: RGB = (std[0], std[1], std[2])
        # Swin and its kin give channels last.
        self.channels_last = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, image: Tensor) -> list[Tensor]:
        features = self.net(image)
        return [f.permute(0, 3, 1, 2) for f in features] if self.channels_last else list(features)

    def freeze_unused(self, reads: Collection[int]) -> None:
        """Leave out of the training what only maps other than ``reads`` come from, as DDP waits for every gradient.

        An HRNet's last fusion has layers for each of its maps; other families make their later maps of earlier ones.
        """
        last = getattr(self.net, "stage4", None)
        if isinstance(last, nn.Sequential) and hasattr(last[-1], "fuse_layers"):
            for index, layers in enumerate(last[-1].fuse_layers):  # type: ignore[arg-type]
                if index not in reads:
                    layers.requires_grad_(False)

    def set_grad_checkpointing(self, enabled: bool = True) -> bool:
        """Keep each block's input only and run it again in the backward pass; false where timm's model can't."""
        inner = self.net.model if isinstance(self.net, FeatureGetterNet) else self.net
        try:
            inner.set_grad_checkpointing(enabled)  # type: ignore[operator]
        except (AttributeError, AssertionError):  # not of this model; timm's way to say that it has no such thing
            return False
        return True


class FinalNormFeatureGetter(FeatureGetterNet):
    """timm's features of a ViT, which lack its final normalisation: here the last block's have it."""

    def __init__(self, model: nn.Module, out_indices: Sequence[int], **options: Any):
        super().__init__(model, tuple(out_indices), norm=True, **options)
        self.norm = False  # else timm normalises every map with the last one's

    def forward(self, x: Tensor) -> list[Tensor]:
        *earlier, last = super().forward(x)
        normed = self.model.norm(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[operator]
        return [*earlier, normed]


def build_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out_indices: Sequence[int] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Backbone:
    """The timm model ``name`` as a feature pyramid.

    ``weights``: None (random), ``"hub"`` (timm's own, fetched) or a .safetensors / .pth file whose names are those
    of the whole timm model. ``mean``/``std`` (RGB, 0..1 scale) override timm's. ``out_indices``: which of timm's
    feature levels; by default those of stride 4 and coarser, and four evenly spaced blocks of a model with one
    resolution (ViT). ``kwargs`` go to ``timm.create_model``, architecture arguments only
    (:mod:`mtcl.models.backbone_options`). Raises UserError for an unknown name, an unreachable hub, weights that do not
    fit: never falls back to a random start.
    """
    check_backbone_kwargs(kwargs)
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists them"
        raise UserError(f"backbone.name={name} is not a timm model; {hint}")
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # resnet18.no_such_tag
        raise UserError(
            f"backbone.name={name} has a tag that timm does not know; leave out what follows the dot"
        ) from error
    options = dict(kwargs or {})
    options |= _any_size(name, options)
    if out_indices is None:
        out_indices = _default_levels(name, options)
    try:
        net = timm.create_model(
            name,
            features_only=True,
            pretrained=weights == "hub",
            out_indices=tuple(out_indices),
            **options,
            **_final_norm(name, options, out_indices),
        )
    except Exception as error:  # timm and the hub's library raise many kinds
        if weights == "hub":
            raise UserError(
                f"the hub gave no weights for backbone {name} ({_first_line(error)}); check the connection, or give a "
                "file (backbone.weights=PATH), or start from random (backbone.weights=none)"
            ) from error
        raise UserError(f"backbone {name} with kwargs {options} can't be built: {_first_line(error)}") from error
    if weights not in (None, "hub"):
        _load_file(net, name, options, Path(str(weights)))
    config = timm.models.get_pretrained_cfg(name)
    return Backbone(net, mean or getattr(config, "mean", None) or (0.485, 0.456, 0.406),
                    std or getattr(config, "std", None) or (0.229, 0.224, 0.225))  # fmt: skip


def _any_size(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that let a model of a fixed input size take pictures of any size."""
    config = timm.models.get_pretrained_cfg(name)
    if "img_size" in options or not getattr(config, "fixed_input_size", False):
        return {}
    for candidate in ({"dynamic_img_size": True, "dynamic_img_pad": True}, {"strict_img_size": False}):
        try:
            with torch.device("meta"):
                timm.create_model(name, features_only=True, **{**options, **candidate})
            return candidate
        except TypeError:  # this family does not know the option
            continue
        except Exception:  # a real defect: let the real construction report it
            return candidate
    raise UserError(
        f"backbone {name} takes pictures of its own size only; choose another, or fix the size: "
        "'++backbone.kwargs={img_size:[H,W]}' (both multiples of 32, equal to data.size)"
    )


def _final_norm(name: str, options: Mapping[str, Any], out_indices: Sequence[int]) -> dict[str, Any]:
    """The option that keeps a ViT's final normalisation, where its last block is among the levels."""
    try:
        with torch.device("meta"):
            net = timm.create_model(name, features_only=True, **options)
    except Exception:  # let the real construction report it
        return {}
    info: Any = net.feature_info
    depth = len(info.info)
    columnar = isinstance(net, FeatureGetterNet) and depth > 1 and len(set(info.reduction())) == 1
    last = depth - 1 in {index % depth for index in out_indices}
    named = isinstance(getattr(net, "model", None), nn.Module) and hasattr(net.model, "norm")
    return {"feature_cls": FinalNormFeatureGetter} if columnar and last and named else {}


def _default_levels(name: str, options: Mapping[str, Any]) -> list[int]:
    try:
        with torch.device("meta"):
            net = timm.create_model(name, features_only=True, **options)
    except Exception as error:
        raise UserError(f"backbone {name} with kwargs {options} gives no feature maps: {_first_line(error)}") from error
    info: Any = net.feature_info
    if len(set(info.reduction())) == 1 and len(info.out_indices) > 1:  # one resolution throughout: a ViT
        depth = len(info.info)
        return [depth * quarter // 4 - 1 for quarter in range(1, 5)]
    return [index for index, stride in zip(info.out_indices, info.reduction()) if stride >= 4]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"backbone.weights={path} is not a file; give none, hub, or a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"backbone.weights={path} can't be read as weights: {describe_load_error(error)}") from error
    for key in ("state_dict", "model", "state_dict_ema"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )
    if not tensors or not state:
        raise UserError(f"backbone.weights={path} holds no state dict of tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _load_file(net: nn.Module, name: str, options: Mapping[str, Any], path: Path) -> None:
    """Fill every parameter and buffer of ``net`` from a file written for the whole timm model, or raise UserError."""
    state = _read_state(path)
    whole = timm.create_model(name, **options)
    convert = getattr(sys.modules[model_entrypoint(name).__module__], "checkpoint_filter_fn", None)
    if convert is not None:  # timm's own reading of the original authors' files (names, position embeddings)
        try:
            state = convert(state, whole)
        except Exception as error:
            raise UserError(f"backbone.weights={path} does not fit backbone {name}: {_first_line(error)}") from error
    # A feature net has its whole model's names, but for a prefix or for dots that became underscores.
    by_name = {key.replace(".", "_"): value for key, value in state.items()}
    own = net.state_dict()
    found = {key: by_name.get(key.removeprefix("model.").replace(".", "_")) for key in own}
    missing = [key for key, value in found.items() if value is None and not key.endswith("num_batches_tracked")]
    if missing:
        raise UserError(
            f"backbone.weights={path} lacks {len(missing)} of the {len(own)} tensors of backbone {name} "
            f"(first: {', '.join(missing[:3])}); is it a file for another model?"
        )
    wrong = [
        f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
        for key, value in found.items()
        if value is not None and value.shape != own[key].shape
    ]
    if wrong:
        raise UserError(f"backbone.weights={path} does not fit backbone {name}: {'; '.join(wrong[:3])}")
    for key, value in found.items():
        if value is not None:
            check_tensor_values(key, value, own[key], f"backbone.weights={path}")
    # A deeper sibling's file (resnet34 for resnet18) has all these names and shapes, and further blocks of their kind.
    known = {key.replace(".", "_") for key in whole.state_dict()}
    kinds = {re.sub(r"\d+", "#", key) for key in known}
    further = [key for key in by_name if key not in known and re.sub(r"\d+", "#", key) in kinds]
    if further:
        raise UserError(
            f"backbone.weights={path} has {len(further)} tensors more than backbone {name} (first: {further[0]}); "
            "is it a file for a deeper model?"
        )
    net.load_state_dict({key: own[key] if value is None else value for key, value in found.items()})
