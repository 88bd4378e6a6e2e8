"""The first stage of SAK as a run like any other, and the second one that starts from it."""

import json
import re
from contextlib import contextmanager

import pytest
import torch
from helpers.common import TINY, assert_fails, composed
from helpers.distillation import STUDENT, list_overrides, write_images
from omegaconf import OmegaConf

from mtcl import UserError
from mtcl.cli.train import train
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_training_run
from mtcl.config.load import load_model
from mtcl.training.checkpoint import load_checkpoint
from mtcl.training.trainer import Trainer

CPU = torch.device("cpu")
SECOND_STAGE = ["decoder=sak", *STUDENT, "regularizer=distillation", "data.size=[48,64]", "tasks.names=[semseg,depth]"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("pictures"))


def distill(images, folder, *more):
    return train(composed(*list_overrides(images, *more), name="distill"), folder)


@pytest.fixture(scope="module")
def student(images, tmp_path_factory):
    """The folder of a distillation of four steps."""
    folder = tmp_path_factory.mktemp("student")
    distill(images, folder)
    return folder


def read_log(folder, kind):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_distillation_is_a_run_like_any_other(student):
    metrics = json.loads((student / "metrics.json").read_text())
    names = {"loss", "loss/first", "cosine/first", "loss/second", "cosine/second"}
    assert set(metrics) == {"distillation"}
    assert set(metrics["distillation"]) == names
    assert metrics["distillation"]["loss"] == pytest.approx(
        metrics["distillation"]["loss/first"] + metrics["distillation"]["loss/second"]
    )
    assert {path.name for path in (student / "checkpoints").iterdir()} >= {"last.pt", "best.pt"}
    assert list(student.glob("events.out.tfevents.*"))
    assert [record["step"] for record in read_log(student, "train")] == [0, 1, 2, 3]
    assert json.loads((student / "run.json").read_text())["num_images"] == 2
    checkpoint = load_checkpoint(student / "checkpoints" / "last.pt")
    assert checkpoint.meta["tasks"] == {}
    parts = {name.split(".")[0] for name in checkpoint.model}
    assert parts == {"backbone", "adapters", "norms"}, "no routers, no heads"
    assert {name.split(".")[0] for name in checkpoint.regularizer} == {"aligners"}, "no teacher"


class Stopped(Exception):
    """Ends a training in a test."""


@contextmanager
def stopping_after_two_steps():
    """End the training inside after two steps."""
    train_step = Trainer.train_step

    def stop_after_two(trainer, *batches, **options):
        if trainer.step == 2:
            raise Stopped
        return train_step(trainer, *batches, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_after_two)
        with pytest.raises(Stopped):
            yield


def assert_same_end(folder, other):
    one, two = (load_checkpoint(path / "checkpoints" / "last.pt") for path in (folder, other))
    assert (one.step, two.step) == (4, 4)
    assert_equal(one.model, two.model)
    assert_equal(one.regularizer, two.regularizer)


def test_resumed_it_is_bit_equal(student, images, tmp_path):
    with stopping_after_two_steps():
        distill(images, tmp_path / "run")
    distill(images, tmp_path / "run", "resume=auto")
    assert_same_end(student, tmp_path / "run")


@pytest.mark.slow
def test_it_learns(images, tmp_path):
    distill(images, tmp_path, "trainer.max_steps=60", "trainer.val_interval=null", "optimizer.lr=3e-3",
            "schedule=constant", "data.augment.area=[1.0,1.0]")  # fmt: skip
    losses = [record["regularizer"] for record in read_log(tmp_path, "train")]
    assert losses[-1] < 0.6 * losses[0]


def test_the_second_stage_starts_from_the_student(student, tmp_path):
    weights = f"decoder.weights={student}/checkpoints/last.pt"
    config = composed(*TINY[:2], *SECOND_STAGE, weights)
    tasks = build_tasks(config)
    trainer = build_training_run(config, tasks, tmp_path, CPU, pretrained=True).trainer
    checkpoint = load_checkpoint(student / "checkpoints" / "last.pt")
    state = trainer.model.state_dict()
    for name, value in checkpoint.model.items():
        assert name.endswith("pos_embed") or torch.equal(state[name], value), name
    assert_equal(trainer.regularizer.state_dict(), checkpoint.regularizer)
    # Rebuilt without weights, as for a resume or an evaluation: the file is not read.
    OmegaConf.update(config, "decoder.weights", "nowhere.pt")
    build_model(config, tasks, pretrained=False)
    with pytest.raises(UserError, match=r"nowhere\.pt"):
        build_model(config, tasks, pretrained=True)


@pytest.mark.slow
def test_the_second_stage_trains_and_its_checkpoint_holds_no_aligner_in_the_model(student, tmp_path):
    """Stopped and resumed it is bit-equal: the same weights, aligners, losses and scores."""
    overrides = [*TINY[:2], *SECOND_STAGE, f"decoder.weights={student}/checkpoints/last.pt"]
    overrides += ["trainer.max_steps=4", "trainer.checkpoint_interval=2", "trainer.log_interval=1"]
    metrics = train(composed(*overrides), tmp_path / "uncut")
    assert set(metrics) == {"semseg", "depth"}
    log = read_log(tmp_path / "uncut", "regularizer")[-1]
    assert {"first/loss", "first/cosine", "second/loss", "second/cosine"} <= set(log)
    with stopping_after_two_steps():
        train(composed(*overrides), tmp_path / "run")
    assert train(composed(*overrides, "resume=auto"), tmp_path / "run") == metrics
    assert_same_end(tmp_path / "uncut", tmp_path / "run")
    loaded = load_model(tmp_path / "uncut" / "checkpoints" / "last.pt")
    assert not [name for name in loaded.model.state_dict() if "align" in name or "teacher" in name]
    output = loaded.model.predict(torch.zeros(1, 3, 50, 70))
    assert {name: tuple(p.shape[2:]) for name, p in output.items()} == {"semseg": (50, 70), "depth": (50, 70)}


