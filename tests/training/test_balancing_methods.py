"""Scalarizers of TorchJD, AvgNorm and DB-MTL: against slow sums in float64, in parts, in processes, resumed."""

import copy
import functools
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from helpers.common import ROOT, TINY, composed
from helpers.shrunken import RESNET
from helpers.toy_objectives import CPU, NO, WEIGHTS, Toy, plain, same
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mtcl import UserError, distributed
from mtcl.config.build_balancer import build_balancer
from mtcl.config.build_data import build_tasks
from mtcl.config.build_training import build_training_run
from mtcl.training.balancing import Balancer, FixedWeights
from mtcl.training.balancing_avg_norm import AverageNorm
from mtcl.training.balancing_db_mtl import DualBalancing
from mtcl.training.balancing_scalarizers import build_scalarization
from mtcl.training.balancing_torchjd import list_scalarizers
from mtcl.training.checkpoint_file import read_checkpoint_file, write_checkpoint_file

VECTOR = {"a": 0.5, "b": 0.3, "c": 0.2}
BOUNDS = {"a": 0.1, "b": 0.0, "c": 0.02}
OPTIONS = {
    "Constant": {"weights": VECTOR},
    "COSMOS": {"lambda_": 0.5, "weights": VECTOR},
    "DWA": {"temperature": 0.5},
    "FAMO": {"lr": 0.2, "weight_decay": 0.01, "min_losses": BOUNDS},
    "PBI": {"theta": 2.0, "weights": VECTOR, "reference": BOUNDS},
    "STCH": {"mu": 0.3},
}
try:
    SCALARIZERS = list(list_scalarizers())
except UserError:
    SCALARIZERS = []
pytestmark = pytest.mark.skipif(not SCALARIZERS, reason="TorchJD is not installed")


def scalarization(name: str, **options) -> Balancer:
    build = {"scale": 1.5, "lr": 0.1, "every": 2, "schedule": lambda step: 1.0, "seed": 3}
    return build_scalarization(WEIGHTS, CPU, name, options=OPTIONS.get(name, {}) | options, **build)


METHODS: dict[str, Callable[[Toy], Balancer]] = {name: lambda toy, n=name: scalarization(n) for name in SCALARIZERS}
METHODS["avg_norm"] = lambda toy: AverageNorm(WEIGHTS, [toy.trunk, toy.bias])
METHODS["db_mtl"] = lambda toy: DualBalancing(WEIGHTS, CPU, beta=0.7, sigma=0.5)


def gradients(toy: Toy) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in toy.named_parameters() if p.grad is not None}


def take_step(toy: Toy, balancer: Balancer, number: int, names: str = "abc", rate: float = 0.02) -> dict[str, Tensor]:
    """A step of gradient descent, with the losses of before and after; return its gradients."""
    toy.zero_grad(set_to_none=True)
    balancer.backward(toy.losses(number, names), toy.parameters())
    balancer.finish_step(number)
    step_gradients = gradients(toy)
    with torch.no_grad():
        for name, gradient in step_gradients.items():
            toy.get_parameter(name).sub_(rate * gradient)
        if balancer.measures_progress:
            balancer.observe_progress(toy.losses(number, names))
    balancer.update(number, NO)
    return step_gradients


# --- Slow references in float64: the formula of one step, from lists of numbers


