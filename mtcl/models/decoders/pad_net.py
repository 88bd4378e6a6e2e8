"""PAD-Net: each task's initial features are refined with messages from those of the other tasks.

Xu, Ouyang, Wang, Sebe. PAD-Net: Multi-Tasks Guided Prediction-and-Distillation Network for Simultaneous Depth
Estimation and Scene Parsing. CVPR 2018, arXiv:1805.04409.

    features -> Fusion at 1/4 -> trunk -> per task: 2 bottlenecks -> initial map -> 1x1 -> initial prediction
    initial maps of all tasks -> Distillation -> per task: 2 bottlenecks -> final -> 1x1 -> prediction

Initial predictions are supervised like the final ones, and left out at inference. Shapes and the gate follow the
version that later papers compare with (Vandenhende et al., PAMI 2021, on HRNet): a message is gated by its source. The
2018 paper gates it by its target, one gate for all sources.
"""

from collections.abc import Iterable, Mapping, Sequence

from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from mtcl.errors import ParameterError
from mtcl.models.decoders.base import Decoder
from mtcl.models.decoders.blocks import Distillation, Fusion, predict_tasks, projection_shortcut
from mtcl.models.output import DenseOutput, Size


class PADNet(Decoder):
    """Initial maps per task, multi-modal distillation between them, final heads.

    Features: ``final`` (each task's pre-logit map), ``initial`` (its map before the distillation), ``trunk`` (the
    shared map, the same tensor for every task).

    Args:
        channels: see :class:`Decoder`.
        strides: see :class:`Decoder`.
        tasks: see :class:`Decoder`.
        width: channels of every task's maps, a multiple of 4.
        trunk_width: channels of the shared map; None: the sum of the backbone's channels.
        stride: stride of all maps, in pixels.
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
            raise ParameterError("width", f"={width} must be a multiple of 4: a bottleneck is a quarter as wide")
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

    def forward(self, features: list[Tensor], size: Size) -> DenseOutput:
        """Decode with the initial predictions as intermediate ones."""
        trunk, initial, final = self._maps(features, size)
        return DenseOutput(
            self._predictions(self.logits, final, size),
            {"final": final, "initial": initial, "trunk": dict.fromkeys(final, trunk)},
            [self._predictions(self.initial_logits, initial, size)],
            size,
        )

    def predict(self, features: list[Tensor], size: Size) -> dict[str, Tensor]:
        """Return the final predictions; the initial heads are not run."""
        return self._predictions(self.logits, self._maps(features, size)[-1], size)

    def _maps(self, features: list[Tensor], size: Size) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return the trunk, the initial maps and the final maps."""
        trunk = self.fusion(features, [-(-s // self.stride) for s in size])
        initial = {task: layers(trunk) for task, layers in self.initial.items()}
        refined = self.distillation(initial)
        return trunk, initial, {task: head(refined[task]) for task, head in self.heads.items()}

    @staticmethod
    def _predictions(logits: nn.ModuleDict, maps: dict[str, Tensor], size: Size) -> dict[str, Tensor]:
        return predict_tasks(logits, maps, size)

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return the fusion and the initial layers."""
        yield from self.fusion.parameters()
        yield from self.initial.parameters()  # every final map depends on every initial one


def _bottlenecks(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        Bottleneck(inputs, outputs // 4, downsample=projection_shortcut(inputs, outputs)),
        Bottleneck(outputs, outputs // 4),
    )
