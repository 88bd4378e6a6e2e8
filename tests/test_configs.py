"""Every shipped config composes and can be built; experiments take two steps."""

import pytest
import torch
from conftest import choices, composed
from omegaconf import OmegaConf

from mtcl.contrastive import Contrastive
from mtcl.entry import build
from mtcl.entry.schema import check_config, leaves, rule_of
from mtcl.entry.train import train

GROUPS = [
    "backbone",
    "data",
    "debug",
    "decoder",
    "evaluation",
    "experiment",
    "loss",
    "optimizer",
    "regularizer",
    "schedule",
    "tasks",
    "trainer",
]
# Large backbones shrink to the same architecture at a test's size.
VIT = "backbone.kwargs={embed_dim:24,depth:4,num_heads:2,drop_path_rate:0.15}"
SHRUNKEN = {"vit_small": VIT, "vit_base": VIT, "vit_large": VIT,
            "swin_tiny": "backbone.kwargs={embed_dim:12,depths:[1,1,1,1],num_heads:[1,2,2,4]}"}  # fmt: skip


def backbone_of(experiment: str) -> str:
    text = (composed(f"experiment={experiment}")).backbone.name
    return next(name for name in choices("backbone") if composed(f"backbone={name}").backbone.name == text)


@pytest.mark.parametrize(("group", "choice"), [(g, c) for g in GROUPS for c in choices(g)])
def test_every_choice_composes(group, choice):
    config = composed(f"{group}={choice}")
    build.choose_monitor(config.trainer.monitor, build.build_tasks(config), config.evaluation.quick)
    build.build_schedule(max_steps=config.trainer.max_steps, **build.plain(config.schedule))


def test_every_value_of_every_config_has_a_rule():
    """A new key without a rule would let nonsense through to a traceback."""
    for group in GROUPS:
        for choice in choices(group):
            plain = OmegaConf.to_container(composed(f"{group}={choice}"), resolve=True)
            check_config(plain)
            missing = [key for key, _ in leaves(plain) if rule_of(key) is None and not key.endswith("_target_")]
            assert not missing, (group, choice)


def test_every_group_is_tested():
    from conftest import ROOT

    assert sorted(path.name for path in (ROOT / "configs").iterdir() if path.is_dir()) == GROUPS


@pytest.mark.parametrize("backbone", choices("backbone"))
def test_every_backbone_predicts(backbone):
    config = composed(f"backbone={backbone}", *([SHRUNKEN[backbone]] if backbone in SHRUNKEN else []))
    tasks = build.build_tasks(config)
    model = build.build_model(config, tasks, pretrained=False).eval()
    with torch.no_grad():
        predictions = model.predict(torch.zeros(1, 3, 40, 56))
    assert {name: tuple(p.shape) for name, p in predictions.items()} == {
        name: (1, task.channels, 40, 56) for name, task in tasks.items()
    }
    assert isinstance(build.build_regularizer(config, tasks, model), Contrastive)


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_experiments_take_two_steps_on_tiny_rooms(experiment, tmp_path):
    backbone = backbone_of(experiment)
    words = [f"experiment={experiment}", "debug=tiny", "data=rooms", "data.size=[32,64]", "data.batch_size=2",
             "data.augment.scale=[1.0,1.2]"]  # fmt: skip
    if composed(f"experiment={experiment}", "data=rooms").data.options.get("resize", None) is not None:
        words.append("~data.options.resize")
    words += [SHRUNKEN[backbone].replace("backbone.kwargs=", "++backbone.kwargs=")] if backbone in SHRUNKEN else []
    metrics = train(composed(*words), tmp_path)
    tasks = build.build_tasks(composed(*words))
    assert set(metrics) == set(tasks)
    assert (tmp_path / "checkpoints" / "last.pt").is_file()
