"""Balance objectives by the norms of their gradients at the last layer that they share (AvgNorm)."""

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mtcl import distributed
from mtcl.errors import ParameterError
from mtcl.training.balancing import FixedWeights

log = logging.getLogger(__name__)

TARGETS = ("sum", "mean")


class AverageNorm(FixedWeights):
    """Scales each objective's loss so that its gradient at the last shared layer has the same norm as the others'.

    AvgNorm of "Revisit the Imbalance Optimization in Multi-task Learning: An Experimental Analysis" (Guo et al., 2025,
    arXiv 2509.23915). The factor of the weighted loss L_i is, in every batch,

        S / |g_i|,        g_i: gradient of L_i at the weight of the last shared layer

    Of the paper only the abstract was at hand, and an account of its section V-F that somebody else wrote: from there
    is S = |g_1 + ... + g_K|, the norm of the summed gradient (``sum``). The method's name would also fit the mean of
    the norms (``mean``).

    Which layer is the last one is ours: the last kernel or matrix, in the order of the model's shared parameters, that
    the losses of all objectives of the batch reach. While the regulariser is off, that may be a later one than with it.
    In several processes the norms are those of the gradients of all images together. An objective without labels has no
    gradient and takes no part. The host does not wait for the device.

    Args:
        weights: objective -> w, which multiplies its loss before; it cancels but for its part in S.
        shared: the parameters that the tasks share, from the input to the heads.
        target: ``sum`` or ``mean``, see above.
    """

    saved_name = "AverageNorm"

    def __init__(self, weights: Mapping[str, float], shared: Iterable[nn.Parameter], target: str = "sum"):
        super().__init__(weights)
        if target not in TARGETS:
            raise ParameterError("target", f"={target} is not known; choose {' or '.join(TARGETS)}")
        self.target = target
        self.candidates = [p for p in shared if p.requires_grad and p.ndim > 1]
        # By objectives, not one for all: a resumed run, which sees other losses first, has the same layers.
        self.layers: dict[tuple[str, ...], nn.Parameter | None] = {}
        self.logged: dict[str, Tensor | float] = {}

    def weigh(self, losses: Mapping[str, Tensor], num_batches: int = 1) -> dict[str, float | Tensor]:
        """Return w times S / |g_i| for each objective; 1 for other losses. Keeps the graph, leaves ``.grad`` alone."""
        fixed, self.logged = super().weigh(losses, num_batches), {}
        objectives = {name: self.weights[name] * losses[name] for name in self.weights if name in losses}
        layer = self._find_layer(objectives)
        if layer is None:
            return fixed
        rows = self._read_gradients(objectives, layer)
        rows = distributed.all_reduce_sum(rows) / distributed.world_size()
        norms = rows.norm(dim=1)
        is_present = norms != 0
        target = rows.sum(dim=0).norm() if self.target == "sum" else norms.sum() / is_present.sum()
        factors = torch.where(is_present, target / norms, 1.0).unbind()
        weighted = {name: self.weights[name] * factor for name, factor in zip(objectives, factors)}
        self.logged = {f"{name}/weight": weight for name, weight in weighted.items()}
        self.logged |= {f"{name}/norm": norm * num_batches for name, norm in zip(objectives, norms.unbind())}
        return fixed | weighted

    def _find_layer(self, objectives: Mapping[str, Tensor]) -> nn.Parameter | None:
        """Return the last shared layer that all of these losses reach; None, after one warning, where there is none."""
        names = tuple(objectives)
        if names not in self.layers:
            layers = (
                candidate
                for candidate in reversed(self.candidates)
                if all(_differentiate(self.scale_loss(loss), candidate) is not None for loss in objectives.values())
            )
            self.layers[names] = next(layers, None)
            if self.layers[names] is None:
                log.warning("no trained layer serves all of %s: their norms are not balanced", ", ".join(names))
        return self.layers[names]

    def _read_gradients(self, objectives: Mapping[str, Tensor], layer: nn.Parameter) -> Tensor:
        """Return each objective's gradient at a layer of N weights, (K, N)."""
        gradients = [_differentiate(self.scale_loss(loss), layer) for loss in objectives.values()]
        zero = torch.zeros_like(layer)
        rows = torch.stack([(zero if gradient is None else gradient).float().flatten() for gradient in gradients])
        return self.unscale_gradient(rows)

    def summary(self) -> dict[str, Tensor | float]:
        """Return the factor of each objective's loss, and its gradient's norm."""
        return self.logged


def _differentiate(loss: Tensor, parameter: nn.Parameter) -> Tensor | None:
    if not loss.requires_grad:
        return None
    return torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)[0]
