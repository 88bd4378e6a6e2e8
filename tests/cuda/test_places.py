"""Every place that asks for the device or calls torch.cuda, by its calls: right ones, in the right order.

``PLACES`` lists them with the test that runs each; a place that is not listed fails the first test.
"""

import ast
import os
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers.common import ROOT, composed
from helpers.fake_cuda import CUDA
from torch import nn

from mtcl import distributed
from mtcl.cli import run_record
from mtcl.cli import train as train_command
from mtcl.config import build_data, build_features
from mtcl.models import EncoderDecoder
from mtcl.models.decoders.blocks import SpatialNorm
from mtcl.profiling.timing import measure_peak_memory, measure_time
from mtcl.runtime import autocast, choose_device, peak_memory, rng_state, seed_everything, set_rng_state
from mtcl.training import sharding, train_step
from mtcl.training.balancing_torchjd import private_randomness
from mtcl.training.optimizers import build_optimizer

PLACES = {
    "cli.consistency.choose_float64_capable_device": "test_mps.test_what_needs_float64_is_refused",
    "cli.run_record.build_run_record": "test_places.test_the_record_names_the_gpu",
    "cli.train.set_up_process": "test_places.test_a_process_is_set_up_in_order",
    "config.build_data.build_eval_loader": "test_places.test_loaders_pin_their_memory",
    "config.build_data.build_train_loader": "test_places.test_loaders_pin_their_memory",
    "config.build_training.build_trainer": "test_mps.test_what_needs_float64_is_refused",
    "config.build_features.build_feature_caches": "test_places.test_loaders_of_a_feature_cache_pin_their_memory",
    "data.device_batch._copy_stream": "test_parts.test_features_are_copied_on_a_stream_of_their_own",
    "data.device_batch._copy_stream_context": "test_parts.test_features_are_copied_on_a_stream_of_their_own",
    "data.device_batch.prepare_batch": "test_training.test_a_step_of_each_decoder",
    "distributed.init_process_group": "test_places.test_a_process_group_connects_the_gpu_of_its_process",
    "metrics.masked.count": "test_parts.test_loss_and_metric_of_each_task",
    "metrics.masked.row_bands": "test_parts.test_loss_and_metric_of_each_task",
    "metrics.segmentation.SegmentationMetric": "test_parts.test_loss_and_metric_of_each_task",
    "metrics.segmentation.max_and_argmax": "test_parts.test_loss_and_metric_of_each_task",
    "models.decoders.blocks.resize_trained": "test_training.test_a_step_of_each_decoder",
    "profiling.timing.measure_peak_memory": "test_places.test_memory_is_measured_between_synchronisations",
    "profiling.timing.synchronize": "test_places.test_time_is_measured_between_synchronisations",
    "regularizers.base.Regularizer": "test_parts.test_a_step_of_each_regulariser",
    "regularizers.mtpsl.CrossTaskConsistency": "test_parts.test_a_step_of_each_regulariser",
    "regularizers.mtpsl._normalize_maps": "test_parts.test_a_step_of_each_regulariser",
    "regularizers.pairs.find_labelled_groups": "test_parts.test_a_step_of_each_regulariser",
    "runtime.choose_device": "test_places.test_each_process_chooses_its_gpu",
    "runtime.choose_float64_device": "test_mps.test_precision_and_the_device_of_sums",
    "runtime.choose_precision": "test_places.test_auto_is_bf16_where_the_gpu_has_it_else_fp16",
    "runtime.peak_memory": "test_places.test_peak_memory_is_that_of_the_gpu",
    "runtime.rng_state": "test_places.test_generator_states_include_the_gpu",
    "runtime.seed_everything": "test_places.test_the_deterministic_flags",
    "runtime.set_rng_state": "test_places.test_generator_states_include_the_gpu",
    "training.balancing_torchjd.private_randomness": "test_places.test_an_aggregator_has_private_randomness",
    "training.checkpoint_thread.copy_to_cpu": "test_parts.test_a_checkpoint_is_copied_without_waiting"
    "_and_read_after_the_event",
    "training.optimizers.build_optimizer": "test_places.test_optimisers_are_fused",
    "training.sharding.ShardedWeights": "test_places.test_sharding_synchronises_batch_norms_first",
    "training.train_step.wrap_parallel": "test_places.test_ddp_synchronises_batch_norms_and_takes_one_gpu",
}
MARKS = re.compile(
    r"cuda|is_cpu|cudnn|nccl|sync_batchnorm|record_stream|\.type\b|fused|pin_memory|use_determ|matmul_pre"
)
SETTINGS = ("torch.use_deterministic_algorithms", "torch.set_float32_matmul_precision")


