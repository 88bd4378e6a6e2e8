"""Backbones: any timm model with feature maps, CNN or transformer, behind one interface."""

import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import timm
import torch
from safetensors.torch import load_file
from timm.models import model_entrypoint
from timm.models._features import FeatureGetterNet, FeatureListNet
from torch import Tensor, nn

from mtcl.errors import ParameterError, UserError, describe_load_error, find_similar
from mtcl.models.backbone_options import check_backbone_kwargs
from mtcl.models.weights import check_tensor_values

RGB = tuple[float, float, float]
UPSAMPLE_MODES = ("nearest", "bilinear")
MAPS_AFTER = ("stages", "convolutions")


class Backbone(nn.Module):
    """Feature maps of a timm model: (B, 3, H, W) -> list of (B, C_i, H / stride_i, W / stride_i), finest first.

    The output of a ViT's last block is normalised by its final layer norm, as in training; the maps of earlier blocks
    are not.

    Args:
        net: a timm model built with ``features_only=True``.
        mean: RGB mean of the normalisation that it expects, for images scaled to 0..1.
        std: RGB standard deviation of that normalisation.
        name: of the timm model.
        kwargs: of ``timm.create_model``, from which the complete model can be built.

    Attributes:
        channels: channels of each feature map.
        strides: stride of each feature map, in pixels.
        multiple: H and W must be multiples of it.
        is_frozen: whether nothing in it is trained (:func:`mtcl.models.trainable.set_trainable`): parameters and
            buffers stay as they are, ``net`` stays in evaluation mode, and the maps have no graph.
        frozen_modules: submodules of ``net`` that stay in evaluation mode; ``""`` is all of it.
    """

    is_frozen: bool = False
    frozen_modules: tuple[str, ...] = ()

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        name: str,
        kwargs: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.name, self.kwargs = name, dict(kwargs or {})
        self.net = net
        info: Any = net.feature_info
        self.channels: list[int] = list(info.channels())
        self.strides: list[int] = [int(s) for s in info.reduction()]
        self.multiple = max(self.strides)
        self.mean: RGB = (mean[0], mean[1], mean[2])
        self.std: RGB = (std[0], std[1], std[2])
        # Swin and similar models give channels last.
        self.channels_last = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the feature maps of a normalised image."""
        if self.is_frozen:
            with torch.no_grad():
                features = self.net(image)
        else:
            features = self.net(image)
        return [f.permute(0, 3, 1, 2) for f in features] if self.channels_last else list(features)

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        for name in self.frozen_modules:
            self.net.get_submodule(name).eval()
        return self

    def freeze_unused(self, used_levels: Collection[int]) -> None:
        """Freeze layers that only unused feature maps depend on, because DDP waits for every gradient.

        The last fusion of an HRNet has layers for each of its maps; in other families later maps depend on earlier
        ones.

        Args:
            used_levels: indices of the feature maps that the decoder reads.
        """
        last = getattr(self.net, "stage4", None)
        if isinstance(last, nn.Sequential) and hasattr(last[-1], "fuse_layers"):
            for index, layers in enumerate(last[-1].fuse_layers):  # type: ignore[arg-type]
                if index not in used_levels:
                    layers.requires_grad_(False)

    def set_grad_checkpointing(self, enabled: bool = True) -> bool:
        """Switch activation checkpointing of the blocks; return false if timm's model does not support it."""
        inner = self.net.model if isinstance(self.net, FeatureGetterNet) else self.net
        try:
            inner.set_grad_checkpointing(enabled)  # type: ignore[operator]
        except (AttributeError, AssertionError):  # not a method of this model; timm's answer if unsupported
            return False
        return True


class FinalNormFeatureGetter(FeatureGetterNet):
    """timm's features of a ViT, with the final layer norm on those of the last block."""

    def __init__(self, model: nn.Module, out_indices: Sequence[int], **options: Any):
        super().__init__(model, tuple(out_indices), norm=True, **options)
        self.norm = False  # otherwise timm applies the norm to every map

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps of the selected blocks."""
        *earlier, last = super().forward(x)
        normed = self.model.norm(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[operator]
        return [*earlier, normed]


class ConvolutionFeatures(FeatureListNet):
    """timm's features of a VGG net, with a map for each convolution (after norm and ReLU) in place of one per stage."""

    def __init__(self, model: nn.Module, **options: Any):
        model.feature_info = list(_describe_convolutions(model.features))  # type: ignore[arg-type, assignment]
        super().__init__(model, **options)


def _describe_convolutions(layers: nn.Sequential) -> Iterator[dict[str, Any]]:
    """Yield what timm's ``feature_info`` says about a map, for each convolution of a VGG net."""
    width, stride = 0, 1
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d):
            width = layer.out_channels
        elif isinstance(layer, nn.MaxPool2d):
            stride *= 2
        elif isinstance(layer, nn.ReLU):
            yield {"num_chs": width, "reduction": stride, "module": f"features.{index}"}