def scalarize(name: str, losses: list[Tensor], vectors: dict[str, list[float]], state: list[float]) -> Tensor:
    """The scalarizer written out, for the objectives that have labels."""
    count, weights = len(losses), vectors["weights"]
    weighted = [r * loss for r, loss in zip(weights, losses)]
    if name in ("Sum", "Constant"):
        return sum(losses if name == "Sum" else weighted)
    if name == "Mean":
        return sum(losses) / count
    if name == "COSMOS":
        norms = math.sqrt(sum(r * r for r in weights)) * sum(loss**2 for loss in losses) ** 0.5
        return sum(weighted) - 0.5 * sum(weighted) / norms
    if name == "PBI":
        direction = [r / math.sqrt(sum(r * r for r in weights)) for r in weights]
        shifted = [loss - b for loss, b in zip(losses, vectors["bounds"])]
        along = sum(x * d for x, d in zip(shifted, direction))
        return along + 2.0 * sum((x - along * d) ** 2 for x, d in zip(shifted, direction)) ** 0.5
    if name == "STCH":
        return 0.3 * sum((loss / count / 0.3).exp() for loss in losses).log()
    if name == "GeometricMean":
        return math.prod(losses) ** (1 / count)
    if name == "UW":
        return sum(0.5 * math.exp(-s) * loss + 0.5 * s for s, loss in zip(state, losses))
    if name == "IMTLL":
        return sum(math.exp(s) * loss - s for s, loss in zip(state, losses))
    assert name == "FAMO"
    z = [math.exp(s) / sum(map(math.exp, state)) for s in state]
    distances = [loss - b + 1e-8 for loss, b in zip(losses, vectors["bounds"])]
    c = 1 / sum(x / float(d.detach()) for x, d in zip(z, distances))
    return c * sum(x * d.log() for x, d in zip(z, distances))


FORMULAS = ["Constant", "COSMOS", "FAMO", "GeometricMean", "IMTLL", "Mean", "PBI", "STCH", "Sum", "UW"]


@pytest.mark.parametrize("names", ["abc", "ac"])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_scalarizer_is_its_formula(name, names):
    """Three steps, of which the state of the library's class is read; also of the objectives with labels alone."""
    toy, balancer = Toy(), scalarization(name)
    for number in range(3):
        learned = {"UW": "log_variance", "IMTLL": "log_scale", "FAMO": "logit"}.get(name)
        summary = balancer.summary()
        state = [summary[f"{n}/{learned}"].item() if learned else 0.0 for n in names]
        double = copy.deepcopy(toy).double()
        losses = []
        for n in names:
            torch.manual_seed(0)
            losses.append(WEIGHTS[n] * double_losses(double, number)[n])
        vectors = {"weights": [VECTOR[n] for n in names], "bounds": [BOUNDS[n] for n in names]}
        (1.5 * scalarize(name, losses, vectors, state)).backward()
        step_gradients = take_step(toy, balancer, number, names)
        for key, gradient in gradients(double).items():
            torch.testing.assert_close(step_gradients[key].double(), gradient, rtol=1e-4, atol=1e-6)
        assert step_gradients.keys() == gradients(double).keys()


def double_losses(toy: Toy, number: int) -> dict[str, Tensor]:
    """The toy's losses in float64, of the same single-precision data."""
    generator = torch.Generator().manual_seed(number)
    losses = {}
    for name in "abcd":
        image, target = torch.randn(5, 4, 2, 2, generator=generator), torch.randn(5, generator=generator)
        z = torch.einsum("nchw,kchw->nk", image.double(), toy.trunk) + toy.bias
        losses[name] = ((z.tanh() @ toy.heads[name]) - target.double()).abs().mean()
    return losses


def test_random_weights_are_a_softmax_of_seed_and_step():
    toy = Toy()
    balancer, again, other = scalarization("Random"), scalarization("Random"), scalarization("Random")
    other.seed = 4
    generator, weights = torch.get_rng_state(), []
    for number in range(3):
        first, second = (take_step(Toy(), one, number) for one in (balancer, again))
        assert same(first, second)
        summary = {n: float(balancer.summary()[f"{n}/weight"]) / WEIGHTS[n] for n in WEIGHTS}
        assert sum(summary.values()) == pytest.approx(1.5)
        want = toy.step(FixedWeights({n: WEIGHTS[n] * summary[n] for n in WEIGHTS}), number)
        torch.testing.assert_close(first, want)
        weights.append(tuple(summary.values()))
    assert len(set(weights)) == 3
    take_step(Toy(), other, 0)
    assert other.summary()["a/weight"] != pytest.approx(1.5 * weights[0][0])
    take_step(Toy(), balancer, 3, "ac")
    assert float(balancer.summary()["a/weight"]) + float(balancer.summary()["c/weight"]) / 0.5 == pytest.approx(1.5)
    assert torch.equal(generator, torch.get_rng_state())


