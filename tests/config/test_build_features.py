"""Training on cached features of a frozen backbone equals training without the cache, and never uses wrong ones."""

import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers.common import composed, flip, tiny_nyud

from mtcl import distributed
from mtcl.config.build_data import build_tasks
from mtcl.config.build_features import build_feature_caches
from mtcl.config.build_training import TrainingRun, build_training_run
from mtcl.errors import UserError
from mtcl.models.weights import hash_weights
from mtcl.training import feature_filling

DEVICE = torch.device("cpu")
OVERRIDES = [
    "trainer.device=cpu",
    "debug=tiny",
    "data.limit=null",
    "data.workers=0",
    "backbone.trainable=frozen",
    "data.views=2",
]
OVERRIDES += ["trainer.validate_first=false", "data.feature_precision=fp32", "trainer.clip_norm=null"]
RESNET = [
    "backbone=resnet18",
    "++backbone.kwargs={layers:[1,1,1,1],channels:[8,16,32,64]}",
    "decoder=multi_head",
    "decoder.width=16",
    "decoder.head_width=8",
]
VIT = ["backbone=vit_small", "++backbone.kwargs={embed_dim:32,depth:4,num_heads:2}", "decoder=multi_head"]
VIT += ["decoder.width=16", "decoder.head_width=8", "decoder.stride=8"]
ROOMS = ["data=rooms", "data.size=[64,64]", "data.options.length=[6,5]", "data.batch_size=4", "data.eval_batch_size=2"]
ROOMS += ["data.augment.scale=[0.7,1.3]", "data.augment.photometric=true", "regularizer.options.num_pixels=16"]
ROOMS += ["regularizer=contrastive"]


def build(*overrides: str, folder: str | Path = "unused") -> TrainingRun:
    rooms = () if "data=nyud" in overrides else ROOMS
    config = composed(*OVERRIDES, *rooms, *overrides)
    torch.manual_seed(config.seed if "seed=1" in overrides else 0)
    return build_training_run(config, build_tasks(config), Path(folder), DEVICE)


def fill(run: TrainingRun) -> None:
    for filler in run.trainer.feature_fillers:
        filler.fill(run.trainer.model, DEVICE, "fp32")


def train(run: TrainingRun, steps: int) -> list[dict[str, float]]:
    trainer = run.trainer
    trainer.model.train()
    fill(run)
    losses = []
    for batches in islice(trainer.batches_per_step(), steps):
        losses.append({name: float(value) for name, value in trainer.train_step(*batches).items()})
        trainer.step += 1
    return losses


@pytest.mark.parametrize("model", [RESNET, VIT], ids=["resnet", "vit"])
def test_training_on_cached_features_equals_training_without_the_cache(model, tmp_path) -> None:
    plain, cached = (
        build(*model, "trainer.max_steps=30"),
        build(*model, "trainer.max_steps=30", f"data.feature_cache={tmp_path}"),
    )
    expected, losses = train(plain, 20), train(cached, 20)
    assert losses == expected
    assert "regularizer" in losses[0]
    assert len({loss["depth"] for loss in losses}) > 10
    assert (
        plain.trainer.evaluator.run(plain.trainer.model).metrics
        == cached.trainer.evaluator.run(cached.trainer.model).metrics
    )
    for batch in islice(cached.trainer.batches_per_step(), 1):
        assert batch[0]["image"].shape == (4, 0, 64, 64)


def test_contrast_trains_the_heads_and_weight_zero_changes_nothing(tmp_path) -> None:
    cache = f"data.feature_cache={tmp_path}"
    without = train(build(*RESNET, cache, "regularizer=none"), 3)
    reported = train(build(*RESNET, cache, "regularizer.weight=0"), 3)
    assert [{k: v for k, v in loss.items() if k != "regularizer"} for loss in reported] == without
    run = build(*RESNET, cache, "regularizer.weight=1")
    trained = train(run, 3)
    assert trained[0]["depth"] == without[0]["depth"]
    assert trained[2]["depth"] != without[2]["depth"]