def build_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out_indices: Sequence[int] | None = None,
    maps_after: str = "stages",
    upsample_mode: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Backbone:
    """Build a timm model as a feature pyramid.

    Args:
        name: of a timm model.
        weights: None (random), ``"hub"`` (timm's own, downloaded) or a .safetensors / .pth file with the names of the
            complete timm model.
        mean: RGB mean of the normalisation, 0..1 scale; None: timm's.
        std: RGB standard deviation of the normalisation; None: timm's.
        out_indices: timm's feature levels to use; None: those of stride 4 and coarser, and for a model of a single
            resolution (ViT) four evenly spaced blocks.
        maps_after: what ``out_indices`` counts, one of :data:`MAPS_AFTER`: timm's levels, or the convolutions of a VGG
            net.
        upsample_mode: how an HRNet resizes its coarser branches before it adds them to finer ones, one of
            :data:`UPSAMPLE_MODES`; None: as timm does.
        kwargs: for ``timm.create_model``, architecture arguments only (:mod:`mtcl.models.backbone_options`).

    Raises:
        UserError: the name is unknown, the hub can't be reached, the weights do not fit, or ``upsample_mode`` or
            ``maps_after`` does not. Never falls back to random weights.
    """
    check_backbone_kwargs(kwargs)
    if upsample_mode not in (None, *UPSAMPLE_MODES):
        raise ParameterError("upsample_mode", f"={upsample_mode} must be one of {', '.join(UPSAMPLE_MODES)}, or null")
    _check_name(name)
    options = dict(kwargs or {})
    options |= _get_size_options(name, options)
    feature_options = _get_convolution_options(name, maps_after, out_indices)
    if out_indices is None:
        out_indices = _choose_levels(name, options)
    try:
        net = timm.create_model(
            name,
            features_only=True,
            pretrained=weights == "hub",
            out_indices=tuple(out_indices),
            **options,
            **(feature_options or _get_norm_options(name, options, out_indices)),
        )
    except Exception as error:  # timm and the hub's library raise many kinds
        if weights == "hub":
            raise ParameterError(
                "weights",
                f"=hub gave no weights for backbone {name} ({_first_line(error)}); check the connection, or give the "
                "path of a file, or start from random weights with none",
            ) from error
        raise UserError(f"backbone {name} with kwargs {options} can't be built: {_first_line(error)}") from error
    if weights not in (None, "hub"):
        _load_file(net, name, options, Path(str(weights)))
    if upsample_mode is not None:
        _set_upsample_mode(net, name, upsample_mode)
    config = timm.models.get_pretrained_cfg(name)
    return Backbone(net, mean or getattr(config, "mean", None) or (0.485, 0.456, 0.406),
                    std or getattr(config, "std", None) or (0.229, 0.224, 0.225), name, options)  # fmt: skip


def _set_upsample_mode(net: nn.Module, name: str, mode: str) -> None:
    """Let the upsampling layers of a network interpolate as ``mode`` says."""
    layers = [module for module in net.modules() if isinstance(module, nn.Upsample)]
    if not layers:
        raise ParameterError("upsample_mode", f"={mode} is for HRNets; {name} upsamples nothing, give null")
    for layer in layers:
        layer.mode, layer.align_corners = mode, False if mode == "bilinear" else None


def get_complete_name(name: str) -> str:
    """Return a name under which a tensor of a feature net and of its complete model are the same.

    A feature net has the names of its complete model, except for a prefix or dots that became underscores.
    """
    return name.removeprefix("model.").replace(".", "_")


def _check_name(name: str) -> None:
    """Raise ``ParameterError`` unless timm has the model and its tag."""
    if not timm.is_model(name):
        similar = find_similar(name, timm.list_models(), count=3)
        hint = f"did you mean {' or '.join(similar)}?" if similar else "timm.list_models() lists them"
        raise ParameterError("name", f"={name} is not a timm model; {hint}")
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # resnet18.no_such_tag
        problem = f"={name} has a tag that timm does not know; leave out what follows the dot"
        raise ParameterError("name", problem) from error