def test_the_geometric_mean_is_the_librarys():
    """Which is not called, since it reads on the host whether a loss is negative."""
    toy, balancer = Toy(), scalarization("GeometricMean")
    losses = torch.stack([WEIGHTS[n] * loss for n, loss in toy.losses(1).items()])
    (1.5 * list_scalarizers()["GeometricMean"]()(losses)).backward()
    want = gradients(toy)
    torch.testing.assert_close(toy.step(balancer, 1), want)


@pytest.mark.parametrize("names", ["abc", "ac"])
def test_famo_learns_its_logits_as_published(names):
    """Algorithm 2 in float64: Adam with L2 decay on the softmax, by how much each logarithm decreased."""
    toy, balancer = Toy(), scalarization("FAMO")
    logits = torch.zeros(len(names), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.2, weight_decay=0.01)
    for number in range(4):
        softmax = {n: math.exp(balancer.summary()[f"{n}/logit"].item()) for n in WEIGHTS}
        old = {n: WEIGHTS[n] * loss.item() for n, loss in toy.losses(number).items() if n in WEIGHTS}
        take_step(toy, balancer, number, names, rate=0.3)
        new = {n: WEIGHTS[n] * loss.item() for n, loss in toy.losses(number).items() if n in WEIGHTS}
        delta = [math.log(old[n] - BOUNDS[n] + 1e-8) - math.log(new[n] - BOUNDS[n] + 1e-8) for n in names]
        adam.zero_grad()
        torch.softmax(logits, dim=0).backward(torch.tensor(delta, dtype=torch.float64))
        logits.grad *= sum(softmax[n] for n in names) / sum(softmax.values())  # the part that b has is not theirs
        adam.step()
        learned = [balancer.summary()[f"{n}/logit"].item() for n in names]
        assert learned == pytest.approx(logits.tolist(), rel=1e-3)
    assert max(map(abs, learned)) > 0.1
    assert names == "abc" or balancer.summary()["b/logit"] == 0


# --- AvgNorm


@pytest.mark.parametrize("target", ["sum", "mean"])
def test_avg_norm_is_its_formula(target):
    toy, balancer = Toy(), AverageNorm(WEIGHTS, [toy_bias := Toy().bias], target)
    assert balancer.candidates == [], "a vector is no layer"
    balancer = AverageNorm(WEIGHTS, [toy.trunk, toy_bias], target)
    for number in range(3):
        rows = {}
        for name, weight in WEIGHTS.items():
            double = copy.deepcopy(toy).double()
            (weight * double_losses(double, number)[name]).backward()
            rows[name] = double.trunk.grad.flatten()
        norms = {name: row.norm() for name, row in rows.items()}
        common = sum(rows.values()).norm() if target == "sum" else sum(norms.values()) / 3
        factors = {name: float(common / norm) for name, norm in norms.items()}
        want = toy.step(FixedWeights({n: WEIGHTS[n] * factors[n] for n in WEIGHTS}), number, "abcd")
        want = {name: gradient.clone() for name, gradient in want.items()}
        torch.testing.assert_close(toy.step(balancer, number, "abcd"), want, rtol=1e-4, atol=1e-6)
        for name in WEIGHTS:
            assert float(balancer.summary()[f"{name}/weight"]) == pytest.approx(WEIGHTS[name] * factors[name], rel=1e-4)
            assert float(balancer.summary()[f"{name}/norm"]) == pytest.approx(float(norms[name]), rel=1e-4)


