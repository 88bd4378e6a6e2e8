"""Representation-level task saliency, Rep-MTL: gradients of the tasks' losses at the representation that they share.

Wang, Li, Xu, "Rep-MTL: Unleashing the Power of Representation-level Task Saliency for Multi-Task Learning", ICCV 2025
(arXiv 2507.21049, the numbers in brackets are its equations): a comparator of the contrastive regularizer,
training-only as well, without parameters of its own. With Z the map (B, C, h, w) of which every task's layers predict:

    S_t = dL_t / dZ                                                  saliency of task t                          (3)
    P_it = |mean_c S_t| / sum_k |mean_c S_k|                         at each cell i of each image                (4, 5)
    L_tsr = mean over cells of -sum_t P_it log P_it                  tasks shall differ in where they look       (6)
    M_bt = S_bt S_bt^T,  A_b = mean over cells of S_b, (C, T)        affinity of channels; anchor of image b     (7, 8)
    L_csa = mean over images b and tasks t of -sim(A_b A_b^T, M_bt) / temperature
            + log sum over images k != b of exp(sim(A_b A_b^T, A_k A_k^T) / temperature)                         (9)
    L = sum_t w_t L_task_t + lambda * (tsr_weight L_tsr + csa_weight L_csa)                                      (10)

sim is the cosine of two matrices (C, C), which are never formed: <A_b A_b^T, A_k A_k^T> = |A_b^T A_k|^2 and
<A A^T, S S^T> = |S^T A|^2. The saliencies are in the graph, so that both losses train the model by second derivatives.
What is the paper's and what is our choice is said in ``configs/regularizer/rep_mtl.yaml``.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtcl.distributed import all_reduce_sum, rank, scale_for_ddp_mean, world_size
from mtcl.errors import UserError
from mtcl.losses.masked import masked_mean
from mtcl.models.base import DenseOutput
from mtcl.regularizers.base import Regularizer, RegularizerOutput
from mtcl.regularizers.sampling import Draw, draw_nothing
from mtcl.regularizers.task_loss import compute_task_loss
from mtcl.tasks.base import Task
from mtcl.tasks.image_weights import weigh_images

TERMS = ("specific", "alignment")
FLOOR = 1e-12  # of what is divided by, or a logarithm taken of


class TaskSaliency(Regularizer):
    """Regulation and alignment of the tasks' saliencies, the gradients of their losses at a map that all share.

    >>> from mtcl.tasks import build_task
    >>> tasks = {name: build_task(name) for name in ("depth", "edge")}
    >>> labels = {name: torch.rand(2, 1, 8, 8).round() for name in tasks}
    >>> shared = torch.randn(2, 4, 8, 8, requires_grad=True)
    >>> heads = {name: torch.nn.Conv2d(4, 1, 3, padding=1) for name in tasks}

    >>> regularizer = TaskSaliency(tasks)
    >>> maps = {name: head(shared) for name, head in heads.items()}
    >>> output = DenseOutput(maps, {"trunk": dict.fromkeys(tasks, shared)}, [], (8, 8))
    >>> loss = regularizer.compute_loss(output, labels, regularizer.sample(0, ["first", "second"])).loss
    >>> loss.backward()

    Tasks without a label in an image have no saliency there and do not enter its distribution or its pairs. An
    image with a single labelled task has an alignment only, one without any has neither. ``losses`` of the result:
    the two terms without their weights; ``loss`` is their weighted sum. With ``task_loss.views="first"`` the images are
    the rows of the first views.

    Args:
        tasks: name -> task, at least two; a saliency is that of the task's loss times its weight.
        channels: ignored; other regularizers read feature maps of that width.
        seed: ignored: nothing is drawn.
        feature: which of a model's features is Z; the same map for all tasks.
        tsr_weight: of L_tsr.
        csa_weight: of L_csa.
        temperature: of L_csa.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        channels: Mapping[str, int] | None = None,  # noqa: ARG002
        *,
        seed: int = 0,  # noqa: ARG002
        feature: str = "trunk",
        tsr_weight: float = 0.9,
        csa_weight: float = 0.9,
        temperature: float = 0.1,
    ):
        super().__init__()
        if len(tasks) < 2:
            raise UserError("saliencies of tasks need at least two tasks; switch the regularizer off for one")
        self.tasks, self.feature = dict(tasks), feature
        self.weights, self.temperature = (tsr_weight, csa_weight), temperature
        self.sums: Tensor
        self.register_buffer("sums", torch.zeros(1 + len(TERMS)), persistent=False)  # steps, sums of the terms

    def sample(self, step: int, ids: Sequence[str]) -> Draw:  # noqa: ARG002
        """Draw nothing."""
        return draw_nothing(ids)

    def compute_loss(
        self,
        output: DenseOutput,
        labels: Mapping[str, Tensor],
        draw: Draw,  # noqa: ARG002
        teacher: Mapping[str, Tensor] | None = None,  # noqa: ARG002
    ) -> RegularizerOutput:
        """Compute both terms; see the module's formulas. The output must be in the graph of its ``feature``."""
        views = self.task_loss.views_per_step
        if self.task_loss.views == "first":  # a saliency of other rows would be that of no loss
            num_images = len(next(iter(output.predictions.values()))) // views
            labels, views = {name: labels[name][:num_images] for name in self.tasks}, 1
        with torch.autocast(output.device.type, enabled=False):
            has_label = torch.stack(
                [task.valid(labels[n]).flatten(1).any(dim=1) & (task.weight > 0) for n, task in self.tasks.items()]
            )  # (T, B)
            saliency = torch.where(has_label[..., None, None], self.measure_saliencies(output, labels), 0.0)
            is_salient = (saliency.detach() != 0).flatten(2).any(dim=2)  # a loss may be zero in spite of labels
            terms = (
                average_entropy(saliency, is_salient),
                align_saliencies(saliency, is_salient, self.temperature, views),
            )
            with torch.no_grad():
                self.sums += torch.stack([torch.ones_like(terms[0]), *terms])
            loss = torch.stack([weight * term for weight, term in zip(self.weights, terms)]).sum()
        return RegularizerOutput(loss, dict(zip(TERMS, terms)))

    def measure_saliencies(self, output: DenseOutput, labels: Mapping[str, Tensor]) -> Tensor:
        """Return the gradient of each task's weighted loss at Z: (T, B, C, cells), in a graph where one is recorded.

        Args:
            output: a forward pass in training.
            labels: task -> label of the first B rows of the output; the loss is that of these rows.

        Raises:
            UserError: the tasks do not share the map, or nothing that is trained comes before it.
        """
        maps = list(output.features[self.feature].values())
        if any(x is not maps[0] for x in maps):
            raise UserError(
                f"a saliency needs a map that all tasks share, but each has its own feature {self.feature}; choose "
                "another feature or decoder"
            )
        if not maps[0].requires_grad:
            raise UserError(
                "a saliency needs the gradient of a map, but nothing that is trained comes before the feature "
                f"{self.feature} of this decoder on a frozen backbone; train the backbone or choose another decoder"
            )
        num_rows = len(labels[next(iter(self.tasks))])
        if num_rows < len(maps[0]):
            predictions, *intermediate = (
                {name: rows[:num_rows] for name, rows in kind.items()}
                for kind in (output.predictions, *output.intermediate)
            )
            output = output._replace(predictions=predictions, intermediate=intermediate)
        has_graph, saliencies = torch.is_grad_enabled(), []
        image_weights = weigh_images(self.tasks, labels, self.task_loss.image_weighting)
        with torch.enable_grad():
            for name, task in self.tasks.items():
                terms = output, labels[name], self.task_loss.intermediate_weight, image_weights[name]
                loss = task.weight * compute_task_loss(name, task, *terms)
                (gradient,) = torch.autograd.grad(loss, maps[0], retain_graph=True, create_graph=has_graph)
                gradient = gradient[:num_rows]
                saliencies.append(gradient.to(torch.promote_types(gradient.dtype, torch.float32)).flatten(2))
        return torch.stack(saliencies)

    def summary(self) -> dict[str, float]:
        """Return the two terms, without their weights, as means over the steps since the last call."""
        steps, *sums = self.sums.tolist()
        self.sums.zero_()
        return {name: value / steps for name, value in zip(TERMS, sums)} if steps else {}


