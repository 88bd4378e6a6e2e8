"""What takes a run's curves and panels: each logger alone, and what happens when it fails."""

import csv
import errno
import gzip
import json
import logging
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.common import TINY, choices, composed
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.backend_context import Context

from mtcl import UserError
from mtcl.cli.train import find_hparams, train
from mtcl.config import build_loggers as build_loggers_module
from mtcl.config.build_loggers import build_loggers
from mtcl.config.build_training import build_trainer_options
from mtcl.config.overrides import LOGGERS
from mtcl.training.loggers import CsvLogger, MetricLogger, MlflowLogger, TensorBoardLogger, WandbLogger
from mtcl.training.loggers.background import BackgroundLogger, Identity, PanelImage, Result, Scalars
from mtcl.training.measurements import Throughput, read_learning_rates
from mtcl.training.run_logger import RunLogger, choose_scores
from mtcl.training.step_profiler import StepProfiler


def read_table(folder):
    """Step -> column -> value, without empty cells; each step has one row."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = {int(row["step"]): {k: float(v) for k, v in row.items() if k != "step" and v} for row in rows}
    assert len(table) == len(rows)
    return table


# --- CSV


def log_run(logger, steps, validations=(), offset=0.0):
    """Log as a training does: the validation of a state, then the losses of the update that follows it."""
    reference = {}
    for step in steps:
        records = [{"val/depth/rmse": 100.0 + step + offset}] if step in validations else []
        records.append({"train/depth": 1.0 / (step + 3) + offset, **({"train/late": 7.0} if step > 2 else {})})
        records.append({"lr/decoder": 10.0**-step})
        for record in records:
            logger.log_scalars(step, record)
            reference[step] = reference.get(step, {}) | record
    return reference


def test_a_csv_row_has_all_of_its_step(tmp_path):
    logger = CsvLogger(tmp_path)
    logger.open()
    reference = {}
    for step in range(6):
        reference |= log_run(logger, [step], validations=[0, 4])
        assert read_table(tmp_path) == reference, "the last row is on the disk, too"
    logger.close(is_finished=True)
    assert read_table(tmp_path) == reference
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 7


def test_a_csv_file_is_continued_where_the_run_is(tmp_path):
    first = CsvLogger(tmp_path)
    first.open()
    reference = log_run(first, range(6), validations=[0, 4])
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("7")  # killed while it wrote
    second = CsvLogger(tmp_path, start_step=4)
    second.open()
    expected = {step: reference[step] for step in range(4)} | {4: {"val/depth/rmse": 104.0}}
    assert read_table(tmp_path) == expected
    for step, row in log_run(second, range(4, 8), validations=[6], offset=0.5).items():
        expected[step] = expected.get(step, {}) | row
    second.close(is_finished=True)
    assert read_table(tmp_path) == expected
    fresh = CsvLogger(tmp_path)
    fresh.open()
    assert read_table(tmp_path) == {}


def test_rows_that_a_full_disk_refused_are_written_later(tmp_path, monkeypatch, caplog):
    run_logger = RunLogger(tmp_path, loggers=[CsvLogger(tmp_path)])
    run_logger.log_scalars(0, "train", {"depth": 1.0})
    write = CsvLogger._write_last

    def refuse(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CsvLogger, "_write_last", refuse)
    for step in (1, 2):
        run_logger.log_scalars(step, "train", {"depth": 1.0 + step})
    monkeypatch.setattr(CsvLogger, "_write_last", write)
    run_logger.log_scalars(3, "train", {"depth": 4.0})
    run_logger.close()
    assert read_table(tmp_path) == {step: {"train/depth": 1.0 + step} for step in range(4)}
    assert caplog.text.count("No space left on device") == 1


# --- TensorBoard


def test_the_hparams_tab_has_the_overrides_and_scores_of_a_sweep(tmp_path):
    """TensorBoard's own reader collects them over all runs; curves are no metrics of a session."""
    for name, weight in (("a", 0.1), ("b", 0.3)):
        run_logger = RunLogger(tmp_path / name)
        run_logger.log_scalars(0, "train", {"depth": 1.0})
        hparams = {"regularizer.weight": weight, "seed": 0, "regularizer": "none"}
        run_logger.log_result(9, hparams, {"depth": {"rmse": weight, "abs_rel": 0.2}, "edge": {"loss": 0.1}})
        run_logger.close()
    events = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    events.Reload()
    context = Context(TBContext(data_provider=MultiplexerDataProvider(events, str(tmp_path))))
    metadata = context.hparams_metadata(RequestContext(), "")
    experiment = context.experiment_from_metadata(RequestContext(), "", True, metadata, [])
    domains = {info.name: info for info in experiment.hparam_infos}
    assert set(domains) == {"regularizer.weight", "seed", "regularizer"}
    interval = domains["regularizer.weight"].domain_interval
    assert (interval.min_value, interval.max_value) == (0.1, 0.3)
    assert domains["regularizer.weight"].differs
    assert not domains["seed"].differs
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert metrics == {"score/depth/rmse", "score/edge/loss"}
    (score,) = events.Tensors("b/hparams", "score/depth/rmse")
    assert (score.step, score.tensor_proto.float_val[0]) == (9, pytest.approx(0.3))