def test_avg_norm_takes_the_last_layer_that_all_reach(caplog):
    toy = Toy()
    heads = torch.nn.Parameter(torch.ones(2, 2))  # that no loss reaches
    balancer = AverageNorm(WEIGHTS, [toy.trunk, toy.bias, heads])
    toy.step(balancer, 0)
    assert list(balancer.layers.values()) == [toy.trunk]
    late = torch.nn.Parameter(torch.ones(2, 2))  # that c, as a regulariser at an early feature, does not reach
    losses = toy.losses(0)
    losses |= {name: losses[name] + late.square().mean() for name in "ab"}
    first, second = AverageNorm(WEIGHTS, [toy.trunk, late]), AverageNorm(WEIGHTS, [toy.trunk, late])
    second.weigh({name: losses[name] for name in "ab"})  # a step without c, or its diagnostics
    assert same(*({n: torch.as_tensor(w) for n, w in one.weigh(losses).items()} for one in (first, second)))
    assert second.layers == {("a", "b"): late, ("a", "b", "c"): toy.trunk}
    alone = AverageNorm(WEIGHTS, [toy.bias, heads])
    assert same({n: g.clone() for n, g in toy.step(alone, 0).items()}, plain(toy))
    toy.step(alone, 1)
    assert caplog.text.count("no trained layer serves all of a, b, c") == 1
    with pytest.raises(UserError, match="target=median is not known; choose sum or mean"):
        AverageNorm(WEIGHTS, [], "median")


# --- DB-MTL


def test_db_mtl_is_its_formula():
    """LibMTL's sums written out, with a step that lacks an objective and one that is skipped."""
    toy, balancer = Toy(), DualBalancing(WEIGHTS, CPU, beta=0.7, sigma=0.5)
    means = {name: torch.zeros(toy.trunk.numel() + 3, dtype=torch.float64) for name in WEIGHTS}
    counts = dict.fromkeys(WEIGHTS, 0)
    for number in range(5):
        names = "ac" if number == 2 else "abc"
        updated, heads = {}, {}
        for name in names:
            double = copy.deepcopy(toy).double()
            (WEIGHTS[name] * double_losses(double, number)[name] + 1e-8).log().backward()
            row = torch.cat([double.trunk.grad.flatten(), double.bias.grad])
            updated[name] = row + 0.7 / (counts[name] + 1) ** 0.5 * (means[name] - row)
            heads[name] = double.heads[name].grad
        largest = max(mean.norm() for mean in updated.values())
        total = sum(largest / (mean.norm() + 1e-8) * mean for mean in updated.values())
        toy.zero_grad(set_to_none=True)
        losses = {name: loss * (name in names) for name, loss in toy.losses(number).items()}
        balancer.backward(losses, toy.parameters())
        balancer.finish_step(number)
        step_gradients = gradients(toy)
        balancer.update(number, torch.tensor(float(number == 3)))
        torch.testing.assert_close(
            torch.cat([step_gradients["trunk"].flatten(), step_gradients["bias"]]).double(), total, rtol=1e-4, atol=1e-6
        )
        for name in names:
            torch.testing.assert_close(step_gradients[f"heads.{name}"].double(), heads[name], rtol=1e-4, atol=1e-6)
        if number != 3:
            means |= updated
            counts |= {name: counts[name] + 1 for name in names}
    assert balancer.counts.tolist() == [4, 3, 4]


# --- All of them


