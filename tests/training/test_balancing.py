"""From one loss per objective to gradients: learned and moving weights, TorchJD's aggregators."""

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.common import ROOT, TINY, choices, composed
from helpers.processes import TORCHRUN, run_cases, weights_of
from helpers.shrunken import RESNET, shrunk
from helpers.toy_objectives import CPU, NO, WEIGHTS, Toy, plain, same
from omegaconf import OmegaConf
from torch import Tensor, nn

from mtcl import UserError, distributed
from mtcl.cli.train import train
from mtcl.config.build_data import build_tasks
from mtcl.config.build_training import build_balancer, build_training_run
from mtcl.training.balancing import Balancer, FixedWeights
from mtcl.training.balancing_scalarizers import DynamicWeightAveraging, LearnedScales
from mtcl.training.balancing_torchjd import GradientAggregation, list_aggregators, private_randomness
from mtcl.training.checkpoint import load_checkpoint, save_checkpoint
from mtcl.training.checkpoint_file import read_checkpoint_file, write_checkpoint_file
from mtcl.training.trainer import Trainer

OVERRIDES = [*TINY, RESNET, "trainer.val_interval=null", "trainer.checkpoint_interval=null", "trainer.num_panels=0"]
THREE = "tasks.names=[depth,normals,edge]"
try:
    KINDS = list(list_aggregators())
except UserError:
    KINDS = []
torchjd = pytest.mark.skipif(not KINDS, reason="TorchJD is not installed: pip install 'mtcl[balancing]'")


def uncertainty(weights=WEIGHTS, lr: float = 0.1, schedule=lambda step: 1.0) -> LearnedScales:
    return LearnedScales(weights, CPU, "UW", None, 2.0, lr=lr, schedule=schedule)


def dwa(every: int, **options) -> DynamicWeightAveraging:
    return DynamicWeightAveraging(WEIGHTS, CPU, "DWA", options, every=every)


# --- Uncertainty


def test_uncertainty_is_its_formula_learned_by_adam():
    """Against autograd through the formula, and torch's Adam."""
    toy, balancer = Toy(), uncertainty(lr=0.1, schedule=lambda step: 1 / (step + 1))
    s = torch.zeros(3, requires_grad=True)
    adam = torch.optim.Adam([s], lr=0.1)
    for number in range(4):
        toy.zero_grad(set_to_none=True)
        adam.zero_grad()
        adam.param_groups[0]["lr"] = 0.1 / (number + 1)
        losses = toy.losses(number, "abcd")  # d: no objective, counts once
        total = losses["d"] + sum(torch.exp(-s[i]) * w * losses[n] + s[i] for i, (n, w) in enumerate(WEIGHTS.items()))
        total.backward()
        want = {name: p.grad.clone() for name, p in toy.named_parameters() if p.grad is not None}
        adam.step()
        gradients = toy.step(balancer, number, "abcd")
        torch.testing.assert_close(gradients, want)
        torch.testing.assert_close(balancer.learned.detach(), s.detach())
    assert same(toy.step(uncertainty()), plain(toy)), "it starts with the weights"
    torch.testing.assert_close(balancer.summary()["b/weight"], 2 * torch.exp(-s[1].detach()))


def test_uncertainty_settles_at_the_size_of_the_loss():
    balancer = uncertainty({"a": 2.0, "b": 1.0}, lr=0.2, schedule=lambda step: 0.99**step)
    x = torch.ones((), requires_grad=True)
    for step in range(300):
        balancer.backward({"a": 4 * x, "b": 0.1 * x}, [x])
        balancer.finish_step(step)
        balancer.update(step, NO)
    assert balancer.learned.exp().tolist() == pytest.approx([8.0, 0.1], rel=0.02)


@pytest.mark.parametrize("skip", [False, True])
def test_what_is_not_there_or_is_skipped_teaches_nothing(skip):
    for balancer in (uncertainty(), dwa(every=1)):
        toy = Toy()
        for number in range(3):
            toy.step(balancer, number)
        summary_before = {name: float(value) for name, value in balancer.summary().items()}
        if skip:
            losses = toy.losses(3)
            balancer.backward({name: loss * torch.nan for name, loss in losses.items()}, toy.parameters())
            balancer.finish_step(3)
            balancer.update(3, torch.ones(()))
            balancer.every = 10  # else the window of one step closes empty
        else:
            toy.step(balancer, 3, "ab")
        summary_after = {name: float(value) for name, value in balancer.summary().items()}
        if skip and isinstance(balancer, LearnedScales):
            assert summary_after == summary_before
        assert all(math.isfinite(value) for value in summary_after.values())
        if isinstance(balancer, LearnedScales):
            assert summary_after["c/log_variance"] == summary_before["c/log_variance"] != 0
            assert skip or summary_after["a/log_variance"] != summary_before["a/log_variance"]
        elif not skip:
            assert summary_after["c/weight"] == WEIGHTS["c"], "not seen in both windows: no factor"
            assert summary_after["a/weight"] + summary_after["b/weight"] / 2 == pytest.approx(2)