def test_hparams_are_what_bears_on_the_result():
    overrides = ["regularizer.weight=0.3", "regularizer=none", "data.root=/x", "trainer.num_panels=1", "logger=csv"]
    values = {"seed": 3, "regularizer": {"weight": 0.3}, "optimizer": {"betas": [0.9, 0.99]}}
    config = OmegaConf.create(values)
    overrides += ["optimizer.betas=[0.9,0.99]", "+recipe=finetune", "seed=3", "logger.wandb.mode=offline"]
    assert find_hparams(config, overrides) == {
        "seed": 3,
        "regularizer.weight": 0.3,
        "regularizer": "none",
        "optimizer.betas": "[0.9,0.99]",
        "recipe": "finetune",
    }


def test_a_task_is_represented_by_one_score():
    metrics = {"depth": {"abs_rel": 0.1, "rmse": 0.5}, "edge": {"loss": 0.2}, "teacher": {"a": 1.0, "b": 2.0}}
    assert choose_scores(metrics) == {"depth/rmse": 0.5, "edge/loss": 0.2, "teacher/a": 1.0, "teacher/b": 2.0}


# --- Servers


class Server(BackgroundLogger):
    """A server in memory that fails as often as it is told to."""

    title = "Server"
    retry_seconds = 0.005
    close_seconds = 5.0

    def __init__(self, refused_connects=0, refused_sends=0, rejects=()):
        super().__init__()
        self.refused_connects, self.refused_sends, self.rejects = refused_connects, refused_sends, rejects
        self.received, self.ending = [], None
        self.may_send = threading.Event()
        self.may_send.set()

    def connect(self):
        self.refused_connects -= 1
        if self.refused_connects >= 0:
            raise ConnectionError("connection refused\nby a long story")

    def send(self, record):
        self.may_send.wait()
        if isinstance(record, Scalars) and record.step in self.rejects:
            raise ValueError("not a valid name")
        self.refused_sends -= 1
        if self.refused_sends >= 0:
            raise TimeoutError
        self.received.append(record)

    def finish(self, is_finished):
        self.ending = is_finished

    def locate(self):
        return "here"

    def refuses(self, error):
        return isinstance(error, ValueError)


def log_steps(run_logger, count):
    for step in range(count):
        run_logger.log_scalars(step, "train", {"depth": float(step), "edge": float("nan")})