@pytest.mark.parametrize("method", METHODS)
def test_an_objective_without_labels_takes_no_part(method):
    """A loss of 0 without gradient is as one that is not there, also where no objective has labels."""
    toy, other = Toy(), Toy()
    with_zero, without = METHODS[method](toy), METHODS[method](other)
    for number in range(4):
        losses = toy.losses(number)
        toy.zero_grad(set_to_none=True)
        with_zero.backward({**losses, "b": 0.0 * losses["b"]}, toy.parameters())
        with_zero.finish_step(number)
        if with_zero.measures_progress:
            with_zero.observe_progress({**losses, "b": 0.0 * losses["b"]})
        with_zero.update(number, NO)
        other.zero_grad(set_to_none=True)
        without.backward(other.losses(number, "ac"), other.parameters())
        without.finish_step(number)
        if without.measures_progress:
            without.observe_progress(other.losses(number, "ac"))
        without.update(number, NO)
        step_gradients, want = gradients(toy), gradients(other)
        for name in ("trunk", "bias", "heads.a", "heads.c"):
            torch.testing.assert_close(step_gradients[name], want[name])
        assert not step_gradients["heads.b"].any()
    toy.zero_grad(set_to_none=True)
    with_zero.backward({name: 0.0 * loss for name, loss in toy.losses(4).items()}, toy.parameters())
    with_zero.finish_step(4)
    if with_zero.measures_progress:
        with_zero.observe_progress({name: 0.0 * loss for name, loss in toy.losses(4).items()})
    with_zero.update(4, NO)
    assert not any(gradient.any() for gradient in gradients(toy).values())
    step_gradients = take_step(toy, with_zero, 5)
    assert all(gradient.isfinite().all() for gradient in step_gradients.values())
    assert step_gradients["trunk"].any()


@pytest.mark.parametrize("method", METHODS)
def test_a_skipped_step_teaches_nothing_and_a_state_goes_on_to_the_bit(method, tmp_path):
    toy = Toy()
    balancer = METHODS[method](toy)
    for number in range(5):
        take_step(toy, balancer, number)
    old_state = copy.deepcopy(balancer.state_dict())
    losses = {name: loss * (torch.nan if name == "b" else 1.0) for name, loss in toy.losses(5).items()}
    balancer.backward(losses, toy.parameters())
    balancer.finish_step(5)
    if balancer.measures_progress:
        balancer.observe_progress(losses)
    balancer.update(5, torch.ones(()))
    assert not toy.trunk.grad.isfinite().all() or method in ("Constant", "DWA", "IMTLL", "Mean", "Sum", "UW", "Random")
    write_checkpoint_file(tmp_path / "a.pt", {"model": {}, "config": {}, "step": 6, "balancer": balancer.state_dict()})
    if method not in ("DWA", "Random"):  # which end a window, and go on to the next draw
        states = [[x for x in tree_leaves(s) if isinstance(x, Tensor)] for s in (old_state, balancer.state_dict())]
        assert all(torch.equal(old, new) for old, new in zip(*states, strict=True))
    twin = copy.deepcopy(toy)
    resumed = METHODS[method](twin)
    resumed.load_state_dict(read_checkpoint_file(tmp_path / "a.pt")["balancer"])
    for number in range(6, 9):
        step_gradients = take_step(toy, balancer, number)
        assert same(step_gradients, take_step(twin, resumed, number))
        assert all(gradient.isfinite().all() for gradient in step_gradients.values())
    state = balancer.state_dict()
    if state.keys() > {"method", "objectives"}:
        fresh = METHODS[method](Toy())
        fresh_steps = [take_step(Toy(), one, 9) for one in (fresh, balancer)]
        assert not same(*fresh_steps), "so that the test of resumption can fail"


