"""Checkpoints of DiffusionMTL become ours: every key accounted for, every tensor filled, the same predictions."""

import math

import pytest
import torch
from helpers.common import composed
from helpers.diffusion_mtl_reference import Reference, make_tables, published_shapes, published_state
from helpers.imported_checkpoints import (
    CONFIGS,
    assert_each_from_one,
    list_channels,
    rebuild,
    to_double,
    write_published,
)
from helpers.published import get_published_parameters

from mtcl import UserError
from mtcl.cli.import_checkpoint import import_checkpoint
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.models.published import METHODS, check_state_dict, translate_state_dict

SIZE = (64, 96)
CHANNELS, WIDTH, HEAD = (64, 8, 16, 12), 12, 10  # the stem of a ResNet is 64 wide
TASKS = {"pascal": "[semseg,human_parts,sal,normals,edge]", "nyud": "[semseg,depth,normals]"}


def list_overrides(data, *more):
    return [f"data={data}", f"tasks.names={TASKS[data]}", "decoder=diffusion_mtl", "backbone=resnet18", *more]


def add_shrinking(overrides):
    narrow = f"++backbone.kwargs={{channels:{list(CHANNELS)}}}".replace(" ", "")
    return [*overrides, f"data.size={list(SIZE)}", f"decoder.width={WIDTH}", f"decoder.head_width={HEAD}", narrow]


def make_published(overrides, steps=2):
    return published_state(published_shapes(list_channels(overrides), CHANNELS, WIDTH, HEAD, steps))


@pytest.mark.parametrize(("data", "steps"), [("pascal", 2), ("nyud", 3)])
def test_it_predicts_as_published(data, steps, tmp_path):
    """But for the noise of inference, of which ours takes the mean."""
    overrides = add_shrinking(list_overrides(data))
    state = make_published(overrides, steps)
    source = write_published(tmp_path / "theirs.pth.tar", state)
    imported = import_checkpoint("diffusion_mtl", source, tmp_path / "ours.pt", overrides, CONFIGS)
    assert imported.config_overrides == {"decoder.steps": steps}
    assert imported.unused_keys == list(make_tables(steps))
    model, saved = rebuild(tmp_path / "ours.pt")
    assert saved["step"] == 40000
    assert_each_from_one(model, state, num_unused=len(imported.unused_keys))
    assert imported.num_tensors == len(state) - len(imported.unused_keys)

    image = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1)).double()
    model.double()
    with torch.no_grad():
        output, alone = model(image), model.predict(image)
        predictions, initial = Reference(to_double(state), list(output.predictions))(image)
    for task, prediction in output.predictions.items():
        assert prediction.std() > 1e-2
        torch.testing.assert_close(prediction, predictions[task], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(alone[task], prediction)
        torch.testing.assert_close(output.intermediate[0][task], initial[task], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("data", ["pascal", "nyud"])
def test_the_published_network_fits(data):
    """At full size, shapes only."""
    experiment = f"{data}_onelabel_diffusion_mtl_resnet18"
    config = composed(f"experiment={experiment}")
    tasks = build_tasks(config)
    shapes = published_shapes({name: task.channels for name, task in tasks.items()})
    with torch.device("meta"):
        model = build_model(config, tasks, pretrained=False)
        theirs = {key: torch.empty(shape) for key, shape in shapes.items()}
    ours, unused_keys = translate_state_dict(theirs, METHODS["diffusion_mtl"], list(tasks))
    check_state_dict(ours, model.state_dict(), "diffusion_mtl")
    assert unused_keys == list(make_tables(2))
    learned = [shape for key, shape in shapes.items() if key.endswith((".weight", ".bias"))]
    count = sum(math.prod(shape) for shape in learned)
    assert sum(p.numel() for p in model.parameters()) == count == get_published_parameters(experiment)


def test_another_schedule_of_noise_is_refused(tmp_path):
    """The tables follow from the number of steps; a file in which they do not is of another network."""
    overrides = add_shrinking(list_overrides("nyud"))
    state = make_published(overrides)
    state["diffusion_model.sqrt_one_minus_alphas_cumprod"] = torch.tensor([0.01, 0.2])
    source = write_published(tmp_path / "theirs.pth.tar", state)
    with pytest.raises(UserError, match="sqrt_one_minus_alphas_cumprod is not that of the public code for 2 steps"):
        import_checkpoint("diffusion_mtl", source, tmp_path / "ours.pt", overrides, CONFIGS)
    assert not (tmp_path / "ours.pt").exists()