@pytest.mark.parametrize("failures", [{}, {"refused_connects": 3}, {"refused_sends": 4}])
def test_numbers_reach_a_server_that_answers_late_in_order(failures, tmp_path, caplog):
    server = Server(**failures)
    run_logger = RunLogger(tmp_path, loggers=[server])
    log_steps(run_logger, 5)
    run_logger.log_result(5, {"seed": 0}, {"depth": {"rmse": 1.0}})
    deadline = time.monotonic() + 5
    while server.waiting and time.monotonic() < deadline:
        time.sleep(0.002)
    run_logger.close()
    *scalars, result = server.received
    assert [(record.step, record.values) for record in scalars] == [(s, {"train/depth": float(s)}) for s in range(5)]
    assert (result.hparams, result.scores) == ({"seed": 0}, {"depth/rmse": 1.0})
    assert server.ending is True
    assert run_logger.describe() == ["here"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == bool(failures), "one warning, however often it fails"
    assert all(w.startswith("Server takes no records") and "long story" not in w for w in warnings)


def test_a_server_that_never_answers_is_one_warning(tmp_path, caplog):
    server = Server(refused_connects=10**9)
    run_logger = RunLogger(tmp_path, loggers=[server])
    log_steps(run_logger, 5)
    run_logger.close()
    assert run_logger.describe() == ["5 records were not sent to Server (connection refused)"]
    assert caplog.text.count("Server takes no records") == 1
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 5


def test_the_end_of_a_run_does_not_wait_for_a_server_that_hangs(tmp_path):
    server = Server()
    server.close_seconds = 0.05
    server.may_send.clear()
    run_logger = RunLogger(tmp_path, loggers=[server])
    log_steps(run_logger, 3)
    start = time.monotonic()
    run_logger.close()
    assert time.monotonic() - start < 2
    assert run_logger.describe() == ["3 records were not sent to Server (it takes too long)"]
    server.may_send.set()
    server.thread.join()


def test_what_a_server_refuses_for_good_does_not_hold_up_the_rest(tmp_path, caplog):
    server = Server(rejects=(1,))
    run_logger = RunLogger(tmp_path, loggers=[server])
    log_steps(run_logger, 4)
    run_logger.close()
    assert [record.step for record in server.received] == [0, 2, 3]
    assert run_logger.describe() == ["1 records were not sent to Server (not a valid name)"]
    assert server.ending is False, "there was no result"


def test_an_image_is_tried_once(tmp_path):
    server = Server(refused_sends=1)
    server.open()
    server.log_image(3, "panel/a", np.zeros((2, 3, 3), np.uint8))
    server.log_scalars(3, {"train/depth": 1.0})
    server.close(is_finished=True)
    assert [record.step for record in server.received] == [3]
    assert isinstance(server.received[0], Scalars)
    assert server.num_lost == 1


def test_a_logger_that_raises_is_one_warning_and_the_others_have_everything(tmp_path, caplog):
    class Broken(MetricLogger):
        subject = "broken curves"

        def open(self):
            raise RuntimeError("no luck")

        log_scalars = log_result = close = lambda self, *_: self.open()

        def describe(self):
            return ""

    run_logger = RunLogger(tmp_path, loggers=[Broken(), CsvLogger(tmp_path)])
    log_steps(run_logger, 3)
    run_logger.close()
    assert read_table(tmp_path) == {step: {"train/depth": float(step)} for step in range(3)}
    assert caplog.text.count("no luck") == 1


# --- MLflow and Weights & Biases, without their packages


def test_mlflow_gets_names_that_it_takes(tmp_path):
    logger = MlflowLogger(tmp_path, Identity("run"), "sqlite:///none.db", "mine")
    calls = []
    logger.client = SimpleNamespace(set_tag=lambda *a: calls.append(a))
    logger._send_metrics = lambda values, step, milliseconds: calls.append((values, step, milliseconds))
    logger.send(Scalars(3, {"regularizer/depth<-edge/active": 1.0}, time=2.5))
    logger.send(Result(4, {"seed": 1}, {"depth/rmse": 0.5}, time=3.0))
    assert calls == [
        ({"regularizer/depth<-edge/active": 1.0}, 3, 2500),
        ({"score/depth/rmse": 0.5}, 4, 3000),
        ("", "override.seed", "1"),
    ]
    assert logger.locate() == "mlflow ui --backend-store-uri sqlite:///none.db"


def test_wandb_gets_the_step_with_each_record(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", SimpleNamespace(Image=lambda array: array.shape))
    logger = WandbLogger(tmp_path, Identity("run"), mode="offline")
    logged, summary, config = [], {}, SimpleNamespace(update=lambda values, allow_val_change: logged.append(values))
    logger.run = SimpleNamespace(log=logged.append, summary=summary, config=config)
    logger.send(Scalars(3, {"train/depth": 1.0}))
    logger.send(PanelImage(4, "panel/a", np.zeros((2, 3, 3), np.uint8)))
    logger.send(Result(5, {"seed": 1}, {"depth/rmse": 0.5}))
    assert logged == [
        {"train/depth": 1.0, "step": 3},
        {"panel/a": (2, 3, 3), "step": 4},
        {"override.seed": 1},
    ]
    assert summary == {"score/depth/rmse": 0.5}


# --- From a config


def config_of(**loggers):
    """A config with these loggers and little else."""
    return OmegaConf.create({"name": "rooms", "seed": 5, "optimizer": {"name": "adamw"}, "logger": loggers})


def test_loggers_are_those_of_the_config(tmp_path):
    config_without_choice = OmegaConf.create({"seed": 0})  # as in a run folder of before there was a choice
    cases = [(config_of(), []), (config_without_choice, [TensorBoardLogger])]
    cases.append((composed("logger=null"), []))
    cases.append((composed("logger=[tensorboard,csv]"), [TensorBoardLogger, CsvLogger]))
    for config, expected in cases:
        assert [type(logger) for logger in build_loggers(config, tmp_path)] == expected


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(build_loggers_module, "find_spec", lambda name: None)
    for name in ("mlflow", "wandb"):
        with pytest.raises(UserError, match=rf"^logger={name} needs the package {name}; pip install 'mtcl\[{name}\]'"):
            build_loggers(config_of(csv={}, **{name: {"run_name": None}}), tmp_path)


def test_values_that_are_refused_are_named_by_their_key(tmp_path, monkeypatch):
    monkeypatch.setattr(build_loggers_module, "find_spec", lambda name: name)
    monkeypatch.setattr("mtcl.training.loggers.wandb_logger._has_login", lambda: False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = config_of(mlflow={"tracking_uri": "http://me:secret@localhost:5000", "run_name": None})
    with pytest.raises(UserError, match=r"^logger\.mlflow\.tracking_uri has a password"):
        build_loggers(config, tmp_path)
    options = {"project": "${name}", "group": None, "run_name": None}
    with pytest.raises(UserError, match=r"^logger\.wandb\.mode=online needs an account"):
        build_loggers(config_of(wandb={**options, "mode": None}), tmp_path)
    (logger,) = build_loggers(config_of(wandb={**options, "mode": "offline"}), tmp_path / "run7", 3)
    assert (logger.identity.name, logger.identity.start_step) == ("run7", 3)
    assert logger.identity.parameters == {"name": "rooms", "seed": 5, "optimizer.name": "adamw"}
    assert logger.project == "rooms"


def test_an_unknown_logger_is_answered_with_those_that_there_are():
    with pytest.raises(UserError, match=rf"^logger=foo is not known; choose one of {', '.join(LOGGERS)}$"):
        composed("logger=[csv,foo]")
    assert list(LOGGERS) == choices("logger")


# --- What is measured


def test_images_per_second_are_those_between_two_readings(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("mtcl.training.measurements.time.perf_counter", lambda: clock[0])
    batch = {"meta": [SimpleNamespace(view=0)] * 4 + [SimpleNamespace(view=1)] * 4}
    throughput = Throughput()
    throughput.count([batch])
    clock[0] = 50.0
    assert throughput.read() == {}, "the first steps compile and start workers"
    for _ in range(10):
        throughput.count([batch, batch])
        clock[0] += 0.2
        with throughput.pause():
            clock[0] += 7.0
    assert throughput.read() == {"images_per_second": pytest.approx(40.0), "seconds_per_step": pytest.approx(0.2)}
    assert throughput.read() == {}


def test_learning_rates_are_named_by_what_they_train():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(4)]
    model = SimpleNamespace(backbone_parameters=lambda: parameters[:2])
    rates = [(parameters[0], 0.1), (parameters[1], 0.2), (parameters[2], 0.4)]
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": lr} for parameter, lr in rates])
    other = torch.optim.SGD(parameters[3:], lr=0.8)
    expected = {"backbone": 0.2, "backbone_lowest": 0.1, "decoder": 0.4, "regularizer": 0.8}
    assert read_learning_rates(model, optimizer, other) == expected
    assert read_learning_rates(model, torch.optim.SGD(parameters[2:3], lr=0.4)) == {"decoder": 0.4}


@pytest.mark.slow
def test_a_training_logs_its_total_loss_speed_rates_and_memory(tmp_path):
    overrides = ["trainer.max_steps=2", "trainer.validate_first=false", "logger=[tensorboard,csv]"]
    overrides += ["tasks.names=[depth,normals]", "trainer.accumulate_grad_batches=2", "regularizer.weighting=fixed"]
    config = composed(*TINY, *overrides)
    train(config, tmp_path)
    row = read_table(tmp_path)[1]
    weights = {name: config.loss.weights[name] for name in ("depth", "normals")}
    if None in weights.values():
        weights = {"depth": 1.0, "normals": 10.0}
    total = sum(weights[name] * row[f"train/{name}"] for name in weights)
    assert row["train/loss"] == pytest.approx(total + config.regularizer.weight * row["train/regularizer"], rel=1e-5)
    assert row["lr/decoder"] == row["lr/backbone"] == row["train/lr"] == row["lr/regularizer"]
    assert row["system/images_per_second"] * row["system/seconds_per_step"] == pytest.approx(4)
    assert row["system/peak_memory_gib"] > 0
    log_records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {record["kind"] for record in log_records}.isdisjoint({"system", "lr"}), "equal runs have equal logs"
    events = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    assert {"score/depth/rmse", "score/normals/mErr"} <= set(events.GetAccumulator("hparams").Tags()["tensors"])
    assert set(row) <= set(events.GetAccumulator(".").Tags()["tensors"])


# --- The profiler


def test_the_profiler_records_the_steps_after_the_warm_up(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with StepProfiler(tmp_path, 2, start_step=10) as profiler:
        for _ in range(9):
            torch.ones(3).add(1)
            profiler.step()
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps_15-16.pt.trace.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::add" for event in events) == 2
    assert f"trace of the profiler: {path}; open it in" in caplog.text


def test_a_profile_needs_steps():
    config = composed("trainer.profile=5", "trainer.max_steps=9")
    with pytest.raises(
        UserError, match=r"trainer.profile=5 needs 10 steps \(5 before the trace\), but this run takes 9"
    ):
        build_trainer_options(config, 0)
    assert build_trainer_options(config, start_step=8).profile == 5, "the same command continues a run"
    config.trainer.profile = 4
    assert build_trainer_options(config, 0).profile == 4