def test_fp16_features_are_close(tmp_path) -> None:
    expected = train(build(*RESNET), 2)
    losses = train(build(*RESNET, "data.feature_precision=fp16", f"data.feature_cache={tmp_path}"), 2)
    assert losses[0] == pytest.approx(expected[0], rel=1e-2)
    assert losses != expected


def test_a_filled_cache_is_used_again_and_more_views_are_added(tmp_path, monkeypatch) -> None:
    cache = f"data.feature_cache={tmp_path}"
    fill(build(*RESNET, cache))
    entries = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array")}
    assert len(entries) == 2 * 6 + 5
    monkeypatch.setattr(feature_filling.FeatureFiller, "_encode", lambda *_args: pytest.fail("computed again"))
    fill(build(*RESNET, cache, "seed=3"))  # another order, another decoder: the same features
    monkeypatch.undo()
    fill(build(*RESNET, cache, "data.views=3"))
    assert {path: path.stat().st_mtime_ns for path in entries} == entries
    assert len(list(tmp_path.rglob("*.array"))) == 3 * 6 + 5


def test_an_interrupted_filling_continues(tmp_path, monkeypatch) -> None:
    run = build(*RESNET, f"data.feature_cache={tmp_path}")
    write, names = run.trainer.feature_fillers[0].cache.write, []

    def stop_after_five(*args, **options):
        if len(names) == 5:
            raise KeyboardInterrupt
        names.append(args[:2])
        write(*args, **options)

    monkeypatch.setattr(run.trainer.feature_fillers[0].cache, "write", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        fill(run)
    assert len(list(tmp_path.rglob("*.array"))) == 5
    expected = train(build(*RESNET), 4)
    assert train(build(*RESNET, f"data.feature_cache={tmp_path}"), 4) == expected


@pytest.mark.parametrize("part", ["header", "values", "length"])
def test_a_damaged_entry_is_computed_again(part, tmp_path) -> None:
    cache = f"data.feature_cache={tmp_path}"
    fill(build(*RESNET, cache))
    path = sorted(tmp_path.rglob("*.array"))[3]
    content = path.read_bytes()
    if part == "length":
        path.write_bytes(content[:-64])
    else:
        flip(path, 20 if part == "header" else len(content) - 3)
    run = build(*RESNET, cache)
    (filler,) = (f for f in run.trainer.feature_fillers if f.cache.folder in path.parents)
    with pytest.raises(UserError, match=r"no intact features of .*start again"):
        filler.cache.read(int(path.parent.name.removeprefix("view")), path.stem)
    fill(run)
    assert path.read_bytes() == content


def test_an_image_that_has_changed_is_computed_again(tmp_path) -> None:
    root = tiny_nyud(tmp_path / "nyud")
    overrides = [*RESNET, "data=nyud", f"data.root={root}", "data.cache=null", "data.memory_map=false", "tasks=nyud"]
    overrides += ["data.size=[64,96]", "data.batch_size=2", "regularizer=contrastive"]
    overrides += ["regularizer.options.num_pixels=16"]
    overrides += [f"data.feature_cache={tmp_path}/features"]
    fill(build(*overrides))
    entries = {path: path.read_bytes() for path in (tmp_path / "features").rglob("a.array")}
    image = root / "images" / "a.png"
    image.write_bytes((root / "images" / "b.png").read_bytes())
    fill(build(*overrides))
    assert len(entries) == 3
    assert all(path.read_bytes() != content for path, content in entries.items())


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """The folder of a cache that is filled once for the tests below."""
    cache = tmp_path_factory.mktemp("filled")
    fill(build(*RESNET, f"data.feature_cache={cache}"))
    return cache


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("seed=1", "weights"),  # random weights of another seed
        ("data.size=[64,96]", "images, labels, size"),
        ("data.augment.flip=0.25", "augmentation"),
        ("data.views_seed=1", "views_seed"),
        ("backbone.mean=[0.4,0.4,0.4]", "normalisation"),
        ("data.feature_precision=fp16", "format"),
        ("data.label_assignment=one", "labels"),
    ],
)
def test_a_cache_of_other_settings_is_not_used_and_the_log_says_so(
    override, difference, filled, tmp_path, caplog
) -> None:
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    cache = f"data.feature_cache={tmp_path}"
    (folder,) = tmp_path.glob("resnet18-train-*")
    with caplog.at_level("INFO"):
        fill(build(*RESNET, cache, override))
    assert f"{folder} was made with another {difference})" in caplog.text
    assert len(list(tmp_path.glob("resnet18-train-*"))) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone.trainable=full"], r"data\.feature_cache .*set backbone\.trainable=frozen"),
        (["data.views=null"], r"data\.feature_cache needs .*set data\.views"),
        (["data.views_per_step=2"], r"data\.feature_cache .* one view .*set data\.views_per_step=1 or"),
        (["data.feature_precision=bf16"], r"data\.feature_precision=bf16 is not known; choose fp16 or fp32"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, message, tmp_path) -> None:
    with pytest.raises(UserError, match=message):
        build(*RESNET, f"data.feature_cache={tmp_path}/cache", *overrides)
    assert not (tmp_path / "cache").exists()


