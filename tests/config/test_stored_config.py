"""Checkpoints and exported folders of strangers: a sentence or the right model, and nothing else happens."""

import copy
import json
import math
import os
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.common import composed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import mtcl
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model, saved_config
from mtcl.config.load import load_model
from mtcl.config.stored_config import check_stored_config, describe_tasks
from mtcl.errors import UserError
from mtcl.run_lock import is_locked, lock_run
from mtcl.training.checkpoint_file import write_checkpoint_file

OVERRIDES = ["backbone.name=test_resnet", "decoder.width=8", "decoder.head_width=4", "data.size=[32,64]"]
OVERRIDES += ["tasks.names=[semseg,depth]", "trainer.device=cpu"]


@pytest.fixture(scope="module")
def state() -> dict:
    """The content of a small checkpoint."""
    torch.manual_seed(0)
    config = composed(*OVERRIDES)
    tasks = build_tasks(config)
    model = build_model(config, tasks, pretrained=False)
    return {
        "model": model.state_dict(),
        "ema": None,
        "regularizer": None,
        "optimizer": {},
        "step": 3,
        "rng": {},
        "config": saved_config(config, model),
        "meta": {"tasks": describe_tasks(tasks), "best": 0.5},
    }


def change(content: dict, key: str, value: object) -> dict:
    """Return a copy of a checkpoint's content with ``key`` (dotted, below its config) set, or taken out for ``...``."""
    changed = {**content, "config": copy.deepcopy(content["config"])}
    *groups, name = key.split(".")
    part = changed["config"]
    for group in groups:
        part[group] = part.get(group) or {}
        part = part[group]
    part.pop(name, None)
    if value is not ...:
        part[name] = value
    return changed


def recursive() -> list:
    nest: list = []
    nest.append(nest)
    return nest


def doubling() -> list:
    nest: list = []
    for _ in range(60):
        nest = [nest, nest]
    return nest


ODD_CONFIGS: list[tuple[str, object]] = [
    # what reaches for files, the network or the environment
    (
        "backbone.kwargs",
        {"pretrained": True, "cache_dir": "x", "pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/.rc"}},
    ),
    ("backbone.kwargs", {"pretrained_cfg": {"url": "http://127.0.0.1:9/x", "architecture": "mobilenetv2_100"}}),
    ("backbone.kwargs.checkpoint_path", "weights.pth"),
    ("backbone.name", "hf-hub:someone/model"),
    ("backbone.name", "local-dir:/etc"),
    ("data.root", "${oc.env:HOME}"),
    ("backbone.name", "${oc.env:HOME}"),
    ("data.size", "${data.size}"),
    ("data.size", ["${oc.decode:32}", 64]),
    ("name", "${a"),
    ("decoder._target_", "os.system"),
    ("decoder._target_", "mtcl.cli.train.train"),
    ("decoder._target_", "mtcl.errors.UserError"),
    ("decoder._target_", "mtcl..x"),
    ("data._target_", "mtcl.config.load.load"),
    ("data._target_", ["mtcl.data.Rooms"]),
    ("decoder.genotype", "/etc/hostname"),
    ("data.name", "../../evil"),
    ("data.split", "../../secret"),
    ("data.split", "x" * 300),
    ("data._target_", "mtcl.data.sample.ConfigurableDataset"),
    # what would take minutes or gigabytes to lay out
    ("backbone", {"name": "dla34", "kwargs": {"levels": [1, 1, 1, 30, 2, 1]}}),
    ("backbone", {"name": "tiny_vit_5m_224", "kwargs": {"window_sizes": [500] * 4}}),
    ("backbone", {"name": "hrnet_w18", "kwargs": {"stage2": {"num_modules": 100_000, "num_channels": [18, 36]}}}),
    ("backbone", {"name": "maxvit_tiny_tf_224", "kwargs": {"img_size": 100_000}}),
    ("backbone", {"name": "swin_tiny_patch4_window7_224", "kwargs": {"depths": [128] * 32}}),
    ("backbone", {"name": "densenet121", "kwargs": {"block_config": [128] * 32}}),
    ("backbone", {"name": "densenet121", "kwargs": {"block_config": [128] * 16 + [-128] * 16}}),
    ("backbone", {"name": "efficientnet_b0", "kwargs": {"depth_multiplier": 100}}),
    ("data.options.length", [1, 10**9]),
    ("data.workers", 10**6),
    ("regularizer.options.embed_dim", 10**8),
    ("x" * 1000, 1),
    ("decoder." + "x" * 1000, 1),
    ("seed", ...),
    # types
    ("decoder.width", "wide"),
    ("decoder.width", -8),
    ("decoder.width", 10**9),
    ("decoder.width", 64),  # fits the rules, not the weights
    ("decoder.depth", 10**6),
    ("decoder.width", True),
    ("decoder.nonsense", 1),
    ("decoder", "multi_head"),
    ("data.size", [60_000, 60_000]),
    ("data.size", [10**9, 10**9]),
    ("data.size", [-32, 64]),
    ("data.size", [32]),
    ("data.size", 64),
    ("data.options", 5),
    ("data.options", ["length"]),
    ("data.options.foo", 1),
    ("loss", 5),
    ("loss.weights", "heavy"),
    ("loss.weights.depth", "heavy"),
    ("loss.options.semseg", 5),
    ("tasks", []),
    ("tasks.names", 5),
    ("trainer", None),
    ("trainer.channels_last", "yes"),
    ("backbone.kwargs", "img_size"),
    ("backbone.kwargs", {"img_size": [10**9, 10**9]}),
    ("backbone.kwargs", {"layers": [10**6] * 4}),
    ("backbone.mean", 5),
    ("backbone.mean", [0.5] * 5),
    ("backbone.mean", [0.5, 0.5, math.nan]),
    ("backbone.mean", [1e30] * 3),
    ("backbone.std", [0, 0, 0]),
    ("backbone.std", [1, -1, 1]),
    ("backbone.std", [1e-30] * 3),
    ("backbone.out_indices", [10**6]),
    ("backbone.out_indices", []),
    ("backbone.name", 5),
    ("backbone.name", ...),
    ("decoder._target_", ...),
    ("data.size", ...),
    ("data", ...),
    ("backbone", ...),
    ("seed", 10**30),
    ("surprise", 1),
    ("loss.weights", {5: 1.0}),
    ("data.options", {5: 1}),
    ("name", torch.ones(2)),
    ("name", "x" * 100_000),
    ("name", recursive()),
    ("name", doubling()),
    ("name", [[[[0] * 1000] * 1000] * 1000]),
]


