"""What is exported is the model, all of it and nothing else."""

import errno
import json
import os
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers.common import ROOT, TINY, assert_fails, composed
from helpers.shrunken import shrunk
from PIL import Image
from safetensors.torch import load_file

import mtcl
from mtcl import UserError
from mtcl.cli.export import export_model, push, remove_local_paths
from mtcl.cli.model_card import BIBTEX, describe_license, format_model_card, is_procedural
from mtcl.cli.train import train
from mtcl.config.build_data import build_dataset, build_tasks
from mtcl.config.build_model import build_model, inline_genotype
from mtcl.config.load import (
    LoadedModel,
    SavedModel,
    build_predictor,
    download_model,
    load_model,
)
from mtcl.config.resolve import plain
from mtcl.config.stored_config import describe_tasks
from mtcl.inference import export as exporting
from mtcl.inference import recipe
from mtcl.inference.model_files import (
    CARD_FILE,
    HUB_FILES,
    METADATA_FILE,
    ONNX_FILE,
    PROGRAM_FILE,
    RECIPE_FILE,
    WEIGHTS_FILE,
)
from mtcl.training.checkpoint_file import read_checkpoint_file

SCRIPT = "scripts/export.py"
HAS_ONNX = all(find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="extra export not installed")
needs_hub = pytest.mark.skipif(not find_spec("huggingface_hub"), reason="extra hub not installed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with the regulariser and a running mean of the weights, two tasks."""
    folder = tmp_path_factory.mktemp("trained")
    train(
        composed(*TINY, "data.size=[64,96]", "tasks.names=[semseg,depth]", "trainer.ema=0.5", "trainer.max_steps=3"),
        folder,
    )
    return folder


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_model(load_model(trained), "safetensors", folder)
    return folder


ALL_TASKS = "[semseg,human_parts,sal,depth,normals,edge]"


def as_trained(loaded: LoadedModel) -> exporting.TrainedModel:
    return exporting.TrainedModel(loaded.model, loaded.tasks, loaded.size, loaded.saved.step)


def random_model(decoder: str, backbone: str, names: str = "[semseg,depth]", size=(64, 96)) -> LoadedModel:
    overrides = [f"tasks.names={names}", f"data.size={list(size)}", f"backbone={backbone}", f"decoder={decoder}"]
    config = composed(*overrides, *shrunk(decoder, backbone))
    torch.manual_seed(0)
    tasks = build_tasks(config)
    model = build_model(config, tasks, pretrained=False).eval()
    saved = SavedModel(mtcl.__file__, model.state_dict(), plain(config), describe_tasks(tasks), 7)
    return LoadedModel(model, tasks, size, saved)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- Weights and card


def test_predictions_are_those_of_the_checkpoint(trained, folder):
    want = mtcl.load(trained / "checkpoints" / "last.pt", device="cpu")(picture(40, 70))
    got = mtcl.load(folder, device="cpu")(picture(40, 70))
    assert list(got) == list(want) == ["semseg", "depth"]
    for task in want:
        assert np.array_equal(got[task], want[task])


@pytest.mark.slow
def test_an_exported_folder_is_scored_like_its_checkpoint(cli, trained, folder, tmp_path):
    for name, source in (("folder", folder), ("run", trained)):
        result = cli("evaluate.py", f"checkpoint={source}", f"hydra.run.dir={tmp_path}/{name}", "trainer.device=cpu")
        assert result.code == 0, result.err
    scores = [json.loads((path / "metrics.json").read_text()) for path in (tmp_path / "folder", tmp_path / "run")]
    assert scores[0] == scores[1] == json.loads((trained / "metrics.json").read_text())


def test_the_weights_are_the_running_mean_and_the_model_alone(trained, folder):
    state = read_checkpoint_file(trained / "checkpoints" / "last.pt")
    assert state["regularizer"]  # there is something to leave out
    assert any(not torch.equal(t, state["model"][n]) for n, t in state["ema"]["model"].items())
    weights = load_file(folder / WEIGHTS_FILE)
    assert weights.keys() == state["ema"]["model"].keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in state["ema"]["model"].items())


