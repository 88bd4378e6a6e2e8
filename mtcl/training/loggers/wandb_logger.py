"""Log a run to Weights & Biases, online or into files (an optional package)."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mtcl.atomic import write_json
from mtcl.errors import ParameterError
from mtcl.training.loggers.background import BackgroundLogger, Identity, PanelImage, Record, Result, Scalars

STATE = "wandb.json"  # in the run folder: which run a resumed one continues


class WandbLogger(BackgroundLogger):
    """Sends curves, panels, the config and the scores of a run to Weights & Biases.

    Args:
        folder: the run folder; its subfolder ``wandb`` has the files.
        identity: of the run.
        project: name of the project.
        entity: user or team; None: the account's default.
        group: of runs.
        tags: of the run.
        mode: ``online`` or ``offline``; None: the environment variable WANDB_MODE, else online.

    Raises:
        ParameterError: the mode is unknown, or nobody is logged in for ``online``.
    """

    title = "Weights & Biases"

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        project: str = "mtcl",
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        mode: str | None = None,
    ):
        if mode not in (None, "online", "offline"):
            raise ParameterError("mode", f"={mode} is not known; choose online or offline")
        self.mode = mode or os.environ.get("WANDB_MODE") or "online"
        if self.mode == "online" and not _has_login():
            raise ParameterError(
                "mode", "=online needs an account: run wandb login, or set WANDB_API_KEY; or choose offline"
            )
        super().__init__()
        self.folder, self.identity = folder, identity
        self.project, self.entity, self.group, self.tags = project, entity, group, list(tags)
        self.run: Any = None

    def connect(self) -> None:
        """Begin the run, or continue that of the interrupted training."""
        import wandb  # takes seconds

        run = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            tags=self.tags,
            name=self.identity.name,
            config=dict(self.identity.parameters),
            dir=str(self.folder),
            mode=self.mode,
            id=self._find_run(),
            resume="allow" if self.mode == "online" else None,
            settings=wandb.Settings(console="off", silent=True, init_timeout=30),
        )
        write_json(self.folder / STATE, {"run_id": run.id})
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self.run = run

    def _find_run(self) -> str | None:
        """Return the id of the run that is continued; None for a new run."""
        if self.identity.start_step:
            with suppress(OSError, ValueError, KeyError, TypeError):
                return str(json.loads((self.folder / STATE).read_text("utf-8"))["run_id"])
        return None

    def send(self, record: Record) -> None:
        """Send a record."""
        import wandb

        if isinstance(record, Scalars):
            self.run.log({**record.values, "step": record.step})
        elif isinstance(record, PanelImage):
            self.run.log({record.name: wandb.Image(record.image), "step": record.step})
        elif isinstance(record, Result):
            self.run.summary.update({f"score/{name}": value for name, value in record.scores.items()})
            self.run.config.update({f"override.{k}": v for k, v in record.hparams.items()}, allow_val_change=True)

    def finish(self, is_finished: bool) -> None:
        """End the run."""
        self.run.finish(exit_code=0 if is_finished else 1)

    def locate(self) -> str:
        """Return the run's page, or the command that sends its files."""
        if self.mode == "online":
            return str(self.run.url)
        return f"wandb sync {Path(self.run.dir).parent}"


def _has_login() -> bool:
    """Return whether there is a key for the server, from the environment or of ``wandb login``."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    try:
        return bool(wandb.login(prompt=False))
    except TypeError:  # an older version, without that argument
        return bool(wandb.api.api_key)