def asks_for_device(node: ast.AST) -> bool:
    """Tell whether a node of the syntax tree asks what the device is, or sets something of CUDA."""
    match node:
        case ast.Attribute(attr="is_cpu" | "is_cuda" | "record_stream"):
            return True
        case ast.Attribute():
            return ast.unparse(node).startswith(("torch.cuda.", "torch.backends.cud", *SETTINGS))
        case ast.Compare():
            return any(
                isinstance(side, ast.Attribute) and side.attr == "type" for side in (node.left, *node.comparators)
            )
        case ast.keyword(arg="fused" | "pin_memory", value=ast.Constant(value=True)):
            return True
        case ast.Call(func=ast.Name(id="convert_sync_batchnorm")):
            return True
        case ast.Constant(value=str()):
            return "nccl" in node.value
    return False


def list_places(source: str) -> set[str]:
    """Return the functions and classes of a module that ask for the device; an empty name: the module itself."""
    if not MARKS.search(source):  # saves most of the time
        return set()
    return {getattr(node, "name", "") for node in ast.parse(source).body if any(map(asks_for_device, ast.walk(node)))}


def test_every_place_is_listed_with_its_test():
    paths = sorted((ROOT / "mtcl").rglob("*.py"))
    modules = {".".join(path.relative_to(ROOT / "mtcl").with_suffix("").parts): path for path in paths}
    places = {f"{module}.{name}" for module, path in modules.items() for name in list_places(path.read_text("utf-8"))}
    assert places == set(PLACES)
    for test in PLACES.values():
        module, name = test.split(".")
        assert f"\ndef {name}(" in (ROOT / "tests" / "cuda" / f"{module}.py").read_text("utf-8"), test


def test_a_new_place_is_noticed():
    lines = [
        "def a(x): return torch.cuda.is_available()",
        "def b(x): return 1 if x.device.type != 'cpu' else 2",
        "class C:\n    def c(self): torch.backends.cudnn.benchmark = True",
        "def d(x): return x.is_cuda",
        "def e(x): return x + 1",
    ]
    assert list_places("\n".join(lines)) == {"a", "b", "C", "d"}