def _get_size_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that let a model of a fixed input size take images of any size."""
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
        except Exception:  # another problem, which the actual construction reports
            return candidate
    raise ParameterError(
        "name",
        f"={name} takes images of its own size only; choose another, or fix the size with kwargs "
        "{img_size: [H, W]} (multiples of 32, equal to the size of the training images)",
    )


def _get_convolution_options(name: str, maps_after: str, out_indices: Sequence[int] | None) -> dict[str, Any]:
    """Return the option that lets a VGG net give the maps of its convolutions, if they are asked for."""
    if maps_after not in MAPS_AFTER:
        raise ParameterError("maps_after", f"={maps_after} must be one of {', '.join(MAPS_AFTER)}")
    if maps_after == "stages":
        return {}
    if model_entrypoint(name).__module__ != "timm.models.vgg":
        raise ParameterError("maps_after", f"=convolutions is for VGG nets; give stages for {name}")
    if out_indices is None:
        raise ParameterError("out_indices", "=null with maps_after=convolutions; say which convolutions, from 0 on")
    return {"feature_cls": ConvolutionFeatures}


def _get_norm_options(name: str, options: Mapping[str, Any], out_indices: Sequence[int]) -> dict[str, Any]:
    """Return the option that keeps a ViT's final layer norm, if its last block is among the levels."""
    try:
        with torch.device("meta"):
            net = timm.create_model(name, features_only=True, **options)
    except Exception:  # the actual construction reports it
        return {}
    info: Any = net.feature_info
    depth = len(info.info)
    columnar = isinstance(net, FeatureGetterNet) and depth > 1 and len(set(info.reduction())) == 1
    last = depth - 1 in {index % depth for index in out_indices}
    has_norm = isinstance(getattr(net, "model", None), nn.Module) and hasattr(net.model, "norm")
    return {"feature_cls": FinalNormFeatureGetter} if columnar and last and has_norm else {}


def _choose_levels(name: str, options: Mapping[str, Any]) -> list[int]:
    """Return the default feature levels: stride 4 and coarser, or four evenly spaced blocks of a ViT."""
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
    """Return the first line of an error's message."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a .safetensors or .pth file."""
    if not path.is_file():
        raise ParameterError("weights", f"={path} is not a file; give none, hub, or a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ParameterError("weights", f"={path} can't be read as weights: {describe_load_error(error)}") from error
    for key in ("state_dict", "model", "state_dict_ema"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )
    if not tensors or not state:
        raise ParameterError("weights", f"={path} holds no state dict of tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _check_dropped_biases(
    authors_state: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str, path: Path
) -> None:
    """Raise ``ParameterError`` if timm's conversion dropped biases of queries or values that are not 0 (DINOv3's)."""
    for key, bias in authors_state.items():
        if key.endswith("attn.qkv.bias") and key not in state and key.replace("qkv.bias", "q_bias") not in state:
            queries, _, values = bias.chunk(3)  # the keys' are masked
            if queries.any() or values.any():
                raise ParameterError(
                    "weights",
                    f"={path} has biases ({key}) that backbone {name} lacks; choose timm's model with them "
                    f"(backbone {name.partition('.')[0]}_qkvb)",
                )


def _load_file(net: nn.Module, name: str, options: Mapping[str, Any], path: Path) -> None:
    """Load every parameter and buffer of ``net`` from a file of the complete timm model, or raise ``UserError``."""
    state = _read_state_dict(path)
    complete = timm.create_model(name, **options)
    convert = getattr(sys.modules[model_entrypoint(name).__module__], "checkpoint_filter_fn", None)
    if convert is not None:  # timm's conversion of the original authors' files (names, position embeddings)
        authors_state = dict(state)
        try:
            state = convert(state, complete)
        except Exception as error:
            raise ParameterError("weights", f"={path} does not fit backbone {name}: {_first_line(error)}") from error
        _check_dropped_biases(authors_state, state, name, path)
    by_name = {key.replace(".", "_"): value for key, value in state.items()}
    target = net.state_dict()
    matches = {key: by_name.get(get_complete_name(key)) for key in target}
    missing = [key for key, value in matches.items() if value is None and not key.endswith("num_batches_tracked")]
    if missing:
        raise ParameterError(
            "weights",
            f"={path} lacks {len(missing)} of the {len(target)} tensors of backbone {name} "
            f"(first: {', '.join(missing[:3])}); is it a file for another model?",
        )
    wrong = [
        f"{key} {tuple(value.shape)} instead of {tuple(target[key].shape)}"
        for key, value in matches.items()
        if value is not None and value.shape != target[key].shape
    ]
    if wrong:
        raise ParameterError("weights", f"={path} does not fit backbone {name}: {'; '.join(wrong[:3])}")
    for key, value in matches.items():
        if value is not None:
            check_tensor_values(key, value, target[key], path)
    # A deeper sibling's file (resnet34 for resnet18) has all these names and shapes, and further blocks of their kind.
    names = {key.replace(".", "_") for key in complete.state_dict()}
    kinds = {re.sub(r"\d+", "#", key) for key in names}
    unexpected = [key for key in by_name if key not in names and re.sub(r"\d+", "#", key) in kinds]
    if unexpected:
        raise ParameterError(
            "weights",
            f"={path} has {len(unexpected)} tensors more than backbone {name} (first: {unexpected[0]}); "
            "is it a file for a deeper model?",
        )
    net.load_state_dict({key: target[key] if value is None else value for key, value in matches.items()})