def test_the_card(trained, folder):
    text = (folder / CARD_FILE).read_text()
    assert text.startswith("---\nlibrary_name: mtcl\nlicense: mit\n")  # rooms, from random weights
    metrics = json.loads((trained / "metrics.json").read_text())
    assert f"| depth | rmse | {metrics['depth']['rmse']:.4f} m |" in text
    for part in ("64 x 96", "step 3 of its training", "pip install 'mtcl[hub]'", "arxiv.org/abs/2307.07934"):
        assert part in text
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    for author in cited["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in BIBTEX
    for part in (cited["title"], cited["collection-title"], str(cited["year"]), cited["identifiers"][0]["value"]):
        assert f"{{{part}}}" in BIBTEX
    assert BIBTEX in text


@pytest.mark.parametrize(
    "overrides",
    [
        ["data=nyud"],
        ["backbone.weights=hub"],
        ["decoder=sak", "backbone=vit_small", "decoder.weights=student.pt"],
        ["decoder=sak", "backbone=vit_small", "regularizer=distillation"],
    ],
)
def test_a_card_leaves_the_licence_open_where_others_own_something(overrides):
    assert is_procedural(plain(composed("experiment=rooms")))
    config = plain(composed("experiment=rooms", *overrides))
    assert not is_procedural(config)
    assert "To be filled in by the publisher" in describe_license(config)


@needs_hub
def test_the_cards_front_matter_is_the_hubs(trained, tmp_path):
    from huggingface_hub import ModelCard

    loaded = load_model(trained)
    data = ModelCard(format_model_card(loaded)).data  # raises where it can't be understood
    assert data.library_name == "mtcl"
    assert data.pipeline_tag == "image-segmentation"
    assert data.datasets is data.base_model is None  # rooms are made here, and the weights were random
    metrics = json.loads((trained / "metrics.json").read_text())
    results = {(result.task_name, result.metric_type): result for result in data.eval_results}
    assert results["depth", "rmse"].metric_value == metrics["depth"]["rmse"]
    assert results["semseg", "mIoU"].dataset_name == "rooms"
    config = {**loaded.saved.config, "name": "a: |b`<i>\n# c"}
    config |= {"data": {**config["data"], "name": "nyud"}, "backbone": {**config["backbone"], "weights": "hub"}}
    text = format_model_card(loaded._replace(saved=loaded.saved._replace(config=config)))
    data = ModelCard(text).data
    assert data.datasets == ["nyu_depth_v2"]
    assert data.base_model == "timm/test_resnet.r160_in1k"
    assert "\n# c" not in text.partition("\n---\n")[2]
    assert "<i>" not in text.partition("\n---\n")[2]


def test_the_card_does_not_take_metrics_of_another_step_or_of_damaged_files(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    facts = json.loads((run / "run.json").read_text())
    for content in ({**facts, "step": 99}, [1], {**facts, "step": None}):
        (run / "run.json").write_text(json.dumps(content))
        assert "Not known" in format_model_card(load_model(run))
    (run / "run.json").write_text(json.dumps(facts))
    (run / "metrics.json").write_text('{"depth": [1], "semseg": {"mIoU": "x", "pixel_accuracy": NaN}}')
    assert "Not known" in format_model_card(load_model(run))


def test_no_path_of_the_machine_is_published(folder):
    """What else a stored config names is left out when it is read, tests/test_stored_config.py."""
    config = {"data": {"root": "/elsewhere/me/data", "name": "nyud"}}
    assert remove_local_paths(config) == {"data": {"root": None, "name": "nyud"}}
    assert config["data"]["root"] == "/elsewhere/me/data"  # left as it was
    assert str(folder.parent) not in (folder / METADATA_FILE).read_text()


def test_a_genotype_of_a_file_travels_along(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({t: dict.fromkeys(("semseg", "depth"), "local") for t in ("semseg", "depth")}))
    config = composed("tasks.names=[semseg,depth]", "decoder=atrc", f"decoder.genotype={path}")
    inline_genotype(config)
    assert plain(config)["decoder"]["genotype"]["depth"] == {"semseg": "local", "depth": "local"}


def test_another_model_replaces_all_that_was_exported(trained, folder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    (out / "notes.txt").write_text("kept")
    (out / ONNX_FILE).write_bytes(b"of an earlier checkpoint")
    export_model(load_model(trained), "safetensors", out)
    assert {path.name for path in out.iterdir()} == {WEIGHTS_FILE, METADATA_FILE, CARD_FILE, "notes.txt"}


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_full_disk(trained, tmp_path, monkeypatch, kind):
    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        export_model(load_model(trained), kind, tmp_path / "out", fixed_size=True)
    assert not (tmp_path / "out").exists()


def test_facts_that_mtcl_did_not_write(folder, tmp_path):
    for name, content in (("a", {"config": {}}), ("b", {"config": None}), ("c", {"tasks": []})):
        shutil.copytree(folder, tmp_path / name)
        facts = json.loads((folder / METADATA_FILE).read_text())
        (tmp_path / name / METADATA_FILE).write_text(json.dumps(facts | content))
        with pytest.raises(UserError, match=f"{name} is no model of mtcl"):
            mtcl.load(tmp_path / name)


def test_data_that_an_exported_model_does_not_know_the_place_of():
    config = composed("data=nyud", "data.root=null", "tasks.names=[depth]")
    with pytest.raises(UserError, match="data=nyud needs"):
        build_dataset(config, "val", build_tasks(config))


# --- Programs


def recipe_block() -> str:
    """The document's own lines."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)
    return block


def check_recipe(loaded: LoadedModel, program: Path, folder: Path, sizes) -> None:
    """What docs/export.md says to do with a program gives what mtcl.load gives, for every task and size."""
    predictor = build_predictor(loaded, device="cpu")
    clipped = 0
    block = recipe_block().replace("onnx/model.onnx", str(program)).replace("image.jpg", str(folder / "picture.png"))
    for height, width in sizes:
        (image,) = exporting.smooth_random_images(1, height, width)
        Image.fromarray(image).save(folder / "picture.png")
        names: dict = {}
        exec(compile(block, "export.md", "exec"), names)
        maps, want = names["maps"], predictor(image)
        assert list(maps) == list(want) == list(loaded.tasks)
        for name, expected in want.items():
            assert maps[name].shape == expected.shape, (name, height, width)
            assert maps[name].dtype == expected.dtype
            if expected.dtype == np.uint8:
                assert (maps[name] != expected).mean() < 1e-3, (name, height, width)
            else:
                assert np.abs(maps[name] - expected).max() < 1e-3, (name, height, width)
        clipped += 0 < (want["depth"] == 0).mean() < 1
    assert clipped


def with_negative_depth(loaded: LoadedModel) -> LoadedModel:
    """Half of it, roughly."""
    biases = [p for n, p in loaded.model.named_parameters() if "depth" in n and n.endswith("bias") and p.shape == (1,)]
    (image,) = exporting.smooth_random_images(1, 40, 70)
    with torch.no_grad():
        biases[-1] += 1 - np.median(build_predictor(loaded, device="cpu")(image)["depth"])
        biases[-1] -= float(np.median(build_predictor(loaded, device="cpu")(image)["depth"]))
    return loaded


SIZES = [(64, 96), (40, 70), (50, 130), (96, 64), (203, 311)]  # the last is shrunk
FIT_ONE_SIZE = [(64, 96), (40, 70), (203, 311)]


def test_a_torch_program(cli, trained, tmp_path):
    result = cli(SCRIPT, trained, "--format=torch", f"--output={tmp_path}/out", "--fixed-size")
    assert result.code == 0, result.err
    assert "batches up to 256, images of 64 x 96 only (as asked for)" in result.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {PROGRAM_FILE, RECIPE_FILE}
    extra = {METADATA_FILE: ""}
    program = torch.export.load(tmp_path / "out" / PROGRAM_FILE, extra_files=extra)
    model = load_model(trained).model
    # Model weights only, by name and size.
    assert {f"model.{name}" for name in model.state_dict()} == set(program.state_dict)
    assert sum(t.numel() for t in program.parameters()) == sum(p.numel() for p in model.parameters())
    facts = json.loads(extra[METADATA_FILE])
    assert facts["tasks"] == ["semseg", "depth"]
    assert facts["multiple"] == 32
    assert facts["size"] == facts["frame"] == [64, 96]
    assert facts["units"]["depth"] == "m"


@pytest.mark.parametrize("any_size", [True, False])
def test_the_recipe_of_the_document_gives_the_scored_model(tmp_path, monkeypatch, any_size):
    """With the program before it is traced."""
    loaded = with_negative_depth(random_model("multi_head", "resnet18", names=ALL_TASKS, size=(60, 100)))
    module = exporting.ExportModule(loaded.model, loaded.tasks)
    facts = json.loads(
        json.dumps(exporting.describe_program(as_trained(loaded), exporting.InputSpec((64, 128), 32, True, any_size)))
    )

    @torch.inference_mode()
    def run(image):
        assert list(image.shape[2:]) == facts["frame"] or any_size
        return {name: raw.numpy() for name, raw in module(torch.from_numpy(image)).items()}

    monkeypatch.setattr(recipe, "open_program", lambda path: (run, facts))
    check_recipe(loaded, tmp_path / ONNX_FILE, tmp_path, SIZES if any_size else FIT_ONE_SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [False, True])
def test_a_torch_program_used_as_the_document_says_is_the_scored_model(tmp_path, fixed):
    loaded = with_negative_depth(random_model("multi_head", "resnet18", names=ALL_TASKS))
    message = export_model(loaded, "torch", tmp_path / "out", fixed)
    assert fixed or "any height and width that are multiples of 32, from 64 x 96 on" in message
    check_recipe(loaded, tmp_path / "out" / PROGRAM_FILE, tmp_path, FIT_ONE_SIZE if fixed else SIZES)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "backbone", "size"),
    [
        ("multi_head", "resnet18", (64, 96)),
        ("invpt", "resnet18", (60, 100)),
        ("multi_head", "vit_small_dinov2", (64, 96)),
    ],
)
def test_an_onnx_file_used_as_the_document_says_is_the_scored_model(tmp_path, decoder, backbone, size):
    loaded = with_negative_depth(random_model(decoder, backbone, names=ALL_TASKS, size=size))
    message = export_model(loaded, "onnx", tmp_path / "out")
    check_recipe(loaded, tmp_path / "out" / ONNX_FILE, tmp_path, FIT_ONE_SIZE if " only " in message else SIZES)


@needs_onnx
@pytest.mark.slow
def test_an_onnx_file(cli, trained, tmp_path):
    import onnx
    import onnxruntime

    result = cli(SCRIPT, trained, "--format=onnx", f"--output={tmp_path}/out")
    assert result.code == 0, result.err
    path = tmp_path / "out" / ONNX_FILE
    assert {path.name for path in (tmp_path / "out").iterdir()} == {ONNX_FILE, RECIPE_FILE}
    file = onnx.load(path)
    onnx.checker.check_model(file)
    # Not more numbers than the model's own, the constants of shapes and of the normalisation aside.
    model = load_model(trained).model
    count = sum(int(np.prod(weight.dims)) for weight in file.graph.initializer)
    assert count < 1.01 * sum(t.numel() for t in model.state_dict().values()) + 100
    regularizer = read_checkpoint_file(trained / "checkpoints" / "last.pt")["regularizer"]
    names = {weight.name for weight in file.graph.initializer}
    assert not any(name.endswith(part) for part in regularizer for name in names)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["tasks"]) == ["semseg", "depth"] == [o.name for o in session.get_outputs()]
    assert json.loads(facts["mean"]) == pytest.approx(model.mean)
    assert json.loads(facts["std"]) == pytest.approx(model.std)
    assert json.loads(facts["classes"])["semseg"][0]
    assert json.loads(facts[METADATA_FILE])["size"] == json.loads(facts["size"]) == [64, 96]
    raw = np.stack(exporting.smooth_random_images(3, 96, 160)).transpose(0, 3, 1, 2).astype(np.float32)
    (several,) = session.run(["depth"], {"image": raw})
    (alone,) = session.run(["depth"], {"image": raw[2:]})
    assert np.abs(several[2] - alone[0]).max() < 1e-4
    assert several.min() >= 0


def export_programs(loaded: LoadedModel, folder: Path, monkeypatch, torch_fixed: bool = False) -> dict[str, str]:
    """Return each format's message: the program is written, loaded, and gives what predict() does (check_program).

    Both formats begin with the same trace, which is made once for each kind of input to save time.
    """
    trace, traced = exporting.trace, {}

    def trace_once(module, spec):
        if spec not in traced:
            traced[spec] = trace(module, spec)
        return traced[spec]

    monkeypatch.setattr(exporting, "trace", trace_once)
    messages = {"torch": export_model(loaded, "torch", folder / "torch", torch_fixed)}
    assert (folder / "torch" / PROGRAM_FILE).is_file()
    if HAS_ONNX:
        messages["onnx"] = export_model(loaded, "onnx", folder / "onnx")
        assert (folder / "onnx" / ONNX_FILE).is_file()
    return messages


@pytest.mark.slow
@pytest.mark.parametrize(
    "decoder",
    [
        *("atrc", "deeplab", "diffusion_mtl", "dpt", "invpt", "invpt_plus_plus", "linear", "mqtransformer", "mti_net"),
        *("mtan", "multi_head", "pad_net", "segnet", "task_diffusion", "task_expert", "task_tokens"),
    ],
)
def test_every_decoder_becomes_a_program(decoder, tmp_path, monkeypatch):
    """For any size, but for those that torch makes for one size at 64 x 96, where it is asked for that to save time."""
    fixed = decoder in ("invpt", "invpt_plus_plus", "mtan", "segnet")
    for kind, message in export_programs(random_model(decoder, "resnet18"), tmp_path, monkeypatch, fixed).items():
        takes = "any height and width that are multiples of 32, from 64 x 96 on"
        takes = "images of 64 x 96 only (as asked for)" if fixed and kind == "torch" else takes
        assert f"batches up to 256, {takes}" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "backbone"), [("taskprompter", "vit_small"), ("sak", "vit_small"), ("multi_head", "swin_tiny")]
)
def test_transformers_become_programs(decoder, backbone, tmp_path, monkeypatch):
    windows = backbone == "swin_tiny"
    messages = export_programs(random_model(decoder, backbone), tmp_path, monkeypatch, torch_fixed=not windows)
    for kind, message in messages.items():
        assert ("images of 64 x 96 only (its backbone cuts images into windows" in message) == windows
        any_size = "any height and width that are multiples of 16, from 64 x 96 on" in message
        assert any_size == (not windows and kind == "onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "backbone", "size", "takes"),
    [
        ("segnet", "resnet18", (64, 96), "images of 64 x 96 only (Guard failed"),
        ("mtan", "resnet18", (64, 96), "images of 64 x 96 only"),
        ("invpt", "resnet18", (64, 96), "images of 64 x 96 only"),
        ("invpt_plus_plus", "resnet18", (128, 160), "from 128 x 160 on"),
        ("multi_head", "resnet18", (32, 64), "images of 32 x 64 only (a side of its training frame"),
        ("multi_head", "vit_small", (64, 96), "images of 64 x 96 only"),
    ],
)
def test_torch_programs_that_take_less(decoder, backbone, size, takes, tmp_path):
    assert takes in export_model(random_model(decoder, backbone, size=size), "torch", tmp_path / "out")


def test_a_model_for_one_picture_at_a_time(trained, tmp_path, monkeypatch):
    run = exporting.ExportModule.forward

    def alone(self, image):
        if image.shape[0] != 1:
            raise ValueError("one picture only")
        return run(self, image)

    monkeypatch.setattr(exporting.ExportModule, "forward", alone)
    message = export_model(load_model(trained), "torch", tmp_path / "out", fixed_size=True)
    assert "one image at a time, images of 64 x 96 only" in message


def test_what_differs_is_not_kept(trained, tmp_path, monkeypatch):
    """A program whose outputs are a little off."""
    loaded = load_model(trained)
    run = exporting.ExportModule.forward

    def off(self, image):
        return {task: raw + (3e-3 if task == "depth" else 0) for task, raw in run(self, image).items()}

    monkeypatch.setattr(exporting.ExportModule, "forward", off)
    with pytest.raises(
        UserError, match=r"can't be exported so: model.pt2, run at 1 x 64 x 96, gives another depth .* by [123]\.\de-03"
    ):
        export_model(loaded, "torch", tmp_path / "out", fixed_size=True)
    assert not (tmp_path / "out").exists()


def test_what_is_none_of_the_models_weights_is_not_exported(trained, tmp_path, monkeypatch):
    build = exporting.ExportModule.__init__

    def with_projector(self, model, tasks):
        build(self, model, tasks)
        self.projector = torch.nn.Linear(1, 1)

    monkeypatch.setattr(exporting.ExportModule, "__init__", with_projector)
    with pytest.raises(UserError, match=r"projector\.bias, which is none of its weights"):
        export_model(load_model(trained), "torch", tmp_path / "out", fixed_size=True)
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_no_numbers_are_not_kept(trained, tmp_path, monkeypatch):
    run = exporting.ExportModule.forward
    monkeypatch.setattr(
        exporting.ExportModule, "forward", lambda s, x: {t: r * torch.nan for t, r in run(s, x).items()}
    )
    with pytest.raises(UserError, match="than the model, by nan"):
        export_model(load_model(trained), "torch", tmp_path / "out", fixed_size=True)


# --- Mistakes


def test_a_full_folder_is_left_alone(cli, trained, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    arguments = [str(trained), "--format=safetensors", f"--output={tmp_path}"]
    assert_fails(cli(SCRIPT, *arguments), "is not empty", "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert cli(SCRIPT, *arguments, "--overwrite").code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", WEIGHTS_FILE, METADATA_FILE, CARD_FILE}
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--format=onnx", "--output=x"], "give a CHECKPOINT, --push or --pull"),
        (["x.pt", "--output=x"], "CHECKPOINT needs --format"),
        (["x.pt", "--format=onx", "--output=x"], "choose from"),
        (["missing.pt", "--format=torch", "--output=x"], "missing.pt does not exist"),
        (["--push=me/model"], "--push needs --folder"),
        (["--push=me/model", "--folder=x", "--fixed-size"], "--fixed-size makes no sense"),
        (["--push=me", "--folder=x"], "give USER/NAME"),
    ],
)
def test_mistakes_are_one_sentence(cli, arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_fails(cli(SCRIPT, *arguments), sentence)
    assert not list(tmp_path.iterdir())


def test_without_onnx(cli, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("mtcl.cli.arguments.find_spec", lambda name: None)
    arguments = [str(trained), "--format=onnx", f"--output={tmp_path}/out"]
    assert_fails(cli(SCRIPT, *arguments), "pip install 'mtcl[export]'")
    assert not (tmp_path / "out").exists()


def test_help(cli):
    result = cli(SCRIPT, "--help")
    assert result.code == 0
    assert "safetensors|torch|onnx" in result.out


# --- The hub, whose place a folder takes


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The network calls of the hub's library, onto a folder; ``server.error``: raised by each of them."""
    import huggingface_hub

    class Server:
        root = tmp_path / "hub"
        error: Exception | None = None

        def create_repo(self, name, private, exist_ok):
            if self.error:
                raise self.error
            self.public = not private or (self.root / name).exists()  # what is there stays as it is
            (self.root / name).mkdir(parents=True, exist_ok=exist_ok)

        def repo_info(self, name):
            return SimpleNamespace(private=not self.public)

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            for path in huggingface_hub.utils.filter_repo_objects(
                [p.relative_to(folder_path).as_posix() for p in folder_path.rglob("*") if p.is_file()],
                allow_patterns=allow_patterns,
            ):
                shutil.copy(folder_path / path, self.root / repo_id / path)
            return f"https://huggingface.co/{repo_id}"

        def download(self, name, revision, allow_patterns, local_dir):
            if self.error and local_dir and any(local_dir.iterdir()):
                return str(local_dir)  # a warning is all that the library has for this
            if self.error:
                raise self.error
            to = local_dir or tmp_path / "cache" / name
            to.mkdir(parents=True, exist_ok=True)
            for path in (self.root / name).iterdir():
                if path.name in allow_patterns:
                    shutil.copy(path, to)
            return str(to)

    server = Server()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: server)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", server.download)
    return server


@needs_hub
def test_push_load_and_pull(cli, server, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published = tmp_path / "published"
    shutil.copytree(folder, published)
    (published / "secret.txt").write_text("not for everybody")
    result = cli(SCRIPT, "--push=me/model", f"--folder={published}")
    assert result.code == 0, result.err
    assert "https://huggingface.co/me/model" in result.out
    assert {path.name for path in (server.root / "me" / "model").iterdir()} == {WEIGHTS_FILE, METADATA_FILE, CARD_FILE}

    want = mtcl.load(folder, device="cpu")(picture(32, 64))
    got = mtcl.load("me/model", device="cpu")(picture(32, 64))
    assert np.array_equal(got["depth"], want["depth"])

    result = cli(SCRIPT, "--pull=me/model", "--folder=here")
    assert result.code == 0, result.err
    assert (tmp_path / "here" / WEIGHTS_FILE).read_bytes() == (folder / WEIGHTS_FILE).read_bytes()
    assert_fails(cli(SCRIPT, "--pull=me/model", "--folder=here"), "is not empty")
    server.error = ConnectionError("no network")
    assert_fails(cli(SCRIPT, "--pull=me/model", "--folder=here", "--overwrite"), "did not give it (no network)")
    server.error = None
    assert {path.name for path in (tmp_path / "here").iterdir()} == {WEIGHTS_FILE, METADATA_FILE, CARD_FILE}
    assert cli(SCRIPT, "--pull=me/model", "--folder=here", "--overwrite").code == 0
    assert_fails(cli(SCRIPT, "--push=me/model", f"--folder={published}", "--private"), "exists already, and is public")
    assert cli(SCRIPT, "--push=me/secret", f"--folder={published}", "--private").code == 0
    (tmp_path / "here" / ONNX_FILE).write_bytes(b"of another model")
    assert cli(SCRIPT, "--pull=me/model", "--folder=here", "--overwrite").code == 0
    assert {path.name for path in (tmp_path / "here").iterdir()} == {WEIGHTS_FILE, METADATA_FILE, CARD_FILE}
    (server.root / "me/model" / METADATA_FILE).unlink()
    with pytest.raises(UserError, match="me/model on the hub is no model of mtcl"):
        download_model("me/model", folder=tmp_path / "there")


@needs_hub
def test_of_a_hostile_snapshot_only_the_models_own_files_are_taken(folder, tmp_path, monkeypatch):
    """Links, folders, code and names that lead outside, all offered at once."""
    (tmp_path / "mine.txt").write_text("mine")
    out = tmp_path / "out"
    offered = {}

    def download(name, revision, allow_patterns, local_dir):
        assert set(allow_patterns) == set(HUB_FILES)
        for file in (WEIGHTS_FILE, METADATA_FILE, CARD_FILE):
            shutil.copy(folder / file, local_dir / file)
        for file, make in offered.items():
            (local_dir / file).unlink(missing_ok=True)
            make(local_dir / file)
        return str(local_dir)

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    offered |= {"recipe.py": lambda p: p.write_text("evil"), "../../../x": lambda p: None, "setup.py": Path.touch}
    download_model("me/model", folder=out)
    assert {path.name for path in out.iterdir()} == {WEIGHTS_FILE, METADATA_FILE, CARD_FILE}
    weights_before = (out / WEIGHTS_FILE).read_bytes()
    for name in HUB_FILES:
        target = folder / METADATA_FILE if name == METADATA_FILE else tmp_path / "mine.txt"
        for make in (lambda p, target=target: p.symlink_to(target), Path.mkdir)[: 1 if name == METADATA_FILE else 2]:
            offered.clear()
            offered[name] = make
            with pytest.raises(UserError, match=f"{name} of what was to go into .* is a link or no file"):
                download_model("me/model", folder=out)
            assert (out / WEIGHTS_FILE).read_bytes() == weights_before
    assert (tmp_path / "mine.txt").read_text() == "mine"


@needs_hub
def test_the_hub_without_connection_or_token(server, folder, tmp_path):
    from huggingface_hub.errors import LocalTokenNotFoundError

    server.error = ConnectionError("Name or service not known\nand a long trace")
    with pytest.raises(UserError, match=r"refused it \(Name or service not known\); check the connection"):
        push(folder, "me/model")
    with pytest.raises(UserError, match=r"the hub did not give it \(Name or service not known\)"):
        download_model("me/model")
    server.error = LocalTokenNotFoundError("no token")
    with pytest.raises(UserError, match="hf auth login"):
        push(folder, "me/model")
    with pytest.raises(UserError, match=f"has no {METADATA_FILE}"):
        push(tmp_path, "me/model")


def test_without_the_hubs_library(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"me/model is no file or folder here; .* pip install 'mtcl\[hub\]'"):
        mtcl.load("me/model")
    with pytest.raises(UserError, match=r"--push me/model; .* pip install 'mtcl\[hub\]'"):
        push(folder, "me/model")


@needs_hub
def test_the_library_is_called_as_it_is(monkeypatch, folder):
    """The real library's own functions, with its network closed: no wrong argument, a sentence at the end."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(UserError, match=r"refused it \(.*offline"):
        push(folder, "me/model")
    with pytest.raises(UserError, match="the hub did not give it"):
        download_model("me/no-such-model")
