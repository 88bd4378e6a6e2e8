"""Every shipped config composes and can be built; a shrunken twin of every experiment takes a step."""

import functools
import json
import re

import pytest
import torch
from helpers.common import ROOT, choices
from helpers.shrunken import shrunk
from omegaconf import DictConfig, OmegaConf

from mtcl.cli.train import train
from mtcl.config.build_data import build_tasks, choose_label_tasks
from mtcl.config.build_evaluator import choose_monitor
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_regularizer
from mtcl.config.compose import Composition, compose_with_choices
from mtcl.config.resolve import plain
from mtcl.config.schema import (
    ROLES,
    RULES,
    affects_sample_order,
    check_config,
    flatten,
    may_differ_on_resume,
    role_of,
    rule_of,
)
from mtcl.errors import UserError
from mtcl.models.backbones import Backbone, build_backbone
from mtcl.regularizers import Contrastive
from mtcl.schedules import build_schedule

GROUPS = [
    "backbone",
    "balancing",
    "data",
    "debug",
    "decoder",
    "evaluation",
    "experiment",
    "logger",
    "loss",
    "optimizer",
    "recipe",
    "regularizer",
    "schedule",
    "tasks",
    "trainer",
]
# One experiment per decoder and per family of backbones runs in `make test`, all of them in `make test-slow`.
FAST = {
    "rooms",
    "nyud_small_cpu",
    "nyud_multi_head_vit_base",
    "nyud_deeplab_resnet18",
    "nyud_pad_net_hrnet18",
    "nyud_mti_net_hrnet18",
    "nyud_atrc_hrnet48",
    "pascal_atrc_hrnet18",
    "pascal_invpt_vit_large",
    "nyud_invpt_swin_large",
    "pascal_taskprompter_vit_base",
    "pascal_mqtransformer_swin_tiny",
    "nyud_sak_vit_base",
}
EXPERIMENTS = choices("experiment")
DECODERS = (
    "multi_head|deeplab|pad_net|mti_net|atrc|invpt_plus_plus|invpt|taskprompter|mqtransformer|task_expert|"
    "task_diffusion|sak"
)
PUBLISHED = [name for name in EXPERIMENTS if re.fullmatch(rf"(nyud|pascal)_({DECODERS})_(?!dinov).*", name)]


@functools.cache
def compose_once(*overrides: str) -> Composition:
    return compose_with_choices(overrides, ROOT / "configs", check=False)


def composed(*overrides: str) -> DictConfig:
    """Compose a config once for all tests here: none of them changes it."""
    return compose_once(*overrides).config


def chosen(experiment: str) -> dict[str, str | None]:
    """Group -> choice, as Hydra resolved them: several configs may name the same timm model."""
    return compose_once(f"experiment={experiment}").choices


def word(group: str, choice: str) -> str:
    """A recipe is not among the defaults, so it has to be added."""
    return f"{'+' if group == 'recipe' else ''}{group}={choice}"


@pytest.mark.parametrize(("group", "choice"), [(g, c) for g in GROUPS for c in choices(g)])
def test_every_choice_composes_and_every_value_has_a_rule(group, choice):
    """A new key without a rule would let nonsense through to a traceback."""
    config = composed(word(group, choice))
    choose_monitor(config.trainer.monitor, build_tasks(config), config.evaluation.fast_boundaries)
    build_schedule(max_steps=config.trainer.max_steps, **plain(config.schedule))
    values = OmegaConf.to_container(config, resolve=True)
    check_config(values)
    assert not [key for key, _ in flatten(values) if rule_of(key) is None and not key.endswith("_target_")]


def test_every_role_has_keys():
    assert {rule.role for rule in RULES.values()} == set(ROLES)
    roles = {
        key: role_of(key) for key in ("data.root", "data.batch_size", "trainer.compile", "trainer.num_panels", "x.y")
    }
    assert list(roles.values()) == ["machine", "result", "engine", "record", "result"]


def test_a_resumed_run_may_differ_in_what_its_result_does_not_depend_on():
    free = ("trainer.max_steps", "trainer.compile", "trainer.keep_checkpoint_interval", "data.workers", "resume")
    assert all(map(may_differ_on_resume, free))
    fixed = ("seed", "optimizer.lr", "trainer.channels_last", "trainer.monitor", "of.another.version")
    assert not any(map(may_differ_on_resume, fixed))
    assert [key for key in ("seed", "data.split", "optimizer.lr") if affects_sample_order(key)] == [
        "seed",
        "data.split",
    ]


def test_every_group_is_tested():
    assert sorted(path.name for path in (ROOT / "configs").iterdir() if path.is_dir()) == GROUPS