# --- Dynamic weight averaging


def test_dwa_is_its_formula():
    """Against the paper's sums written out, windows of three steps, one of them skipped."""
    toy, balancer = Toy(), dwa(every=3, temperature=2.0)
    means, window, factors = [], [], dict.fromkeys(WEIGHTS, 1.0)
    for number in range(12):
        losses = {name: loss.item() for name, loss in toy.losses(number).items()}
        gradients = toy.step(balancer, number, skip=torch.tensor(float(number == 4)))
        want = toy.step(FixedWeights({n: WEIGHTS[n] * factors[n] for n in WEIGHTS}), number)
        torch.testing.assert_close(gradients, want)
        if number != 4:
            window.append(losses)
        if number % 3 == 2:
            means.append({name: sum(step_losses[name] for step_losses in window) / len(window) for name in WEIGHTS})
            window = []
        if number >= 5 and number % 3 == 2:
            rates = {name: math.exp(means[-1][name] / means[-2][name] / 2.0) for name in WEIGHTS}
            factors = {name: 3 * rate / sum(rates.values()) for name, rate in rates.items()}
            assert len(set(factors.values())) == 3
    assert {n: v.item() for n, v in balancer.summary().items()} == pytest.approx(
        {f"{n}/weight": WEIGHTS[n] * factors[n] for n in WEIGHTS}
    )


MOVING = {"uncertainty": uncertainty, "dwa": lambda: dwa(every=2)}


@pytest.mark.parametrize("make", MOVING.values(), ids=MOVING)
def test_moving_weights_follow_the_mean_over_processes_and_batches(make, monkeypatch):
    """Two batches of a step, or two processes, weigh as their mean does; and a state continues to the bit."""
    toy, one, batches, process = Toy(), make(), make(), make()
    for number in range(5):
        first, second = toy.losses(2 * number), toy.losses(2 * number + 1)
        one.backward({name: (first[name] + second[name]) / 2 for name in first}, [])
        one.finish_step(number)
        one.update(number, NO)
        first, second = toy.losses(2 * number), toy.losses(2 * number + 1)
        for part in (first, second):
            batches.backward({name: loss / 2 for name, loss in part.items()}, [])
        batches.finish_step(number)
        batches.update(number, NO)
        with monkeypatch.context() as patch:
            other = torch.stack([loss.detach() for loss in toy.losses(2 * number + 1).values()])
            patch.setattr(distributed, "world_size", lambda: 2)
            patch.setattr(distributed, "all_reduce_sum", lambda x, other=other: x + other)
            process.backward(toy.losses(2 * number), [])
            process.finish_step(number)
            process.update(number, NO)
        for compared in (batches, process):
            torch.testing.assert_close(compared.summary(), one.summary())
    resumed = make()
    resumed.load_state_dict(copy.deepcopy(one.state_dict()))
    assert same(one.summary(), resumed.summary())
    for balancer in (one, resumed):
        toy.step(balancer, 5)
    assert same(one.summary(), resumed.summary())


# --- TorchJD


def aggregated(name: str, seed: int = 0, **options) -> GradientAggregation:
    needed = {"CAGrad": {"c": 0.4}, "Constant": {"weights": [1.0, 2.0, 3.0]}, "FairGrad": {"alpha": 2.0}}
    needed |= {"Krum": {"n_byzantine": 0}, "TrimmedMean": {"trim_number": 1}}
    try:
        return GradientAggregation(WEIGHTS, CPU, name, {**needed.get(name, {}), **options}, seed)
    except UserError as error:
        if "pip install" in str(error):
            pytest.skip(str(error))
        raise


