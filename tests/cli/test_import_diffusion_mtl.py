"""Checkpoints of DiffusionMTL become ours: every key accounted for, every tensor filled, the same predictions."""

import math

import pytest
import torch
from helpers.common import ROOT, composed
from helpers.diffusion_mtl_reference import Reference, make_tables, published_shapes, published_state
from omegaconf import OmegaConf

from mtcl import UserError
from mtcl.cli.import_checkpoint import import_checkpoint
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.models.published import METHODS, check_state_dict, translate_state_dict
from mtcl.training.checkpoint_file import read_checkpoint_file

CONFIGS = ROOT / "configs"
SIZE = (64, 96)
CHANNELS, WIDTH, HEAD = (64, 8, 16, 12), 12, 10  # the stem of a ResNet is 64 wide
TASKS = {"pascal": "[semseg,human_parts,sal,normals,edge]", "nyud": "[semseg,depth,normals]"}


def list_overrides(data, *more):
    return [f"data={data}", f"tasks.names={TASKS[data]}", "decoder=diffusion_mtl", "backbone=resnet18", *more]


def add_shrinking(overrides):
    narrow = f"++backbone.kwargs={{channels:{list(CHANNELS)}}}".replace(" ", "")
    return [*overrides, f"data.size={list(SIZE)}", f"decoder.width={WIDTH}", f"decoder.head_width={HEAD}", narrow]


def list_channels(overrides):
    return {name: task.channels for name, task in build_tasks(composed(*overrides)).items()}


def make_published(overrides, steps=2):
    return published_state(published_shapes(list_channels(overrides), CHANNELS, WIDTH, HEAD, steps))


def write(path, state):
    """As the public training code saves: DDP's names, beside optimiser and schedule."""
    content = {
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 2e-5}]},
        "scheduler": {"max_iterations": 100, "base_lrs": [2e-5], "last_epoch": 100},
        "model": {f"module.{key}": value for key, value in state.items()},
        "epoch": 99,
        "iter_count": 83299,
    }
    torch.save(content, path)
    return path


@pytest.mark.parametrize(("data", "steps"), [("pascal", 2), ("nyud", 3)])
def test_it_predicts_as_published(data, steps, tmp_path):
    """But for the noise of inference, of which ours takes the mean."""
    overrides = add_shrinking(list_overrides(data))
    state = make_published(overrides, steps)
    source = write(tmp_path / "theirs.pth.tar", state)
    imported = import_checkpoint("diffusion_mtl", source, tmp_path / "ours.pt", overrides, CONFIGS)
    assert imported.config_overrides == {"decoder.steps": steps}
    assert imported.unused_keys == list(make_tables(steps))
    saved = read_checkpoint_file(tmp_path / "ours.pt")
    assert saved["step"] == 83300
    config = OmegaConf.create(saved["config"])
    model = build_model(config, build_tasks(config), pretrained=False)
    model.load_state_dict(saved["model"])

    # Every tensor of ours comes from one key, and every key goes to one tensor of ours but those of the tables.
    for name, value in model.state_dict().items():
        sources = [k for k, v in state.items() if v.shape == value.shape and torch.equal(v, value)]
        assert len(sources) == 1, name
    assert len(model.state_dict()) == imported.num_tensors == len(state) - len(imported.unused_keys)

    image = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1)).double()
    exact = {key: value.double() for key, value in state.items()}
    model.double().eval()
    with torch.no_grad():
        output, alone = model(image), model.predict(image)
        predictions, initial = Reference(exact, list(output.predictions))(image)
    for task, prediction in output.predictions.items():
        assert prediction.std() > 1e-2
        torch.testing.assert_close(prediction, predictions[task], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(alone[task], prediction)
        torch.testing.assert_close(output.intermediate[0][task], initial[task], rtol=1e-5, atol=1e-7)


def test_the_published_network_fits():
    """At full size, shapes only."""
    config = composed("experiment=pascal_onelabel_diffusion_mtl_resnet18")
    tasks = build_tasks(config)
    shapes = published_shapes({name: task.channels for name, task in tasks.items()})
    with torch.device("meta"):
        model = build_model(config, tasks, pretrained=False)
        theirs = {key: torch.empty(shape) for key, shape in shapes.items()}
    ours, unused_keys = translate_state_dict(theirs, METHODS["diffusion_mtl"], list(tasks))
    check_state_dict(ours, model.state_dict(), "diffusion_mtl")
    assert unused_keys == list(make_tables(2))
    learned = [shape for key, shape in shapes.items() if key.endswith((".weight", ".bias"))]
    assert sum(p.numel() for p in model.parameters()) == sum(math.prod(shape) for shape in learned)


def test_another_schedule_of_noise_is_refused(tmp_path):
    """The tables follow from the number of steps; a file in which they do not is of another network."""
    overrides = add_shrinking(list_overrides("nyud"))
    state = make_published(overrides)
    state["diffusion_model.sqrt_one_minus_alphas_cumprod"] = torch.tensor([0.01, 0.2])
    source = write(tmp_path / "theirs.pth.tar", state)
    with pytest.raises(UserError, match="has other variances than the public code"):
        import_checkpoint("diffusion_mtl", source, tmp_path / "ours.pt", overrides, CONFIGS)
    assert not (tmp_path / "ours.pt").exists()
