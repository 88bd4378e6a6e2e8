"""What every decoder promises, checked on random feature maps of a tiny pyramid (or of a ViT's four equal maps)."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.models.decoders import Decoder
from mtcl.models.output import DenseOutput

TASKS = {"semseg": 5, "depth": 1, "normals": 3}
CHANNELS = [4, 6, 8, 10]
PYRAMID, VIT = [4, 8, 16, 32], [16] * 4
# Channels and task sets with which the authors' public code was built.
HRNET18, HRNET48 = [18, 36, 72, 144], [48, 96, 192, 384]
NYUD2 = {"semseg": 40, "depth": 1}
NYUD4 = {**NYUD2, "normals": 3, "edge": 1}
PASCAL = {"semseg": 21, "human_parts": 7, "sal": 2, "edge": 1, "normals": 3}
Size = tuple[int, int]
Make = Callable[..., Decoder]  # (channels, strides, tasks) -> decoder


def features(size: Size, strides: Sequence[int] = PYRAMID, batch: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, c, size[0] // s, size[1] // s, generator=generator) for c, s in zip(CHANNELS, strides)]


def build_decoder(make: Make, tasks: Iterable[str] = TASKS, strides: Sequence[int] = PYRAMID) -> Decoder:
    torch.manual_seed(0)
    return make(CHANNELS, strides, {t: TASKS[t] for t in tasks})


def outputs(output: DenseOutput) -> Iterable[Tensor]:
    """All that is supervised."""
    for predictions in (output.predictions, *output.intermediate):
        yield from predictions.values()


def check_shapes(
    make: Make,
    tasks: Iterable[str],
    strides: Sequence[int],
    batch: int,
    training: bool,
    size: Size = (96, 64),  # a frame is a multiple of the largest stride
) -> None:
    tasks = list(tasks)
    decoder = build_decoder(make, tasks, strides).train(training)
    output = decoder(features(size, strides, batch), size)
    for predictions in (output.predictions, *output.intermediate):
        assert {t: p.shape for t, p in predictions.items()} == {t: (batch, TASKS[t], *size) for t in tasks}
        assert list(predictions) == tasks
    assert "final" in output.features
    assert {
        k: {t: m.shape[1] for t, m in features.items()} for k, features in output.features.items()
    } == decoder.feature_channels
    assert all(p.isfinite().all() for p in outputs(output))
    sum(p.square().mean() for p in outputs(output)).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # a bias before nothing but a softmax or a sum may see none by chance; and a batch norm of one image takes away
        # what is equal at all of its pixels; other weights all learn
        is_constant = batch == 1 and "pooled" in name
        assert parameter.grad.any() or parameter.dim() == 1 or is_constant, name


def check_predict(make: Make) -> None:
    """The inference path gives the same and runs no head that only training needs."""
    decoder = build_decoder(make).eval()
    maps = features((64, 96))
    with torch.no_grad():
        output = decoder(maps, (64, 96))
        ran = called(decoder, lambda: decoder.predict(maps, (64, 96)))
        predictions = decoder.predict(maps, (64, 96))
    assert list(predictions) == list(output.predictions)
    assert all(torch.equal(p, output.predictions[t]) for t, p in predictions.items())
    idle = {name for name, module in decoder.named_modules() if not list(module.children())} - ran
    assert all(name.startswith("initial_logits") for name in idle), idle
    assert bool(idle) == bool(output.intermediate)


def called(model: nn.Module, act: Callable[[], object]) -> set[str]:
    names: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: names.add(name)) for name, module in model.named_modules()
    ]
    act()
    for hook in hooks:
        hook.remove()
    return names


def check_compiles(make: Make) -> None:
    torch._dynamo.reset()
    decoder = build_decoder(make, ["depth", "normals"]).eval()  # tracing takes long
    maps = features((64, 96), batch=1)
    with torch.no_grad():
        want = decoder(maps, (64, 96))
        got = torch.compile(decoder, fullgraph=True, backend="eager")(maps, (64, 96))
    for a, b in zip(outputs(got), outputs(want), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def check_bf16(make: Make) -> None:
    decoder = build_decoder(make)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = decoder(features((64, 96)), (64, 96))
    assert all(p.dtype == torch.float32 for p in output.predictions.values())
    sum(p.square().mean() for p in outputs(output)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def check_shared(make: Make) -> None:
    """shared_parameters() is what the gradients of at least two tasks reach, once each."""
    decoder = build_decoder(make)
    output = decoder(features((64, 96)), (64, 96))
    reached = {name: 0 for name, _ in decoder.named_parameters()}
    for task in TASKS:
        decoder.zero_grad(set_to_none=True)
        predictions = [output.predictions[task], *(p[task] for p in output.intermediate)]
        sum(p.square().mean() for p in predictions).backward(retain_graph=True)
        for name, parameter in decoder.named_parameters():
            reached[name] += parameter.grad is not None and bool(parameter.grad.any())
    assert min(reached.values()) > 0
    names = {id(p): name for name, p in decoder.named_parameters()}
    shared = [names[id(p)] for p in decoder.shared_parameters()]
    assert len(shared) == len(set(shared))
    assert set(shared) == {name for name, times in reached.items() if times > 1}


def check_overfits(make: Make, steps: int = 20, lr: float = 0.02) -> None:
    """One tiny batch of random targets: every task's loss falls clearly."""
    decoder = build_decoder(make)
    maps = features((32, 64))
    generator = torch.Generator().manual_seed(1)
    labels = {
        t: F.interpolate(torch.randn(2, c, 4, 8, generator=generator), (32, 64), mode="bilinear")
        for t, c in TASKS.items()
    }

    def losses() -> Mapping[str, Tensor]:
        output = decoder(maps, (32, 64))
        every = [output.predictions, *output.intermediate]
        return {t: sum((p[t] - labels[t]).square().mean() for p in every) / len(every) for t in TASKS}

    optimizer = torch.optim.Adam(decoder.parameters(), lr=lr)
    first = {t: value.item() for t, value in losses().items()}
    for _ in range(steps):
        optimizer.zero_grad()
        sum(losses().values()).backward()
        optimizer.step()
    last = {t: value.item() for t, value in losses().items()}
    assert all(last[t] < 0.6 * first[t] for t in TASKS), (first, last)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
