"""Log a run to MLflow's tracking, on a server or in a database file (an optional package).

The limits of names, values and batches are those of MLflow's REST API (its page "REST API", and
``mlflow/utils/validation.py`` of version 3).
"""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mtcl.atomic import write_json
from mtcl.errors import ParameterError
from mtcl.training.loggers.background import BackgroundLogger, Identity, PanelImage, Record, Result, Scalars

STATE = "mlflow.json"  # in the run folder: which run on which server a resumed run continues
MAX_METRICS, MAX_PARAMETERS, MAX_VALUE_LENGTH = 1000, 100, 6000
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}  # we try again ourselves


class MlflowLogger(BackgroundLogger):
    """Sends curves, panels, the config (as parameters) and the scores of a run to MLflow.

    Args:
        folder: the run folder; it remembers the run's id, so that a resumed run continues its curves.
        identity: of the run.
        tracking_uri: ``http://HOST:PORT``, ``sqlite:////FILE``, ...; None: the environment variable
            MLFLOW_TRACKING_URI, else MLflow's default.
        experiment: name of the experiment; it is created where there is none.

    Raises:
        ParameterError: the address holds a password, which the run's config would show.
    """

    title = "MLflow"

    def __init__(self, folder: Path, identity: Identity, tracking_uri: str | None = None, experiment: str = "Default"):
        if tracking_uri is not None and urlsplit(tracking_uri).password:
            raise ParameterError(
                "tracking_uri",
                " has a password in it, which would stand in the run's config; leave it out and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or set MLFLOW_TRACKING_URI",
            )
        super().__init__()
        self.state, self.identity = folder / STATE, identity
        self.tracking_uri, self.experiment = tracking_uri, experiment
        self.client: Any = None
        self.experiment_id = self.run_id = ""

    def connect(self) -> None:
        """Create the run, or continue that of the interrupted training, and send the config."""
        for variable, value in PATIENCE.items():
            os.environ.setdefault(variable, value)
        import mlflow  # takes seconds

        for name in ("mlflow", "alembic"):  # they tell of each table that they create
            logging.getLogger(name).setLevel(logging.WARNING)
        self.client = mlflow.MlflowClient(self.tracking_uri)
        self.tracking_uri = self.client.tracking_uri
        experiment = self.client.get_experiment_by_name(self.experiment)
        self.experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(self.experiment)
        if not self.run_id:
            self.run_id = self._find_run() or self._create_run()
        self._send_parameters()

    def _create_run(self) -> str:
        run_id = self.client.create_run(self.experiment_id, run_name=self.identity.name).info.run_id
        write_json(self.state, {"tracking_uri": _without_password(self.tracking_uri), "run_id": run_id})
        return str(run_id)

    def _find_run(self) -> str | None:
        """Return the id of the run that is continued; None for a new run, or where the server has it no more."""
        from mlflow.exceptions import MlflowException

        if not self.identity.start_step or not self.state.is_file():
            return None
        try:
            saved = json.loads(self.state.read_text("utf-8"))
            if saved["tracking_uri"] != _without_password(self.tracking_uri):
                return None
            self.client.update_run(saved["run_id"], status="RUNNING")
        except (ValueError, KeyError, TypeError):
            return None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return str(saved["run_id"])

    def _send_parameters(self) -> None:
        """Send the config; a parameter that the run has already can't be changed."""
        from mlflow.entities import Param

        present = self.client.get_run(self.run_id).data.params
        parameters = [
            Param(key, str(value)[:MAX_VALUE_LENGTH])
            for key, value in self.identity.parameters.items()
            if key not in present
        ]
        for start in range(0, len(parameters), MAX_PARAMETERS):
            self.client.log_batch(self.run_id, params=parameters[start : start + MAX_PARAMETERS])

    def send(self, record: Record) -> None:
        """Send a record."""
        milliseconds = int(record.time * 1000)
        if isinstance(record, Scalars):
            self._send_metrics(record.values, record.step, milliseconds)
        elif isinstance(record, PanelImage):
            self.client.log_image(
                self.run_id,
                record.image,
                key=re.sub(r"[^\w.-]", "_", record.name),
                step=record.step,
                timestamp=milliseconds,
                synchronous=True,
            )
        elif isinstance(record, Result):
            self._send_metrics({f"score/{name}": v for name, v in record.scores.items()}, record.step, milliseconds)
            for key, value in record.hparams.items():
                self.client.set_tag(self.run_id, f"override.{metric_name(key)}", str(value)[:MAX_VALUE_LENGTH])

    def _send_metrics(self, values: Mapping[str, float], step: int, milliseconds: int) -> None:
        from mlflow.entities import Metric

        metrics: Sequence[Metric] = [Metric(metric_name(name), v, milliseconds, step) for name, v in values.items()]
        for start in range(0, len(metrics), MAX_METRICS):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + MAX_METRICS])

    def finish(self, is_finished: bool) -> None:
        """Set the run's status."""
        self.client.set_terminated(self.run_id, "FINISHED" if is_finished else "KILLED")

    def refuses(self, error: Exception) -> bool:
        """Return whether the server answered that a record is not valid."""
        with suppress(AttributeError):
            return error.error_code == "INVALID_PARAMETER_VALUE"  # type: ignore[attr-defined]
        return False

    def locate(self) -> str:
        """Return the run's page, or the command that shows it."""
        uri = _without_password(self.tracking_uri)
        if uri.startswith("http"):
            return f"{uri.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        return f"mlflow ui --backend-store-uri {uri}"


def metric_name(name: str) -> str:
    """Return a name with the characters that MLflow takes.

    >>> metric_name("regularizer/depth<-edge/active")
    'regularizer/depth_from_edge/active'
    """
    return re.sub(r"[^\w\-. /]", "_", name.replace("<-", "_from_"))


def _without_password(uri: str | None) -> str:
    """Return an address without user and password."""
    uri = uri or ""
    parts = urlsplit(uri)
    return (
        uri
        if parts.hostname is None or "@" not in parts.netloc
        else uri.replace(f"{parts.netloc.rpartition('@')[0]}@", "")
    )
