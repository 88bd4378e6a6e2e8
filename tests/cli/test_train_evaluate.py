"""The two commands as users type them: what they write, and how they fail."""

import errno
import functools
import json
from pathlib import Path

import pytest
import torch
from helpers.common import ROOT, TINY, assert_fails, composed, tiny_nyud
from helpers.pascal_miniature import write_archive

import mtcl.config.build_model
from mtcl.cli.train import train
from mtcl.config.build_data import build_tasks
from mtcl.data import Rooms
from mtcl.errors import UserError
from mtcl.evaluation.format_metrics import format_metrics
from mtcl.tasks import TASK_NAMES
from mtcl.training.checkpoint_file import read_checkpoint_file, write_checkpoint_file


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(composed(*TINY, "trainer.num_panels=1"), folder)
    return folder


def test_train_writes_everything(cli, tmp_path):
    result = cli("train.py", *TINY, "trainer.num_panels=1", f"hydra.run.dir={tmp_path}/run")
    assert result.code == 0, result.err
    folder = tmp_path / "run"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == {"semseg", "human_parts", "sal", "depth", "normals", "edge"}
    assert 0 <= metrics["semseg"]["mIoU"] <= 1
    assert "mIoU" in result.out
    assert str(folder / "panels") in result.out
    facts = json.loads((folder / "run.json").read_text())
    assert {"command", "commit", "clean", "versions", "device", "seed", "split", "num_images", "protocol",
            "data_fingerprint"} <= facts.keys()  # fmt: skip
    assert facts["num_images"] == 4
    for name in ("last", "best"):
        checkpoint = read_checkpoint_file(folder / "checkpoints" / f"{name}.pt")
        assert {
            "format",
            "model",
            "ema",
            "regularizer",
            "share",
            "balancer",
            "scaler",
            "optimizer",
            "schedule",
            "step",
            "rng",
            "config",
            "meta",
        } == set(checkpoint)
        assert not [key for key in checkpoint["model"] if "projector" in key]
    assert checkpoint["config"]["backbone"]["mean"] == pytest.approx([0.5, 0.5, 0.5])
    assert len(list((folder / "panels").glob("*.png"))) == 1
    assert list(folder.glob("events.out.tfevents.*"))


def test_train_refuses_a_folder_with_a_run(cli, trained):
    files_before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert_fails(cli("train.py", *TINY, f"hydra.run.dir={trained}"), str(trained), "resume=auto")
    assert files_before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


def test_dry_run_of_the_default_without_regularizer(cli, tmp_path):
    tiny = [word for word in TINY if not word.startswith("regularizer=")]
    folder = f"hydra.run.dir={tmp_path}/run"
    refused = cli("train.py", *tiny, "regularizer.weight=0.1", folder)
    assert_fails(refused, "regularizer.weight=0.1 has no effect", "add regularizer=contrastive")
    result = cli("train.py", *tiny, "trainer.dry_run=true", "trainer.max_steps=1000", folder)
    assert result.code == 0, result.err
    assert ", no regularizer, " in result.out
    assert "dry run: the step took" in result.out
    assert read_checkpoint_file(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 1


@pytest.mark.parametrize("overrides", [["tasks.names=[depth,semseg]"], ["tasks=single_normals"], ["tasks=pascal"]])
def test_task_subsets(cli, tmp_path, overrides):
    result = cli("train.py", *TINY, *overrides, f"hydra.run.dir={tmp_path}/run")
    assert result.code == 0, result.err
    names = composed(*overrides).tasks.names
    assert set(json.loads((tmp_path / "run" / "metrics.json").read_text())) == set(names)
    if len(names) == 1:
        assert "the regularizer is off" in result.out


@pytest.mark.slow
def test_resume_auto_looks_in_its_folder_then_among_its_siblings(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = [*TINY, "name=mine", "resume=auto"]
    result = cli("train.py", *overrides, "hydra.run.dir=outputs/mine/first")
    assert "starting afresh" in result.out
    result = cli("train.py", *overrides, "trainer.max_steps=3", "hydra.run.dir=outputs/mine/other")
    assert "starting afresh" in result.out, "a folder named by the user has no siblings"
    result = cli("train.py", *overrides, "trainer.max_steps=3", "hydra.run.dir=outputs/mine/first")
    assert f"resumed at step 2 from {tmp_path}/outputs/mine/first/checkpoints/last.pt" in result.out
    result = cli("train.py", *overrides, "trainer.max_steps=4", "seed=1")
    assert "starting afresh" in result.out, "a run of another seed is not this one"
    result = cli("train.py", *overrides, "trainer.max_steps=3")
    assert "starting afresh" in result.out, "a finished run is not continued"
    result = cli("train.py", *overrides, "trainer.max_steps=4")
    assert "resumed at step 3 from" in result.out


def test_evaluate_repeats_the_training_runs_numbers(cli, trained, tmp_path, monkeypatch):
    original = Rooms.__init__

    @functools.wraps(original)
    def only_val(self, subset, *args, **kwargs):
        assert subset == "val", "evaluation opened the training list"
        original(self, subset, *args, **kwargs)

    monkeypatch.setattr(Rooms, "__init__", only_val)
    path = trained / "checkpoints" / "last.pt"
    result = cli("evaluate.py", f"checkpoint={path}", f"hydra.run.dir={tmp_path}/a")
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "a" / "metrics.json").read_text()) == json.loads(
        (trained / "metrics.json").read_text()
    )
    assert json.loads((tmp_path / "a" / "run.json").read_text())["step"] == 2
    assert list((tmp_path / "a" / "panels").glob("*.png"))
    assert "mIoU" in result.out