@torchjd
def test_the_library_names_the_aggregators():
    assert {"PCGrad", "CAGrad", "MGDA", "NashMTL", "IMTLG", "AlignedMTL", "UPGrad"} <= set(KINDS)
    assert not {"Aggregator", "WeightedAggregator", "GramianWeightedAggregator", "PCGradWeighting"} & set(KINDS)
    files = [OmegaConf.load(ROOT / "configs" / "balancing" / f"{choice}.yaml") for choice in choices("balancing")]
    aggregators = {file.aggregator for file in files if "aggregator" in file}
    assert len(aggregators) == 7
    assert aggregators <= set(KINDS)


@torchjd
@pytest.mark.parametrize("name", KINDS)
def test_every_aggregator(name, tmp_path):
    """Heads as in a plain backward pass, the trunk moved; reproducible, resumable to the bit, and torch's generator
    left alone."""
    toy, balancer, again, generator = Toy(), aggregated(name), aggregated(name), torch.get_rng_state()
    for number in range(3):
        gradients = {n: g.clone() for n, g in toy.step(balancer, number).items()}
        want = plain(toy, number)
        assert gradients.keys() == want.keys() == {"trunk", "bias", "heads.a", "heads.b", "heads.c"}
        assert all(torch.equal(gradients[n], want[n]) for n in want if n.startswith("heads"))
        assert all(gradients[n].isfinite().all() for n in ("trunk", "bias"))
        assert gradients["trunk"].stride() == toy.trunk.stride()
        assert same(gradients, toy.step(again, number)), "the same once more"
    assert any(gradients[n].any() for n in ("trunk", "bias"))
    write_checkpoint_file(tmp_path / "a.pt", {"model": {}, "config": {}, "step": 3, "balancer": balancer.state_dict()})
    resumed = aggregated(name)
    resumed.load_state_dict(read_checkpoint_file(tmp_path / "a.pt")["balancer"])
    for number in range(3, 6):
        gradients = {n: g.clone() for n, g in toy.step(balancer, number).items()}
        assert same(gradients, toy.step(resumed, number))
    assert torch.equal(generator, torch.get_rng_state())


@torchjd
@pytest.mark.parametrize("name", ["GradVac", "NashMTL", "PCD", "ExcessMTL"])
def test_a_state_matters(name):
    """... so that the test of resumption above can fail."""
    options = {"ExcessMTL": {"n_warmup_steps": 1}, "NashMTL": {"update_weights_every": 3}}.get(name, {})
    toy, balancer, fresh = Toy(), aggregated(name, **options), aggregated(name, **options)
    for number in range(4):
        toy.step(balancer, number)
    gradients = {n: g.clone() for n, g in toy.step(balancer, 4).items()}
    assert not same(gradients, toy.step(fresh, 4))


@torchjd
def test_randomness_is_of_seed_and_step():
    toy = Toy()

    def trunk(seed: int, step: int) -> Tensor:
        balancer = aggregated("Random", seed=seed)
        balancer.backward(toy.losses(), toy.parameters())
        toy.zero_grad(set_to_none=True)
        balancer.finish_step(step)
        return toy.trunk.grad.clone()

    first = trunk(0, 0)
    assert torch.equal(first, trunk(0, 0))
    assert not torch.equal(first, trunk(0, 1))
    assert not torch.equal(first, trunk(1, 0))


@torchjd
def test_the_sum_is_the_plain_backward_pass():
    """Weights, a loss that is no objective, an objective that lies outside; then the mean, times their number."""
    toy = Toy()
    want = {n: g.clone() for n, g in plain(toy, 3, "abcd").items()}
    for name, factor in (("Sum", 1.0), ("Mean", 3.0)):
        balancer = GradientAggregation({n: factor * w for n, w in WEIGHTS.items()}, CPU, name)
        gradients = toy.step(balancer, 3, "abcd")
        assert gradients.keys() == want.keys()
        for parameter in ("trunk", "bias", "heads.d"):
            torch.testing.assert_close(gradients[parameter], want[parameter])
    assert balancer.summary()["b/weight"] == pytest.approx(2.0)  # 3 * 2 / 3
    only = toy.step(GradientAggregation({"a": 1.0, "b": 2.0, "c": 0.5, "d": 1.0}, CPU, "Sum"), 3, "abcd")
    torch.testing.assert_close(only, want)


