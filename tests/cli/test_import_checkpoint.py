"""Published checkpoints become ours: every key accounted for, every tensor filled, the same predictions."""

import runpy
import sys

import pytest
import torch
from helpers import task_diffusion_reference
from helpers.common import ROOT, composed
from helpers.imported_checkpoints import (
    CONFIGS,
    assert_each_from_one,
    list_channels,
    rebuild,
    to_double,
    write_published,
)
from helpers.invpt_reference import IDLE, Reference, published_shapes, random_state
from helpers.published import get_published_parameters
from omegaconf import OmegaConf

from mtcl import UserError
from mtcl.cli.evaluate import evaluate
from mtcl.cli.import_checkpoint import import_checkpoint
from mtcl.cli.train import train
from mtcl.config.build_data import build_tasks, get_image_size
from mtcl.config.build_model import build_model
from mtcl.models.published import METHODS, check_state_dict, translate_state_dict
from mtcl.training.checkpoint_file import read_checkpoint_file

SIZE = (64, 128)
PASCAL = ["data=pascal", "decoder=invpt", "backbone=vit_large", f"data.size=[{SIZE[0]},{SIZE[1]}]"]
SMALL = ["decoder.width=12", "decoder.prediction_width=4",
         "++backbone.kwargs={embed_dim:24,depth:4,num_heads:2,drop_path_rate:0.15}"]  # fmt: skip
ROOMS = [*PASCAL[1:], "data=rooms", "tasks.names=[semseg,human_parts,sal,normals,edge]"]


def add_shrinking(*overrides):
    return [*overrides, *SMALL]


def make_published(overrides, seed=0, **options):
    small = {"dim": 24, "depth": 4, "width": 12, "extra": 4}
    return random_state(published_shapes(list_channels(overrides), SIZE, **{**small, **options}), seed)