@pytest.mark.parametrize(("key", "value"), ODD_CONFIGS, ids=[f"{i}-{key}" for i, (key, _) in enumerate(ODD_CONFIGS)])
def test_odd_stored_configs_are_refused_in_a_sentence(key, value, state, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    content = change(state, key, value)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        load_model_of(content, tmp_path)
    assert time.monotonic() - start < 5
    message = str(error.value)
    assert str(tmp_path / "odd.pt") in message
    assert "\n" not in message
    assert not (tmp_path / "home").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd.pt"]


def load_model_of(content: dict, tmp_path: Path) -> object:
    path = tmp_path / "odd.pt"
    write_checkpoint_file(path, content)
    return load_model(path)


def test_a_stored_config_opens_the_network_for_no_backbone(state, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    for weights in ("hub", "/elsewhere/weights.pth", None):
        loaded = load_model_of(change(state, "backbone.weights", weights), tmp_path)
        assert torch.equal(
            loaded.model.state_dict()["backbone.net.conv1.0.weight"], state["model"]["backbone.net.conv1.0.weight"]
        )


def test_paths_of_another_machine_are_left_out(state, tmp_path):
    content = state
    paths = {
        "data.cache": "/etc/cache",
        "data.shards": "pipe:cat /etc/a.tar",
        "data.label_assignment": "/etc/labels.json",
        "backbone.weights": "/w.pt",
        "resume": "/r.pt",
    }
    for key, value in paths.items():
        content = change(content, key, value)
    checked = check_stored_config(content["config"], "x")
    assert not any(str(value) in json.dumps(checked) for value in paths.values())
    assert checked["data"]["label_assignment"] == "full"
    assert content["config"]["data"]["cache"] == "/etc/cache"  # a copy was changed


ODD_PARTS: list[dict] = [
    {"meta": []},
    {"meta": {}},
    {"meta": {"tasks": {}}},
    {"meta": {"tasks": ["semseg"]}},
    {"meta": {"tasks": {"semseg": 5}}},
    {"meta": {"tasks": {"flow": {"channels": 2, "classes": []}}}},
    {"meta": {"tasks": {"semseg": {"channels": 10**12, "classes": []}}}},
    {"meta": {"tasks": {"depth": {"channels": 1, "classes": [5]}}}},
    {"ema": True},
    {"ema": {"model": [1]}},
    {"ema": {}},
    {"ema": {"model": {}}},
    {"model": []},
    {"model": {}},
    {"model": {"w": 5}},
    {"config": []},
    {"config": 5},
    {"step": "x"},
    {"step": -1},
    {"step": True},
    {"rng": 5},
    {"regularizer": 5},
    {"optimizer": [1]},
]


@pytest.mark.parametrize("part", ODD_PARTS, ids=str)
def test_odd_parts_of_a_checkpoint_are_refused_in_a_sentence(part, state, tmp_path):
    with pytest.raises(UserError, match=r"odd\.pt"):
        load_model_of({**state, **part}, tmp_path)


ODD_WEIGHTS = {
    "nan": lambda t: t.clone().fill_(math.nan),
    "infinite": lambda t: t.clone().fill_(math.inf),
    "int8": lambda t: t.to(torch.int8),
    "complex": lambda t: t.to(torch.complex64),
    "bool": lambda t: t > 0,
    "another shape": lambda t: t[:1].clone(),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "claims more than there is": lambda t: t.new_ones(1).expand(t.shape),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("kind", ODD_WEIGHTS)
def test_odd_weights_are_refused_in_a_sentence(kind, state, tmp_path):
    name = "backbone.net.conv1.0.weight"
    weights = {**state["model"], name: ODD_WEIGHTS[kind](state["model"][name])}
    with pytest.raises(UserError, match=r"odd\.pt"):
        load_model_of({**state, "model": weights}, tmp_path)
    variance = next(key for key in weights if key.endswith("running_var"))
    weights = {**state["model"], variance: -state["model"][variance]}
    with pytest.raises(UserError, match="negative variances"):
        load_model_of({**state, "model": weights}, tmp_path)


def test_predictions_that_overflow_are_told_once(state, tmp_path, caplog):
    """Every weight is finite, what is computed with them is not."""
    weights = {key: w * 1e30 if key.endswith("weight") else w for key, w in state["model"].items()}
    write_checkpoint_file(tmp_path / "odd.pt", {**state, "model": weights})
    predictor = mtcl.load(tmp_path / "odd.pt", device="cpu", tasks="depth")
    for _ in range(2):
        predictor(np.full((20, 30, 3), 128, np.uint8))
    assert caplog.text.count("prediction of depth has NaN or infinite pixels") == 1


def test_half_precision_weights_are_read(state, tmp_path):
    half = {key: w.half() if w.is_floating_point() else w for key, w in state["model"].items()}
    loaded = load_model_of({**state, "model": half}, tmp_path)
    assert all(w.dtype != torch.float16 for w in loaded.model.state_dict().values())


def test_a_compressed_archive_is_refused(state, tmp_path):
    """A small file could hold more than the memory."""
    torch.save({"format": 1, **state, "bomb": torch.zeros(10_000_000)}, tmp_path / "plain.pt")
    packed = zipfile.ZipFile(tmp_path / "odd.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "odd.pt").stat().st_size < 3_000_000
    with pytest.raises(UserError, match="compressed"):
        mtcl.load(tmp_path / "odd.pt")


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function: object, *arguments: object):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def nested_tuples(levels: int) -> tuple:
    nest: tuple = ()
    for _ in range(levels):
        nest = (nest, nest)
    return nest


@pytest.mark.parametrize(
    "extra",
    [
        Calls(bytearray, 2 * 10**9),
        Calls(torch.FloatTensor, 10**9),
        Calls(os.getpid),
        nested_tuples(44),
        [nested_tuples(30)],
    ],
    ids=["bytearray", "storage", "code", "tuples", "tuples in a list"],
)
def test_what_asks_for_time_or_memory_is_refused_unread(extra, state, tmp_path):
    torch.save({"format": 1, **state, "extra": extra}, tmp_path / "odd.pt")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"odd\.pt"):
        load_model(tmp_path / "odd.pt")
    assert time.monotonic() - start < 5


def test_weights_that_are_one_in_memory_are_refused(state, tmp_path):
    """The file would be a part of what its model takes."""
    room = torch.ones(max(w.numel() for w in state["model"].values()))
    weights = {
        key: room[: w.numel()].view(w.shape) if w.is_floating_point() else w for key, w in state["model"].items()
    }
    torch.save({"format": 1, **state, "model": weights}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="claim more than"):
        load_model(tmp_path / "odd.pt")


def test_an_archive_that_only_torch_can_read_is_refused(state, tmp_path):
    path = tmp_path / "odd.pt"
    torch.save({"format": 1, **state}, path)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 6] = 99  # the version that is needed to unpack the first member
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"odd\.pt"):
        load_model(path)


