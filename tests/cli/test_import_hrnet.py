"""Checkpoints of MTI-Net, PAD-Net and ATRC on HRNets become ours: names, sizes, and the public networks' arithmetic."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers.common import composed
from helpers.hrnet_reference import (
    SMALL_V2,
    ATRCReference,
    MTINetReference,
    PADNetReference,
    atrc_shapes,
    mti_net_shapes,
    pad_net_shapes,
    resize,
)
from helpers.imported_checkpoints import CONFIGS, rebuild, to_double
from helpers.invpt_reference import random_state
from helpers.published import get_published_parameters

from mtcl import UserError
from mtcl.cli.import_checkpoint import import_checkpoint
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.models.published import METHODS, check_state_dict, read_published_checkpoint, translate_state_dict

WIDTHS = (8, 16, 32, 64)
ATRC_TASKS = ("semseg", "depth", "normals", "edge")
SIZE = (64, 96)


def stage(number):
    return (f"stage{number}:{{num_modules:1,num_branches:{number},block_type:BASIC,num_blocks:{[1] * number},"
            f"num_channels:{list(WIDTHS[:number])},fuse_method:SUM}}")  # fmt: skip


STEM = "stage1:{num_modules:1,num_branches:1,block_type:BOTTLENECK,num_blocks:[1],num_channels:[64],fuse_method:SUM}"
TINY = f"++backbone.kwargs={{{STEM},{stage(2)},{stage(3)},{stage(4)}}}".replace(" ", "")
MTI_NET = ["data=pascal", "tasks.names=[semseg,sal,edge]", "backbone=hrnet_w18_small", "decoder=mti_net", TINY]
PAD_NET = [*MTI_NET[:3], "decoder=pad_net", TINY]
ATRC = ["data=nyud", "backbone=hrnet_w18_small", "decoder=atrc", TINY]
# Every kind of context, and a task that gathers none.
GENOTYPE = {
    "semseg": {"semseg": 3, "depth": 1, "normals": 0, "edge": 4},
    "depth": {"semseg": 4, "depth": 2, "normals": 1, "edge": 0},
    "normals": {"semseg": 0, "depth": 0, "normals": 0, "edge": 0},
    "edge": {"semseg": 2, "depth": 3, "normals": 4, "edge": 1},
}
LABELS = {"semseg": 40, "edge": 2, "normals": 40}  # of their own contexts, or of those of others


def make_state(shapes, seed=0):
    """Random tensors whose variances keep the maps of so many residual blocks near one."""
    state = random_state(shapes, seed)
    return {key: 4 * value if key.endswith("running_var") else value for key, value in state.items()}


def published(name, seed=0):
    if name == "atrc":
        return make_state(atrc_shapes({"semseg": 40, "depth": 1, "normals": 3, "edge": 1}, LABELS, GENOTYPE, WIDTHS))
    tasks = {"semseg": 21, "sal": 1, "edge": 1}  # in the public code saliency has one logit
    if name == "mti_net":
        return make_state(mti_net_shapes(tasks, WIDTHS), seed)
    return make_state(pad_net_shapes(tasks, WIDTHS, width=16), seed)


def imported(name, state, overrides, folder, **content):
    """The model of our checkpoint, as evaluate.py builds it, and the result of the import."""
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}, **content}, folder / "theirs.pth.tar")
    result = import_checkpoint(name, folder / "theirs.pth.tar", folder / "ours.pt", overrides, CONFIGS)
    return rebuild(folder / "ours.pt")[0], result


def make_image():
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_same(ours, theirs):
    assert theirs.std() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def count_values(state):
    return sum(value.numel() for value in state.values())


@pytest.mark.parametrize(
    ("name", "overrides", "reference"),
    [("mti_net", MTI_NET, MTINetReference),
     pytest.param("pad_net", PAD_NET, PADNetReference, marks=pytest.mark.slow)],
)  # fmt: skip
def test_mti_net_and_pad_net_predict_as_published(name, overrides, reference, tmp_path):
    state = published(name)
    model, result = imported(name, state, overrides, tmp_path)
    assert result.config_overrides["backbone.upsample_mode"] == "bilinear"
    assert not result.unused_keys
    image = make_image()
    with torch.no_grad():
        output = model.double()(image)
        predictions, initial = reference(to_double(state), list(output.predictions))(image)
    for ours, theirs in zip([output.predictions, *output.intermediate], [predictions, *initial], strict=True):
        for task, prediction in ours.items():
            logits = resize(theirs[task], SIZE)
            if task == "sal":  # the same probability from two logits
                assert not prediction[:, 0].any()
                prediction = prediction[:, 1:]
            assert_same(prediction, logits)


def test_atrc_predicts_as_published(tmp_path):
    state = published("atrc")
    (tmp_path / "genotype.json").write_text(json.dumps({"data": GENOTYPE, "step": 40000}))
    overrides = [*ATRC, f"decoder.genotype={tmp_path}/genotype.json"]
    model, result = imported("atrc", state, overrides, tmp_path)
    assert sorted(result.unused_keys) == sorted(key for key in state if key.startswith("criterion."))
    assert count_values(model.state_dict()) == count_values(state) - 2 - 120  # nothing else is left out
    (tmp_path / "genotype.json").unlink()  # it is in the checkpoint
    image = make_image()
    with torch.no_grad():
        output = model.double()(image)
        predictions, labels = ATRCReference(to_double(state), ATRC_TASKS, GENOTYPE)(image)
    for task in ATRC_TASKS:
        assert_same(output.predictions[task], predictions[task])
    for task, logits in labels.items():
        assert_same(output.intermediate[0][task], resize(model.decoder.decode[task](logits), SIZE))
    assert set(output.intermediate[0]) == set(labels) == set(LABELS)


# Parameters of the authors' code, of which tests/models/decoders count ours, and of their backbone.
@pytest.mark.slow  # for the many names
@pytest.mark.parametrize(
    ("name", "make", "num_decoder"), [("mti_net", mti_net_shapes, 20633996), ("pad_net", pad_net_shapes, 25444786)]
)
def test_the_published_size_fits(name, make, num_decoder):
    tasks = {"semseg": 21, "human_parts": 7, "sal": 2, "normals": 3, "edge": 1}
    config = composed(f"experiment=pascal_{name}_hrnet18")
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in make(tasks, (18, 36, 72, 144), **SMALL_V2).items()}
        model = build_model(config, build_tasks(config), pretrained=False)
    parameters = {k: v for k, v in state.items() if "running_" not in k and "num_batches" not in k}
    assert count_values(parameters) == num_decoder + 3_860_720 == get_published_parameters(f"pascal_{name}_hrnet18")
    ours, _ = translate_state_dict(state, METHODS[name], list(tasks))
    check_state_dict(ours, model.state_dict(), name)


@pytest.mark.slow  # for the many names
@pytest.mark.parametrize("experiment", ["nyud_atrc_hrnet18", "nyud_atrc_hrnet48"])
def test_the_published_atrc_fits(experiment):
    config = composed(f"experiment={experiment}")
    large = experiment.endswith("48")
    widths, sizes = (18, 36, 72, 144), SMALL_V2
    if large:
        widths, sizes = (48, 96, 192, 384), {"modules": (1, 4, 3), "blocks": 4}
    with torch.device("meta"):
        model = build_model(config, build_tasks(config), pretrained=False)
        genotype = {
            t: {s: ["none", "global", "local", "t_label", "s_label"].index(kind) for s, kind in row.items()}
            for t, row in model.decoder.genotype.items()
        }
        labels = {task: layer.out_channels for task, layer in model.decoder.labels.items()}
        shapes = atrc_shapes({"semseg": 40, "depth": 1, "normals": 3, "edge": 1}, labels, genotype, widths, **sizes)
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
    ours, unused_keys = translate_state_dict(state, METHODS["atrc"], list(ATRC_TASKS), model.state_dict().keys())
    check_state_dict(ours, model.state_dict(), "atrc")
    assert all(key.startswith("criterion.") for key in unused_keys)


def save_as_lightning(path, state, monkeypatch, **options):
    """Save as Lightning 1.1 does, whose callbacks are classes; numpy's scores are those of MTI-Net's code."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    with monkeypatch.context() as patch:
        for package in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, package, ModuleType(package))
        patch.setitem(sys.modules, name, module)
        content = {
            "epoch": 402,
            "global_step": 40000,
            "pytorch-lightning_version": "1.1.8",
            "callbacks": {module.ModelCheckpoint: {"best_model_score": None, "best_model_path": "last.ckpt"}},
            "best_result": {"semseg": {"mIoU": np.float64(0.3), "jaccards": [np.float32(0.2)]}},
            "state_dict": state,
        }
        torch.save(content, path, **options)