def test_evaluate_takes_overrides(cli, trained, tmp_path):
    overrides = ["data.split=tune", "data.limit=2", "data.size=[64,64]"]
    result = cli("evaluate.py", f"checkpoint={trained}/checkpoints/best.pt", *overrides, f"hydra.run.dir={tmp_path}/a")
    assert result.code == 0, result.err
    facts = json.loads((tmp_path / "a" / "run.json").read_text())
    assert (facts["split"], facts["num_images"]) == ("tune", 2)


def test_evaluate_knows_the_keys_of_the_checkpoints_own_dataset(cli, tmp_path):
    """A dataset other than the default one, with options of its own; trained on a machine with another device."""
    root = tiny_nyud(tmp_path / "data")
    overrides = ["data=nyud", f"data.root={root}", "data.options.resize=[32,64]", f"data.cache={tmp_path}/cache"]
    assert cli("train.py", *TINY, *overrides, f"hydra.run.dir={tmp_path}/run").code == 0
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["config"]["trainer"]["device"] = "cuda"
    torch.save(checkpoint, path)
    result = cli("evaluate.py", f"checkpoint={path}", f"hydra.run.dir={tmp_path}/same")
    assert result.code == 0, result.err
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "same"))
    assert a == b
    overrides = ["data.options.resize=[64,96]", "data.size=[64,96]"]
    assert cli("evaluate.py", f"checkpoint={path}", *overrides, f"hydra.run.dir={tmp_path}/larger").code == 0
    assert json.loads((tmp_path / "larger" / "metrics.json").read_text()) != a
    moved = (tmp_path / "data").rename(tmp_path / "moved")
    result = cli("evaluate.py", f"checkpoint={path}", f"data.root={moved}", f"hydra.run.dir={tmp_path}/moved_too")
    assert result.code == 0, result.err


def test_pascal_is_trained_and_evaluated(cli, tmp_path):
    write_archive(tmp_path / "PASCALContext", [f"2008_{n:06d}" for n in range(4)], ["2009_000001"])
    overrides = ["data=pascal", f"data.root={tmp_path}", f"data.cache={tmp_path}/cache", "data.label_assignment=random"]
    result = cli("train.py", *TINY, *overrides, f"hydra.run.dir={tmp_path}/run")
    assert result.code == 0, result.err
    assert "parts, masks of normals, edges derived once" in result.out
    assert set(json.loads((tmp_path / "run" / "metrics.json").read_text())) == {
        "semseg",
        "human_parts",
        "sal",
        "normals",
        "edge",
    }
    result = cli("evaluate.py", f"checkpoint={tmp_path}/run/checkpoints/last.pt", f"hydra.run.dir={tmp_path}/again")
    assert result.code == 0, result.err
    a, b = ((tmp_path / name / "metrics.json").read_text() for name in ("run", "again"))
    assert a == b