@pytest.fixture
def calls(monkeypatch):
    """Replace what calls the driver by a recorder."""
    recorder = mock.MagicMock()
    for name in ("set_device", "synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, getattr(recorder, name))
    for name in ("get_rng_state", "set_rng_state", "is_bf16_supported", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, getattr(recorder, name))
    return recorder


# A process


def test_each_process_chooses_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert choose_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert choose_device("cuda") == torch.device("cuda", 2)


@pytest.mark.parametrize("index", [None, 2])
def test_a_process_group_connects_the_gpu_of_its_process(index, calls, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.distributed, "init_process_group", calls.init_process_group)
    distributed.init_process_group(torch.device("cuda", index))
    device = torch.device("cuda", index or 0)
    init = mock.call.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    assert calls.mock_calls == [mock.call.set_device(device), init]
    calls.reset_mock()
    distributed.init_process_group(torch.device("cpu"))
    assert calls.mock_calls == [mock.call.init_process_group("gloo")]
    calls.reset_mock()
    monkeypatch.setenv("WORLD_SIZE", "1")
    distributed.init_process_group(CUDA)
    assert calls.mock_calls == []


def test_a_process_is_set_up_in_order(calls, monkeypatch):
    """The seed is set on the GPU that the process group took; cuBLAS reads its setting when it is first used."""
    monkeypatch.setattr(train_command, "choose_device", lambda *_: CUDA)
    monkeypatch.setattr(distributed, "init_process_group", calls.init_process_group)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", calls.set_float32_matmul_precision)
    monkeypatch.setattr(train_command, "seed_everything", calls.seed_everything)
    trainer = SimpleNamespace(device="auto", tf32=True, deterministic=True)
    assert train_command.set_up_process(SimpleNamespace(trainer=trainer, seed=3)) == CUDA
    assert calls.mock_calls == [
        mock.call.init_process_group(CUDA),
        mock.call.set_float32_matmul_precision("high"),
        mock.call.seed_everything(3, True),
    ]


def test_the_deterministic_flags(calls, monkeypatch):
    """cuBLAS's workspace is set before anything else can use cuBLAS."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch, "manual_seed", calls.manual_seed)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    workspaces = []
    monkeypatch.setattr(
        torch,
        "use_deterministic_algorithms",
        lambda mode: (workspaces.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG")), calls.use(mode)),
    )
    seed_everything(5, deterministic=True)
    assert calls.mock_calls == [mock.call.manual_seed(5), mock.call.use(True)]
    assert workspaces == [":4096:8"]
    assert not torch.backends.cudnn.benchmark
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


def test_auto_is_bf16_where_the_gpu_has_it_else_fp16(calls, monkeypatch, caplog):
    """A run in fp16 that did not ask for it says so."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    for is_native in (True, False):
        calls.is_bf16_supported.return_value = is_native
        with autocast(CUDA, "auto"):
            assert torch.is_autocast_enabled("cuda")
            assert torch.get_autocast_dtype("cuda") == (torch.bfloat16 if is_native else torch.float16)
        trainer = mock.MagicMock(device=CUDA)
        trainer.model.parameters.return_value = []
        with caplog.at_level("INFO"):
            train_command.log_setup(composed("debug=tiny"), trainer, mock.MagicMock(), mock.MagicMock(), False)
        sentence = "trainer.precision=auto: cuda:0 has no bf16, so the run is in fp16, with a gradient scaler"
        assert (sentence in caplog.text) != is_native
    calls.is_bf16_supported.assert_called_with(including_emulation=False)


def test_generator_states_include_the_gpu(calls):
    calls.get_rng_state.return_value = torch.ones(4, dtype=torch.uint8)
    state = rng_state(CUDA)
    assert state["cuda"] is calls.get_rng_state.return_value
    set_rng_state(state, CUDA)
    set_rng_state({"cpu": state["cpu"]}, CUDA)  # of a run on a CPU
    set_rng_state(state, torch.device("cpu"))
    assert calls.mock_calls == [mock.call.get_rng_state(CUDA), mock.call.set_rng_state(state["cuda"], CUDA)]


def test_an_aggregator_has_private_randomness(calls, monkeypatch):
    """The generator of the GPU is seeded inside, and gets its state back."""
    monkeypatch.setattr(torch.cuda, "default_generators", [None, calls.generator])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with private_randomness(1, 7, torch.device("cuda", 1)):
        seed = torch.initial_seed()
        calls.body()
    assert calls.mock_calls == [
        mock.call.get_rng_state(1),
        mock.call.generator.manual_seed(seed),
        mock.call.body(),
        mock.call.set_rng_state(calls.get_rng_state.return_value, 1),
    ]


# Records


def test_the_record_names_the_gpu(calls):
    config = mock.MagicMock()
    config.data.size = (32, 64)
    with mock.patch.object(run_record, "OmegaConf"):
        record = run_record.build_run_record(config, mock.MagicMock(), 4, CUDA, [])
    assert record["device"] is calls.get_device_name.return_value
    calls.get_device_name.assert_called_once_with(CUDA)


def test_peak_memory_is_that_of_the_gpu(calls):
    calls.max_memory_allocated.return_value = 3 * 2**29
    assert peak_memory(CUDA) == 1.5
    assert calls.mock_calls == [mock.call.max_memory_allocated(CUDA)]


def test_time_is_measured_between_synchronisations(calls):
    measure_time(calls.work, CUDA)
    assert calls.mock_calls == [mock.call.synchronize(CUDA), mock.call.work(), mock.call.synchronize(CUDA)]


def test_memory_is_measured_between_synchronisations(calls):
    calls.memory_allocated.return_value, calls.max_memory_allocated.return_value = 100, 350
    assert measure_peak_memory(calls.work, CUDA) == 250
    names = ["synchronize", "reset_peak_memory_stats", "memory_allocated", "work", "synchronize"]
    names += ["max_memory_allocated"]
    assert calls.mock_calls == [getattr(mock.call, name)(*() if name == "work" else (CUDA,)) for name in names]


# Data


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_loaders_pin_their_memory(device):
    config = composed("debug=tiny", "data.size=[32,64]")
    dataset = SimpleNamespace(ids=list("abcd"))
    loaders = [
        build_data.build_train_loader(config, dataset, {}, 0, torch.device(device)),
        build_data.build_eval_loader(config, dataset, {}, torch.device(device)),
    ]
    assert [loader.pin_memory for loader in loaders] == [device == "cuda"] * 2


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_loaders_of_a_feature_cache_pin_their_memory(device, tmp_path, monkeypatch):
    monkeypatch.setattr(build_features, "describe_format", mock.MagicMock())
    monkeypatch.setattr(build_features, "describe_backbone", lambda *_: {})
    monkeypatch.setattr(build_features, "FeatureCache", mock.MagicMock())
    monkeypatch.setattr(build_features, "PartiallyLabeledDataset", int)
    config = composed("debug=tiny", "data.size=[32,64]", "data.views=1", f"data.feature_cache={tmp_path}")
    dataset = mock.MagicMock(ids=list("abcd"))
    model = mock.MagicMock(spec=EncoderDecoder, backbone=mock.MagicMock(is_frozen=True))
    caches = build_features.build_feature_caches(config, {}, model, dataset, dataset, torch.device(device))
    assert [filler.load([[0]]).pin_memory for filler in caches.fillers] == [device == "cuda"] * 2


# Training


class TinyModel(nn.Module):
    """The parts of a model that the optimisers and wrappers look at."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.norm = SpatialNorm(4)

    def backbone_parameters(self):
        return self.backbone.parameters()


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_optimisers_are_fused(name):
    """Only these skip a step by a flag on the GPU."""
    optimizer = build_optimizer(TinyModel(), name, 0.1)
    assert all(group["fused"] for group in optimizer.param_groups)
    assert optimizer._step_supports_amp_scaling


@pytest.mark.parametrize("device", [torch.device("cuda", 1), torch.device("cpu")])
def test_ddp_synchronises_batch_norms_and_takes_one_gpu(device, monkeypatch):
    """The optimiser has the parameters already, so the new norms must have the same ones."""
    model, wrap = TinyModel(), mock.MagicMock()
    step = nn.Module()
    step.model = model
    parameters = list(model.parameters())
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(train_step, "DistributedDataParallel", wrap)
    assert train_step.wrap_parallel(step, device) is wrap.return_value
    is_cuda = device.type == "cuda"
    wrap.assert_called_once_with(step, device_ids=[1] if is_cuda else None, gradient_as_bucket_view=True)
    norms = [module for module in step.model.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert len(norms) == (2 if is_cuda else 0)
    assert [id(p) for p in step.model.parameters()] == [id(p) for p in parameters]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_sharding_synchronises_batch_norms_first(device, monkeypatch):
    calls, model = mock.MagicMock(), TinyModel()
    calls.convert.side_effect = sharding.convert_sync_batchnorm
    parts = [SimpleNamespace(to_local=lambda p=p: p, requires_grad=True) for p in model.parameters()]
    monkeypatch.setattr(sharding, "convert_sync_batchnorm", calls.convert)
    monkeypatch.setattr(sharding, "init_device_mesh", calls.mesh)
    monkeypatch.setattr(sharding, "fully_shard", calls.shard)
    monkeypatch.setattr(sharding, "_broadcast_state", calls.broadcast)
    monkeypatch.setattr(sharding, "_sharded_parameters", lambda _: parts)
    monkeypatch.setattr(sharding, "fsdp_units", lambda model: [model.backbone])
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    sharding.ShardedWeights(model, torch.device(device))
    mesh = calls.mesh.return_value
    expected = [
        mock.call.mesh(device, (2,)),
        mock.call.broadcast(model),
        mock.call.shard(model.backbone, mesh=mesh),
        mock.call.shard(model, mesh=mesh),
    ]
    assert calls.mock_calls == [mock.call.convert(model)] * (device == "cuda") + expected
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()) == (device == "cuda")