@pytest.mark.parametrize("method", [name for name in SCALARIZERS if name not in ("DWA", "UW")])
def test_two_processes_have_the_factors_of_all_images(method, monkeypatch):
    """The mean of both processes' gradients, which DDP takes, is the gradient of one process with both batches."""
    one, halves = Toy(), [Toy(), Toy()]
    alone, pair = METHODS[method](one), [METHODS[method](toy) for toy in halves]
    for number in range(3):
        first, second = (one.losses(2 * number + i) for i in range(2))
        one.zero_grad(set_to_none=True)
        alone.backward({name: (first[name] + second[name]) / 2 for name in first}, one.parameters())
        parts = [torch.stack([loss.detach() for loss in losses.values()]) for losses in (first, second)]
        means = {name: (first[name] + second[name]).detach() / 2 for name in first}
        alone.finish_step(number)
        if alone.measures_progress:
            alone.observe_progress({name: 0.9 * loss for name, loss in means.items()})
        alone.update(number, NO)
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "world_size", lambda: 2)
            for i, (toy, balancer) in enumerate(zip(halves, pair)):
                patch.setattr(distributed, "all_reduce_sum", lambda x, other=parts[1 - i]: x + other)
                toy.zero_grad(set_to_none=True)
                balancer.backward(toy.losses(2 * number + i), toy.parameters())
                balancer.finish_step(number)
                if balancer.measures_progress:
                    patch.setattr(distributed, "all_reduce_sum", lambda x, other=parts[1 - i]: x + 0.9 * other)
                    balancer.observe_progress({n: 0.9 * loss for n, loss in toy.losses(2 * number + i).items()})
                balancer.update(number, NO)
        torch.testing.assert_close(pair[0].summary(), alone.summary())
        assert same(pair[0].summary(), pair[1].summary())
        for name, gradient in gradients(one).items():
            mean = (gradients(halves[0])[name] + gradients(halves[1])[name]) / 2
            torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-6)