def test_attributes_that_a_file_gives_to_its_containers_count_for_nothing(state, tmp_path):
    odd = OrderedDict(state["model"])
    odd._metadata = {"": {"assign_to_params_buffers": True}}  # type: ignore[attr-defined]
    double = OrderedDict((key, w.double() if w.is_floating_point() else w) for key, w in odd.items())
    double._metadata = odd._metadata  # type: ignore[attr-defined]
    loaded = load_model_of({**state, "model": double}, tmp_path)
    assert not any(w.dtype == torch.float64 for w in loaded.model.state_dict().values())


def test_exported_folders_pass_the_same_door(state, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({key: w.contiguous() for key, w in state["model"].items()}, folder / "model.safetensors")
    facts = {"config": state["config"], "tasks": state["meta"]["tasks"], "step": 3}

    def written(text: str) -> Path:
        (folder / "mtcl.json").write_text(text)
        return folder

    assert set(mtcl.load(written(json.dumps(facts)), device="cpu").tasks) == {"semseg", "depth"}
    for key, value in ODD_CONFIGS:
        if key != "name":  # JSON has no tensors and no cycles
            with pytest.raises(UserError, match=r"model|mtcl\.json"):
                load_model(written(json.dumps({**facts, "config": change(state, key, value)["config"]}, skipkeys=True)))
    for text in ("", "[1]", "{", "5", "[" * 100_000, json.dumps(facts)[:-9], json.dumps({**facts, "step": 10**400})):
        with pytest.raises(UserError, match=r"mtcl\.json"):
            load_model(written(text))
    (folder / "mtcl.json").unlink()
    os.mkfifo(folder / "mtcl.json")
    with pytest.raises(UserError, match="neither an exported model"):
        load_model(folder)


def test_the_lock_follows_no_link(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "target").write_text("precious")
    (run / ".lock").symlink_to(tmp_path / "target")
    assert not is_locked(run)
    with pytest.raises(UserError, match=r"\.lock is a link"):
        lock_run(run)
    assert (tmp_path / "target").read_text() == "precious"
    (run / ".lock").unlink()
    (run / ".lock").write_text("kept")
    with lock_run(run):
        assert is_locked(run)
    assert (run / ".lock").read_text() == "kept"
    (run / ".lock").unlink()
    os.mkfifo(run / ".lock")
    assert not is_locked(run)


# --- Mutations

_ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.sampled_from([10**9, 2**63, -1, 0, 10**40]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=12),
    st.sampled_from(
        ["${oc.env:HOME}", "${a.b}", "???", "/etc/passwd", "../x", "mtcl.data.NYUD", "mtcl.models.TaskPrompter"]
    ),
    st.sampled_from(
        ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "efficientnet_b0", "hf-hub:a/b"]
    ),
)
_VALUES = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.text(max_size=8), st.integers()), inner, max_size=4)
    ),
    max_leaves=6,
)