@torchjd
def test_pcgrad_is_its_algorithm():
    """Algorithm 1 of the paper, vector by vector, in the order that was drawn."""
    toy = Toy()
    conflicts = 0
    for number in range(6):
        rows = {}
        for name, weight in WEIGHTS.items():
            toy.zero_grad(set_to_none=True)
            (weight * toy.losses(number)[name]).backward()
            rows[name] = torch.cat([toy.trunk.grad.flatten(), toy.bias.grad]).double()
        total = torch.zeros_like(rows["a"])
        with private_randomness(7, number, CPU):
            for i, name in enumerate(rows):
                mine = rows[name].clone()
                for j in torch.randperm(3).tolist():
                    other = list(rows.values())[j]
                    if j != i and mine @ other < 0:
                        conflicts += 1
                        mine -= mine @ other / (other @ other) * other
                total += mine
        gradients = toy.step(aggregated("PCGrad", seed=7), number)
        gradients = torch.cat([gradients["trunk"].flatten(), gradients["bias"]]).double()
        torch.testing.assert_close(gradients, total, rtol=1e-4, atol=1e-5)
    assert conflicts >= 3


@torchjd
def test_an_objective_without_a_gradient_is_left_out():
    """MGDA's shortest vector would otherwise be zero."""
    toy, balancer = Toy(), aggregated("MGDA")
    losses = toy.losses(1)
    balancer.backward({**losses, "c": 0.0 * losses["c"]}, toy.parameters())
    balancer.finish_step(1)
    assert toy.trunk.grad.any()
    assert list(balancer.aggregators) == [("a", "b")]
    assert toy.heads["c"].grad is not None
    assert not toy.heads["c"].grad.any()
    assert "c/weight" not in balancer.summary()
    toy.step(balancer, 2)
    assert list(balancer.aggregators) == [("a", "b"), ("a", "b", "c")]
    gradients = toy.step(balancer, 3, "a")
    want = plain(toy, 3, "a")
    assert same(gradients, want), "one objective alone has nothing to be balanced with"


@torchjd
def test_batches_of_a_step_are_averaged_before():
    toy = Toy()
    joint, parts = aggregated("PCGrad"), aggregated("PCGrad")
    a, b = toy.losses(1), toy.losses(2)
    joint.backward({n: (a[n] + b[n]) / 2 for n in a}, toy.parameters())
    joint.finish_step(0)
    want = {n: p.grad.clone() for n, p in toy.named_parameters() if p.grad is not None}
    toy.zero_grad(set_to_none=True)
    for losses in (toy.losses(1), toy.losses(2)):
        parts.backward({n: loss / 2 for n, loss in losses.items()}, toy.parameters())
    parts.finish_step(0)
    torch.testing.assert_close({n: p.grad for n, p in toy.named_parameters() if p.grad is not None}, want)


@torchjd
def test_what_is_not_finite_never_reaches_the_aggregator():
    toy, balancer = Toy(), aggregated("GradVac")
    toy.step(balancer, 0)
    state_before = {name: value.clone() for name, value in balancer.state_dict()["made"]["a,b,c"].items()}
    for bad in (math.nan, math.inf):
        losses = toy.losses(1)
        toy.zero_grad(set_to_none=True)
        balancer.backward({**losses, "b": bad * losses["b"]}, toy.parameters())
        balancer.finish_step(1)
        assert not toy.trunk.grad.isfinite().all()
        losses = toy.losses(1)
        toy.zero_grad(set_to_none=True)
        balancer.backward({**losses, "b": losses["b"] + bad}, toy.parameters())  # with a gradient that is finite
        balancer.finish_step(1)
    state_after = balancer.state_dict()["made"]["a,b,c"]
    assert state_before
    assert all(torch.equal(state_before[name], state_after[name]) for name in state_before)


@torchjd
def test_a_solver_that_fails_leaves_a_step_that_is_skipped(caplog, monkeypatch):
    toy, balancer = Toy(), aggregated("IMTLG")

    def fail(self, gramian):
        raise RuntimeError("no solution\nat all")

    monkeypatch.setattr("torchjd.aggregation.IMTLGWeighting.forward", fail)
    gradients = toy.step(balancer, 4)
    assert gradients["trunk"].isnan().all()
    assert "step 4: IMTLG failed (RuntimeError: no solution)" in caplog.text
    assert not hasattr(toy.trunk, "jac")


@torchjd
def test_vectors_over_objectives():
    toy = Toy()
    want = toy.step(FixedWeights({"a": 3.0, "b": 8.0, "c": 0.5}), 1)
    want = {n: want[n].clone() for n in ("trunk", "bias")}
    for weights in ({"c": 1.0, "a": 3.0, "b": 4.0}, [3.0, 4.0, 1.0]):
        gradients = toy.step(aggregated("Constant", weights=weights), 1)
        torch.testing.assert_close({n: gradients[n] for n in want}, want)
    toy.step(aggregated("Constant", weights=weights), 1, "ac")  # a part of them