@pytest.mark.slow
def test_the_second_stage_in_bf16_and_compiled(tmp_path, monkeypatch):
    """Two steps: compiled they are those of an eager training, in bf16 near to them."""
    monkeypatch.setattr("mtcl.training.train_step.CompiledModule.backend", "aot_eager")
    common = [*TINY[:2], *SECOND_STAGE, "++backbone.kwargs.drop_path_rate=0", "optimizer=sgd", "regularizer.lr=1e-4"]
    losses, aligners = {}, {}
    for engine in ("trainer.compile=false", "trainer.compile=true", "trainer.precision=bf16"):
        torch._dynamo.reset()
        config = composed(*common, engine)
        torch.manual_seed(0)
        trainer = build_training_run(config, build_tasks(config), tmp_path / engine, CPU).trainer
        trainer.model.train()
        aligners_at_first = {name: value.clone() for name, value in trainer.regularizer.state_dict().items()}
        values = [trainer.train_step(*batches) for _, batches in zip(range(2), trainer.batches_per_step())]
        assert getattr(trainer.training_step, "works", False) == (engine == "trainer.compile=true")
        names = ("semseg", "depth", "regularizer")
        losses[engine] = torch.tensor([[step[name].item() for name in names] for step in values])
        aligners[engine] = trainer.regularizer.state_dict()
        assert all(not torch.equal(aligners_at_first[name], value) for name, value in aligners[engine].items())
    torch._dynamo.reset()
    eager, compiled, bf16 = losses.values()
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bf16, eager, rtol=2e-2, atol=1e-2)
    assert (bf16 != eager).all()
    for name, value in aligners["trainer.compile=true"].items():
        torch.testing.assert_close(value, aligners["trainer.compile=false"][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.root=nowhere"], r"data\.root=nowhere is not a folder"),
        (["data.options.num_val=8"], r"data\.options\.num_val=8 leaves nothing to train on: .* has 8 images"),
        (
            ["decoder.teachers=[first,third]"],
            r"regularizer\.options\.teachers lack third, which the model has adapters",
        ),
        (["regularizer.options.teachers.first.name=no_net"], r"teachers\.first\.name=no_net is not a timm model"),
        (["+regularizer.options.teachers.first.weights=a.pth"], r"teachers\.first\.weights=a\.pth is not a file"),
        (["+regularizer.options.teachers.first.size=3"], r"teachers\.first\.size does not exist; a teacher has name"),
        (["+regularizer.options.teachers.second.out_indices=[0,1]"], r"teachers\.second has 2 maps, the student 4"),
        (["+regularizer.options.teachers.second.input_size=50"], r"input_size=50 of test_vit must be a multiple of 16"),
        (["regularizer=none"], r"data=images has no labels: only regularizer=distillation trains on it"),
        (["regularizer.weight=0"], r"without tasks the distillation is the whole loss"),
        (["decoder=multi_head"], r"data=images has no labels to train on; scripts/distill\.py distils"),
        (["tasks.names=[depth]"], r"asks for depth, but data=images has labels for nothing only"),
        (["balancing=uncertainty"], r"one objective only, distillation"),
    ],
)
def test_a_mistake_is_one_sentence(images, overrides, message, tmp_path):
    base = list_overrides(images)
    if "decoder=multi_head" in overrides:
        base = [word for word in base if not word.startswith("decoder.")]
    if "regularizer=none" in overrides:
        base = [word for word in base if "regularizer." not in word]
    config = composed(*base, *overrides, name="distill")
    with pytest.raises(UserError, match=message):
        build_training_run(config, build_tasks(config), tmp_path, CPU)
    assert not list(tmp_path.iterdir())


def test_the_command(images, tmp_path, cli):
    overrides = list_overrides(images, "trainer.max_steps=1", "trainer.checkpoint_interval=null")
    result = cli("scripts/distill.py", *overrides, f"hydra.run.dir={tmp_path}/run")
    assert result.code == 0, result.err
    assert "tasks none, regularizer distillation with weight 1.0" in result.out
    assert re.search(r"distillation +cosine/second +-?0\.\d{4}", result.out)
    again = cli("scripts/distill.py", *overrides, f"hydra.run.dir={tmp_path}/run")
    assert_fails(again, "already holds a run; continue it with resume=auto")
    assert_fails(cli("scripts/distill.py", "trainer.max_step=1", f"hydra.run.dir={tmp_path}/no"), "trainer.max_step")


def test_a_student_can_be_neither_evaluated_nor_mistaken_for_another(student):
    path = student / "checkpoints" / "last.pt"
    with pytest.raises(UserError, match=r"is a student of scripts/distill\.py, which predicts no task"):
        load_model(path)
    base = [word for word in SECOND_STAGE if "teachers" not in word]
    base += ["decoder.teachers=[first]"]
    config = composed(*TINY[:2], *base, f"decoder.weights={path}")
    with pytest.raises(UserError, match=r"is a student of first, second, but decoder\.teachers are first"):
        build_model(config, build_tasks(config), pretrained=True)