@pytest.mark.slow
def test_damage_in_the_middle_of_training_is_one_sentence_and_damage_of_the_cache_is_mended(cli, tmp_path):
    root = tiny_nyud(tmp_path / "data")
    overrides = ["data=nyud", f"data.root={root}", "data.options.resize=[32,64]", f"data.cache={tmp_path}/cache"]
    overrides += ["data.workers=2", "trainer.max_steps=4"]
    assert cli("train.py", *TINY, *overrides, f"hydra.run.dir={tmp_path}/first").code == 0
    entries = list((tmp_path / "cache").rglob("*.array"))
    assert len(entries) == 4 * 5
    for path in entries:
        path.write_bytes(path.read_bytes()[:-7])
    result = cli("train.py", *TINY, *overrides, f"hydra.run.dir={tmp_path}/second")
    assert result.code == 0, result.err
    a, b = ((tmp_path / name / "metrics.json").read_text() for name in ("first", "second"))
    assert a == b
    path = root / "normals" / "c.png"
    path.write_bytes(path.read_bytes()[:-100])
    result = cli("train.py", *TINY, *overrides, f"hydra.run.dir={tmp_path}/third")
    assert_fails(result, str(path), "truncated or damaged")


@pytest.mark.slow
def test_edges_get_their_odsF_at_the_end_and_before_it_on_request(cli, tmp_path):
    overrides = ["tasks=single_edge", "trainer.max_steps=2", "trainer.val_interval=1"]
    validations = {}
    for name, word in {
        "end": "seed=0",
        "quick": "evaluation.fast_boundaries=[5,1]",
        "never": "evaluation.score_boundaries=false",
    }.items():
        result = cli("train.py", *TINY, *overrides, word, f"hydra.run.dir={tmp_path}/{name}")
        assert result.code == 0, result.err
        records = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        validations[name] = ["edge/odsF" in record for record in records if record["kind"] == "val"]
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())["edge"]
        assert ("odsF" in metrics) == (name != "never")
        assert "loss" in metrics
    overrides = ["tasks=single_edge", "evaluation.fast_boundaries=[5,1]", "evaluation.score_boundaries=false"]
    assert cli("train.py", *TINY, *overrides, f"hydra.run.dir={tmp_path}/both").code == 0
    assert validations == {"end": [False, False, True], "quick": [True] * 3, "never": [False] * 3}
    checkpoint = tmp_path / "end" / "checkpoints" / "last.pt"
    overrides = [f"checkpoint={checkpoint}", f"hydra.run.dir={tmp_path}/again"]
    assert cli("evaluate.py", *overrides).code == 0
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("end", "again"))
    assert a == b
    overrides = [f"checkpoint={checkpoint}", "data.boundary_distance=0.2", f"hydra.run.dir={tmp_path}/far"]
    assert cli("evaluate.py", *overrides).code == 0  # the distance is that of the data scored
    assert json.loads((tmp_path / "far" / "metrics.json").read_text())["edge"]["odsF"] > a["edge"]["odsF"]
    overrides = [f"checkpoint={checkpoint}", "evaluation.options.edge.preset=invpt", f"hydra.run.dir={tmp_path}/invpt"]
    assert cli("evaluate.py", *overrides).code == 0
    assert json.loads((tmp_path / "invpt" / "metrics.json").read_text())["edge"] != a["edge"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("evaluation.options.edge.preset=matlab", "matlab"),
        ("evaluation.options.sal.protocol=old", "old"),
        ("evaluation.options.depth.protocol=old", "old"),
        ("evaluation.fast_boundaries=[9]", "evaluation.fast_boundaries"),
    ],
)
def test_impossible_ways_of_scoring_are_refused_before_training(cli, tmp_path, word, message):
    assert_fails(cli("train.py", *TINY, word, f"hydra.run.dir={tmp_path}/run"), message)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_table_leaves_out_what_nobody_reads():
    tasks = build_tasks(composed())
    metrics = {
        "semseg": {"mIoU": 0.5, "IoU/wall": 0.25, "not_finite": 0.0},
        "edge": {"loss": 0.05, "odsF": 0.75, "not_finite": 3.0},
    }
    earlier = {"semseg": {"mIoU": 0.1, "IoU/wall": 0.1, "not_finite": 0.0}, "edge": {"loss": 0.1, "not_finite": 0.0}}
    table = format_metrics({name: tasks[name] for name in metrics}, {"untrained": earlier, "step 9": metrics})
    rows = [line.split() for line in table.splitlines()[2:]]
    assert rows[0] == ["semseg", "mIoU*", "10.00", "%", "50.00", "%"]
    assert ["edge", "odsF*", "-", "75.00", "%"] in rows
    assert ["edge", "not_finite", "0", "pixels", "3", "pixels"] in rows
    assert "IoU/" not in table
    assert table.count("not_finite") == 1
    del earlier["edge"]["not_finite"], metrics["edge"]["not_finite"]
    late = {"semseg": metrics["semseg"], "edge": {**metrics["edge"], "not_finite": 0.0}}
    assert "not_finite" not in format_metrics({"edge": tasks["edge"]}, {"untrained": earlier, "step 9": late})
    for absent, shown in ((0.0, False), (3.0, True)):  # the second mIoU only where a class is absent
        values = {"mIoU": 0.5, "mIoU_present": 0.75, "absent_classes": absent}
        table = format_metrics({"semseg": tasks["semseg"]}, {"step 9": {"semseg": values}})
        assert ("absent_classes  3 classes" in table, "75.00 %" in table) == (shown, shown), table