@torchjd
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("PCgrad", {}, r"aggregator=PCgrad is not known \(did you mean PCGrad\?\); choose one of AlignedMTL, .*UPGrad"),
        ("PCGradWeighting", {}, "is not known"),
        ("CAGrad", {}, r"aggregator=CAGrad needs the option c"),
        ("PCGrad", {"c": 1}, "options.c is not an option of PCGrad; it has none"),
        ("MGDA", {"iterations": 1}, "options.iterations is not an option of MGDA; it has epsilon, max_iters"),
        ("NashMTL", {"n_tasks": 3}, "options.n_tasks is not an option"),
        ("Constant", {"weights": [1.0, 2.0]}, "weights=.* must have a number for each of a, b, c"),
        ("Constant", {"weights": {"a": 1.0, "b": 1.0, "d": 1.0}}, "must have a number for each of a, b, c"),
        ("Krum", {"n_byzantine": 3}, r"Krum with .*n_byzantine.* can't balance a, b, c: .*6 rows"),
        ("GradDrop", {"f": "identity"}, "GradDrop with .* can't balance"),
    ],
)
def test_mistakes_in_the_options(name, options, message):
    with pytest.raises(UserError, match=message) as error:
        GradientAggregation(WEIGHTS, CPU, name, options)
    assert "\n" not in str(error.value)


