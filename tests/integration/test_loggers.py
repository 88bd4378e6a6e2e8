"""Trainings that log to MLflow's server and to Weights & Biases' files, where these packages are installed."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.common import TINY, composed
from omegaconf import OmegaConf

from mtcl.cli.train import train

SHORT = [*TINY, "trainer.validate_first=false", "evaluation.score_boundaries=false", "tasks.names=[depth,normals]"]


def read_losses(folder: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """MLflow's server on a free port of this machine, with a database of SQLite."""
    pytest.importorskip("mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process
    finally:
        stop(process)


def stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.mark.slow
def test_a_run_is_on_mlflows_server_is_continued_there_and_outlives_it(mlflow_server, tmp_path, caplog):
    from mlflow import MlflowClient

    uri, process = mlflow_server
    folder = tmp_path / "run"
    overrides = ["logger=[csv,mlflow]", f"logger.mlflow.tracking_uri={uri}", "logger.mlflow.experiment=tests"]
    train(composed(*SHORT, *overrides), folder, overrides=["regularizer.weight=0.3", "data.root=/x"])
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == read_losses(folder)
    assert len(history) == 2
    final = json.loads((folder / "metrics.json").read_text())
    assert run.data.metrics["score/depth/rmse"] == pytest.approx(final["depth"]["rmse"])
    assert run.data.metrics["system/peak_memory_gib"] > 0
    assert run.data.params["trainer.max_steps"] == "2"
    assert run.data.tags["override.regularizer.weight"] == "0.3"
    assert "override.data.root" not in run.data.tags
    assert client.list_artifacts(run.info.run_id, "images")
    assert "MLflow takes no records" not in caplog.text
    # Continued
    longer = composed(*SHORT, *overrides, "trainer.max_steps=3", "resume=auto")
    train(longer, folder)
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == [0, 1, 2]
    assert run.info.status == "FINISHED"
    # Without the server
    stop(process)
    OmegaConf.update(longer, "trainer.max_steps", 4)
    caplog.set_level("INFO")
    train(longer, folder)
    assert [step for step, _ in read_losses(folder)] == [0, 1, 2, 3]
    assert caplog.text.count("MLflow takes no records") == 1
    assert "records were not sent to MLflow" in caplog.text


@pytest.mark.slow
def test_a_run_is_in_the_files_of_weights_and_biases(tmp_path, caplog, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run"
    caplog.set_level("INFO")
    train(composed(*SHORT, "logger=wandb"), folder, overrides=["seed=0"])
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content = path.read_bytes()
    for name in (b"train/loss", b"system/peak_memory_gib", b"score/depth/rmse", b"override.seed", b"optimizer"):
        assert name in content, name
    assert list(path.parent.glob("files/media/images/panel/*.png"))
    assert f"wandb sync {path.parent}" in caplog.text
    assert "takes no records" not in caplog.text
    assert not list(folder.glob("events.*"))
