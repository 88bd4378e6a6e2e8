"""Name the tensors of public code, with their shapes, layer by layer."""

from collections.abc import Sequence


class Shapes(dict[str, tuple[int, ...]]):
    """Key -> shape of a published state dict, filled layer by layer."""

    def layer(self, name: str, *shape: int, bias: bool = True, outputs: int = 0) -> None:
        """Add a layer of any kind; ``outputs``: of a transposed convolution, where they are not the first side."""
        self[f"{name}.weight"] = shape
        if bias:
            self[f"{name}.bias"] = (outputs or shape[0],)

    def conv(self, name: str, outputs: int, inputs: int, kernel: int = 1, bias: bool = False) -> None:
        """Add a square convolution."""
        self.layer(name, outputs, inputs, kernel, kernel, bias=bias)

    def norm(self, name: str, channels: int) -> None:
        """Add a batch norm."""
        for part in ("weight", "bias", "running_mean", "running_var"):
            self[f"{name}.{part}"] = (channels,)
        self[f"{name}.num_batches_tracked"] = ()

    def block(self, name: str, inputs: int, outputs: int, kernels: Sequence[int] = (3, 3)) -> None:
        """Add a residual block: basic (3x3, 3x3), or a bottleneck (1x1, 3x3, 1x1) of a quarter of the outputs."""
        hidden = outputs if len(kernels) == 2 else outputs // 4
        sides = [inputs, *[hidden] * (len(kernels) - 1), outputs]
        for i, kernel in enumerate(kernels):
            self.conv(f"{name}.conv{i + 1}", sides[i + 1], sides[i], kernel)
            self.norm(f"{name}.bn{i + 1}", sides[i + 1])
        if inputs != outputs:
            self.conv(f"{name}.downsample.0", outputs, inputs)
            self.norm(f"{name}.downsample.1", outputs)
