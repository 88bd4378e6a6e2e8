"""Balance objectives by logarithms of their losses and by gradients of equal norm (DB-MTL)."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtcl.training.balancing import Balancer, rename_objective
from mtcl.training.balancing_torchjd import add_gradient

log = logging.getLogger(__name__)

EPSILON = 1e-8  # in the logarithm and beside the norms


class DualBalancing(Balancer):
    """Dual-balancing multi-task learning (Lin et al., arXiv 2308.12029).

    Each loss is replaced by its logarithm. At the shared parameters the gradients of these are averaged over the steps,

        m_i <- g_i + b_k (m_i - g_i),        b_k = beta / k ** sigma in the k-th step, all m_i = 0 before

    and the sum of (max_j |m_j|) m_i / |m_i| is the gradient. A parameter that a single objective depends on (a head)
    gets the gradient of its logarithm. These formulas and the defaults are those of LibMTL's code (LibMTL/weighting/
    DB_MTL.py, by the authors). Batches of a step are averaged first.

    Ours: an objective without labels in a step takes no part in it, and keeps its running mean and its k; a step that
    is skipped changes neither. The host does not wait for the device.

    Args:
        weights: objective -> fixed factor of its loss, which the gradient of a logarithm does not depend on.
        device: of the losses.
        beta: of the running mean, 0 (none) to below 1.
        sigma: how fast the running mean forgets more, at least 0.
    """

    saved_name = "DualBalancing"

    def __init__(self, weights: Mapping[str, float], device: torch.device, beta: float = 0.9, sigma: float = 0.0):
        super().__init__(weights)
        self.beta, self.sigma = beta, sigma
        self.counts = torch.zeros(len(self.weights), device=device)  # steps with labels
        self.means: dict[str, dict[int, Tensor]] = {name: {} for name in self.weights}  # by number of the parameter
        self.rows: dict[int, dict[str, Tensor]] = {}  # number -> objective -> gradient, of this step
        self.trained: list[nn.Parameter] = []
        self.updated: dict[str, dict[int, Tensor]] = {}  # the running means, unless the step is skipped
        self.is_present = torch.zeros_like(self.counts, dtype=torch.bool)
        self.has_warned = False  # that no parameter is shared
        self.logged: dict[str, Tensor | float] = {}

    def backward(self, losses: Mapping[str, Tensor], parameters: Iterable[nn.Parameter], num_batches: int = 1) -> None:
        """Compute and keep the gradients of each objective's logarithm; add those of other losses at once."""
        self.trained = [p for p in parameters if p.requires_grad]
        objectives = {name: self.weights[name] * losses[name] for name in self.weights if name in losses}
        outside = [loss for name, loss in losses.items() if name not in objectives]
        if outside:
            self.scale_loss(torch.stack(outside).sum()).backward(retain_graph=True)
        for number, (name, loss) in enumerate(objectives.items(), start=1):
            logarithm = torch.log(num_batches * loss + EPSILON) / num_batches
            gradients = torch.autograd.grad(
                self.scale_loss(logarithm), self.trained, retain_graph=number < len(objectives), allow_unused=True
            )
            for index, gradient in enumerate(gradients):
                if gradient is not None:
                    gradient = self.unscale_gradient(gradient)
                    rows = self.rows.setdefault(index, {})
                    rows[name] = rows[name] + gradient if name in rows else gradient

    @torch.no_grad()
    def finish_step(self, step: int) -> None:  # noqa: ARG002
        """Average the gradients over the steps, bring them to one norm and add them to ``.grad``."""
        with self.unscaled_gradients(self.trained):
            self._add_gradients()

    def _add_gradients(self) -> None:
        rows, self.rows = self.rows, {}
        shared = [index for index, gradients in rows.items() if len(gradients) > 1]
        for index, gradients in rows.items():
            if len(gradients) == 1:
                add_gradient(self.trained[index], gradients.popitem()[1])
        if not shared:
            if not self.has_warned:
                log.warning("no trained parameter serves two objectives: their gradients are not balanced")
                self.has_warned = True
            return
        gradients_by_name = {name: {i: rows[i][name] for i in shared if name in rows[i]} for name in self.weights}
        self.is_present = torch.stack([self._norm(gradients) != 0 for gradients in gradients_by_name.values()])
        decays = (self.beta / (self.counts + 1) ** self.sigma).unbind()
        self.updated = {
            name: self._average(name, gradients, decay)
            for (name, gradients), decay in zip(gradients_by_name.items(), decays)
        }
        mean_norms = torch.stack([self._norm(means) for means in self.updated.values()])
        mean_norms = torch.where(self.is_present, mean_norms, 0.0)
        factors = torch.where(self.is_present, mean_norms.max() / (mean_norms + EPSILON), 0.0).unbind()
        for name, factor in zip(self.weights, factors):
            for index, mean in self.updated[name].items():
                add_gradient(self.trained[index], factor * mean)
        self.logged = {f"{name}/norm": norm for name, norm in zip(self.weights, mean_norms.unbind())}
        self.logged |= {f"{name}/weight": factor for name, factor in zip(self.weights, factors)}

    def _norm(self, gradients: Mapping[int, Tensor]) -> Tensor:
        """Return the norm of all gradients together; 0 without any."""
        return torch.nn.utils.get_total_norm(list(gradients.values())) if gradients else self.counts.new_zeros(())

    def _average(self, name: str, gradients: Mapping[int, Tensor], decay: Tensor) -> dict[int, Tensor]:
        """Return an objective's running means with this step's gradients, by number of the parameter."""
        means = self.means[name]
        return {
            index: gradient + decay * ((means[index] if index in means else torch.zeros_like(gradient)) - gradient)
            for index, gradient in gradients.items()
        }

    @torch.no_grad()
    def update(self, step: int, skip: Tensor) -> None:  # noqa: ARG002
        """Take over the running means of the step, unless it is skipped."""
        updated, self.updated = self.updated, {}
        is_kept = self.is_present & (skip == 0)
        self.counts += is_kept
        for k, (name, means) in enumerate(updated.items()):
            for index, mean in means.items():
                old = self.means[name].get(index)
                self.means[name][index] = torch.where(is_kept[k], mean, torch.zeros_like(mean) if old is None else old)

    def summary(self) -> dict[str, Tensor | float]:
        """Return the norm of each objective's mean gradient, and the factor that it is multiplied by."""
        return self.logged

    def _state(self) -> dict[str, Any]:
        means = {name: {str(index): mean for index, mean in means.items()} for name, means in self.means.items()}
        return {"counts": self.counts, "means": means}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.counts.copy_(state["counts"])
        self.means = {
            rename_objective(name): {
                int(index): mean.to(self.counts.device, copy=True) for index, mean in means.items()
            }
            for name, means in state["means"].items()
        }