def test_a_batch_without_a_tasks_labels_has_no_loss_of_it_in_the_log(cli, tmp_path):
    """One label a picture, two pictures a step, six tasks: most have none."""
    overrides = ["data.label_assignment=one", "data.options.length=[12,2]", "data.limit=null", "trainer.max_steps=3"]
    result = cli("train.py", *TINY, *overrides, f"hydra.run.dir={tmp_path}/run")
    assert result.code == 0, result.err
    assert "labels of 12 images: semseg 2, human_parts 2, sal 2, depth 2, normals 2, edge 2" in result.out
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["labels"]
    assert recorded == {"rule": "one", "seed": 0, "images": dict.fromkeys(TASK_NAMES, 2)}
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    assert len(trained) == 3
    for record in trained:
        losses = [record[name] for name in TASK_NAMES]
        assert 1 <= sum(loss is not None for loss in losses) <= 2
        assert all(loss is None or loss > 0 for loss in losses)


@pytest.mark.slow
def test_a_seed_of_labels_and_a_rule_for_normals_reach_the_data(cli, tmp_path):
    losses = []
    for overrides in ([], ["data.label_assignment=random"], ["data.label_assignment=random", "data.labels_seed=1"]):
        folder = tmp_path / str(len(losses))
        assert cli("train.py", *TINY, *overrides, "trainer.max_steps=1", f"hydra.run.dir={folder}").code == 0
        record = json.loads((folder / "log.jsonl").read_text().splitlines()[-2])
        losses.append(tuple(record.items()))
    assert len(set(losses)) == 3
    config = composed("data=nyud", "data.normals_valid=standard")
    assert build_tasks(config)["normals"].normals_valid == "standard"
    assert build_tasks(composed("data=nyud"))["normals"].normals_valid == "length"


def test_evaluate_asks_no_hub_for_weights(cli, tmp_path, monkeypatch):
    checkpoint = torch.load(_trained_copy(tmp_path), weights_only=True)
    checkpoint["config"]["backbone"]["weights"] = "hub"
    torch.save(checkpoint, tmp_path / "hub.pt")
    weights = []
    original = mtcl.config.build_model.build_backbone
    monkeypatch.setattr(
        "mtcl.config.build_model.build_backbone", lambda *a, **k: (weights.append(k["weights"]), original(*a, **k))[1]
    )
    result = cli("evaluate.py", f"checkpoint={tmp_path}/hub.pt", f"hydra.run.dir={tmp_path}/a")
    assert result.code == 0, result.err
    assert set(weights) == {None}


def _trained_copy(folder):
    train(composed(*TINY), folder / "run")
    return folder / "run" / "checkpoints" / "last.pt"


