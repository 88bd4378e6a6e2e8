"""PAD-Net: predictions of all tasks, made from one another's features.

Xu, Ouyang, Wang, Sebe. PAD-Net: Multi-Tasks Guided Prediction-and-Distillation Network for Simultaneous Depth
Estimation and Scene Parsing. CVPR 2018, arXiv:1805.04409.

    features -> Fusion at 1/4 -> trunk -> per task: 2 bottlenecks -> initial map -> 1x1 -> initial prediction
    initial maps of all tasks -> Distillation -> per task: 2 bottlenecks -> final -> 1x1 -> prediction

Initial predictions are supervised as the final ones are, and left out at inference. Shapes and the gate follow the
form in which the field compares with it (Vandenhende et al., PAMI 2021, on HRNet): a message is gated by its
source. The 2018 paper gates it by its target, one gate for all sources.
"""

from collections.abc import Iterable, Mapping, Sequence

from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from mtcl.errors import UserError
from mtcl.models.decoders.base import Decoder, DecoderOutput
from mtcl.models.decoders.blocks import Distillation, Fusion, predict_tasks, projection_shortcut


class PADNet(Decoder):
    """Every task's maps are ``width`` wide, at ``stride``, from a shared map ``trunk_width`` wide.

    ``trunk_width`` None: as wide as the backbone's maps together. ``width`` must be a multiple of 4.

    Taps: ``final`` (each task's pre-logit map), ``initial`` (its map before the distillation), ``trunk`` (the
    shared map, the same tensor for every task).
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        tasks: Mapping[str, int],
        width: int = 256,
        trunk_width: int | None = None,
        stride: int = 4,
    ):
        super().__init__(channels, strides, tasks)
        if width % 4:
            raise UserError(f"decoder.width={width} must be a multiple of 4: a bottleneck is a quarter as wide")
        self.stride = stride
        trunk_width = trunk_width or sum(channels)
        self.fusion = Fusion(channels, trunk_width)
        self.initial = nn.ModuleDict({task: _bottlenecks(trunk_width, width) for task in self.tasks})
        self.initial_logits = nn.ModuleDict({task: nn.Conv2d(width, c, 1) for task, c in self.tasks.items()})
        self.distillation = Distillation(self.tasks, width)
        self.heads = nn.ModuleDict({task: _bottlenecks(width, width) for task in self.tasks})
        self.logits = nn.ModuleDict({task: nn.Conv2d(width, c, 1) for task, c in self.tasks.items()})
        self.feature_channels = {
            "final": dict.fromkeys(self.tasks, width),
            "initial": dict.fromkeys(self.tasks, width),
            "trunk": dict.fromkeys(self.tasks, trunk_width),
        }

    def forward(self, features: list[Tensor], size: tuple[int, int]) -> DecoderOutput:
        trunk, initial, final = self._maps(features, size)
        return DecoderOutput(
            self._predictions(self.logits, final, size),
            {"final": final, "initial": initial, "trunk": dict.fromkeys(final, trunk)},
            [self._predictions(self.initial_logits, initial, size)],
        )

    def predict(self, features: list[Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        return self._predictions(self.logits, self._maps(features, size)[-1], size)

    def _maps(
        self, features: list[Tensor], size: tuple[int, int]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        trunk = self.fusion(features, [-(-s // self.stride) for s in size])
        initial = {task: layers(trunk) for task, layers in self.initial.items()}
        refined = self.distillation(initial)
        return trunk, initial, {task: head(refined[task]) for task, head in self.heads.items()}

    @staticmethod
    def _predictions(logits: nn.ModuleDict, maps: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        return predict_tasks(logits, maps, size)

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        yield from self.fusion.parameters()
        yield from self.initial.parameters()  # a task's initial map goes into every task's final one


def _bottlenecks(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        Bottleneck(inputs, outputs // 4, downsample=projection_shortcut(inputs, outputs)),
        Bottleneck(outputs, outputs // 4),
    )
