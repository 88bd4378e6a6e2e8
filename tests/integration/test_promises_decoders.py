"""What every decoder promises, whatever is inside: built from its own config, at a test's size."""

import json
import math
from statistics import median

import pytest
import torch
from helpers.common import choices, composed
from helpers.shrunken import PLAIN_VIT, shrunk
from hypothesis import given, settings
from hypothesis import strategies as st

from mtcl.cli.train import train
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_training_run
from mtcl.errors import UserError
from mtcl.models import DenseModel
from mtcl.regularizers import Contrastive
from mtcl.runtime import freeze_running_statistics
from mtcl.training.trainer import Trainer

DECODERS = choices("decoder")
TASKS = ("semseg", "human_parts", "sal", "depth", "normals", "edge")
TINY = ["trainer.device=cpu", "debug=tiny", "data.size=[64,96]", "data.batch_size=2", "regularizer=contrastive"]

# To learn something takes a little more room than to keep a promise.
WIDER = {
    "multi_head": ["decoder.width=128", "decoder.head_width=64"],
    "invpt": ["decoder.width=112", "optimizer.lr=2e-3"],
    "invpt_plus_plus": ["decoder.width=112", "optimizer.lr=2e-3"],
    "dpt": ["decoder.width=64", "decoder.head_width=32", "decoder.final_width=32"],
}


def list_overrides(decoder: str, *more: str) -> list[str]:
    backbone = "vit_small" if decoder in PLAIN_VIT else "resnet18"
    return [*TINY, f"backbone={backbone}", f"decoder={decoder}", *shrunk(decoder, backbone), *more]


def make_model(decoder: str, *more: str) -> DenseModel:
    config = composed(*list_overrides(decoder, *more))
    torch.manual_seed(0)
    return build_model(config, build_tasks(config), pretrained=False)


