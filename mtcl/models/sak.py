"""Swiss Army Knife: a ViT with a path of adapters for each teacher, mixed for every task by routers.

Lu, Cao, Wang: Swiss Army Knife: Synergizing Biases in Knowledge from Vision Foundation Models for Multi-Task Learning,
ICLR 2025 (arXiv:2410.14633). With the tokens h_0 (embedded patches) and h_i (after block i) of the stem, which all
teachers share, the path of a teacher is

    r_0 = A_0(h_0),    r_i = A_i(r_i-1 + h_i),    A(x) = x + s * up(gelu(down(x)))

and its adapted map at a level the layer norm of r_i. For every task and level a router weights the stem's map and the
adapted ones; a head fuses the mixtures of all levels. Layers, orders and constants are those of the authors' code
(github.com/innovator-zero/SAK, models/backbones/sak.py and models/heads.py). The layers that lead from adapted maps to
a teacher's, and the teachers, belong to the training alone: :mod:`mtcl.regularizers.distillation`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtcl.errors import ParameterError, UserError
from mtcl.models.backbones import Backbone
from mtcl.models.base import DenseModel, crop_to_image, pad_to_multiple
from mtcl.models.decoders.blocks import SpatialNorm, predict_tasks, resize
from mtcl.models.output import DenseOutput, EncodedImage, Size
from mtcl.models.plain_vit import get_plain_vit, resample_position_embedding
from mtcl.models.weights import check_weights

POSITIONS = "backbone.net.model.pos_embed"
LEAST_NOISE = 0.01  # standard deviation of a router's noise in training
FINER = 4  # how much finer than the patches the heads fuse the levels


class SwissArmyKnife(DenseModel):
    """A plain timm ViT with adapters for several teachers, and routers and a head for each task.

    The ViT keeps its class and register tokens, which the adapters see, too, and loses its last norm. The levels are
    the blocks of the backbone's ``out_indices``. A frozen ViT (:func:`mtcl.models.trainable.set_trainable`) has no
    graph. Without tasks there are no routers and no heads: this is the student of the first stage.

    Features: ``final`` (each task's pre-logit map, four times finer than the patches), ``adapted`` (not of tasks, but
    the adapted map of each teacher and level, ``TEACHER_levelN`` with N from 1, at the patches' size).

    Args:
        backbone: a plain ViT of timm.
        tasks: task name -> number of channels of its prediction; may be empty.
        teachers: names of the teachers, any different words.
        size: height and width of the images that the position embedding is made for; it is resampled to others.
        reduction: an adapter is C / reduction wide inside, for C channels of the ViT.
        routing: ``mixture`` (routers), or ``sum`` (the stem's map plus all adapted ones, the same for all tasks).
        noisy_gating: whether the routers' scores get noise of a learned size in training.

    Raises:
        UserError: the backbone is not a plain ViT.
        ParameterError: teachers or ``routing`` can't be used.
    """

    def __init__(
        self,
        backbone: Backbone,
        tasks: Mapping[str, int],
        teachers: Sequence[str] = ("dinov2", "clip", "sam"),
        size: Sequence[int] = (512, 512),
        reduction: int = 4,
        routing: str = "mixture",
        noisy_gating: bool = True,
    ):
        super().__init__()
        vit = get_plain_vit(backbone, "SAK puts adapters beside the blocks of a plain ViT")
        if routing not in ("mixture", "sum"):
            raise ParameterError("routing", f"={routing} is not known; choose mixture or sum")
        if not teachers:
            raise ParameterError("teachers", "=[] leaves no adapters; name at least one teacher")
        self.backbone = backbone
        self.mean, self.std = backbone.mean, backbone.std
        self.tasks, self.teachers = dict(tasks), list(teachers)
        self.patch = vit.patch_embed.patch_size
        self.grid = (-(-size[0] // self.patch[0]), -(-size[1] // self.patch[1]))
        dim: int = vit.embed_dim
        info: Any = backbone.net.feature_info
        self.level_blocks = sorted(int(index) for index in info.out_indices)
        if dim < reduction:
            raise ParameterError("reduction", f"={reduction} leaves nothing of {dim} channels; choose 1 to {dim}")

        vit.norm = nn.Identity()
        self.num_prefix: int = vit.num_prefix_tokens
        # Prefix tokens have positions of their own, unless the ViT embeds the patches' alone.
        self.num_prefix_positions = 0 if vit.no_embed_class else self.num_prefix
        prefix, patches = vit.pos_embed.detach().tensor_split([self.num_prefix_positions], dim=1)
        patches = resample_position_embedding(patches, vit.patch_embed.grid_size, self.grid)
        vit.pos_embed = nn.Parameter(torch.cat([prefix, patches], dim=1))

        num_adapters = self.level_blocks[-1] + 2  # later blocks are not run
        self.adapters = nn.ModuleDict(
            {name: nn.ModuleList(Adapter(dim, reduction) for _ in range(num_adapters)) for name in self.teachers}
        )
        self.norms = nn.ModuleDict(
            {name: nn.ModuleList(nn.LayerNorm(dim) for _ in self.level_blocks) for name in self.teachers}
        )
        self.routers = nn.ModuleDict()
        if routing == "mixture":
            self.routers.update(
                {
                    task: nn.ModuleList(Router(dim, 1 + len(self.teachers), noisy_gating) for _ in self.level_blocks)
                    for task in self.tasks
                }
            )
        self.heads = nn.ModuleDict({task: Head(dim, len(self.level_blocks)) for task in self.tasks})
        self.logits = nn.ModuleDict({task: nn.Conv2d(dim, c, 1) for task, c in self.tasks.items()})
        self.feature_channels = {
            "final": dict.fromkeys(self.tasks, dim),
            "adapted": {name_level(t, n): dim for t in self.teachers for n in range(len(self.level_blocks))},
        }

    def forward(self, image: Tensor | EncodedImage) -> DenseOutput:
        """Return predictions cropped to the image, with the final and the adapted maps as features."""
        assert isinstance(image, Tensor), "the adapters need all blocks: maps of the backbone alone do not serve"
        height, width = image.shape[-2:]
        image, frame = pad_to_multiple(image, self.patch)
        adapted: dict[str, Tensor] = {}
        mixtures: dict[str, list[Tensor]] = {task: [] for task in self.tasks}
        for level, (stem, maps) in enumerate(self._run_levels(image)):
            adapted |= {name_level(teacher, level): m for teacher, m in maps.items()}
            sources = [stem, *maps.values()]
            for task in self.tasks:
                if task in self.routers:
                    mixtures[task].append(mix(self.routers[task][level](stem), sources))  # type: ignore[index]
                else:
                    mixtures[task].append(torch.stack(sources).sum(dim=0))
        final = {task: self.heads[task](maps) for task, maps in mixtures.items()}
        predictions = crop_to_image(predict_tasks(self.logits, final, frame), (height, width))
        ordered = {name: adapted[name] for name in self.feature_channels["adapted"]}
        return DenseOutput(predictions, {"final": final, "adapted": ordered}, [], frame)

    def predict(self, image: Tensor | EncodedImage) -> dict[str, Tensor]:
        """Return task -> raw prediction (B, C, H, W)."""
        return self.forward(image).predictions

    def _run_levels(self, image: Tensor) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield the stem's map and the adapted map of each teacher, each (B, C, h, w), of one level after the other."""
        vit: Any = self.backbone.net.model
        tokens, size = self._embed(image)
        paths = {teacher: adapters[0](tokens) for teacher, adapters in self.adapters.items()}  # type: ignore[index]
        for index in range(self.level_blocks[-1] + 1):
            tokens = self._run_block(vit.blocks[index], tokens)
            for teacher, adapters in self.adapters.items():
                paths[teacher] = adapters[index + 1](paths[teacher] + tokens)  # type: ignore[index]
            if index in self.level_blocks:
                level = self.level_blocks.index(index)
                norms: dict[str, Any] = {teacher: self.norms[teacher] for teacher in self.teachers}
                maps = {t: self._to_map(norms[t][level](path[:, self.num_prefix :]), size) for t, path in paths.items()}
                yield self._to_map(tokens[:, self.num_prefix :], size), maps

    def _embed(self, image: Tensor) -> tuple[Tensor, Size]:
        """Return the tokens (B, prefix + h * w, C) before the first block, and the size h, w of the grid of patches."""
        vit: Any = self.backbone.net.model
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.backbone.is_frozen):
            x = vit.patch_embed.proj(image)
            size = (x.shape[2], x.shape[3])
            x = vit.patch_embed.norm(x.flatten(2).transpose(1, 2))
            prefix_positions, patches = vit.pos_embed.tensor_split([self.num_prefix_positions], dim=1)
            x = x + resample_position_embedding(patches, self.grid, size)
            prefix = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
            if prefix:
                tokens = torch.cat(prefix, dim=1)
                tokens = tokens + prefix_positions if self.num_prefix_positions else tokens
                x = torch.cat([tokens.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
            return vit.norm_pre(vit.pos_drop(x)), size

    def _run_block(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """Run a block of the stem, without a graph where the stem is frozen."""
        if self.backbone.is_frozen:
            with torch.no_grad():
                return block(tokens)
        vit: Any = self.backbone.net.model
        if vit.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, tokens, use_reentrant=False)
        return block(tokens)

    @staticmethod
    def _to_map(tokens: Tensor, size: Size) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, size)

    def backbone_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the ViT."""
        return self.backbone.parameters()

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return the ViT and the teachers' paths, which every task's mixtures are made of."""
        yield from self.backbone.parameters()
        yield from self.adapters.parameters()
        yield from self.norms.parameters()

    def load_student(self, state: Mapping[str, Tensor], size: Sequence[int], source: str) -> None:
        """Take the stem and the teachers' paths of a student that was distilled; routers and heads stay as they are.

        Args:
            state: state dict of a model of this class for the same teachers and ViT, with any tasks.
            size: height and width of the images that its position embedding is made for.
            source: of the weights, for messages.

        Raises:
            UserError: a tensor is missing, or does not fit.
        """
        parts = ("backbone.", "adapters.", "norms.")
        expected = {name: value for name, value in self.state_dict().items() if name.startswith(parts)}
        student = {name: value for name, value in state.items() if name.startswith(parts)}
        positions = student.get(POSITIONS)
        if positions is not None and positions.ndim == 3:
            grid = (-(-size[0] // self.patch[0]), -(-size[1] // self.patch[1]))
            prefix, patches = positions.tensor_split([self.num_prefix_positions], dim=1)
            if patches.shape[1] != grid[0] * grid[1]:
                raise UserError(f"the weights in {source} have {patches.shape[1]} positions, not those of their size")
            patches = resample_position_embedding(patches.float(), grid, self.grid)
            student[POSITIONS] = torch.cat([prefix, patches.to(prefix)], dim=1)
        check_weights(student, expected, source)
        self.load_state_dict(student, strict=False)


def name_level(teacher: str, level: int) -> str:
    """Return the name of a teacher's adapted map at a level, which is counted from 0: TEACHER_level1 for the first."""
    return f"{teacher}_level{level + 1}"


class Adapter(nn.Module):
    """A bottleneck beside the identity: x + s * up(gelu(down(x))), with a learned number s that begins at 1.

    Args:
        dim: channels C of the tokens (B, N, C).
        reduction: the bottleneck has C / reduction channels.
    """

    def __init__(self, dim: int, reduction: int):
        super().__init__()
        self.down = nn.Linear(dim, dim // reduction)
        self.up = nn.Linear(dim // reduction, dim)
        self.scale = nn.Parameter(torch.ones(1))
        self.apply(initialize_linear)

    def forward(self, x: Tensor) -> Tensor:
        """Adapt tokens (B, N, C)."""
        return x + self.up(F.gelu(self.down(x))) * self.scale


class Router(nn.Module):
    """Weights of several maps for one task and level, which add up to 1 in each cell.

    The scores are those of the whole image. In training they get noise in each cell, of a learned standard deviation.

    Args:
        dim: channels of the stem's map.
        num_sources: K, number of maps to weight.
        noisy: whether there is noise in training.
    """

    def __init__(self, dim: int, num_sources: int, noisy: bool):
        super().__init__()
        self.num_sources, self.noisy = num_sources, noisy
        self.layers = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.LayerNorm(dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, 2 * num_sources if noisy else num_sources),
        )
        self.apply(initialize_linear)

    def forward(self, stem: Tensor) -> Tensor:
        """Return the weights (B, K, h, w), or (B, K, 1, 1) without noise, for the stem's map (B, C, h, w)."""
        scores = self.layers(stem.flatten(2).transpose(1, 2)).mean(dim=1)[..., None, None]  # (B, K or 2 K, 1, 1)
        if self.noisy:
            scores, raw_deviation = scores.split(self.num_sources, dim=1)
            if self.training:
                noise = scores.new_empty(*scores.shape[:2], *stem.shape[2:]).normal_()  # in each cell
                scores = scores + noise * (F.softplus(raw_deviation) + LEAST_NOISE)
        return scores.softmax(dim=1)


def mix(weights: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """Return the sum of K maps (B, C, h, w), each times its weight, (B, K, h, w) or (B, K, 1, 1)."""
    return torch.stack([weights[:, k : k + 1] * m for k, m in enumerate(maps)]).sum(dim=0)


class Head(nn.Module):
    """Fuse a task's maps of all levels: each to a quarter of its channels, resized, concatenated, 3x3, BN, GELU.

    Args:
        dim: channels C of each map and of the result.
        num_levels: number of maps.
    """

    def __init__(self, dim: int, num_levels: int):
        super().__init__()
        part = max(dim // 4, 1)
        self.project = nn.ModuleList(nn.Conv2d(dim, part, 1) for _ in range(num_levels))
        self.fuse = nn.Sequential(
            nn.Conv2d(num_levels * part, dim, 3, padding=1),  # with the bias of the authors' code
            SpatialNorm(dim),
            nn.GELU(),
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the map before the logits (B, C, 4 h, 4 w) for maps (B, C, h, w)."""
        size = (FINER * maps[0].shape[2], FINER * maps[0].shape[3])
        parts = [resize(project(m), size) for project, m in zip(self.project, maps)]
        return self.fuse(torch.cat(parts, dim=1))


def initialize_linear(module: nn.Module) -> None:
    """Draw the weight of a linear layer with standard deviation 0.02, and set its bias to 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
