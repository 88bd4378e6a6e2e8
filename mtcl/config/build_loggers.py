"""Build what takes a run's curves and panels."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mtcl.config.resolve import construct, plain
from mtcl.config.schema import flatten
from mtcl.errors import UserError
from mtcl.training.loggers import CsvLogger, MetricLogger, MlflowLogger, TensorBoardLogger, WandbLogger
from mtcl.training.loggers.background import Identity

IN_FOLDER: dict[str, Callable[[Path, int], MetricLogger]] = {"tensorboard": TensorBoardLogger, "csv": CsvLogger}
WITH_SERVER: dict[str, Callable[..., MetricLogger]] = {"mlflow": MlflowLogger, "wandb": WandbLogger}  # name -> class


def build_loggers(config: DictConfig, folder: Path, start_step: int = 0) -> list[MetricLogger]:
    """Build the loggers of a config; TensorBoard's alone for a config of before there was a choice.

    Args:
        config: as ``train.py`` composes it.
        folder: the run folder; nothing is written yet.
        start_step: the step to continue from.

    Raises:
        UserError: a package is missing, or a value is refused; the sentence names the extra or the key.
    """
    loggers = []
    for name, options in plain(config.get("logger", {"tensorboard": {}})).items():
        if name in IN_FOLDER:
            loggers.append(IN_FOLDER[name](folder, start_step))
        else:
            loggers.append(_build_for_server(name, dict(options), config, folder, start_step))
    return loggers


def _build_for_server(
    name: str, options: dict[str, Any], config: DictConfig, folder: Path, start_step: int
) -> MetricLogger:
    """Build a logger that shows the config and the run's name, too."""
    if find_spec(name) is None:
        raise UserError(f"logger={name} needs the package {name}; pip install 'mtcl[{name}]'")
    parameters = {key: value for key, value in flatten(plain(config)) if not key.startswith("logger.")}
    identity = Identity(options.pop("run_name") or folder.name, parameters, start_step)
    return construct(WITH_SERVER[name], f"logger.{name}", folder, identity, **options)