def picture(height: int, width: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def trainer_of(tmp_path, *overrides: str) -> tuple[Trainer, dict]:
    config = composed(*overrides)
    torch.manual_seed(0)
    tasks = build_tasks(config)
    trainer = build_training_run(config, tasks, tmp_path, torch.device("cpu")).trainer
    trainer.model.train()
    return trainer, next(iter(trainer.batches))


def outputs(model: DenseModel, image: torch.Tensor) -> list[torch.Tensor]:
    output = model(image)
    maps = (output.predictions, *output.intermediate, *output.features.values())
    return [x for kind in maps for x in kind.values()]


def loss_of(model: DenseModel, image: torch.Tensor) -> torch.Tensor:
    output = model(image)
    kinds = (output.predictions, *output.intermediate)
    return torch.stack([x.square().mean() for kind in kinds for x in kind.values()]).sum()


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_regulariser_leaves_no_trace(decoder, tmp_path):
    """Attached and trained on its taps or not: the same names, and bit for bit the same predictions. A step with weight
    zero is one without it."""
    names = ["semseg", "depth", "normals"]  # each takes its time in three trainers
    trainers = []
    for more in (["regularizer=none"], ["regularizer.weight=0"], []):
        trainer, batch = trainer_of(tmp_path, *list_overrides(decoder, f"tasks.names=[{','.join(names)}]", *more))
        trainer.train_step(batch)
        trainers.append(trainer)
    off, zero, on = trainers
    assert off.regularizer is None
    assert isinstance(on.regularizer, Contrastive)
    state, of_zero = off.model.state_dict(), zero.model.state_dict()
    assert all(torch.equal(state[key], of_zero[key]) for key in state)
    plain, trained = off.model, on.model.state_dict()
    assert trained.keys() == state.keys()
    plain.load_state_dict(trained)
    image = picture(64, 96)
    with torch.no_grad():
        watched = on.model.eval()
        want = plain.eval().predict(image)
        for got in (watched.predict(image), watched(image).predictions):
            assert list(got) == names
            assert all(torch.equal(got[task], want[task]) for task in names)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
def test_compiles_as_one_graph(decoder):
    """Tracing takes seconds, so decoders' tests of their own check no more than what another option compiles to."""
    torch._dynamo.reset()
    model, image = make_model(decoder, "tasks.names=[semseg,depth,normals]").eval(), picture(50, 70, batch=1)
    with torch.no_grad():
        want = outputs(model, image)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for a, b in zip(outputs(compiled, image), want, strict=True):
            torch.testing.assert_close(a, b)
        torch.compile(model.predict, fullgraph=True, backend="eager")(image)
    torch._dynamo.reset()


@pytest.mark.parametrize("decoder", DECODERS)
def test_bf16(decoder, tmp_path):
    """A step under autocast: losses and weights are finite, predictions are single precision, taps need not be."""
    trainer, batch = trainer_of(tmp_path, *list_overrides(decoder, "trainer.precision=bf16"))
    values = trainer.train_step(batch)
    assert {*TASKS, "regularizer"} <= values.keys()
    assert all(math.isfinite(value) for name, value in values.items())
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        predictions = trainer.model(picture(64, 96)).predictions
    assert {p.dtype for p in predictions.values()} == {torch.float32}


@pytest.mark.parametrize("decoder", DECODERS)
def test_gradient_checkpointing_changes_nothing(decoder):
    """Neither gradients nor what batch norm remembers; random draws (drop path, dropout) are drawn again alike."""
    image, states = picture(64, 96), []
    for on in (False, True):
        model = make_model(decoder, "tasks.names=[semseg,depth]").train()
        if on:
            assert model.backbone.set_grad_checkpointing()
        calls = []
        for module in model.backbone.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        loss = loss_of(model, image)
        with freeze_running_statistics(model):
            loss.backward()
        states.append((dict(model.named_parameters()), dict(model.named_buffers()), len(calls)))
    (a, a_buffers, once), (b, b_buffers, again) = states
    assert again > 1.2 * once, "blocks ran again in the backward pass"
    for name in a:
        torch.testing.assert_close(a[name].grad, b[name].grad, msg=name)
    for name in a_buffers:
        if not name.endswith("num_batches_tracked"):  # counts forwards; nothing reads it
            torch.testing.assert_close(a_buffers[name], b_buffers[name], msg=name)


@pytest.mark.parametrize("decoder", DECODERS)
@given(
    tasks=st.sets(st.sampled_from(TASKS), min_size=1),
    height=st.integers(33, 80),
    width=st.integers(33, 80),
    batch=st.integers(1, 2),
)
@settings(max_examples=3, deadline=None, derandomize=True)
def test_any_tasks_any_size_any_batch(decoder, tasks, height, width, batch):
    """One task or all, odd sizes, one picture: shapes as promised, and every parameter is trained."""
    names = [task for task in TASKS if task in tasks]
    config = composed(*list_overrides(decoder))
    config.tasks.names = names
    torch.manual_seed(0)
    model = build_model(config, build_tasks(config), pretrained=False).train()
    image = picture(height, width, batch)
    output = model(image)
    for predictions in (output.predictions, *output.intermediate):
        assert list(predictions) == names
        assert all(p.shape[0] == batch and p.shape[2:] == (height, width) for p in predictions.values())
        assert all(p.isfinite().all() for p in predictions.values())
    assert {
        tap: {t: m.shape[1] for t, m in maps.items()} for tap, maps in output.features.items()
    } == model.feature_channels
    assert output.frame[0] >= height
    assert output.frame[1] >= width
    torch.stack(
        [p.square().mean() for kind in (output.predictions, *output.intermediate) for p in kind.values()]
    ).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


FAMILIES = ("hrnet_w18_small", "swin_tiny", "vit_small", "vit_small_dinov2", "vit_small_dinov3", "resnet18_dilated")


# A decoder sees of DINOv3 maps of the sizes and strides of another ViT's: one decoder is enough for its backbone.
PAIRS = [
    (decoder, backbone)
    for decoder in DECODERS
    for backbone in FAMILIES
    if backbone != "vit_small_dinov3" or decoder in ("multi_head", *PLAIN_VIT)
]
QUICK_FAMILIES = ("hrnet_w18_small", "vit_small")  # of several strides, and of one


@pytest.mark.parametrize(
    ("decoder", "backbone"),
    [pytest.param(*pair, marks=() if pair[1] in QUICK_FAMILIES else pytest.mark.slow) for pair in PAIRS],
)
def test_every_parameter_learns_on_every_backbone(decoder, backbone):
    """Or is left out of the training: DDP would wait for its gradient."""
    overrides = shrunk(decoder, backbone)
    of_backbone = [override for override in overrides if "backbone." in override]
    of_decoder = [override for override in overrides if override not in of_backbone]
    config = composed(*TINY, f"decoder={decoder}", *of_decoder, "tasks.names=[semseg,depth]")
    config.backbone = composed(*TINY, f"backbone={backbone}", *of_backbone).backbone  # composed once for all decoders
    torch.manual_seed(0)
    if decoder in PLAIN_VIT and backbone not in ("vit_small", "vit_small_dinov2"):
        with pytest.raises(UserError, match="plain ViT"):
            build_model(config, build_tasks(config), pretrained=False)
        return
    model = build_model(config, build_tasks(config), pretrained=False).train()
    loss_of(model, picture(64, 96)).backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert not frozen or (backbone.startswith("hrnet") and all("stage4" in name for name in frozen))


@pytest.mark.slow
@pytest.mark.parametrize(("decoder", "weight"), [("multi_head", "0"), *((decoder, "0.3") for decoder in DECODERS)])
def test_every_decoder_overfits_one_batch(decoder, weight, tmp_path):
    """Four pictures, seen 100 times: every task's loss falls well below its start, the contrast in its way or not."""
    overrides = list_overrides(
        decoder, "data.size=[48,64]", "data.batch_size=4", "data.augment.flip=0", "data.options.seed=3",
        "trainer.max_steps=100", "trainer.val_interval=null", "trainer.checkpoint_interval=null",
        "schedule=constant", "optimizer.lr=4e-3", f"regularizer.weight={weight}",
    )  # fmt: skip
    train(composed(*overrides, *WIDER.get(decoder, [])), tmp_path)
    history = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    history = [record for record in history if record["kind"] == "train"]
    assert history[0]["human_parts"] > 0, "no person in these pictures: choose another seed"
    # InvPT's losses hold those of its first predictions, which have 2x2 cells here. Rounding, which differs between
    # processors, decides where a noisy loss stands at a single step.
    part = {"dpt": 0.5, "invpt": 0.5, "invpt_plus_plus": 0.5, "mqtransformer": 0.45}.get(decoder, 0.35)
    for task in ("semseg", "human_parts", "sal", "depth", "normals"):
        assert median(record[task] for record in history[-9:]) < part * history[0][task], task
    assert median(record["edge"] for record in history[-9:]) < 0.8 * history[0]["edge"]