TRAIN_MISTAKES = {
    "unknown task": (["tasks.names=[semseg,deph]"], ["deph", "depth"]),
    "task the data lacks": (["data=nyud", "tasks.names=[sal]"], ["sal", "nyud"]),
    "no task": (["tasks.names=[]"], ["tasks.names"]),
    "unknown backbone": (["backbone.name=resnet19"], ["resnet19", "resnet18"]),
    "unknown backbone config": (["backbone=resnet19"], ["backbone=resnet19", "resnet18"]),
    "backbone of timm": (["backbone=resnet101"], ["backbone=resnet101 is not known", "or backbone.name=resnet101"]),
    "key without its group": (["lr=0.001"], ["no config key lr; did you mean optimizer.lr or"]),
    "key of another group": (["optimizer.batch_size=2"], ["did you mean data.batch_size?"]),
    "task twice": (["tasks.names=[depth,depth]"], ["tasks.names=", "different names"]),
    "betas": (["optimizer.betas=[0.9,1.0]"], ["optimizer.betas=[0.9, 1.0]", "below 1"]),
    "nesterov": (["optimizer=sgd", "optimizer.nesterov=true", "optimizer.momentum=0"], ["momentum above 0"]),
    "option of no optimizer": (["+optimizer.foo=1"], ["optimizer.foo"]),
    "sign that needs quotes": (["trainer.monitor=a=b"], ["holds = (character 2)", "type 'trainer.monitor=\"a=b\"'"]),
    "bracket": (["data.size=[32,64"], ["data.size=[32,64 can't be read", "a list is [a,b]"]),
    "path without a key": (["outputs/none"], ["outputs/none has no key", "resume=outputs/none"]),
    "home that is not there": (["data=nyud", "data.root=~/none"], ["/home of mine/none is not a folder"]),
    "path with signs": (["data=nyud", "data.root=no/a=b[1] {2}#,für"], ["no/a=b[1] {2}#,für is not a folder"]),
    "folder to resume": ([f"resume={ROOT}/tests"], ["tests is a folder", "checkpoints/last.pt", "resume=auto"]),
    "no checkpoint": ([f"resume={ROOT}/README.md"], ["README.md can't be read (it is no file of torch.save"]),
    "no weights": ([f"backbone.weights={ROOT}/README.md"], ["README.md can't be read", "no file of torch.save"]),
    "one value per channel": (
        ["data.batch_size=1", "data.size=[32,32]", "trainer.accumulate_grad_batches=2", "trainer.validate_first=false"],
        ["single value per channel", "data.batch_size", "data.size"],
    ),
    "unknown key": (["trainer.max_step=3"], ["trainer.max_step", "trainer.max_steps"]),
    "unknown group": (["regularisr=none"], ["regularisr"]),
    "unknown experiment": (["experiment=nope"], ["nope", "rooms"]),
    "ill-formed word": (["trainer.max_steps"], ["trainer.max_steps"]),
    "unknown split": (["data.split=third"], ["third"]),
    "weights that are not there": (["backbone.weights=no/such/file.pth"], ["no/such/file.pth"]),
    "data root that is not there": (["data=nyud", "data.root=no/such/root"], ["no/such/root", "segmentation"]),
    "root for rooms": (["data.root=here"], ["data.root=here"]),
    "batch larger than the data": (["data.batch_size=9"], ["9", "4"]),
    "size": (["data.size=96"], ["data.size=96"]),
    "negative weight": (["regularizer.weight=-1"], ["regularizer.weight=-1"]),
    "negative task weight": (["loss.weights.depth=-1"], ["loss.weights.depth=-1"]),
    "tap": (["regularizer.options.feature=middle"], ["middle", "final"]),
    "monitor": (["trainer.monitor=semseg/rmse"], ["semseg/rmse", "semseg/mIoU"]),
    "device": (["trainer.device=tpu"], ["tpu", "cuda"]),
    "precision": (["trainer.precision=fp8"], ["fp8", "bf16"]),
    "optimizer": (["optimizer.name=lyon"], ["optimizer.name=lyon", "did you mean lion?"]),
    "schedule": (["schedule.name=exp"], ["exp", "poly"]),
    "seed": (["seed=-1"], ["seed=-1"]),
    "missing checkpoint": (["resume=no/such.pt"], ["no/such.pt"]),
    "foreign target": (["decoder._target_=os.system"], ["os.system"]),
    "text for a number": (["optimizer.lr=fast"], ["optimizer.lr", "fast"]),
    "text for a count": (["trainer.max_steps=many"], ["trainer.max_steps", "many"]),
    "scale": (["data.augment.scale=2"], ["data.augment.scale=2", "list of two"]),
    "half a scale": (["data.augment.scale=[1.0]"], ["data.augment.scale=[1.0]"]),
    "mean": (["backbone.mean=0.5"], ["backbone.mean=0.5"]),
    "names": (["tasks.names=5"], ["tasks.names=5"]),
    "threshold": (["regularizer.options.thresholds.depth=0.1"], ["thresholds.depth=0.1"]),
    "thresholds that overlap": (["regularizer.options.thresholds.depth=[0.3,0.2]"], ["thresholds.depth", "0.3"]),
    "null for a number": (["data.batch_size=null"], ["data.batch_size=null"]),
    "text for a null": (["optimizer.backbone_lr=fast"], ["optimizer.backbone_lr=fast", "null"]),
    "number for a mapping": (["backbone.kwargs=5"], ["backbone.kwargs=5"]),
    "negative rate": (["optimizer.lr=-1"], ["optimizer.lr=-1"]),
    "infinite rate": (["optimizer.lr=inf"], ["optimizer.lr=inf"]),
    "no clipping": (["trainer.clip_norm=0"], ["trainer.clip_norm=0", "null"]),
    "option of no decoder": (["+decoder.foo=1"], ["decoder.foo", "width"]),
    "option of no reader": (["+data.options.foo=1"], ["data.options.foo", "length"]),
    "option of no regularizer": (["+regularizer.options.foo=1"], ["regularizer.options.foo", "margin"]),
    "target of another kind": (["decoder._target_=mtcl.data.NYUD"], ["mtcl.data.NYUD", "Decoder"]),
    "option of no backbone": (["backbone.kwargs={foo:1}"], ["foo"]),
    "interval of nothing": (["trainer.log_interval=0"], ["trainer.log_interval=0"]),
    "limit of nothing": (["data.limit=0"], ["data.limit=0"]),
    "batch of nothing": (["data.batch_size=0"], ["0"]),
}