def average_entropy(saliency: Tensor, is_salient: Tensor) -> Tensor:
    """Average the entropy over tasks of |mean_c S_t| at all cells of images with two salient tasks or more.

    Args:
        saliency: (T, B, C, cells), zero where ``is_salient`` is false.
        is_salient: bool (T, B).

    Returns:
        scalar, the mean over the cells of all processes where any task's saliency is more than FLOOR of the image's
        largest.
    """
    size = _scale(saliency, (0, 2, 3)).mean(dim=2).abs()  # (T, B, cells)
    total = size.sum(dim=0)
    p = size / total.clamp(min=FLOOR)
    entropy = -(p * p.clamp(min=FLOOR).log()).sum(dim=0)
    return masked_mean(entropy, (total > FLOOR) & (is_salient.sum(dim=0) > 1)[:, None])


def align_saliencies(saliency: Tensor, is_salient: Tensor, temperature: float, views: int = 1) -> Tensor:
    """Contrast each image's anchor with the affinities of its tasks and the anchors of other images.

    Args:
        saliency: (T, B, C, cells), zero where ``is_salient`` is false.
        is_salient: bool (T, B).
        temperature: of the softmax.
        views: of an image in the batch, which are no negatives of each other: row i is of image i % (B / views).

    Returns:
        scalar, the mean over the images of all processes that have a salient task, and a negative.
    """
    num_images = is_salient.shape[1]
    s = _scale(saliency, (2, 3)).transpose(0, 1)  # (B, T, C, cells)
    anchor = _scale(saliency.mean(dim=3), (0, 2)).transpose(0, 1)  # A_b^T: (B, T, C)
    # <A A^T, S S^T> = |S^T A|^2; |S S^T| = |S^T S|, of which one is small
    product = torch.einsum("btcn,bsc->btsn", s, anchor).square().sum(dim=(2, 3))
    gram = s @ s.mT if s.shape[2] <= s.shape[3] else s.mT @ s
    affinity_norm = _norm(gram.square().sum(dim=(2, 3)))  # (B, T)
    positive = product / (affinity_norm * _norm((anchor @ anchor.mT).square().sum(dim=(1, 2)))[:, None])
    num_positives = is_salient.sum(dim=0)  # (B,)
    positive = (positive * is_salient.T).sum(dim=1) / num_positives.clamp(min=1)

    anchors = _gather_images(anchor)  # (all processes' images, T, C)
    inner = torch.einsum("btc,ksc->bkts", anchors, anchors).square().sum(dim=(2, 3))
    norm = _norm(inner.diagonal())
    logits = inner / (norm[:, None] * norm) / temperature
    has_anchor = _gather_images(num_positives.float()) > 0
    row = torch.arange(len(anchors), device=anchors.device)
    per_process = num_images // views
    image = row // num_images * per_process + row % num_images % per_process
    is_negative = has_anchor & (image[:, None] != image)
    has_negative = is_negative.any(dim=1)
    negative = torch.where(is_negative | ~has_negative[:, None], logits, -torch.inf).logsumexp(dim=1)
    counts = (has_anchor & has_negative).to(negative)
    # Rows of other processes have these anchors as negatives: their gradient counts here, their value there.
    mine = row // num_images == rank()
    shared = torch.where(mine, negative, negative - negative.detach())
    first = rank() * num_images
    total = (shared * counts).sum() - (positive / temperature * counts[first : first + num_images]).sum()
    return scale_for_ddp_mean(total / counts.sum().clamp(min=1))


def _scale(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Divide by the largest absolute value along ``dim``, a constant: the length of saliencies means nothing."""
    largest = x.detach().abs().amax(dim=dim, keepdim=True)
    return x / torch.where(largest > 0, largest, 1.0)


def _norm(square: Tensor) -> Tensor:
    """Return the root of squared norms, at least FLOOR."""
    return square.clamp(min=FLOOR**2).sqrt()


def _gather_images(x: Tensor) -> Tensor:
    """Return the rows of all processes (processes * B, ...); those of this one stay in their graph."""
    if world_size() == 1:
        return x
    rows = x.new_zeros(world_size(), *x.shape)
    rows[rank()] = x.detach()
    rows = all_reduce_sum(rows)
    return torch.cat([rows[: rank()].flatten(0, 1), x, rows[rank() + 1 :].flatten(0, 1)])