def test_avg_norm_of_two_processes_is_that_of_all_images(monkeypatch):
    toy = Toy()
    first, second = toy.losses(0), toy.losses(1)
    alone = METHODS["avg_norm"](toy)
    alone.weigh({name: (first[name] + second[name]) / 2 for name in first})
    rows = [METHODS["avg_norm"](toy) for _ in range(2)]
    for losses, balancer in zip((first, second), rows):
        balancer.weigh(losses)

    def read_rows(losses: dict[str, Tensor]) -> Tensor:
        gradients = [torch.autograd.grad(w * losses[n], toy.trunk, retain_graph=True)[0] for n, w in WEIGHTS.items()]
        return torch.stack([gradient.flatten() for gradient in gradients])

    parts = [read_rows(losses) for losses in (first, second)]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for i, losses in enumerate((first, second)):
        monkeypatch.setattr(distributed, "all_reduce_sum", lambda x, other=parts[1 - i]: x + other)
        rows[i].weigh(losses)
        torch.testing.assert_close(rows[i].summary(), alone.summary())


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_a_step_are_weighed_by_their_undivided_losses(method):
    """Two equal batches, each loss divided by two, are one batch."""
    one, parts = Toy(), Toy()
    alone, accumulated = METHODS[method](one), METHODS[method](parts)
    for number in range(3):
        want = take_step(one, alone, number)
        parts.zero_grad(set_to_none=True)
        for _ in range(2):
            halves = {name: loss / 2 for name, loss in parts.losses(number).items()}
            accumulated.backward(halves, parts.parameters(), 2)
        accumulated.finish_step(number)
        step_gradients = gradients(parts)
        torch.testing.assert_close(step_gradients, want, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for name, gradient in step_gradients.items():
                parts.get_parameter(name).sub_(0.02 * gradient)
        if accumulated.measures_progress:
            accumulated.observe_progress(parts.losses(number))
        accumulated.update(number, NO)
    torch.testing.assert_close(accumulated.summary(), alone.summary(), rtol=1e-4, atol=1e-6)


# --- From a config


@functools.cache
def base_config() -> DictConfig:
    return composed("tasks.names=[depth,normals,edge]")


def balancer_of(choice: str, **settings) -> Balancer:
    """The balancer of ``balancing=choice`` with other settings of the group, or of others by their dotted names."""
    folder, files = ROOT / "configs" / "balancing", []
    while choice:
        files.insert(0, OmegaConf.load(folder / f"{choice}.yaml"))
        choice = files[0].pop("defaults", [None])[0]
    own_keys = {key: value for key, value in settings.items() if "." not in key}
    config = copy.deepcopy(base_config())
    config.balancing = OmegaConf.merge(*files, own_keys)
    for key, value in settings.items():
        if "." in key:
            OmegaConf.update(config, key, value)
    return build_balancer(config, build_tasks(config), object(), SimpleNamespace(ids=range(50)), CPU)


CHOICES = {"imtl_l": "IMTLL", "famo": "FAMO", "stch": "STCH", "gls": "GeometricMean", "rlw": "Random"}


def test_choices_are_the_librarys_names():
    assert {choice: balancer_of(choice).name for choice in CHOICES} == CHOICES
    assert balancer_of("uncertainty").name == "UW"
    assert balancer_of("scalarizer").scale == 1.0
    assert balancer_of("stch", options={"mu": 0.1}).scalarizer.mu == 0.1
    vector = {"lambda_": 1.0, "weights": {"depth": 1.0, "normals": 2.0, "edge": 3.0}}
    assert balancer_of("scalarizer", scalarizer="COSMOS", options=vector).preference.tolist() == [1, 2, 3]
    assert isinstance(balancer_of("avg_norm"), AverageNorm)
    assert balancer_of("db_mtl", sigma=0.5).sigma == 0.5


AS_OBJECTIVE = {"regularizer_as_objective": True, "regularizer.weighting": "fixed"}


@pytest.mark.parametrize(
    ("choice", "settings", "message"),
    [
        ("fixed", {"method": "db-mtl"}, r"method=db-mtl is not known \(did you mean db_mtl\?\); choose fixed,"),
        ("gls", {"scalarizer": "imtl_l"}, r"imtl_l is not known \(did you mean IMTLL\?\); choose one of"),
        ("gls", {"scalarizer": "MGDA"}, "balancing.scalarizer=MGDA .* balancing=torchjd"),
        ("torchjd", {"aggregator": "STCH"}, "balancing.aggregator=STCH .* balancing=scalarizer"),
        ("stch", {"options": {"muu": 1.0}}, r"options.muu is not an option of STCH \(did you mean mu\?\); it has mu,"),
        ("stch", {"options": {"mu": -1.0}}, "scalarizer=STCH with options .*strictly positive"),
        ("gls", {"scalarizer": "PBI"}, "scalarizer=PBI needs the option theta"),
        ("avg_norm", {"target": "max"}, "balancing.target=max is not known"),
        ("avg_norm", {"trainer.compile": True}, "set trainer.compile=false"),
        ("gls", {"loss.weights.edge": 0}, "loss.weights.edge=0"),
        ("gls", {"regularizer_as_objective": True}, "regularizer.weighting=fixed"),
        (
            "uncertainty",
            AS_OBJECTIVE | {"regularizer.weighting": "head_gradient_norm"},
            "regularizer.weighting=head_gradient_norm rescales",
        ),
        ("famo", AS_OBJECTIVE, "balancing.regularizer_as_objective=false"),
    ],
)
def test_what_is_refused(choice, settings, message):
    with pytest.raises(UserError, match=message) as error:
        balancer_of(choice, **settings)
    assert "\n" not in str(error.value)


def test_the_regularizer_as_an_objective():
    assert [*balancer_of("gls", **AS_OBJECTIVE).weights][-1] == "regularizer"
    balancer_of("rlw", regularizer_as_objective=True)  # whose weights do not depend on the losses


@pytest.mark.parametrize(("choice", "settings"), [("uncertainty", AS_OBJECTIVE), ("db_mtl", AS_OBJECTIVE)])
def test_a_state_of_before_version_0_3_goes_on(choice, settings, caplog):
    """It calls the regulariser's objective contrast."""
    saved, resumed = balancer_of(choice, **settings), balancer_of(choice, **settings)
    if choice == "db_mtl":
        saved.means = {name: {0: torch.full((2,), 3.0)} for name in saved.weights}
    else:
        with torch.no_grad():
            saved.learned.fill_(0.25)
    state = saved.state_dict()
    old = ["contrast" if name == "regularizer" else name for name in state["objectives"]]
    means = {"means": dict(zip(old, state["means"].values()))} if choice == "db_mtl" else {}
    resumed.load_state_dict({**state, "objectives": old, **means})
    assert "starts afresh" not in caplog.text
    pairs = list(zip(tree_leaves(state), tree_leaves(resumed.state_dict()), strict=True))
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def test_an_aggregator_of_before_version_0_3_goes_on():
    saved, resumed = (balancer_of("torchjd", aggregator="GradVac", regularizer_as_objective=True) for _ in range(2))
    names = tuple(saved.weights)
    assert names[-1] == "regularizer"
    saved.num_columns = 5
    saved.aggregators[names] = saved._build(names)
    saved.aggregators[names](torch.eye(len(names), 5) - 0.5)
    state = saved.state_dict()
    made = {key.replace("regularizer", "contrast"): values for key, values in state["made"].items()}
    resumed.load_state_dict({**state, "objectives": [*names[:-1], "contrast"], "made": made})
    assert list(resumed.aggregators) == [names]
    pairs = list(zip(tree_leaves(state), tree_leaves(resumed.state_dict()), strict=True))
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def test_a_state_of_another_kind_is_refused(monkeypatch):
    class Learned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

    for name in ("choose_class", "check_options"):
        monkeypatch.setattr(f"mtcl.training.balancing_scalarizers.{name}", lambda *_: Learned)
    with pytest.raises(UserError, match="New keeps a state"):
        scalarization("New")


# --- In a trainer


@pytest.mark.slow
@pytest.mark.parametrize("method", ["famo", "stch", "avg_norm", "db_mtl"])
def test_a_resumed_training_goes_on_to_the_bit(method, tmp_path):
    """Partly labelled batches, a diagnosed step; what a step computes twice leaves no trace in running statistics."""
    overrides = [*TINY, RESNET, "tasks.names=[depth,normals]", "data.label_assignment=random", f"balancing={method}"]
    overrides += ["trainer.val_interval=null", "trainer.checkpoint_interval=null", "trainer.num_panels=0"]
    config = composed(*overrides)

    def make(folder):
        torch.manual_seed(0)
        trainer = build_training_run(config, build_tasks(config), tmp_path / folder, CPU).trainer
        trainer.model.train()
        return trainer

    trainer, resumed = make("a"), make("b")
    batches = [batch for _, batch in zip(range(4), trainer.batches)]

    def step(one, batch, **options):
        one.train_step(batch, **options)
        one.step += 1

    for batch in batches[:2]:
        step(trainer, batch, with_diagnostics=True)
    resumed.restore(trainer.checkpoint())
    for batch in batches[2:]:
        rng = torch.get_rng_state()
        step(trainer, batch)
        torch.set_rng_state(rng)
        step(resumed, batch)
    states = [one.model.state_dict() for one in (trainer, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert same(trainer.balancer.summary(), resumed.balancer.summary())
    assert trainer.nonfinite_guard.flush() == []


def test_a_decoder_that_reads_labels_has_them_when_progress_is_measured(tmp_path, monkeypatch):
    config = composed(*TINY, "decoder=multi_head", "regularizer=none", "balancing=famo", "trainer.max_steps=1")
    trainer = build_training_run(config, build_tasks(config), tmp_path, torch.device("cpu")).trainer
    model, has_labels = trainer.model, []
    decoder_forward = model.decoder.forward

    def forward(maps, frame, labels):
        has_labels.append(labels is not None)
        return decoder_forward(maps, frame)

    monkeypatch.setattr(model, "reads_labels", True)
    monkeypatch.setattr(model.decoder, "forward", forward)
    trainer.train_step(*next(iter(trainer.batches_per_step())))
    assert has_labels == [True, True]  # the step, and its losses by the updated weights