@pytest.mark.parametrize("mistake", TRAIN_MISTAKES)
def test_train_says_what_is_wrong(cli, tmp_path, monkeypatch, mistake):
    monkeypatch.setenv("HOME", "/home of mine")
    overrides, fragments = TRAIN_MISTAKES[mistake]
    result = cli("train.py", *TINY, *overrides, f"hydra.run.dir={tmp_path}/run")
    assert_fails(result, *fragments)
    assert "weights_only" not in result.err
    results = [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".pt", ".json", ".png")]
    assert not results, "nothing that looks like a run's results"
    if mistake != "one value per channel":  # that shows in the first step
        assert not list((tmp_path / "run").rglob("*"))


FOLDER_MISTAKES = {
    "too long": ("x" * 300, ["characters) can't be written (File name too long)"]),
    "below a file": ("file/run", ["/file/run can't be written (Not a directory)"]),
    "a circle of links": ("circle/run", ["/circle", "(Too many levels of symbolic links)"]),
    "a file": ("file", ["/file can't be written (File exists)"]),
}


@pytest.mark.parametrize("mistake", FOLDER_MISTAKES)
def test_a_run_folder_that_cannot_be_is_a_sentence(cli, tmp_path, mistake):
    name, fragments = FOLDER_MISTAKES[mistake]
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    result = cli("train.py", *TINY, f"hydra.run.dir={tmp_path}/{name}")
    assert_fails(result, *fragments, "choose another hydra.run.dir")
    assert len(result.err) < 500


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_cuda_without_cuda(cli, tmp_path):
    assert_fails(cli("train.py", *TINY, "trainer.device=cuda", f"hydra.run.dir={tmp_path}/r"), "trainer.device=cuda")


def test_evaluate_says_what_is_wrong(cli, trained, tmp_path):
    good = f"checkpoint={trained}/checkpoints/last.pt"
    (tmp_path / "text.pt").write_text("not a checkpoint")
    content = (trained / "checkpoints" / "last.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    cases = [
        ([], ["checkpoint"]),
        (["checkpoint=no/such.pt"], ["no/such.pt"]),
        ([f"checkpoint={tmp_path}/text.pt"], ["text.pt"]),
        ([f"checkpoint={tmp_path}/half.pt"], ["half.pt"]),
        ([f"checkpoint={tmp_path}/other.pt"], ["other.pt", "not a checkpoint"]),
        ([good, "tasks.names=[depth,depht]"], ["depht", "depth"]),
        ([f"{tmp_path}/no/run"], ["/no/run", "checkpoint"]),
        ([good, "backbone=resnet50"], ["backbone"]),
        ([good, "experiment=rooms"], ["experiment"]),
        ([good, "data.sise=[32,32]"], ["data.sise", "data.size"]),
        ([good, "~data.limit"], ["data.limit"]),
        ([good, "data=nyud", "data.root=no/such/root"], ["human_parts", "nyud"]),
    ]
    for number, (overrides, fragments) in enumerate(cases):
        result = cli("evaluate.py", *overrides, f"hydra.run.dir={tmp_path}/{number}")
        assert_fails(result, *fragments)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "metrics.json").write_text("mine")
    assert_fails(cli("evaluate.py", good, f"hydra.run.dir={tmp_path}/full"), "metrics.json")
    assert (tmp_path / "full" / "metrics.json").read_text() == "mine"


