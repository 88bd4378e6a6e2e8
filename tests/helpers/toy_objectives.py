"""A toy with several objectives: a trunk that all pull at, two ways, and a head each."""

import torch
from torch import Tensor, nn

from mtcl.training.balancing import Balancer, FixedWeights

CPU = torch.device("cpu")
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}
NO = torch.zeros(())  # no step is skipped


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.trunk = nn.Parameter(torch.randn(3, 4, 2, 2, generator=generator).to(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.randn(3, generator=generator))
        self.heads = nn.ParameterDict({n: nn.Parameter(torch.randn(3, generator=generator)) for n in (*WEIGHTS, "d")})
        self.unused = nn.Parameter(torch.ones(2))

    def losses(self, seed: int = 0, names: str = "abc") -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        losses = {}
        for name in "abcd":
            x = torch.randn(5, 4, 2, 2, generator=generator)
            target = torch.randn(5, generator=generator)
            z = torch.einsum("nchw,kchw->nk", x, self.trunk) + self.bias
            if name in names:
                losses[name] = ((z.tanh() @ self.heads[name]) - target).abs().mean()
        return losses

    def step(self, balancer: Balancer, number: int = 0, names: str = "abc", skip: Tensor = NO) -> dict[str, Tensor]:
        """The gradients of one step, by name."""
        self.zero_grad(set_to_none=True)
        balancer.backward(self.losses(number, names), self.parameters())
        balancer.finish_step(number)
        balancer.update(number, skip)
        return {name: p.grad for name, p in self.named_parameters() if p.grad is not None}


def plain(toy: Toy, number: int = 0, names: str = "abc") -> dict[str, Tensor]:
    return toy.step(FixedWeights(WEIGHTS), number, names)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