def _keys(value: object, prefix: tuple = ()) -> list[tuple]:
    if not isinstance(value, dict):
        return [prefix]
    return [prefix, *(key for name, item in value.items() for key in _keys(item, (*prefix, name)))]


def _mutate(content: dict, path: tuple, value: object) -> dict:
    if not path:
        return value  # type: ignore[return-value]
    copied = dict(content)
    if value is ... and len(path) == 1:
        copied.pop(path[0], None)
    else:
        copied[path[0]] = _mutate(copied[path[0]], path[1:], value)
    return copied


def check_mutation(content: dict, folder: Path) -> None:
    """A mutated checkpoint ends in one sentence or in a model, soon, and nothing else is written."""
    path = folder / "odd.pt"
    write_checkpoint_file(path, content)
    start = time.monotonic()
    sentence = ""
    try:
        load_model(path)
    except UserError as error:
        sentence = str(error)
    assert "\n" not in sentence
    assert time.monotonic() - start < 5
    assert sorted(one.name for one in folder.iterdir()) == ["odd.pt"]


def mutate_checkpoints(count: int):
    @settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(data=st.data())
    def test(state, tmp_path, monkeypatch, data):
        monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
        content = {key: value for key, value in state.items() if key != "model"}
        paths = [path for path in _keys(content) if path]
        for _ in range(data.draw(st.integers(1, 3))):
            path = data.draw(st.sampled_from(paths))
            value = data.draw(st.one_of(st.just(...), _VALUES))
            try:
                content = _mutate(content, path, value)
            except (KeyError, TypeError, ValueError):  # an earlier change took its parent away
                continue
        check_mutation({"model": state["model"], **content}, tmp_path)

    return test


test_mutated_checkpoints = mutate_checkpoints(20)
test_many_mutated_checkpoints = pytest.mark.slow(mutate_checkpoints(300))


@pytest.mark.slow
def test_mutated_bytes_of_a_checkpoint(state, tmp_path):
    """Without its checksum, as torch.save alone writes it: the reader itself must hold."""
    path = tmp_path / "odd.pt"
    torch.save({"format": 1, **state}, path)
    original = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    sentences = []
    for _ in range(150):
        mutated = bytearray(original)
        for _ in range(int(torch.randint(1, 8, (), generator=generator))):
            position = int(torch.randint(len(mutated), (), generator=generator))
            mutated[position] = int(torch.randint(256, (), generator=generator))
        path.write_bytes(mutated)
        try:
            load_model(path)
        except UserError as error:
            sentences.append(str(error))
    assert sentences
    assert not any("\n" in sentence for sentence in sentences)