def test_some_of_a_checkpoints_tasks_are_scored_as_with_all_of_them(cli, trained, tmp_path):
    """The run's folder stands as the first word, without its key."""
    few = ["tasks.names=[depth,semseg]", f"save_predictions={tmp_path}/maps", f"hydra.run.dir={tmp_path}/few=2"]
    result = cli("evaluate.py", str(trained), *few)
    assert result.code == 0, result.err
    assert "* the task's main metric" in result.out
    scored = json.loads((tmp_path / "few=2" / "metrics.json").read_text())
    all_scores = json.loads((trained / "metrics.json").read_text())
    assert scored == {name: all_scores[name] for name in ("semseg", "depth")}
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["depth", "semseg"]
    checkpoint = torch.load(trained / "checkpoints" / "last.pt", weights_only=True)
    del checkpoint["meta"]["tasks"]["depth"]
    torch.save(checkpoint, tmp_path / "less.pt")
    result = cli("evaluate.py", f"{tmp_path}/less.pt", "tasks=single_depth", f"hydra.run.dir={tmp_path}/r")
    assert_fails(result, "less.pt has no task depth to score")


def test_resume_with_other_tasks_is_refused(cli, trained, tmp_path):
    overrides = ["tasks=nyud", f"resume={trained}/checkpoints/last.pt", f"hydra.run.dir={tmp_path}/run"]
    assert_fails(cli("train.py", *TINY, *overrides), "last.pt", "human_parts")
    other = tmp_path / "other"
    assert cli("train.py", *TINY, f"hydra.run.dir={other}").code == 0
    checkpoint_before = (other / "checkpoints" / "last.pt").read_bytes()
    assert_fails(
        cli("train.py", *TINY, f"resume={trained}/checkpoints/last.pt", f"hydra.run.dir={other}"), "already holds a run"
    )
    assert checkpoint_before == (other / "checkpoints" / "last.pt").read_bytes()
    overrides = ["decoder.width=24", f"resume={trained}/checkpoints/last.pt", f"hydra.run.dir={tmp_path}/run"]
    assert_fails(cli("train.py", *TINY, *overrides), "last.pt", "decoder.width is 24, was 16")
    overrides = ["optimizer=sgd", f"resume={trained}/checkpoints/last.pt", f"hydra.run.dir={tmp_path}/run"]
    assert_fails(cli("train.py", *TINY, *overrides), "last.pt", "adamw", "sgd")
    overrides = ["trainer.max_steps=1", f"resume={trained}/checkpoints/last.pt", f"hydra.run.dir={tmp_path}/run"]
    assert_fails(cli("train.py", *TINY, *overrides), "is at step 2, behind trainer.max_steps=1")
    log = (trained / "log.jsonl").read_text()
    overrides = ["decoder.width=24", f"resume={trained}/checkpoints/best.pt", f"hydra.run.dir={trained}"]
    assert_fails(cli("train.py", *TINY, *overrides), "best.pt", "does not fit")
    assert (trained / "log.jsonl").read_text() == log


def test_resume_from_an_odd_checkpoint_is_refused(trained, tmp_path):
    content = read_checkpoint_file(trained / "checkpoints" / "last.pt")
    name = next(key for key, weight in content["model"].items() if weight.dim() == 4)
    not_finite = {**content["model"], name: content["model"][name] * float("nan")}
    int8 = {**content["model"], name: content["model"][name].to(torch.int8)}
    odd: list[dict] = [{"model": not_finite}, {"model": int8}, {"model": {}}, {"meta": {}}, {"meta": {"tasks": 5}}]
    odd += [{"optimizer": {"model": 5}}, {"optimizer": {}}, {"config": {}}, {"config": {"optimizer": 5}}, {"rng": {}}]
    odd += [{"regularizer": {"x": 1}}, {"balancer": {"x": 1}}, {"share": {"x": 1}}]
    for number, part in enumerate(odd):
        write_checkpoint_file(tmp_path / "odd.pt", {**content, **part})
        config = composed(*TINY, f"resume={tmp_path}/odd.pt", "trainer.max_steps=3")
        with pytest.raises(UserError, match=r"odd\.pt"):
            train(config, tmp_path / f"run{number}")
        assert not list((tmp_path / f"run{number}").rglob("*.pt"))


