"""Distillation of several frozen teachers into the adapted maps of a student, both stages of SAK.

Lu, Cao, Wang: Swiss Army Knife: Synergizing Biases in Knowledge from Vision Foundation Models for Multi-Task Learning,
ICLR 2025 (arXiv:2410.14633). With the student's map s of a teacher and a level and the teacher's map t of that level,
both at the larger of their sizes,

    L = sum over teachers and levels of  0.9 * mean over images of (1 - cos(s, t)) + 0.1 * smooth L1(s, t)

where the cosine is that of an image's whole maps as one vector, and smooth L1 is the mean over all values. Where the
channels differ, a linear layer (an aligner) leads from s to those of t. Formula and constants are those of the authors'
code (github.com/innovator-zero/SAK, losses.py, models/mt_distiller.py). The first stage minimises L on images without
labels, the second one sum_t w_t L_task_t + lambda L; theirs has lambda = 1.
"""

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.errors import ParameterError, UserError
from mtcl.models.base import DenseOutput
from mtcl.models.decoders.blocks import resize
from mtcl.models.teachers import Teacher, build_teacher, read_teacher_channels
from mtcl.models.weights import check_weights
from mtcl.regularizers.base import Regularizer, RegularizerOutput
from mtcl.regularizers.sampling import Draw, draw_nothing
from mtcl.tasks.base import Task

TEACHER_OPTIONS = ("name", "weights", "input_size", "mean", "std", "out_indices", "kwargs")


class MapDistance(nn.Module):
    """The distance of a student's map to a teacher's.

    Args:
        cosine_weight: of 1 - cosine.
        smooth_l1_weight: of the smooth L1 distance.
    """

    def __init__(self, cosine_weight: float, smooth_l1_weight: float):
        super().__init__()
        self.cosine_weight, self.smooth_l1_weight = cosine_weight, smooth_l1_weight

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the mean cosine, scalars, of maps (B, C, h, w) and (B, C, h', w')."""
        size = student.shape[-2:] if student.shape[-2] >= teacher.shape[-2] else teacher.shape[-2:]
        student, teacher = resize(student.float(), size), resize(teacher.float(), size)
        cosine = F.cosine_similarity(student.flatten(1), teacher.flatten(1), dim=1).mean()
        distance = F.smooth_l1_loss(student, teacher)
        return self.cosine_weight * (1 - cosine) + self.smooth_l1_weight * distance, cosine


class Distillation(Regularizer):
    """Teach a student's adapted maps those of frozen teachers.

    The aligners are this module's parameters. The teachers are not: they are in no checkpoint, and are built by
    :meth:`load_teachers`, which a training calls once.

    Args:
        tasks: ignored: images need no labels.
        channels: ``TEACHER_levelN`` -> channels of the student's map, N from 1.
        seed: of the aligners' initialization; torch's generator is never touched.
        feature: which of a model's features are the student's maps.
        teachers: teacher -> its network, options of :func:`mtcl.models.teachers.build_teacher`; those that the student
            has no adapters for are not used.
        cosine_weight: of 1 - cosine.
        smooth_l1_weight: of the smooth L1 distance.

    Raises:
        ParameterError: a teacher of the student is missing, or has more or fewer maps.
    """

    min_tasks = 0

    def __init__(
        self,
        tasks: Mapping[str, Task],  # noqa: ARG002
        channels: Mapping[str, int],
        *,
        seed: int = 0,
        feature: str = "adapted",
        teachers: Mapping[str, Mapping[str, Any]],
        cosine_weight: float = 0.9,
        smooth_l1_weight: float = 0.1,
    ):
        super().__init__()
        self.feature = feature
        self.levels = group_levels(channels, feature)
        if missing := [name for name in self.levels if name not in teachers]:
            problem = f" lack {missing[0]}, which the model has adapters for; say which network it is"
            raise ParameterError("teachers", problem)
        self.options = {name: check_teacher_options(name, teachers[name]) for name in self.levels}
        self.aligners = nn.ModuleDict()
        generator = torch.Generator().manual_seed(seed)
        for name, levels in self.levels.items():
            with name_teacher(name):
                teacher_channels = read_teacher_channels(**self.options[name])
            if len(teacher_channels) != len(levels):
                raise ParameterError(
                    "teachers",
                    f".{name} has {len(teacher_channels)} maps, the student {len(levels)}; choose them with "
                    "out_indices",
                )
            for level, outputs in zip(levels, teacher_channels):
                if channels[level] != outputs:
                    self.aligners[level] = build_aligner(channels[level], outputs, generator)
        self.distance = MapDistance(cosine_weight, smooth_l1_weight)
        self.teachers: dict[str, Teacher] = {}  # no submodules
        self.sums: Tensor  # per teacher: steps, loss, cosine
        self.register_buffer("sums", torch.zeros(len(self.levels), 3), persistent=False)

    def load_teachers(self, device: torch.device) -> None:
        """Build the teachers with their weights on ``device``.

        Random ones are a function of their name, so that both stages and all seeds have the same.

        Raises:
            ParameterError: a teacher's weights can't be had, or do not fit.
        """
        for name, options in self.options.items():
            with name_teacher(name), torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(name.encode()))
                self.teachers[name] = build_teacher(**options).to(device)

    @torch.no_grad()
    def run_teachers(self, image: Tensor, mean: Sequence[float], std: Sequence[float]) -> DenseOutput:
        """Return the teachers' maps of images as a feature of the student's name; there are no predictions.

        Args:
            image: (B, 3, H, W), normalised by ``mean`` and ``std``.
            mean: RGB mean, for images scaled to 0..1.
            std: RGB standard deviation.
        """
        maps: dict[str, Tensor] = {}
        for name, levels in self.levels.items():
            maps |= dict(zip(levels, self.teachers[name](image, mean, std)))
        height, width = image.shape[-2:]
        return DenseOutput({}, {self.feature: maps}, [], (height, width))

    def load_aligners(self, state: Mapping[str, Tensor], source: str) -> None:
        """Take the aligners of a distillation from its state dict; ``source`` names it in messages."""
        check_weights(state, self.state_dict(), source)
        self.load_state_dict(state)

    def sample(self, step: int, ids: Sequence[str]) -> Draw:  # noqa: ARG002
        """Draw nothing."""
        return draw_nothing(ids)

    def compare(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Compare maps ``TEACHER_levelN`` (B, C, h, w) of student and teachers.

        Returns:
            teacher -> its loss, summed over levels, and the mean of the levels' cosines.
        """
        terms = {}
        for name, levels in self.levels.items():
            pairs = [self.distance(self._align(level, student[level]), teacher[level].detach()) for level in levels]
            losses, cosines = (torch.stack(values) for values in zip(*pairs))
            terms[name] = (losses.sum(), cosines.mean())
        return terms

    def _align(self, level: str, student: Tensor) -> Tensor:
        """Return the student's map (B, C, h, w) with the teacher's channels."""
        if level not in self.aligners:
            return student
        aligner: nn.Linear = self.aligners[level]  # type: ignore[assignment]
        # A 1x1 convolution: torch.compile takes the strides of the permuted maps of a linear layer for others.
        return F.conv2d(student.float(), aligner.weight[:, :, None, None], aligner.bias)

    def compute_loss(
        self,
        output: DenseOutput,
        labels: Mapping[str, Tensor],  # noqa: ARG002
        draw: Draw,  # noqa: ARG002
        teacher: Mapping[str, Tensor] | None = None,  # noqa: ARG002
    ) -> RegularizerOutput:
        """Compute the loss of each teacher and their sum; without the teachers' maps, zero with a graph."""
        student, maps = output.features[self.feature], output.features.get(f"teacher_{self.feature}")
        if maps is None:
            zeros = {
                name: torch.stack([0.0 * self._align(level, student[level]).sum() for level in levels]).sum()
                for name, levels in self.levels.items()
            }
            return RegularizerOutput(torch.stack(list(zeros.values())).sum(), zeros)
        terms = self.compare(student, maps)
        with torch.no_grad():
            self.sums += torch.stack(
                [torch.stack([loss.new_ones(()), loss, cosine]) for loss, cosine in terms.values()]
            )
        losses = {name: loss for name, (loss, _) in terms.items()}
        return RegularizerOutput(torch.stack(list(losses.values())).sum(), losses)

    def summary(self) -> dict[str, float]:
        """Return each teacher's mean loss and cosine since the last call; nothing before the first step."""
        sums = self.sums.tolist()
        self.sums.zero_()
        means: dict[str, float] = {}
        for name, (steps, loss, cosine) in zip(self.levels, sums):
            if steps:
                means |= {f"{name}/loss": loss / steps, f"{name}/cosine": cosine / steps}
        return means