@pytest.mark.parametrize("zipped", [True, False])
def test_the_training_codes_files_are_read(zipped, tmp_path, monkeypatch):
    state = {"head.final_logits.edge.bias": torch.ones(1)}
    save_as_lightning(tmp_path / "last.ckpt", state, monkeypatch, _use_new_zipfile_serialization=zipped)
    weights, step = read_published_checkpoint(tmp_path / "last.ckpt")
    assert step == 40000
    assert list(weights) == list(state)


def test_classes_of_others_are_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": {torch.nn.Linear: {}}}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt can't be read as a checkpoint"):
        read_published_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("name", "state", "message"),
    [
        ("mti_net", {"backbone.cls_token": torch.ones(1)}, "its backbone is no HRNet"),
        ("atrc", {"backbone.cls_token": torch.ones(1)}, "its backbone is no HRNet"),
        ("mti_net", published("pad_net"), "its backbone is no HRNet"),
        ("pad_net", published("mti_net"), "its backbone is no HRNet"),
        ("pad_net", {f"backbone.0.{k[9:]}": v for k, v in published("mti_net").items()}, "it is not PAD-Net's"),
        ("mti_net", {k: v for k, v in published("mti_net").items() if not k.startswith("heads.edge")},
         r"auxiliary tasks \(edge\), of which it makes no final prediction"),
        ("invpt", published("mti_net"), "its backbone is no ViT"),
    ],
)  # fmt: skip
def test_files_of_other_networks_are_refused(name, state, message):
    with pytest.raises(UserError, match=message):
        METHODS[name].config_overrides(state, SIZE)


def test_keys_of_other_networks_are_refused():
    state = published("mti_net")
    for key, message in (("scale_0.novelty.edge.weight", "scale_0.nov"), ("fpm_scale_0.se.edge.bias", "fpm_sc")):
        with pytest.raises(UserError, match=rf"1 of .* not known .* {message}"):
            translate_state_dict({**state, key: torch.ones(1)}, METHODS["mti_net"], ["semseg", "sal", "edge"])
    with pytest.raises(UserError, match="lists its tasks as normals, edge, depth, the config as depth, normals, edge"):
        translate_state_dict(state, METHODS["mti_net"], ["depth", "normals", "edge"])
    del state["heads.edge.last_layer.0.bias"]  # as other code has it
    with pytest.raises(UserError, match=r"heads.edge.last_layer.0.weight"):
        translate_state_dict(state, METHODS["mti_net"], ["semseg", "sal", "edge"])