# --- Backbones


@pytest.mark.parametrize("backbone", choices("backbone"))
def test_every_backbone_predicts_at_any_size(backbone):
    config = composed(f"backbone={backbone}", "regularizer=contrastive", *shrunk("multi_head", backbone))
    tasks = build_tasks(config)
    model = build_model(config, tasks, pretrained=False).eval()
    with torch.no_grad():
        predictions = model.predict(torch.zeros(1, 3, 45, 71))
    assert {name: tuple(p.shape) for name, p in predictions.items()} == {
        name: (1, task.channels, 45, 71) for name, task in tasks.items()
    }
    assert isinstance(build_regularizer(config, tasks, model), Contrastive)


def published_backbone(choice: str) -> Backbone:
    settings = plain(composed(f"backbone={choice}").backbone)
    with torch.device("meta"):
        return build_backbone(
            settings["name"],
            out_indices=settings["out_indices"],
            maps_after=settings.get("maps_after", "stages"),
            kwargs=settings["kwargs"],
        )


# Channels, strides; parameters where the field gives them.
SIZES = {
    "hrnet_w18_small": ([18, 36, 72, 144], [4, 8, 16, 32], 3_860_720),
    "hrnet_w48": ([48, 96, 192, 384], [4, 8, 16, 32], 65_325_120),
    "resnet18_dilated": ([64, 128, 256, 512], [4, 8, 8, 8], 11_176_512),
    "resnet50_dilated": ([256, 512, 1024, 2048], [4, 8, 8, 8], 23_508_032),
    "vgg16_bn": ([64, 128, 256, 512, 512], [1, 2, 4, 8, 16], 14_723_136),
    "vgg16_bn_mtan": (
        [64, 64, 128, 128, 256, 256, 512, 512, 512, 512],
        [1, 1, 2, 2, 4, 4, 8, 8, 16, 16],
        14_723_136,
    ),
    "swin_tiny": ([96, 192, 384, 768], [4, 8, 16, 32]),
    "swin_small": ([96, 192, 384, 768], [4, 8, 16, 32]),
    "swin_base": ([128, 256, 512, 1024], [4, 8, 16, 32]),
    "swin_large": ([192, 384, 768, 1536], [4, 8, 16, 32]),
    "vit_small": ([384] * 4, [16] * 4),
    "vit_base": ([768] * 4, [16] * 4),
    "vit_large": ([1024] * 4, [16] * 4),
    "vit_small_dinov2": ([384] * 4, [14] * 4),
    "vit_base_dinov2": ([768] * 4, [14] * 4),
    "vit_large_dinov2": ([1024] * 4, [14] * 4),
    "vit_small_dinov3": ([384] * 4, [16] * 4),
    "vit_base_dinov3": ([768] * 4, [16] * 4),
    "vit_large_dinov3": ([1024] * 4, [16] * 4),
}


@pytest.mark.parametrize(
    "choice",
    [name if "small" in name or "18" in name else pytest.param(name, marks=pytest.mark.slow) for name in SIZES],
)
def test_backbones_are_those_of_the_field(choice):
    backbone = published_backbone(choice)
    channels, strides, *parameters = SIZES[choice]
    assert (backbone.channels, backbone.strides) == (channels, strides)
    assert parameters in ([], [sum(p.numel() for p in backbone.parameters())])


@pytest.mark.parametrize(("size", "levels"), [("base", (2, 5, 8, 11)), ("large", (5, 11, 17, 23))])
def test_vits_have_the_field_s_levels_and_drop_path(size, levels):
    net = published_backbone(f"vit_{size}").net
    assert tuple(net.feature_info.out_indices) == levels
    assert net.model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.15)


# --- Experiments


# The field's public configs: optimiser, rate, weight decay, batch over all GPUs, steps, clipping.
SETTINGS = {
    "nyud_atrc_hrnet18": ("sgd", 1e-2, 5e-4, 8, 40000, None),
    "pascal_atrc_hrnet18": ("sgd", 5e-3, 5e-4, 8, 40000, None),
    "nyud_mti_net_hrnet18": ("adam", 1e-4, 1e-4, 8, 9900, None),
    "pascal_pad_net_hrnet18": ("adam", 1e-4, 1e-4, 8, 62400, None),
    "pascal_invpt_vit_large": ("adam", 2e-5, 1e-6, 6, 40000, None),
    "nyud_invpt_vit_large": ("adam", 2e-5, 1e-6, 6, 40000, None),
    "pascal_taskprompter_vit_base": ("adam", 2e-5, 1e-6, 4, 40000, 10.0),
    "nyud_taskprompter_vit_large": ("adam", 1e-5, 1e-6, 4, 40000, 10.0),
    "pascal_task_diffusion_vit_base": ("adam", 2e-5, 1e-6, 4, 40000, 10.0),
    "nyud_task_diffusion_vit_large": ("adam", 1e-5, 1e-6, 4, 40000, 10.0),
    "nyud_sak_vit_base": ("adamw", 2e-5, 1e-6, 4, 40000, 10.0),
    "pascal_sak_vit_base": ("adamw", 2e-5, 1e-6, 4, 40000, 10.0),
    "nyud_mqtransformer_swin_large": ("sgd", 1e-3, 5e-4, 8, 40000, None),
}