@torchjd
def test_solvers_that_are_not_installed(monkeypatch):
    monkeypatch.setattr("torchjd._mixins.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"aggregator=CAGrad: .*cvxpy.*; pip install 'mtcl\[balancing\]'") as error:
        GradientAggregation(WEIGHTS, CPU, "CAGrad", {"c": 0.4})
    assert "\n" not in str(error.value)


def test_without_torchjd(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(UserError, match=r"^method=torchjd needs TorchJD: pip install 'mtcl\[balancing\]'"):
        GradientAggregation(WEIGHTS, CPU, "UPGrad")


# --- From a config


def balancer_of(*overrides: str) -> Balancer:
    config = composed("regularizer=contrastive", *overrides)
    tasks = build_tasks(config)
    regularizer = None if config.regularizer._target_ is None or len(tasks) < 2 else object()
    return build_balancer(config, tasks, regularizer, SimpleNamespace(ids=range(50)), CPU)


def test_methods_and_objectives():
    tasks = ["depth", "normals", "edge"]
    fixed = balancer_of(THREE)
    assert type(fixed) is FixedWeights
    assert fixed.weights == {"depth": 1.0, "normals": 10.0, "edge": 50.0}
    assert fixed.summary() == {}, "nothing to write down"
    dwa = balancer_of(THREE, "balancing=dwa", "data.batch_size=4", "trainer.accumulate_grad_batches=2")
    assert (list(dwa.weights), dwa.every, dwa.scalarizer.temperature) == (tasks, 6, 2.0)
    assert balancer_of(THREE, "balancing=dwa", "balancing.every=7").every == 7
    overrides = [
        THREE,
        "balancing=uncertainty",
        "balancing.regularizer_as_objective=true",
        "regularizer.weighting=fixed",
    ]
    assert list(balancer_of(*overrides).weights) == [*tasks, "regularizer"]
    assert list(balancer_of(*overrides, "regularizer=none").weights) == tasks


@torchjd
def test_an_aggregator_from_the_command_line():
    overrides = ["balancing=torchjd", "balancing.aggregator=MGDA", "balancing.options={max_iters: 7}"]
    balancer = balancer_of(THREE, *overrides, "balancing.regularizer_as_objective=true", "seed=5")
    assert (balancer.name, balancer.options, balancer.seed) == ("MGDA", {"max_iters": 7}, 5)
    assert list(balancer.weights) == ["depth", "normals", "edge", "regularizer"]
    assert balancer_of(THREE, "balancing=imtl_g").name == "IMTLG"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["balancing.method=pcgrad"], r"method=pcgrad is not known; choose fixed, uncertainty, .* or torchjd"),
        (["balancing=torchjd", "trainer.compile=true"], "set trainer.compile=false"),
        (
            ["balancing=dwa", "balancing.regularizer_as_objective=true"],
            "regularizer_as_objective=false or regularizer.weighting=fixed",
        ),
        (["balancing=uncertainty", "loss.weights.edge=0"], "loss.weights.edge=0"),
        (["balancing=dwa", "tasks=single_depth"], "has one objective only, depth; use balancing=fixed"),
    ],
)
def test_what_does_not_go_together(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        balancer_of(*overrides)
    assert "\n" not in str(error.value)


def test_several_processes_are_not_for_torchjd(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match="trains in one process"):
        balancer_of("balancing=torchjd")
    balancer_of("balancing=uncertainty")


def test_train_says_it_in_one_sentence(cli, tmp_path):
    overrides = ["balancing=dwa", "balancing.regularizer_as_objective=true"]
    result = cli("train.py", *TINY, *overrides, f"hydra.run.dir={tmp_path / 'run'}")
    assert result.code == 1
    assert "regularizer.weighting=fixed" in result.err
    assert "Traceback" not in result.err


# --- In a trainer


def make_trainer(folder: Path, *overrides: str) -> Trainer:
    config = composed(*OVERRIDES, *overrides)
    torch.manual_seed(0)
    trainer = build_training_run(config, build_tasks(config), folder, CPU).trainer
    trainer.model.train()
    return trainer


def one_step(trainer: Trainer, *batches: dict) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The gradients of model and regulariser in one step, and how many objectives reached each parameter."""
    gradients: dict[str, Tensor] = {}
    reached: dict[str, int] = {}
    parameters = dict(trainer.model.named_parameters())
    contrast_parameters = trainer.regularizer.named_parameters() if trainer.regularizer is not None else ()
    parameters |= {f"regularizer.{name}": p for name, p in contrast_parameters}
    finish, step = trainer.balancer.finish_step, trainer.optimizer.step

    def look(number):
        rows = getattr(trainer.balancer, "rows", {})
        reached.update({name: len(rows.get(p, {})) for name, p in parameters.items()})
        finish(number)
        gradients.update({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
        assert all(p.grad is None or p.grad.stride() == p.stride() for p in parameters.values())

    trainer.balancer.finish_step, trainer.optimizer.step = look, lambda *args: None
    torch.manual_seed(1)  # of dropout
    trainer.train_step(*(batches or [next(iter(trainer.batches))]))
    trainer.balancer.finish_step, trainer.optimizer.step = finish, step
    return gradients, reached


def assert_alike(actual: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Up to rounding, of which parameters without a say (a bias before a norm) have nothing else."""
    assert actual.keys() == want.keys()
    largest = max(gradient.abs().max().item() for gradient in want.values())
    for name, gradient in want.items():
        bound = 1e-4 * gradient.abs().max().item() + 3e-6 * largest
        assert (actual[name] - gradient).abs().max().item() <= bound, name


slow = pytest.mark.slow
MODELS = [
    pytest.param(*row, id="-".join(row), marks=() if fast else slow)
    for fast, *row in (
        (True, "multi_head", "resnet18", "false"),
        (False, "multi_head", "resnet18", "true"),
        (True, "pad_net", "hrnet_w18_small", "true"),
        (False, "pad_net", "hrnet_w18_small", "false"),
        (False, "mti_net", "hrnet_w18_small", "true"),
        (False, "atrc", "hrnet_w18_small", "false"),
        (False, "invpt", "vit_small", "true"),
        (False, "taskprompter", "vit_base", "true"),
        (False, "mqtransformer", "swin_tiny", "true"),
        (False, "deeplab", "resnet18", "true"),
    )
]


@torchjd
@pytest.mark.parametrize(("decoder", "backbone", "contrast"), MODELS)
def test_summed_gradients_are_those_of_a_plain_step(decoder, backbone, contrast, tmp_path):
    """Of every parameter, projectors too. What is aggregated is what the losses of several objectives reach."""
    overrides = [f"decoder={decoder}", f"backbone={backbone}", "data.size=[64,64]", THREE]
    # The last word of TINY and its like do not fit other decoders.
    config = [w for w in OVERRIDES if not w.startswith(("decoder.", "backbone=", "++backbone", "data.size"))]
    overrides = [*config, *overrides, *shrunk(decoder, backbone), "trainer.clip_norm=null"]
    results = []
    for balancing in (
        [],
        ["balancing=torchjd", "balancing.aggregator=Sum", f"balancing.regularizer_as_objective={contrast}"],
    ):
        composition = composed(*overrides, *balancing)
        torch.manual_seed(0)
        trainer = build_training_run(composition, build_tasks(composition), tmp_path, CPU).trainer
        trainer.model.train()
        results.append(one_step(trainer))
    (want, _), (gradients, reached) = results
    assert_alike(gradients, want)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    shared = {names[id(p)] for p in trainer.model.shared_parameters()}
    several = {name for name, count in reached.items() if count > 1}
    if contrast == "false":
        assert several == {n for n in shared if trainer.model.get_parameter(n).requires_grad}
        assert all(reached[n] == 0 for n in reached if n.startswith("regularizer."))
    else:
        assert several > {n for n in shared if trainer.model.get_parameter(n).requires_grad}
        assert all(reached[n] == 1 for n in reached if n.startswith("regularizer."))


@torchjd
def test_checkpointed_blocks_give_the_same_gradients(tmp_path):
    overrides = [THREE, "balancing=torchjd", "balancing.aggregator=Mean", "balancing.regularizer_as_objective=true"]
    gradients, statistics = [], []
    for recompute in ("false", "true"):
        trainer = make_trainer(tmp_path, *overrides, f"trainer.grad_checkpointing={recompute}")
        gradients.append(one_step(trainer)[0])
        statistics.append([b.clone() for n, b in trainer.model.named_buffers() if "running" in n])
    assert_alike(gradients[1], gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*statistics))