@pytest.mark.parametrize("data", ["pascal", "nyud"])
def test_invpt_predicts_as_published(data, tmp_path):
    overrides = add_shrinking(*PASCAL[1:], f"data={data}")
    state = make_published(overrides)
    imported = import_checkpoint(
        "invpt", write_published(tmp_path / "theirs.pth.tar", state), tmp_path / "ours.pt", overrides, CONFIGS
    )
    model, ours = rebuild(tmp_path / "ours.pt")
    assert ours["step"] == 40000
    assert model.mean == (0.485, 0.456, 0.406)

    # Every key goes to one tensor of ours, or their forward never uses it; every tensor of ours comes from one key.
    unused_keys = [key for key in state if key.startswith(IDLE)]
    assert sorted(imported.unused_keys) == sorted(unused_keys)
    assert_each_from_one(model, state, len(unused_keys))
    assert imported.num_tensors == len(model.state_dict())

    image = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        output = model.double()(image)
        predictions, preliminary = Reference(to_double(state), list(output.predictions), vit_heads=2)(image)
    for task, prediction in output.predictions.items():
        assert prediction.std() > 1e-2
        torch.testing.assert_close(prediction, predictions[task], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(output.intermediate[0][task], preliminary[task], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("data", ["pascal", "nyud"])
def test_task_diffusion_predicts_as_published(data, tmp_path):
    """Its ViT has no class token; noise is that from which our inference starts."""
    overrides = [f"data={data}", "decoder=task_diffusion", "backbone=vit_large", f"data.size=[{SIZE[0]},{SIZE[1]}]",
                 "++backbone.kwargs={embed_dim:24,depth:4,num_heads:2,drop_path_rate:0.15}"]  # fmt: skip
    channels = list_channels(overrides)
    state = random_state(task_diffusion_reference.published_shapes(channels, SIZE, dim=24, depth=4, width=12, blocks=2))
    source = write_published(tmp_path / "theirs.pth.tar", state)
    imported = import_checkpoint("task_diffusion", source, tmp_path / "ours.pt", overrides, CONFIGS)
    assert (imported.unused_keys, imported.num_tensors) == ([], len(state))
    assert imported.config_overrides["decoder.width"] == 12
    model, _ = rebuild(tmp_path / "ours.pt")
    assert len(model.state_dict()) == len(state)

    image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1)).double()
    model.double()
    with torch.no_grad():
        predictions = model.predict(image)
        noise = model.decoder._start(1, SIZE[0] // 16, SIZE[1] // 16)
        reference = task_diffusion_reference.Reference(to_double(state), list(channels), vit_heads=2)
        want = reference.predict(image, noise)
    for task, prediction in predictions.items():
        assert prediction.std() > 1e-2
        torch.testing.assert_close(prediction, want[task], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tasks", ["pascal", "nyud"])
def test_the_published_vit_large_fits(tasks):
    """At full size, shapes only: 423 M parameters are what the public code saves, the idle ones among them."""
    config = composed(f"data={tasks}", "decoder=invpt", "backbone=vit_large", "decoder.aggregate_first=false")
    size = get_image_size(config)
    config.backbone.kwargs = {"img_size": list(size), "dynamic_img_size": True}
    built = build_tasks(config)
    channels = {name: task.channels for name, task in built.items()}
    with torch.device("meta"):
        model = build_model(config, built, pretrained=False)
        theirs = {key: torch.empty(shape) for key, shape in published_shapes(channels, size).items()}
    ours, unused_keys = translate_state_dict(theirs, METHODS["invpt"], list(channels))
    check_state_dict(ours, model.state_dict(), "invpt")
    assert all(key.startswith(IDLE) for key in unused_keys)
    counted = sum(v.numel() for k, v in theirs.items() if "running_" not in k and "num_batches" not in k)
    published = get_published_parameters(f"{tasks}_invpt_vit_large")
    assert counted == (pytest.approx(published, rel=0.002) if tasks == "pascal" else published)  # millions in the paper


def test_evaluate_loads_what_was_imported(tmp_path):
    overrides = add_shrinking(*ROOMS)
    source = write_published(tmp_path / "theirs.pth.tar", make_published(overrides))
    import_checkpoint("invpt", source, tmp_path / "ours.pt", overrides, CONFIGS)
    evaluation_overrides = [f"checkpoint={tmp_path}/ours.pt", "data.limit=2", "data.workers=0", "trainer.device=cpu",
                            "evaluation.score_boundaries=false", "data.size=[40,72]"]  # fmt: skip
    config = composed(*evaluation_overrides, name="evaluate")
    metrics = evaluate(config, evaluation_overrides, [], tmp_path / "scores")
    assert list(metrics) == ["semseg", "human_parts", "sal", "normals", "edge"]
    with pytest.raises(UserError, match=r"was imported.*weights only"):
        train(composed(*overrides, f"resume={tmp_path}/ours.pt", "trainer.device=cpu"), tmp_path / "run")


def test_the_script(tmp_path, capsys, monkeypatch):
    overrides = add_shrinking(*PASCAL)
    source = write_published(tmp_path / "theirs.pth.tar", make_published(overrides))
    monkeypatch.setattr(sys, "argv", ["import_checkpoint.py", "invpt", str(source), f"{tmp_path}/ours.pt", *overrides])
    runpy.run_path(str(ROOT / "scripts" / "import_checkpoint.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "each filled from" in output
    assert "decoder.aggregate_first=False" in output
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "scripts" / "import_checkpoint.py"), run_name="__main__")
    assert "exists already" in capsys.readouterr().err


def test_a_bare_state_dict_will_do(tmp_path):
    overrides = add_shrinking(*PASCAL)
    torch.save(make_published(overrides), tmp_path / "bare.pth")
    import_checkpoint("invpt", tmp_path / "bare.pth", tmp_path / "ours.pt", overrides, CONFIGS)
    assert read_checkpoint_file(tmp_path / "ours.pt")["step"] == 0


def broken(state, how):
    state = dict(state)
    if how == "unknown key":
        state["multi_task_decoder.novelty.weight"] = torch.ones(1)
    elif how == "a task more":
        state["heads.depth.linear_pred.weight"] = torch.ones(1, 16, 1, 1)
    elif how == "an index more":
        state["multi_task_decoder.invpt.redu_chan.1.5.bias"] = torch.ones(16)
    elif how == "missing key":
        del state["heads.edge.linear_pred.bias"]
    elif how == "another shape":
        state["heads.semseg.linear_pred.bias"] = torch.ones(40)
    elif how == "another grid":
        state["backbone.pos_embed"] = torch.ones(1, 10, 24)
    elif how == "another backbone":
        del state["backbone.pos_embed"]
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unknown key", "1 of .* not known .* multi_task_decoder.novelty.weight"),
        ("a task more", "heads.depth.linear_pred.weight"),
        ("an index more", "redu_chan.1.5.bias"),
        ("missing key", "lacks 1 .* decoder.logits.edge.bias"),
        ("another shape", r"decoder.logits.semseg.bias \(40,\) instead of \(21,\)"),
        ("another grid", "9 patches, images of 64x128 have 4x8; give the image size"),
        ("another backbone", "its backbone is no ViT"),
    ],
)
def test_what_does_not_fit_is_refused(how, message, tmp_path):
    overrides = add_shrinking(*PASCAL)
    source = write_published(tmp_path / "theirs.pth.tar", broken(make_published(overrides), how))
    with pytest.raises(UserError, match=message):
        import_checkpoint("invpt", source, tmp_path / "ours.pt", overrides, CONFIGS)
    assert not (tmp_path / "ours.pt").exists()


def test_mistakes_are_told_in_a_sentence(tmp_path):
    overrides, target = add_shrinking(*PASCAL), tmp_path / "ours.pt"
    source = write_published(tmp_path / "theirs.pth.tar", make_published(overrides))
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save({"model": [1, 2]}, tmp_path / "list.pth")
    for method, path, given_overrides, message in (
        ("invtp", source, overrides, "choose one of atrc, diffusion_mtl, invpt, mti_net"),
        ("invpt", tmp_path / "none.pth", overrides, "is not a file"),
        ("invpt", tmp_path / "text.pth", overrides, "can't be read"),
        ("invpt", tmp_path / "list.pth", overrides, "no state dict"),
        ("invpt", source, ["data=pascal", "decoder=multi_head"], "give decoder=invpt"),
        ("invpt", source, ["decoder=nonsense"], "is not known"),
    ):
        with pytest.raises(UserError, match=message):
            import_checkpoint(method, path, target, given_overrides, CONFIGS)
    assert not target.exists()


def test_every_method_has_its_decoder():
    for name, method in METHODS.items():
        target = OmegaConf.load(CONFIGS / "decoder" / f"{name}.yaml")._target_
        assert (method.name, method.model) == (name, target.rpartition(".")[2])
