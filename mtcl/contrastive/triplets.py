"""From label relations to triplets and their loss. Everything over (B, K, K) or (B, K), static shapes."""

import torch
from torch import Tensor


def pick(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each anchor one positive and one negative at random: bool (B, K, K) x 2 -> p, n int64 (B, K), anchor bool
    (B, K).

    Row i of a relation holds the pixels that are alike to (differ from) pixel i. The choice is the first one after i in
    cyclic order: the sampled pixels stand in random order already, so this is uniform and needs no further draw.
    Where ``anchor`` is False, p or n means nothing.
    """
    p, has_positive = _next(positive)
    n, has_negative = _next(negative)
    return p, n, has_positive & has_negative


def _next(relation: Tensor) -> tuple[Tensor, Tensor]:
    count = relation.shape[-1]
    place = torch.arange(count, device=relation.device)
    ahead = ((place[None, :] - place[:, None]) % count).short()  # (K, K): steps from i forward to j
    none = torch.full((), count, dtype=torch.short, device=relation.device)
    nearest = torch.where(relation, ahead, none).amin(dim=-1)  # (B, K)
    return (place + nearest) % count, nearest < none


def triplet_loss(z: Tensor, p: Tensor, n: Tensor, anchor: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Mean over anchors of max(0, margin + d_ap - d_an), d = 2 - 2 cos, of unit vectors z (B, K, D).

    Also per image, detached: (B, 4) number of anchors, of active triplets, sum of d_ap, sum of d_an. Zero with a graph
    where there is no anchor.
    """
    d_ap = 2 - 2 * (z * _take(z, p)).sum(dim=-1)  # (B, K)
    d_an = 2 - 2 * (z * _take(z, n)).sum(dim=-1)
    hinge = torch.relu(margin + d_ap - d_an)
    weight = anchor.to(hinge)
    loss = (hinge * weight).sum() / weight.sum().clamp(min=1)
    active = (hinge > 0).to(hinge)
    stats = torch.stack([torch.ones_like(hinge), active, d_ap, d_an], dim=-1).detach()
    return loss, (stats * weight[..., None]).sum(dim=1)


def _take(z: Tensor, index: Tensor) -> Tensor:
    return z.gather(1, index[..., None].expand_as(z))