def group_levels(channels: Mapping[str, int], feature: str) -> dict[str, list[str]]:
    """Return teacher -> names of its student maps ``TEACHER_levelN``, finest first.

    Raises:
        ParameterError: the names are others.
    """
    levels: dict[str, list[str]] = {}
    for name in channels:
        match = re.fullmatch(r"(\w+)_level\d+", name)
        if match is None:
            raise ParameterError("feature", f"={feature} has no maps for teachers; use adapted with decoder=sak")
        levels.setdefault(match[1], []).append(name)
    return levels


def check_teacher_options(name: str, options: Any) -> dict[str, Any]:
    """Return the options of a teacher's network as a dict; raise ``ParameterError`` where they are not such."""
    if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
        raise ParameterError("teachers", f".{name} needs the name of a timm model, {{name: NAME, weights: hub}}")
    for key in options:
        if key not in TEACHER_OPTIONS:
            raise ParameterError(
                "teachers", f".{name}.{key} does not exist; a teacher has {', '.join(TEACHER_OPTIONS)}"
            )
    input_size = options.get("input_size")
    if input_size is not None and (type(input_size) is not int or not 0 < input_size <= 16384):
        raise ParameterError("teachers", f".{name}.input_size={input_size} must be a whole number from 1 to 16384")
    weights = options.get("weights")
    return {**options, "weights": None if weights == "none" else weights}


def build_aligner(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer with weights of standard deviation 0.02 and no shift."""
    layer = torch.nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


@contextmanager
def name_teacher(name: str) -> Iterator[None]:
    """Let an error about a teacher's network name the teacher."""
    try:
        yield
    except ParameterError as error:
        raise ParameterError("teachers", f".{name}.{error}") from error
    except UserError as error:
        raise ParameterError("teachers", f".{name}: {error}") from error