def test_a_decoder_inside_the_backbone_is_refused(tmp_path) -> None:
    overrides = ["backbone=vit_small", "++backbone.kwargs={embed_dim:32,depth:4,num_heads:2}", "decoder=taskprompter"]
    overrides += ["decoder.size=[64,64]", "decoder.width=8", "decoder.head_width=8"]
    with pytest.raises(UserError, match=r"TaskPrompter works inside the backbone"):
        build(*overrides, f"data.feature_cache={tmp_path}")


def test_a_sharded_model_is_refused(tmp_path, monkeypatch) -> None:
    config = composed(*OVERRIDES, *ROOMS, *RESNET, f"data.feature_cache={tmp_path}", "trainer.parallel=fsdp")
    tasks, run = build_tasks(config), build(*RESNET)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match=r"data\.feature_cache .* use trainer\.parallel=ddp"):
        build_feature_caches(config, tasks, run.trainer.model, run.train_dataset, run.val_dataset, DEVICE)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(tmp_path, monkeypatch) -> None:
    run = build(*RESNET, f"data.feature_cache={tmp_path}/cache")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"needs .* more, but its disk has 1 kB left"):
        fill(run)
    assert not (tmp_path / "cache").exists()


def test_features_that_fp16_cannot_hold_are_refused(tmp_path) -> None:
    run = build(*RESNET, "data.feature_precision=fp16", f"data.feature_cache={tmp_path}")
    with torch.no_grad():
        for module in run.trainer.model.backbone.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.fill_(1e4)
    with pytest.raises(UserError, match=r"not finite in fp16 .*fp32"):
        fill(run)


def test_hash_of_weights_depends_on_names_and_values() -> None:
    weights = {"a": torch.arange(4.0), "b": torch.tensor(1)}
    others = [{**weights, "a": torch.arange(4.0) + 1e-6}, {**weights, "a": torch.arange(4.0)[None]}]
    others += [{"a": weights["a"], "c": weights["b"]}, {**weights, "a": torch.arange(4.0).double()}]
    assert len({hash_weights(w) for w in (weights, *others)}) == 5
    assert hash_weights(weights) == hash_weights(dict(reversed(weights.items())))


def test_no_cache_without_the_key() -> None:
    config = composed(*OVERRIDES, *ROOMS, *RESNET)
    assert config.data.feature_cache is None
    assert build_feature_caches(config, {}, None, None, None, DEVICE) is None
