"""Steps that go wrong, runs that are told to stop, and what makes a step cheaper."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sympy
import torch
from functorch.compile import make_boxed_compiler
from helpers.common import ROOT, TINY, composed
from helpers.shrunken import shrunk
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.exc import InductorError
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

from mtcl import UserError
from mtcl.cli.train import train
from mtcl.config.build_data import build_tasks
from mtcl.config.build_training import build_trainer_options, build_training_run
from mtcl.errors import Preempted
from mtcl.progress import PlainProgress
from mtcl.training.checkpoint_file import read_checkpoint_file
from mtcl.training.measurements import Throughput
from mtcl.training.train_step import CompiledModule
from mtcl.training.trainer import Trainer

OVERRIDES = [*TINY, "trainer.val_interval=null", "trainer.checkpoint_interval=null", "trainer.num_panels=0"]


def make_trainer(tmp_path: Path, *overrides: str) -> Trainer:
    config = composed(*OVERRIDES, *overrides)
    torch.manual_seed(0)
    trainer = build_training_run(config, build_tasks(config), tmp_path, torch.device("cpu")).trainer
    trainer.model.train()
    return trainer


def records(folder: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def spoiled(batch: dict) -> dict:
    labels = dict(batch["labels"])
    labels["normals"] = torch.full_like(labels["normals"], math.nan)
    return {**batch, "labels": labels}


OPTIMIZERS = ["adamw", "adam", "sgd", "timm"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("first", [False, True])
def test_a_step_that_is_not_finite_is_no_step(optimizer, first, tmp_path):
    """Neither weights nor moments nor projectors move; the next good step is that of a run without the bad one.
    ``first``: the bad step is the very first."""
    trainer = make_trainer(tmp_path, f"optimizer={optimizer}")
    good, bad, following = (batch for _, batch in zip(range(3), trainer.batches))
    if not first:
        trainer.train_step(good)

    def state() -> dict[str, torch.Tensor]:
        state_values = {f"model.{k}": v.clone() for k, v in trainer.model.named_parameters()}
        state_values |= {f"regularizer.{k}": v.clone() for k, v in trainer.regularizer.named_parameters()}
        for which in (trainer.optimizer, trainer.regularizer_optimizer):
            for i, entry in enumerate(which.optimizer.state_dict()["state"].values()):
                state_values |= {f"{which}.{i}.{k}": v.clone() for k, v in entry.items() if torch.is_tensor(v)}
        return state_values

    values_before = state()
    trainer.train_step(spoiled(bad))
    for name, value in state().items():
        assert torch.equal(value, values_before.get(name, torch.zeros_like(value))), name
    assert all(value.isfinite() for value in trainer.train_step(following).values())
    assert any(not torch.equal(value, values_before[name]) for name, value in state().items() if name in values_before)
    (skipped,) = trainer.nonfinite_guard.flush()
    assert "loss of normals" in skipped.terms
    assert "loss of depth" not in skipped.terms
    assert skipped.ids == [meta.id for meta in bad["meta"]]


def test_statistics_that_saw_nan_are_put_back(tmp_path):
    trainer = make_trainer(tmp_path, "trainer.max_nonfinite_steps=3")
    batch = next(iter(trainer.batches))
    trainer.train_step(batch)
    assert trainer.nonfinite_guard.flush() == []
    with torch.no_grad():
        weight = next(trainer.model.parameters())
        weight_before = weight.clone()
        weight.fill_(math.nan)
    trainer.train_step(batch)
    with torch.no_grad():
        weight.copy_(weight_before)
    running = [b for name, b in trainer.model.named_buffers() if name.endswith("running_mean")]
    assert any(not b.isfinite().all() for b in running)
    assert len(trainer.nonfinite_guard.flush()) == 1
    assert all(b.isfinite().all() for b in running)


def poison(monkeypatch, steps: range) -> None:
    step = Trainer.train_step

    def train_step(self, *batches, **options):
        return step(self, *[spoiled(b) if self.step in steps else b for b in batches], **options)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def test_skipped_steps_are_written_down_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    poison(monkeypatch, range(2, 4))
    train(composed(*OVERRIDES, "trainer.max_steps=6", "trainer.log_interval=6"), tmp_path)
    written = records(tmp_path, "skipped")
    assert [record["step"] for record in written] == [2, 3]
    assert all(len(record["ids"]) == 2 and "loss of normals" in record["terms"] for record in written)
    assert json.loads((tmp_path / "run.json").read_text())["skipped_steps"] == 2
    assert "step 2 was skipped: the loss of normals" in caplog.text


@pytest.mark.parametrize(("overrides", "count"), [([], 1), (["data.size=[32,64]"], 0), (["regularizer.weight=0"], 0)])
def test_a_regularizer_that_changes_nothing_is_told(overrides, count, tmp_path, caplog):
    """Patches of 5x5 cells do not fit into the features of an image of 8x8 pixels."""
    boundary = ["regularizer=contrastive", "regularizer.options.criterion=boundary", "data.size=[8,8]", *overrides]
    steps = ["trainer.max_steps=6", "trainer.log_interval=1", "trainer.validate_first=false"]
    make_trainer(tmp_path, "tasks.names=[depth,normals]", *boundary, *steps).fit()
    assert caplog.text.count("step 4: the loss of the regulariser was 0 in the last 5 logged steps") == count


def test_too_many_in_a_row_end_the_run_with_a_report(tmp_path, monkeypatch):
    poison(monkeypatch, range(3, 100))
    overrides = [
        "trainer.max_steps=50",
        "trainer.max_nonfinite_steps=4",
        "trainer.log_interval=2",
        "trainer.checkpoint_interval=2",
    ]
    with pytest.raises(
        UserError, match=r"4 steps in a row .* from step 3 on \(the loss of normals.*; images "
    ) as error:
        train(composed(*OVERRIDES, *overrides), tmp_path)
    assert "lower the learning rate" in str(error.value)
    state = read_checkpoint_file(tmp_path / "checkpoints" / "last.pt")
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_after_its_step(name, tmp_path, monkeypatch):
    """... and the same command with resume=auto ends where an undisturbed run does."""
    overrides = [*OVERRIDES, "trainer.max_steps=6"]
    train(composed(*overrides), tmp_path / "whole")
    step = Trainer.train_step

    def train_step(self, *batches, **options):
        if self.step == 2:
            os.kill(os.getpid(), getattr(signal, name))
        return step(self, *batches, **options)

    handler_before = signal.getsignal(getattr(signal, name))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        with pytest.raises(Preempted, match="step 3"):
            train(composed(*overrides), tmp_path / "cut")
    assert signal.getsignal(getattr(signal, name)) == handler_before
    train(composed(*overrides, "resume=auto"), tmp_path / "cut")
    a, b = (read_checkpoint_file(tmp_path / f / "checkpoints" / "last.pt") for f in ("whole", "cut"))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])


def test_the_exit_code_requeues(cli, tmp_path, monkeypatch):
    def fit(self):
        raise Preempted(7)

    monkeypatch.setattr(Trainer, "fit", fit)
    result = cli("train.py", *OVERRIDES, f"hydra.run.dir={tmp_path}")
    assert result.code == 75
    assert "stopped at step 7" in result.err
    assert "resume=auto" in result.err


def test_too_little_memory_is_one_sentence(cli, tmp_path, monkeypatch):
    def fit(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "fit", fit)
    result = cli("train.py", *OVERRIDES, f"hydra.run.dir={tmp_path}")
    assert result.code == 1
    assert "data.batch_size" in result.err
    assert "Traceback" not in result.err


def test_accumulated_batches_are_one_batch(tmp_path):
    """Without batch norm, and with as many valid pixels in each: the mean over batches is that of the whole."""
    results = []
    for overrides in (["data.batch_size=4"], ["data.batch_size=2", "trainer.accumulate_grad_batches=2"]):
        trainer = make_trainer(tmp_path, "regularizer=none", "tasks.names=[depth,normals]", "optimizer=sgd", *overrides)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        trainer.options = replace(trainer.options, clip_norm=None)
        for _, batches in zip(range(2), trainer.batches_per_step()):
            values = trainer.train_step(*batches)
            trainer.step += 1
        results.append((dict(trainer.model.named_parameters()), values))
    (a, values), (b, others) = results
    for name in values:
        torch.testing.assert_close(values[name], others[name], rtol=1e-3, atol=1e-4)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice",
    [["trainer.accumulate_grad_batches=2"], ["decoder=task_diffusion", *shrunk("task_diffusion", "resnet18")]],
    ids=["accumulated", "with noised labels"],
)
def test_a_resumed_run_goes_on_bit_for_bit(choice, tmp_path):
    overrides = [
        *(override for override in OVERRIDES if override != "decoder.head_width=8"),  # not every decoder has it
        *choice,
        "trainer.max_steps=4",
        "trainer.checkpoint_interval=2",
        "schedule=constant",
    ]
    train(composed(*overrides), tmp_path / "whole")
    train(composed(*overrides, "trainer.max_steps=2"), tmp_path / "cut")
    train(composed(*overrides, "resume=auto"), tmp_path / "cut")
    a, b = (read_checkpoint_file(tmp_path / f / "checkpoints" / "last.pt") for f in ("whole", "cut"))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])


@pytest.mark.parametrize(
    "decoder", [[], ["decoder=task_tokens", *shrunk("task_tokens", "resnet18")]], ids=["", "with its own losses"]
)
def test_task_losses_of_the_first_views(decoder, tmp_path):
    """With loss.views=first the losses, those of the decoder too, are those of a batch of the first views alone."""
    overrides = ["data.batch_size=2", "regularizer=none", "backbone=resnet18", "backbone.trainable=frozen", *decoder]
    alone, first, both = (
        make_trainer(tmp_path, *overrides, *more)
        for more in ([], ["data.views_per_step=2", "loss.views=first"], ["data.views_per_step=2"])
    )
    losses = []
    for trainer in (alone, first, both):
        trainer.model.eval()  # a batch norm would know the second views
        losses.append(trainer.train_step(next(iter(trainer.batches))))
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value)
        assert (losses[2][name] - value).abs() > 1e-5


def test_task_losses_of_the_first_views_need_second_ones():
    with pytest.raises(UserError, match=r"loss\.views=first .*set data\.views_per_step=2 or loss\.views=all"):
        build_trainer_options(composed(*OVERRIDES, "loss.views=first"), 0)


@pytest.mark.slow
def test_a_running_mean_of_the_weights(tmp_path, cli):
    """Against the formula; it is what is validated, resumed and scored."""
    trainer = make_trainer(tmp_path, "trainer.ema=0.9")
    want = None
    for _, batch in zip(range(3), trainer.batches):
        trainer.train_step(batch)
        now = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        want = now if want is None else {name: 0.9 * want[name] + 0.1 * now[name] for name in now}
    for name, value in trainer.ema.model.named_parameters():
        torch.testing.assert_close(value, want[name])
    assert trainer.evaluation_model() is trainer.ema.model
    overrides = [
        *OVERRIDES,
        "trainer.ema=0.5",
        "trainer.ema_warmup=true",
        "trainer.max_steps=4",
        "trainer.checkpoint_interval=2",
        "schedule=constant",
    ]
    metrics = train(composed(*overrides), tmp_path / "whole")
    train(composed(*overrides, "trainer.max_steps=2"), tmp_path / "cut")
    assert train(composed(*overrides, "resume=auto"), tmp_path / "cut") == metrics
    checkpoint = tmp_path / "whole" / "checkpoints" / "last.pt"
    assert cli("evaluate.py", f"checkpoint={checkpoint}", f"hydra.run.dir={tmp_path}/scores").code == 0
    scored = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert scored == json.loads((tmp_path / "whole" / "metrics.json").read_text())


@pytest.mark.slow
def test_compiled_steps_learn_the_same(tmp_path):
    """The default backend, where a compiler is at hand; else eager after one warning. Every gradient, the contrast's
    with its share of the tasks' too, in a step that measures gradients at the taps and in one that does not."""
    results = []
    for compiled in (False, True):
        trainer = make_trainer(tmp_path, f"trainer.compile={str(compiled).lower()}", "tasks.names=[depth,normals]")
        gradients = []
        for _, batch in zip(range(2), trainer.batches):
            values = trainer.accumulate_gradients(batch, 1, {}, with_diagnostics=trainer.step == 0)
            gradients.append(
                {n: p.grad.clone() for n, p in trainer.eager_step.named_parameters() if p.grad is not None}
            )
            assert any(name.startswith("gradient/") for name in values) == (trainer.step == 0)
            trainer.eager_step.zero_grad()
            trainer.step += 1
        assert trainer.lambda_.gradient_norm_weight.factor.min() > 0
        results.append(gradients)
    for eager, compiled in zip(*results, strict=True):
        assert eager.keys() == compiled.keys()
        assert any(name.startswith("regularizer.") and g.norm() > 0 for name, g in eager.items())
        for name, gradient in eager.items():
            assert (compiled[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.slow
def test_a_compiler_that_fails_is_done_without(where, tmp_path, caplog, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    if where == "backward":
        broken = aot_autograd(fw_compiler=make_boxed_compiler(lambda graph, inputs: graph), bw_compiler=broken)
    monkeypatch.setattr(
        "mtcl.training.train_step.torch.compile", lambda m, backend, c=torch.compile: c(m, backend=broken)
    )
    trainer = make_trainer(tmp_path, "trainer.compile=true", "tasks.names=[depth,normals]")
    trainer.step = 1  # measures no gradients at the taps
    for _, batch in zip(range(2), trainer.batches):
        values = trainer.train_step(batch)
    assert all(value.isfinite() for value in values.values())
    assert caplog.text.count("continues without it") == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("error", "is_of_compiling"),
    [
        (InductorError(RuntimeError("no schedule"), None), True),
        (GuardOnDataDependentSymNode(sympy.true, "data-dependent"), True),
        (AssertionError(), True),
        (IndexError("past the end"), True),
        (ConstraintViolationError("a size that must not change"), True),
        (torch.OutOfMemoryError("no memory"), False),
    ],
)
def test_errors_of_compiling_are_done_without_and_others_are_not(error, is_of_compiling, monkeypatch, caplog):
    """Try errors that torch._dynamo raises, and some that it passes on as they are."""

    def fail(number):
        raise error

    monkeypatch.setattr("mtcl.training.train_step.torch.compile", lambda module, backend: fail)
    module = CompiledModule(lambda number: number + 1)
    if is_of_compiling:
        assert [module(1), module(2)] == [2, 3]
        assert caplog.text.count("continues without it") == 1
        assert "failed ()" not in caplog.text
        with pytest.raises(type(error)):  # one that is the module's is raised by the eager step
            CompiledModule(fail)(1)
    else:
        with pytest.raises(torch.OutOfMemoryError):
            module(1)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_pictures(workers, tmp_path, monkeypatch, caplog):
    """stop: the reader's sentence. skip: another of the batch takes the place; counted and written down."""
    from mtcl.data import Rooms

    read = Rooms.read

    def broken(self, index, *args, **options):
        if index == 1:
            raise UserError("picture 1 can't be read; is it whole?")
        return read(self, index, *args, **options)

    monkeypatch.setattr(Rooms, "read", broken)
    overrides = [
        *OVERRIDES,
        "data.batch_size=2",
        f"data.workers={workers}",
        "trainer.max_steps=4",
        "trainer.validate_first=false",
    ]
    monkeypatch.setattr("mtcl.evaluation.evaluator.Evaluator.score", lambda self, *a, **k: _nothing(self))
    with pytest.raises(UserError, match="picture 1 can't be read"):
        train(composed(*overrides, "data.limit=2"), tmp_path / "stop")
    train(composed(*overrides, "data.limit=2", "trainer.on_unreadable=skip"), tmp_path / "skip")
    assert json.loads((tmp_path / "skip" / "run.json").read_text())["unreadable"] == 1
    assert len(records(tmp_path / "skip", "unreadable")) == 1
    assert "picture 1" in caplog.text


def _nothing(self):
    from mtcl.evaluation.evaluator import EvaluationResult

    metrics = {name: dict.fromkeys(["mIoU", "maxF", "rmse", "mErr", "loss", "odsF"], 0.5) for name in self.tasks}
    return EvaluationResult(metrics, [], 0)


DRIVER = """
import multiprocessing, os, runpy, signal, subprocess, sys
from helpers.common import ROOT, TINY
from mtcl.training.measurements import Throughput
from mtcl.training.trainer import Trainer

_, what, folder = sys.argv
step = Trainer.train_step

def train_step(self, *batches, **options):
    if self.step == 2 and what == "worker":
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    elif self.step == 2:
        subprocess.run(["kill", "-TERM", "--", f"-{os.getpgid(0)}"])  # as a scheduler does, from outside
    return step(self, *batches, **options)

if __name__ == "__main__":
    Trainer.train_step = train_step
    words = ["data.workers=1", "data.limit=6", "trainer.max_steps=300", "trainer.validate_first=false"]
    sys.argv = ["train.py", *TINY, *words, f"hydra.run.dir={folder}"]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("target", "code"), [("worker", 1), ("group", 75)])
def test_signals_to_data_workers(target, code, tmp_path):
    """A worker that is killed ends the run in one sentence; a SIGTERM to all processes is the main one's to obey."""
    script = tmp_path / "run.py"
    script.write_text(DRIVER)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.run(
        [sys.executable, str(script), target, str(tmp_path / "run")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False, start_new_session=True,
    )  # fmt: skip
    assert process.returncode == code, process.stderr[-2000:]
    assert "Traceback" not in process.stderr
    message = {"worker": "use fewer data workers", "group": "resume=auto"}[target]
    assert message in process.stderr


def test_the_log_counts_the_images_with_a_label_of_each_task(tmp_path):
    """A loss that no image of the batch has a label for is null in the log."""
    trainer = make_trainer(tmp_path)
    batch = next(iter(trainer.batches))
    labels = {**batch["labels"], "depth": batch["labels"]["depth"].clone()}
    labels["normals"] = torch.zeros_like(labels["normals"])
    labels["depth"][0] = 0
    trainer._log(
        trainer.train_step({**batch, "labels": labels}, with_diagnostics=True),
        PlainProgress(disable=True),
        Throughput(),
    )
    num_images = len(batch["meta"])
    (counts,) = records(tmp_path, "labelled_images")
    assert counts == {"step": 0, "kind": "labelled_images"} | dict.fromkeys(trainer.tasks, num_images) | {
        "depth": num_images - 1,
        "normals": 0,
    }
    (losses,) = records(tmp_path, "train")
    assert [name for name in trainer.tasks if losses[name] is None] == ["normals"]