@pytest.mark.parametrize("experiment", SETTINGS)
def test_published_settings(experiment):
    config = composed(f"experiment={experiment}")
    optimizer, trainer = config.optimizer, config.trainer
    assert (
        optimizer.name,
        optimizer.lr,
        optimizer.weight_decay,
        config.data.batch_size,
        trainer.max_steps,
        trainer.clip_norm,
    ) == SETTINGS[experiment]
    assert (config.schedule.name, config.schedule.power) == ("poly", 0.9)
    assert config.data.size == {"pascal": [512, 512]}.get(
        config.data.name, [425, 560] if {"atrc", "mqtransformer"} & set(experiment.split("_")) else [448, 576]
    )


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_published_experiments_say_what_they_reproduce(experiment):
    text = (ROOT / "configs" / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8")
    comment = " ".join(line.removeprefix("# ") for line in text.split("\ndefaults:")[0].split("\n")[1:])
    assert re.search(r"Published|No figures", comment)
    config = composed(f"experiment={experiment}")
    assert config.name == experiment
    data, decoder, backbone = re.fullmatch(rf"(nyud|pascal)_({DECODERS})_(.*)", experiment).groups()  # type: ignore[union-attr]
    choice = chosen(experiment)
    expected_files = {"hrnet18": "hrnet_w18_small", "hrnet48": "hrnet_w48", "resnet18": "resnet18_dilated",
                      "resnet50": "resnet50_dilated"}.get(backbone, backbone)  # fmt: skip
    assert (choice["data"], choice["decoder"], choice["backbone"]) == (data, decoder, expected_files)
    edge = 0.8 if data == "nyud" and choice["recipe"] in ("atrc", "mqtransformer") else 0.95
    edge = 0.9 if experiment == "nyud_task_diffusion_vit_large" else edge
    assert config.loss.options.edge.positive_weight == edge


# Batch, steps of 200 epochs without the odd last batch, steps to the drop of the rate, classes.
LIBMTL = {
    "nyuv2_13_deeplab_resnet50": (8, 200 * (795 // 8), 100 * (795 // 8), 13),
    "cityscapes_deeplab_resnet50": (64, 200 * (2975 // 64), 100 * (2975 // 64), 7),
    "nyuv2_13_segnet": (2, 200 * (795 // 2), 100 * (795 // 2), 13),
    "cityscapes_segnet": (8, 200 * (2975 // 8), 100 * (2975 // 8), 7),
    "nyuv2_13_mtan": (2, 200 * (795 // 2), 100 * (795 // 2), 13),
    "cityscapes_mtan": (8, 200 * (2975 // 8), 100 * (2975 // 8), 7),
}
AUGMENTED = ("nyuv2_13_segnet", "nyuv2_13_mtan", "cityscapes_mtan")


@pytest.mark.parametrize("experiment", LIBMTL)
def test_experiments_of_libmtl_have_its_schedule(experiment):
    config = composed(f"experiment={experiment}")
    trainer, schedule = config.trainer, config.schedule
    assert (config.name, config.optimizer.name, trainer.clip_norm) == (experiment, "adam", None)
    tasks = build_tasks(config)
    assert (config.data.batch_size, trainer.max_steps, schedule.step_size, tasks["semseg"].channels) == LIBMTL[
        experiment
    ]
    factor = build_schedule(max_steps=trainer.max_steps, **plain(schedule))
    half = trainer.max_steps // 2
    assert [factor(step) for step in (0, half - 1, half, trainer.max_steps - 1)] == [1, 1, 0.5, 0.5]
    assert {config.loss.weights[name] for name in tasks} == {1.0}
    assert {config.evaluation.options[name].protocol for name in tasks} == {"mtan"}
    scale, flip = ([1.0, 1.5], 0.5) if experiment in AUGMENTED else ([1.0, 1.0], 0.0)
    assert plain(config.data.augment) == {"scale": scale, "flip": flip, "photometric": False, "class_cap": 1.0}


FOUNDATION = [name for name in EXPERIMENTS if "dinov" in name]


@pytest.mark.parametrize("experiment", FOUNDATION)
def test_experiments_of_foundation_backbones_say_what_is_nearest(experiment):
    text = (ROOT / "configs" / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8")
    comment = " ".join(line.removeprefix("# ") for line in text.split("\ndefaults:")[0].split("\n")[1:])
    assert re.search(r"Nearest row: .*mIoU \d\d\.\d\d", comment)
    assert "What differs:" in comment
    config, choice = composed(f"experiment={experiment}"), chosen(experiment)
    assert config.name == experiment
    version, size = re.search(r"(dinov[23])_(vit_\w+?)(?:_lora)?$", experiment).groups()  # type: ignore[union-attr]
    assert (choice["backbone"], choice["decoder"]) == (
        f"{size}_{version}",
        experiment.split("_dinov")[0].split("_", 1)[1],
    )
    trainable = "lora" if experiment.endswith("_lora") else "full" if choice["decoder"] == "multi_head" else "frozen"
    assert config.backbone.trainable == trainable
    assert config.data.views == (8 if trainable == "frozen" else None)
    assert config.optimizer.layer_decay == (0.9 if trainable == "full" else None)


ONE_LABEL = [name for name in EXPERIMENTS if "_onelabel_" in name]


@pytest.mark.parametrize("experiment", ONE_LABEL)
def test_experiments_of_one_label_say_which_row_is_nearest(experiment):
    text = (ROOT / "configs" / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8")
    comment = " ".join(line.removeprefix("# ") for line in text.split("\ndefaults:")[0].split("\n")[1:])
    assert re.search(r"Published: .*mIoU|Nearest row: .*mIoU \d\d\.\d\d.* What differs: ", comment)
    config = composed(f"experiment={experiment}")
    assert (config.name, config.data.label_assignment, config.backbone.name) == (experiment, "one", "resnet18")
    nyu = experiment.startswith("nyu")
    tasks = ["semseg", "depth", "normals"] if nyu else ["semseg", "human_parts", "sal", "normals", "edge"]
    assert list(build_tasks(config)) == choose_label_tasks(config, ()) == tasks


@pytest.mark.parametrize("data", ["nyud", "nyuv2_13", "pascal"])
def test_one_task_alone_of_the_experiments_of_one_label(data):
    """Check that its labels are those that it has where all tasks of the experiment share the images."""
    experiment = f"experiment={data}_onelabel_resnet18"
    config = composed(experiment, "tasks=single_semseg")
    assert list(build_tasks(config)) == ["semseg"]
    assert choose_label_tasks(config, ["semseg"]) == list(build_tasks(composed(experiment)))


def test_tasks_that_share_the_labels_hold_those_in_use():
    with pytest.raises(UserError, match=r"data\.label_tasks=\[depth,semseg\] lacks normals.*label_tasks=null"):
        choose_label_tasks(composed("data.label_tasks=[depth,semseg]"), ["semseg", "normals"])
    with pytest.raises(UserError, match=r"data\.label_tasks asks for sal, but data=nyud has labels for semseg, depth"):
        choose_label_tasks(composed("data=nyud", "data.label_tasks=[sal,semseg]"), ["semseg"])


OWN_REGULARIZERS = {
    **{f"{data}_sak_vit_{size}": "Distillation" for data in ("nyud", "pascal") for size in ("small", "base", "large")},
    **{f"{data}_onelabel_task_tokens_resnet18": "LabelDiscovery" for data in ("nyud", "nyuv2_13", "pascal")},
    "rooms_small": "Contrastive",
}


@pytest.mark.slow
def test_experiments_have_the_regularizer_of_their_method():
    """None has another but those of SAK, of task tokens, and of the shipped model, which was trained with contrast."""
    targets = {name: composed(f"experiment={name}").regularizer._target_ for name in EXPERIMENTS}
    others = {name: target.rpartition(".")[2] for name, target in targets.items() if target is not None}
    assert others == OWN_REGULARIZERS


@pytest.mark.parametrize(
    "experiment", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in EXPERIMENTS]
)
def test_experiments_compose_without_contrast(experiment):
    on, off = (composed(f"experiment={experiment}", f"regularizer={name}") for name in ("contrastive", "none"))
    assert on.regularizer._target_ == "mtcl.regularizers.Contrastive"
    assert on.regularizer.weight == 0.3
    assert off.regularizer._target_ is None
    assert {key: on[key] for key in on if key != "regularizer"} == {
        key: off[key] for key in off if key != "regularizer"
    }


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_build_at_their_published_size(experiment):
    config = composed(f"experiment={experiment}")
    if config.backbone.trainable == "lora":
        pytest.importorskip("peft")
    tasks = build_tasks(config)
    with torch.device("meta"):
        model = build_model(config, tasks, pretrained=False)
    assert set(model.feature_channels["final"]) == set(tasks)


CONTRASTED = {
    *FAST,
    *(name for name in EXPERIMENTS if name.startswith(("nyud_", "nyuv2_13_"))),
}  # every decoder is in it
TWINS = [(name, True) for name in EXPERIMENTS if name in CONTRASTED]
TWINS += [(name, False) for name in EXPERIMENTS if name not in OWN_REGULARIZERS]  # these have a test of their own


@pytest.mark.parametrize(
    ("experiment", "contrast"),
    [
        pytest.param(name, contrast, marks=() if name in FAST and contrast else pytest.mark.slow)
        for name, contrast in TWINS
    ],
)
def test_a_shrunken_twin_takes_a_step_on_tiny_rooms(experiment, contrast, tmp_path):
    if chosen(experiment).get("recipe") == "lora":
        pytest.importorskip("peft")
    config = composed(*shrink(experiment), f"regularizer={'contrastive' if contrast else 'none'}")
    metrics = train(config, tmp_path)
    assert set(metrics) == set(build_tasks(config))
    assert (tmp_path / "checkpoints" / "last.pt").is_file()


def shrink(experiment: str) -> list[str]:
    """Overrides of a twin that takes one step on two rooms, with the tasks of the experiment's dataset."""
    choice = chosen(experiment)
    overrides = [f"experiment={experiment}", "debug=tiny", "data=rooms", "data.size=[32,64]", "data.batch_size=2",
                 "data.augment.scale=[1.0,1.2]", "data.limit=2", "trainer.max_steps=1", "trainer.val_interval=null",
                 "trainer.validate_first=false", "trainer.num_panels=0", "trainer.device=cpu"]  # fmt: skip
    overrides += shrunk(choice["decoder"], choice["backbone"])
    # The tasks of its dataset: a genotype of ATRC is for these and no others.
    if choice["tasks"] == "auto" and choice["data"] in ("nyud", "pascal"):
        overrides.append(f"tasks={choice['data']}")
    if composed(f"experiment={experiment}", "data=rooms").data.options.get("resize", None) is not None:
        overrides.append("~data.options.resize")
    return overrides


@pytest.mark.slow
@pytest.mark.parametrize("experiment", OWN_REGULARIZERS)
def test_a_shrunken_twin_takes_a_step_with_the_regularizer_of_its_method(experiment, tmp_path):
    overrides = [*shrink(experiment), "regularizer.start_fraction=0", "regularizer.warmup_steps=0"]
    if OWN_REGULARIZERS[experiment] == "Distillation":
        key, tiny = "++regularizer.options.teachers", "{name:test_vit,weights:none}"
        overrides += [f"{key}.dinov2={tiny}", f"{key}.clip={tiny}", f"{key}.sam={tiny}", f"{key}.sam.input_size=64"]
    config = composed(*overrides)
    train(config, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (step,) = (record for record in records if record["kind"] == "train")
    assert step["regularizer"] > 0
    task_loss = sum(task.weight * (step[name] or 0) for name, task in build_tasks(config).items())
    assert step["loss"] > task_loss + 0.1 * step["regularizer"]  # lambda is 0.3 or more


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [name for name in ONE_LABEL if name.endswith("_onelabel_resnet18")])
def test_one_task_alone_takes_a_step_on_the_labels_of_all_tasks(experiment, tmp_path):
    config = composed(*shrink(experiment), "tasks=single_semseg", "data.limit=10", "trainer.max_steps=2")
    assert set(train(config, tmp_path)) == {"semseg"}
    labels = json.loads((tmp_path / "run.json").read_text())["labels"]
    assert labels["images"]["semseg"] == 10 // len(labels["tasks"]) + (10 % len(labels["tasks"]) > 0)


def test_depth_by_mtan_is_monitored_by_its_absolute_error():
    config = composed("evaluation=mtan", "tasks=single_depth")
    tasks, options = build_tasks(config), plain(config.evaluation.options)
    assert choose_monitor("auto", tasks, None, options) == ("depth/abs_err", False)
    assert choose_monitor("auto", tasks, None, plain(composed("tasks=single_depth").evaluation.options)) == (
        "depth/rmse",
        False,
    )
    assert {name: one["protocol"] for name, one in options.items() if "protocol" in one} == {
        "semseg": "mtan",
        "depth": "mtan",
        "normals": "mtan",
        "sal": "standard",
    }
