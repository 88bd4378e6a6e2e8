"""Restate as plainly as possible what public code on HRNets saves and computes.

Key names with their shapes, and networks as functions of a state dict under those names, in evaluation mode: HRNet with
bilinear resizing, MTI-Net and PAD-Net of Vandenhende et al., ATRC of Brüggemann et al. Read in their repositories
(``mtcl/models/published`` names the files).
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.published_shapes import Shapes

KINDS = ("none", "global", "local", "t_label", "s_label")


class HRNetShapes(Shapes):
    """Key -> shape of networks on HRNets."""

    def bottleneck(self, name: str, inputs: int, outputs: int) -> None:
        self.block(name, inputs, outputs, (1, 3, 1))

    def hrnet(self, prefix: str, widths: Sequence[int], modules: Sequence[int], blocks: int) -> None:
        """Modules of the stages 2 to 4; blocks of every branch, and of the first stage."""
        for i, inputs in enumerate((3, 64)):
            self.conv(f"{prefix}conv{i + 1}", 64, inputs, 3)
            self.norm(f"{prefix}bn{i + 1}", 64)
        for i in range(blocks):
            self.bottleneck(f"{prefix}layer1.{i}", 256 if i else 64, 256)
        for new in range(4):  # the first branch starts at 256 channels, each further one at those of the last
            name = f"{prefix}transition{max(new, 1)}.{new}." + ("0.0" if new else "0")
            norm = f"{name[:-1]}1"
            self.conv(name, widths[new], 256 if new < 2 else widths[new - 1], 3)
            self.norm(norm, widths[new])
        for stage in (2, 3, 4):
            for m in range(modules[stage - 2]):
                name = f"{prefix}stage{stage}.{m}"
                for i in range(stage):
                    for b in range(blocks):
                        self.block(f"{name}.branches.{i}.{b}", widths[i], widths[i])
                    for j in range(stage):
                        fuse = f"{name}.fuse_layers.{i}.{j}"
                        if j > i:
                            self.conv(f"{fuse}.0", widths[i], widths[j])
                            self.norm(f"{fuse}.1", widths[i])
                        for k in range(i - j):
                            outputs = widths[i] if k == i - j - 1 else widths[j]
                            self.conv(f"{fuse}.{k}.0", outputs, widths[j], 3)
                            self.norm(f"{fuse}.{k}.1", outputs)

    def messages(self, name: str, tasks: Sequence[str], channels: int) -> None:
        for t in tasks:
            for a in tasks:
                if a != t:
                    self.conv(f"{name}.self_attention.{t}.{a}.attention.0", channels, channels, 3)
                    self.conv(f"{name}.self_attention.{t}.{a}.conv", channels, channels, 3)

    def context(self, name: str, inputs: int, width: int) -> None:
        for side in ("query", "key"):
            for i in range(2):
                self.conv(f"{name}.{side}_project.{i}.conv", width, width if i else inputs)
                self.norm(f"{name}.{side}_project.{i}.bn", width)
        self.conv(f"{name}.value_project.conv", width, inputs)
        self.norm(f"{name}.value_project.bn", width)


SMALL_V2 = {"modules": (1, 3, 2), "blocks": 2}  # of HRNetV2-W18-small, version 2


def mti_net_shapes(tasks: Mapping[str, int], widths: Sequence[int], modules=(1, 1, 1), blocks=1) -> Shapes:
    shapes, names = HRNetShapes(), list(tasks)
    shapes.hrnet("backbone.", widths, modules, blocks)
    for s, c in enumerate(widths):
        for t in names:
            shapes.block(f"scale_{s}.refinement.{t}.0", sum(widths[s : s + 2]), c)
            shapes.block(f"scale_{s}.refinement.{t}.1", c, c)
            shapes.conv(f"scale_{s}.decoders.{t}", tasks[t], c, bias=True)
        shapes.messages(f"distillation_scale_{s}", names, c)
        if s:
            total, fpm = len(names) * c, f"fpm_scale_{s}"
            shapes.block(f"{fpm}.non_linear.0", total, total // 4)
            shapes.block(f"{fpm}.non_linear.1", total // 4, total // 4)
            shapes.conv(f"{fpm}.non_linear.2", total, total // 4, bias=True)
            shapes.block(f"{fpm}.dimensionality_reduction", total, c)
            for t in names:
                for i, shape in ((0, (c // 16, c)), (2, (c, c // 16))):
                    shapes |= {f"{fpm}.se.{t}.squeeze.{i}.weight": shape, f"{fpm}.se.{t}.squeeze.{i}.bias": shape[:1]}
    for t in names:
        shapes.conv(f"heads.{t}.last_layer.0", sum(widths), sum(widths), bias=True)
        shapes.norm(f"heads.{t}.last_layer.1", sum(widths))
        shapes.conv(f"heads.{t}.last_layer.3", tasks[t], sum(widths), bias=True)
    return shapes


def pad_net_shapes(tasks: Mapping[str, int], widths: Sequence[int], width=256, modules=(1, 1, 1), blocks=1) -> Shapes:
    shapes, initial = HRNetShapes(), "initial_task_prediction_heads"
    shapes.hrnet("backbone.0.", widths, modules, blocks)
    shapes.conv("backbone.1.last_layer.0", sum(widths), sum(widths), bias=True)
    shapes.norm("backbone.1.last_layer.1", sum(widths))
    for t, c in tasks.items():
        for i in range(2):
            shapes.bottleneck(f"{initial}.layers.{t}.{i}", width if i else sum(widths), width)
            shapes.bottleneck(f"heads.{t}.{i}", width, width)
        shapes.conv(f"{initial}.conv_out.{t}", c, width, bias=True)
        shapes.conv(f"heads.{t}.2", c, width, bias=True)
    shapes.messages("multi_modal_distillation", list(tasks), width)
    return shapes


def atrc_shapes(
    tasks: Mapping[str, int],
    labels: Mapping[str, int],  # of the tasks that have an auxiliary head
    genotype: Mapping[str, Mapping[str, int]],
    widths: Sequence[int],
    modules=(1, 1, 1),
    blocks=1,
) -> Shapes:
    shapes, total = HRNetShapes(), sum(widths)
    width, context = total // 4, total // 4 // 2
    shapes.hrnet("backbone.", widths, modules, blocks)
    for t, c in tasks.items():
        shapes.conv(f"head.bottleneck.{t}.conv", width, total, 3)
        shapes.norm(f"head.bottleneck.{t}.bn", width)
        shapes.conv(f"head.final_logits.{t}", c, width, bias=True)
        sources = [s for s in tasks if genotype[t][s]]
        for s in sources:
            shapes.context(f"head.atrc_module.cp_blocks.{t}.{s}", width, context)
        if sources:
            shapes.conv(f"head.atrc_module.out_proj.{t}.conv", width, context * len(sources))
            shapes.norm(f"head.atrc_module.out_proj.{t}.bn", width)
        shapes.conv(f"head.atrc_module.bottleneck.{t}.0.conv", width, 2 * width if sources else width)
        shapes.norm(f"head.atrc_module.bottleneck.{t}.0.bn", width)
    for t, count in labels.items():
        shapes.conv(f"head.aux_conv.{t}.conv", total, total)
        shapes.norm(f"head.aux_conv.{t}.bn", total)
        shapes.conv(f"head.aux_logits.{t}", count, total, bias=True)
    shapes["criterion.loss_dict.edge.aux.class_weight"] = (2,)
    if "normals" in labels:
        shapes["criterion.loss_dict.normals.aux.centroids"] = (40, 3)
    return shapes


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class Reference:
    """The public networks' forward, in evaluation mode, of images whose sides are multiples of 32."""

    def __init__(self, state: Mapping[str, Tensor], tasks: Sequence[str]):
        self.state, self.tasks = state, list(tasks)

    def has(self, prefix: str) -> bool:
        return any(key.startswith(f"{prefix}.") for key in self.state)

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def block(self, name: str, x: Tensor) -> Tensor:
        shortcut = x
        if self.has(f"{name}.downsample"):
            shortcut = self.norm(f"{name}.downsample.1", self.conv(f"{name}.downsample.0", x))
        last = 3 if self.has(f"{name}.conv3") else 2
        for i in range(1, last + 1):
            x = self.norm(f"{name}.bn{i}", self.conv(f"{name}.conv{i}", x))
            x = x.relu() if i < last else x
        return (x + shortcut).relu()

    def sequence(self, name: str, x: Tensor) -> Tensor:
        """Run all residual blocks that the state has."""
        i = 0
        while self.has(f"{name}.{i}.conv1"):
            x = self.block(f"{name}.{i}", x)
            i += 1
        return x

    def hrnet(self, prefix: str, image: Tensor) -> list[Tensor]:
        """The four branches, finest first."""
        x = image
        for i in (1, 2):
            x = self.norm(f"{prefix}bn{i}", self.conv(f"{prefix}conv{i}", x, stride=2)).relu()
        x = self.sequence(f"{prefix}layer1", x)
        first = f"{prefix}transition1.0"
        branches = [self.norm(f"{first}.1", self.conv(f"{first}.0", x)).relu()]
        for stage in (2, 3, 4):
            new = f"{prefix}transition{stage - 1}.{stage - 1}.0"
            coarsest = x if stage == 2 else branches[-1]
            branches.append(self.norm(f"{new}.1", self.conv(f"{new}.0", coarsest, stride=2)).relu())
            module = 0
            while self.has(f"{prefix}stage{stage}.{module}"):
                branches = self.exchange(f"{prefix}stage{stage}.{module}", branches)
                module += 1
        return branches

    def exchange(self, name: str, branches: list[Tensor]) -> list[Tensor]:
        branches = [self.sequence(f"{name}.branches.{i}", x) for i, x in enumerate(branches)]
        fused = []
        for i, target in enumerate(branches):
            total = torch.zeros_like(target)
            for j, x in enumerate(branches):
                fuse = f"{name}.fuse_layers.{i}.{j}"
                if j > i:
                    x = resize(self.norm(f"{fuse}.1", self.conv(f"{fuse}.0", x)), target.shape[-2:])
                for k in range(i - j):
                    x = self.norm(f"{fuse}.{k}.1", self.conv(f"{fuse}.{k}.0", x, stride=2))
                    x = x.relu() if k < i - j - 1 else x
                total = total + x
            fused.append(total.relu())
        return fused

    def distil(self, name: str, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        refined = dict(maps)
        for t in self.tasks:
            for a in self.tasks:
                if a != t:
                    message = f"{name}.self_attention.{t}.{a}"
                    gate = self.conv(f"{message}.attention.0", maps[a]).sigmoid()
                    refined[t] = refined[t] + self.conv(f"{message}.conv", maps[a]) * gate
        return refined

    def fuse(self, name: str, maps: Sequence[Tensor]) -> Tensor:
        x = torch.cat([resize(m, maps[0].shape[-2:]) for m in maps], dim=1)
        return self.norm(f"{name}.1", self.conv(f"{name}.0", x)).relu()


class MTINetReference(Reference):
    def __call__(self, image: Tensor) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """Predictions, and initial predictions from the finest scale to the coarsest, of their maps' sizes."""
        features = self.hrnet("backbone.", image)
        scales: dict[int, dict[str, Tensor]] = {}
        handed: dict[str, Tensor] = {}
        for s in (3, 2, 1, 0):
            scales[s] = {}
            for t in self.tasks:
                x = features[s]
                if handed:
                    x = torch.cat([x, resize(handed[t], x.shape[-2:])], dim=1)
                scales[s][t] = self.sequence(f"scale_{s}.refinement.{t}", x)
            if s:
                handed = self.propagate(f"fpm_scale_{s}", scales[s])
        initial = [{t: self.conv(f"scale_{s}.decoders.{t}", m) for t, m in scales[s].items()} for s in range(4)]
        refined = [self.distil(f"distillation_scale_{s}", scales[s]) for s in range(4)]
        predictions = {}
        for t in self.tasks:
            head = f"heads.{t}.last_layer"
            logits = self.conv(f"{head}.3", self.fuse(head, [maps[t] for maps in refined]))
            predictions[t] = resize(logits, image.shape[-2:])
        return predictions, initial

    def propagate(self, name: str, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        joint = torch.cat([maps[t] for t in self.tasks], dim=1)
        logits = self.conv(f"{name}.non_linear.2", self.sequence(f"{name}.non_linear", joint))
        weighted = torch.empty_like(joint)
        n = len(self.tasks)
        for c in range(0, joint.shape[1], n):  # neighbouring channels, whatever task they are of
            weighted[:, c : c + n] = logits[:, c : c + n].softmax(dim=1) * joint[:, c : c + n]
        shared = self.block(f"{name}.dimensionality_reduction", weighted)
        handed = {}
        for t in self.tasks:
            squeeze = {key: self.state[f"{name}.se.{t}.squeeze.{key}"] for key in ("0.weight", "0.bias", "2.weight")}
            hidden = (shared.mean(dim=(2, 3)) @ squeeze["0.weight"].T + squeeze["0.bias"]).relu()
            gate = (hidden @ squeeze["2.weight"].T + self.state[f"{name}.se.{t}.squeeze.2.bias"]).sigmoid()
            handed[t] = shared * gate[:, :, None, None] + maps[t]
        return handed


class PADNetReference(Reference):
    def __call__(self, image: Tensor) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """Predictions, and a list of the initial ones, of their maps' size."""
        trunk = self.fuse("backbone.1.last_layer", self.hrnet("backbone.0.", image))
        name = "initial_task_prediction_heads"
        maps = {t: self.sequence(f"{name}.layers.{t}", trunk) for t in self.tasks}
        initial = {t: self.conv(f"{name}.conv_out.{t}", m) for t, m in maps.items()}
        refined = self.distil("multi_modal_distillation", maps)
        logits = {t: self.conv(f"heads.{t}.2", self.sequence(f"heads.{t}", m)) for t, m in refined.items()}
        return {t: resize(x, image.shape[-2:]) for t, x in logits.items()}, [initial]


class ATRCReference(Reference):
    def __init__(self, state: Mapping[str, Tensor], tasks: Sequence[str], genotype: Mapping[str, Mapping[str, int]]):
        super().__init__(state, tasks)
        self.genotype = genotype

    def layer(self, name: str, x: Tensor) -> Tensor:
        return self.norm(f"{name}.bn", self.conv(f"{name}.conv", x))

    def __call__(self, image: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Predictions, and the label logits of the tasks that have some, of their map's size."""
        features = self.hrnet("backbone.", image)
        joint = torch.cat([resize(m, features[0].shape[-2:]) for m in features], dim=1)
        maps = {t: self.layer(f"head.bottleneck.{t}", joint).relu() for t in self.tasks}
        labels = {
            t: self.conv(f"head.aux_logits.{t}", self.layer(f"head.aux_conv.{t}", joint).relu())
            for t in self.tasks
            if self.has(f"head.aux_logits.{t}")
        }
        predictions = {}
        for t in self.tasks:
            contexts = [self.context(t, s, maps, labels) for s in self.tasks if self.genotype[t][s]]
            x, module = maps[t], "head.atrc_module"
            if contexts:
                x = torch.cat([x, self.layer(f"{module}.out_proj.{t}", torch.cat(contexts, dim=1))], dim=1)
            refined = self.layer(f"{module}.bottleneck.{t}.0", x).relu()
            predictions[t] = resize(self.conv(f"head.final_logits.{t}", refined), image.shape[-2:])
        return predictions, labels

    def context(self, t: str, s: str, maps: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
        kind, name = KINDS[self.genotype[t][s]], f"head.atrc_module.cp_blocks.{t}.{s}"
        source = maps[s]
        if kind in ("t_label", "s_label"):
            logits = labels[t if kind == "t_label" else s]
            regions = [logits[:, k].flatten(1).softmax(dim=1) for k in range(logits.shape[1])]
            means = [(source.flatten(2) * region.unsqueeze(1)).sum(dim=2) for region in regions]
            source = torch.stack(means, dim=2).unsqueeze(3)
        sides = {}
        for side, x in (("query", maps[t]), ("key", source)):
            x = self.layer(f"{name}.{side}_project.1", self.layer(f"{name}.{side}_project.0", x).relu())
            sides[side] = F.softplus(x) if kind == "global" else x.relu()
        query, key = sides["query"], sides["key"]
        value = self.layer(f"{name}.value_project", source).relu()
        if kind == "local":
            return self.attend_to_window(query, key, value, 9)
        products = query.flatten(2).transpose(1, 2) @ key.flatten(2)  # (B, pixels, keys)
        if kind == "global":
            weights = products / products.sum(dim=2, keepdim=True)
        else:
            weights = (products / query.shape[1] ** 0.5).softmax(dim=2)
        return (weights @ value.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(query.shape)

    @staticmethod
    def attend_to_window(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
        """Beyond the border are keys and values of zero, which the softmax counts."""
        radius, (height, width) = window // 2, query.shape[-2:]
        key, value = (F.pad(x, (radius,) * 4) for x in (key, value))
        out = torch.empty_like(query)
        for y in range(height):
            for x in range(width):
                keys, values = (m[:, :, y : y + window, x : x + window].flatten(2) for m in (key, value))
                products = (query[:, :, y, x].unsqueeze(2) * keys).sum(dim=1) / query.shape[1] ** 0.5
                out[:, :, y, x] = (values * products.softmax(dim=1).unsqueeze(1)).sum(dim=2)
        return out
