"""A training run as studies, searches and sweeps start it: a run folder, with a log and a record beside it."""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtcl.config.quoting import quote_value
from mtcl.launch.overrides import merge_overrides
from mtcl.launch.processes import start_process
from mtcl.run_folder import RunFolder


@dataclass
class Job:
    """A run of train.py in a process of its own."""

    folder: Path
    overrides: tuple[str, ...]

    @property
    def run_folder(self) -> RunFolder:
        """The folder with the names of its files."""
        return RunFolder(self.folder)

    @property
    def is_finished(self) -> bool:
        """Has the run written its metrics and its record?"""
        return self.run_folder.is_finished

    @property
    def is_locked(self) -> bool:
        """Does a process, of whatever study, search or sweep, write into the folder?"""
        return self.run_folder.is_locked

    @property
    def can_resume(self) -> bool:
        """Is there a checkpoint to continue from?"""
        return self.run_folder.has_checkpoints

    @property
    def log(self) -> Path:
        """The file that the process's output goes to."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def record(self) -> Path:
        """The file in which a study or search notes what the job is."""
        return self.folder.with_name(f"{self.folder.name}.json")

    def build_command(self, command: Sequence[str], extra_overrides: Sequence[str] = ()) -> list[str]:
        """Return the command that starts the run, or continues it from its last checkpoint.

        Args:
            command: What trains, without overrides.
            extra_overrides: Further overrides, such as the seed.
        """
        resume = ["resume=auto"] if self.can_resume else []
        overrides = merge_overrides(self.overrides, extra_overrides, resume)
        return [*command, *overrides, f"hydra.run.dir={quote_value(self.folder)}"]

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        root: Path | None = None,
        extra_overrides: Sequence[str] = (),
    ) -> subprocess.Popen:
        """Start the run, or continue it from its last checkpoint.

        Args:
            command: What trains, without overrides.
            environment: The process's environment variables.
            root: The folder that it is started in.
            extra_overrides: Further overrides, such as the seed.
        """
        return start_process(self.build_command(command, extra_overrides), self.log, environment, root)
