"""regularizer=paper: what the paper states, independent of the defaults of regularizer=contrastive."""

import torch
import yaml
from helpers.common import ROOT, TINY, composed

from mtcl.cli.train import train
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_lambda, build_regularizer
from mtcl.training.checkpoint_file import read_checkpoint_file

PAPER = [*TINY, "backbone.name=test_resnet", "schedule=constant", "regularizer=paper", "trainer.validate_first=false"]
PAPER += ["trainer.num_panels=0", "trainer.val_interval=null", "trainer.checkpoint_interval=null", "data.limit=5"]


def read_settings(name):
    """Return a file's settings without the other files that it is composed of."""
    settings = yaml.safe_load((ROOT / "configs" / "regularizer" / f"{name}.yaml").read_text())
    settings.pop("defaults", None)
    return settings


def list_keys(settings, prefix=""):
    return {
        name
        for key, value in settings.items()
        for name in (list_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"})
    }


def test_no_default_of_contrastive_is_left_to_the_paper_s_setting():
    assert list_keys(read_settings("paper")) == list_keys(read_settings("contrastive"))


def test_the_setting_is_what_the_paper_states():
    config = composed(*PAPER)
    tasks = build_tasks(config)
    model = build_model(config, tasks, pretrained=False)
    regularizer = build_regularizer(config, tasks, model)
    lambda_ = build_lambda(config, regularizer, model, torch.device("cpu"))
    assert lambda_.gradient_norm_weight is None
    assert {lambda_(step) for step in range(config.trainer.max_steps)} == {1.0}
    names = list(tasks)
    assert [c.name for c in regularizer.comparisons] == names
    assert [c.sources for c in regularizer.comparisons] == [
        [s for s in range(len(names)) if s != t] for t in range(len(names))
    ]
    assert regularizer.criterion == "triplet"
    assert regularizer.label_reader.source_labels == "true"
    assert (
        regularizer.sample(0, ["a"]).pixels.shape[1] > regularizer.num_pixels == regularizer.label_reader.num_balanced
    )
    assert all(projector.weights[0].shape[0] == len(names) for projector in regularizer.projectors.values())


def test_it_takes_steps(tmp_path):
    """Its gradient reaches the model and its projectors."""
    overrides = ["regularizer.options.num_pixels=16", "trainer.max_steps=3", "trainer.log_interval=1"]
    train(composed(*PAPER, *overrides), tmp_path / "paper")
    first = build_first(overrides)
    state = read_checkpoint_file(tmp_path / "paper" / "checkpoints" / "last.pt")["regularizer"]
    assert state.keys() == first.keys()
    assert any(not torch.equal(state[name], first[name]) for name in state)
    train(composed(*PAPER, *overrides, "regularizer.weight=0"), tmp_path / "off")
    on, off = (read_checkpoint_file(tmp_path / n / "checkpoints" / "last.pt")["model"] for n in ("paper", "off"))
    assert any(not torch.equal(on[name], off[name]) for name in on)


def build_first(overrides):
    """Return the regularizer's state before the first step."""
    config = composed(*PAPER, *overrides)
    tasks = build_tasks(config)
    return build_regularizer(config, tasks, build_model(config, tasks, pretrained=False)).state_dict()