@pytest.mark.slow
@torchjd
def test_accumulated_batches_are_one_batch(tmp_path):
    overrides = ["regularizer=none", "tasks.names=[depth,normals]", "balancing=pcgrad"]
    gradients = []
    for more in (["data.batch_size=4"], ["data.batch_size=2", "trainer.accumulate_grad_batches=2"]):
        trainer = make_trainer(tmp_path, *overrides, *more)
        for module in trainer.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        gradients.append(one_step(trainer, *next(iter(trainer.batches_per_step())))[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4)


METHODS = {
    "uncertainty": ["balancing=uncertainty", "balancing.lr=0.1"],
    "dwa": ["balancing=dwa", "balancing.every=1"],
    "contrast": [
        "balancing=dwa",
        "balancing.every=1",
        "balancing.regularizer_as_objective=true",
        "regularizer.weighting=fixed",
    ],
    "torchjd": ["balancing=torchjd", "balancing.aggregator=GradVac", "balancing.regularizer_as_objective=true"],
    "avg_norm": [
        "decoder=diffusion_mtl",
        *shrunk("diffusion_mtl", ""),
        "balancing=avg_norm",
        "balancing.regularizer_as_objective=true",
        "regularizer.options.feature=initial",  # before layers that the tasks share
    ],
}


@pytest.mark.parametrize(
    "method",
    [
        "dwa",
        "avg_norm",
        pytest.param("torchjd", marks=torchjd),
        pytest.param("uncertainty", marks=slow),
        pytest.param("contrast", marks=slow),
    ],
)
def test_a_skipped_step_and_a_resumed_run(method, tmp_path):
    """A step that is not finite changes nothing, clipping and the running mean of weights go on; what is restored from
    a checkpoint goes on to the bit."""
    overrides = [THREE, *METHODS[method], "trainer.ema=0.9", "schedule=constant", "trainer.max_steps=10"]
    trainer = make_trainer(tmp_path / "a", *overrides)
    batches = [batch for _, batch in zip(range(6), trainer.batches)]
    for batch in batches[:3]:
        trainer.train_step(batch, with_diagnostics=trainer.step == 0)
        trainer.step += 1

    def state(of: Trainer) -> dict[str, Tensor]:
        tensors = {f"model/{name}": p.detach().clone() for name, p in of.model.named_parameters()}

        def walk(path: str, value: object) -> None:
            for name, part in value.items() if isinstance(value, dict) else ():
                walk(f"{path}/{name}", part)
            if isinstance(value, Tensor):
                tensors[path] = value.clone()

        walk("balancer", {**of.balancer.state_dict(), **of.balancer.summary()})
        return tensors

    state_before = state(trainer)
    bad = {**batches[3], "labels": {**batches[3]["labels"], "normals": batches[3]["labels"]["normals"] * math.nan}}
    windows = state_before.get("balancer/windows")
    trainer.train_step(bad)
    state_after = state(trainer)
    learned = [name for name in state_before if "norm" not in name.split("/")[-1] and windows is None]
    for name in [n for n in state_before if n.startswith("model/")] + [n for n in learned if "weight" not in n]:
        assert torch.equal(state_before[name], state_after[name]), name
    trainer.step += 1
    assert len(trainer.nonfinite_guard.flush()) == 1
    save_checkpoint(tmp_path / "a.pt", trainer.checkpoint())
    resumed = make_trainer(tmp_path / "b", *overrides)
    resumed.restore(load_checkpoint(tmp_path / "a.pt"))
    for batch in batches[4:]:
        for each in (trainer, resumed):
            torch.manual_seed(each.step)  # of the decoder's noise
            each.train_step(batch)
            each.step += 1
    a, b = state(trainer), state(resumed)
    assert same(a, b)
    assert any(not torch.equal(a[name], state_before[name]) for name in state_before if name.startswith("balancer"))


def test_names_in_checkpoints_stay():
    names = {kind.saved_name for kind in (FixedWeights, DynamicWeightAveraging, GradientAggregation)}
    assert names | {uncertainty().saved_name} == {"FixedWeights", "Uncertainty", "DynamicAverage", "Aggregated"}
    assert uncertainty().state_dict().keys() == {"method", "objectives", "log_variance", "optimizer"}
    assert dwa(every=2).state_dict().keys() == {"method", "objectives", "windows"}


def test_another_balancing_starts_afresh(tmp_path, caplog):
    old = make_trainer(tmp_path / "a", THREE)
    old.train_step(next(iter(old.batches)))
    states = [old.checkpoint()]
    states.append(replace(states[0], balancer=None))  # of before the key
    trainer = make_trainer(tmp_path / "b", THREE, "balancing=dwa")
    for number, state in enumerate(states, start=1):
        trainer.restore(state)
        assert caplog.text.count("with another balancing: this one starts afresh") == number
        old.restore(state)
        assert caplog.text.count("afresh") == number


def test_the_tasks_gradients_are_shown_as_they_enter(tmp_path):
    """The contrast's share is measured beside the tasks' losses as they are weighted by now."""
    trainer = make_trainer(tmp_path, THREE, "balancing=uncertainty")
    batch = next(iter(trainer.batches))
    statistics_before = trainer.accumulate_gradients(batch, 1, {}, True)
    trainer.balancer.factors = torch.tensor([0.5, 1.0, 1.0])
    statistics_after = trainer.accumulate_gradients(batch, 1, {}, True)
    ratio = {
        name: float(statistics_after[f"gradient/{name}/norm_task"] / statistics_before[f"gradient/{name}/norm_task"])
        for name in trainer.tasks
    }
    assert ratio == pytest.approx({"depth": 0.5, "normals": 1.0, "edge": 1.0}, rel=1e-3)


@pytest.mark.parametrize("method", [pytest.param("torchjd", marks=[torchjd, slow]), "uncertainty"])
def test_a_run_writes_its_weights_down(method, tmp_path):
    train(
        composed(*OVERRIDES, THREE, *METHODS[method], "trainer.max_steps=3", "trainer.validate_first=false"), tmp_path
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    written = [line for line in lines if line["kind"] == "balancing"]
    assert [line["step"] for line in written] == [0, 1, 2]
    assert {f"{name}/weight" for name in ("depth", "normals", "edge")} < written[-1].keys()
    assert written[0]["normals/weight"] != written[-1]["normals/weight"]


SHARED_METHODS = {
    "uncertainty": ["balancing=uncertainty", "balancing.lr=0.3"],
    "dwa": ["balancing=dwa", "balancing.every=1"],
    "famo": ["balancing=famo", "balancing.options.lr=0.3"],
    "stch": ["balancing=stch", "optimizer=sgd"],  # small factors: Adam would weigh up the rounding of their gradients
    "avg_norm": ["balancing=avg_norm"],
}


@pytest.mark.slow
def test_two_processes_weigh_as_one(tmp_path):
    """The third step has learned weights; partial labels, so that processes lack objectives of their own."""
    cases = {method: ["data.label_assignment=random", *overrides] for method, overrides in SHARED_METHODS.items()}
    one, two = run_cases(tmp_path / "one", None, cases), run_cases(tmp_path / "two", TORCHRUN, cases)
    for method in cases:
        weights, others = weights_of(one[method][1]), weights_of(two[method][1])
        assert weights.keys() == others.keys(), method
        for name in weights:
            assert torch.allclose(others[name], weights[name], rtol=0, atol=2e-4), (method, name)