def test_an_operation_that_cannot_be_deterministic(cli, tmp_path, monkeypatch):
    """As PyTorch complains on CUDA of the position embeddings of a ViT of another size."""

    def step(self, batch, with_diagnostics=False):
        raise RuntimeError("upsample_bicubic2d_aa_backward_out_cuda does not have a deterministic implementation, but")

    monkeypatch.setattr("mtcl.training.trainer.Trainer.train_step", step)
    result = cli("train.py", *TINY, f"hydra.run.dir={tmp_path}/run")
    assert_fails(result, "trainer.deterministic", "upsample_bicubic2d_aa_backward_out_cuda")


@pytest.mark.slow
def test_real_frames(cli, tmp_path):
    """Two steps on real NYUD-v2 frames, from a real backbone, and an evaluation of them."""
    shared = ROOT.parent / "shared"
    if not shared.is_dir():
        pytest.skip("no ../shared here")
    import subprocess
    import sys

    subprocess.run([sys.executable, shared / "nyud_mini" / "unpack.py", tmp_path / "data"], check=True)
    overrides = ["experiment=nyud_small_cpu", f"data.root={tmp_path}/data", f"data.cache={tmp_path}/cache",
                 "debug=tiny", "data.limit=8", "regularizer=contrastive",
                 f"backbone.weights={shared}/weights/mobilenetv2_100_imagenet.safetensors",
                 "backbone.mean=[0.5,0.5,0.5]", "backbone.std=[0.5,0.5,0.5]",
                 "backbone.kwargs={pad_type:same}"]  # fmt: skip
    result = cli("train.py", *overrides, f"hydra.run.dir={tmp_path}/run")
    assert result.code == 0, result.err
    (tmp_path / "data" / "NYUDv2" / "gt_sets" / "train.txt").unlink()  # evaluation must not want it
    result = cli("evaluate.py", f"checkpoint={tmp_path}/run/checkpoints/last.pt", f"hydra.run.dir={tmp_path}/evaluated")
    assert result.code == 0, result.err
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "evaluated"))
    assert a == b
    result = cli("evaluate.py", f"checkpoint={tmp_path}/run/checkpoints/last.pt", "data.split=tune", "data.limit=6",
                 f"hydra.run.dir={tmp_path}/tune")  # fmt: skip
    assert json.loads((tmp_path / "tune" / "run.json").read_text())["num_images"] == 6


@pytest.mark.slow
def test_benchmarks_run(cli, capfd):
    result = cli("scripts/benchmarks/benchmark_step.py", *TINY, "data.limit=null")
    assert result.code == 0, result.err
    assert "the regulariser adds" in result.out
    assert {line.split()[0] for line in result.out.splitlines()} >= {"none", "contrastive"}
    assert "error: there is no config key" in cli("scripts/benchmarks/benchmark_step.py", "trainer.max_step=1").err
    result = cli("scripts/benchmarks/benchmark_data.py", "--size", "32x32", "--images", "8")
    assert result.code == 0, result.err
    assert {line.split()[0] for line in result.out.splitlines()} >= {"rooms,", "plain", "files", "first", "cached"}
    assert "too small" in cli("scripts/benchmarks/benchmark_data.py", "--images", "4").err
    result = cli("scripts/benchmarks/benchmark_metrics.py", "--run", "2", "--batch", "2")
    assert result.code == 0, result.err
    assert "all five" in result.out


def test_a_script_on_a_full_disk_ends_with_a_sentence(capsys):
    from mtcl.cli.script import run

    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "out/model.pt")

    with pytest.raises(SystemExit) as stopped:
        run(full)
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("error: out/model.pt: No space left on device; make room")
    with pytest.raises(FileNotFoundError):  # a mistake of ours keeps its trace
        run(lambda: Path("nowhere").read_text())
