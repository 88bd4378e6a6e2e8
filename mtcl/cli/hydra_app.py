"""Run ``mtcl train`` and ``mtcl evaluate`` with Hydra; a user's mistake is one sentence and exit code 1."""

import argparse
import atexit
import contextlib
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtcl.cli.terminal import (
    DISK_FULL_ERRORS,
    announce_loading,
    ensure_utf8,
    print_error,
    tolerate_closed_output,
)
from mtcl.config.compose import finish_config
from mtcl.config.overrides import format_error, quote_paths, refuse_idle_regularizer_keys
from mtcl.errors import PeerLost, Preempted, UserError, escape_control_characters
from mtcl.launch import sweep as sweep
from mtcl.launch.processes import EXIT_REQUEUE

# What a disk refuses to write; and what no folder can be called, when Hydra makes the run's.
DISK_ERRORS = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT}
PATH_ERRORS = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EEXIST}


def run_hydra_app(
    job: Callable[[DictConfig], None], configs: Path, name: str, command: Sequence[str] | None = None
) -> None:
    """Run ``job`` on ``configs/name.yaml`` and the command line's overrides, as ``hydra.main`` does; ``-m`` sweeps.

    A UserError, or Hydra's complaint about the command line, is printed as one sentence, exit code 1. Other exceptions
    keep their trace; a preempted run exits with :data:`EXIT_REQUEUE`; HYDRA_FULL_ERROR=1 shows every trace. When the
    output is closed, the work goes on.

    Args:
        job: called with the composed and checked config.
        configs: the folder of configs.
        name: the main config, ``train``, ``distill`` or ``evaluate``.
        command: arguments of the Python whose processes run a sweep's jobs, such as a script's path, see
            :mod:`mtcl.launch.sweep`; None: the jobs run in this process.
    """
    ensure_utf8()
    with tolerate_closed_output(extra_errors=DISK_FULL_ERRORS):  # a run's numbers are in its folder
        _launch(job, configs, name, command)


def train_in_job_folder(config: DictConfig) -> None:
    """Train with the composed config, in the folder that Hydra has made: the job of mtcl train and of distill.py."""
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    chosen_folder = any("hydra.run.dir" in override for override in job.overrides.hydra)
    with announce_loading("PyTorch"):  # here, for --help and a sweep's parent do without
        from mtcl.cli.train import train

    train(config, folder, None if chosen_folder else folder.parent, overrides=list(job.overrides.task))


def _launch(job: Callable[[DictConfig], None], configs: Path, name: str, command: Sequence[str] | None) -> None:
    if int(os.environ.get("RANK", "0")) > 0:  # torchrun: only process 0 keeps the folder that Hydra creates
        sys.argv.append(f"hydra.run.dir={_temporary_folder()}")
    wants_trace = os.environ.get("HYDRA_FULL_ERROR", "0") == "1"
    task = _Task(job, command, wants_trace)
    multirun = any(arg in ("-m", "--multirun", "hydra.mode=MULTIRUN") for arg in sys.argv)
    sweeps = command is not None and multirun
    sys.argv[1:] = quote_paths(sys.argv[1:], sweeps=multirun)
    sweep.job_outcomes.clear()
    sweep.received_signals.clear()
    try:
        with contextlib.nullcontext() if wants_trace else _exit_on_errors(task, sweeps), _exit_when_stopped():
            if sweeps and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise UserError("torchrun can't start a sweep; start torchrun train.py once per run, without -m")
            with _hydra_raises(), sweep.forward_signals() if sweeps else contextlib.nullcontext():
                hydra.main(version_base="1.3", config_path=str(configs.resolve()), config_name=name)(task)()
            if task.error is not None:
                raise task.error
    finally:
        if sweep.job_outcomes or sweep.received_signals:
            print(*map(escape_control_characters, sweep.summary()), sep="\n", file=sys.stderr)
    if code := sweep.exit_code():
        sys.exit(code)


@contextlib.contextmanager
def _exit_on_errors(task: "_Task", sweeps: bool) -> Iterator[None]:
    """Print what the user can fix as one sentence and exit with code 1."""
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException) as error:
        print_error(format_error(error))
        sys.exit(1)
    except OSError as error:
        if error.errno not in (DISK_ERRORS if error is task.error else DISK_ERRORS | PATH_ERRORS):
            raise
        path = error.filename or "the run folder"
        print_error(f"{truncate_path(path)} can't be written ({error.strerror}); choose another hydra.run.dir")
        sys.exit(1)
    except Exception as error:
        if not sweeps:
            raise
        print_error(f"the launcher ended with {type(error).__name__}: {format_error(error)}")
        sys.exit(1)


@contextlib.contextmanager
def _exit_when_stopped() -> Iterator[None]:
    """Say how to go on where a signal has ended the run, and exit with the code that a scheduler expects."""
    try:
        yield
    except sweep.SweepStopped:
        pass
    except Preempted as stopped:
        print(f"{stopped}, its state is saved; the same command with resume=auto goes on from there", file=sys.stderr)
        sys.exit(EXIT_REQUEUE)
    except PeerLost:
        process = os.environ.get("RANK", "0")
        print(f"process {process} ends because another process of this run has ended", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; resume=auto continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


class _Task:
    """The function that Hydra calls: runs ``job``, or for a sweep ``command``, in the launcher's process."""

    def __init__(self, job: Callable[[DictConfig], None], command: Sequence[str] | None, wants_trace: bool):
        self.job, self.command, self.wants_trace = job, command, wants_trace
        self.pid, self.folders = os.getpid(), _config_folders()
        self.error: Exception | None = None  # of a single run; Hydra would print before it

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"job": None} if self.command else {})

    def __call__(self, config: DictConfig) -> object:
        hydra_config = HydraConfig.get()
        sweeps = hydra_config.mode == RunMode.MULTIRUN
        try:
            with announce_loading("PyTorch"):  # here, for it takes seconds
                from mtcl.config.build_model import inline_genotype

            finish_config(config)
            if hydra_config.job.config_name == "train":
                refuse_idle_regularizer_keys(hydra_config.overrides.task, config)
            inline_genotype(config)
            plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
            if not sweeps or self.command is None:
                return self.job(config)
            return sweep.run_job(
                [sys.executable, *self.command, *self.folders],
                [*hydra_config.overrides.task, *map(str, filter(_is_for_jobs, hydra_config.overrides.hydra))],
                plain,
                Path(hydra_config.runtime.output_dir),
                hydra_config.job.num,
                self.environment(),
                in_main_process=os.getpid() == self.pid,
            )
        except (UserError, OmegaConfBaseException, OSError, Preempted, PeerLost) as error:
            if sweeps and self.command is not None and isinstance(error, UserError | OmegaConfBaseException):
                overrides = tuple(hydra_config.overrides.task)
                return sweep.JobOutcome(hydra_config.job.num, overrides, sweep.FAILED, format_error(error))
            if self.wants_trace or sweeps:
                raise  # Hydra says which job of the sweep it was
            self.error = error
            return None

    def environment(self) -> dict[str, str]:
        """Return the environment of a sweep's processes: ours without what is only for Hydra here."""
        variables = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
        return variables | ({"HYDRA_FULL_ERROR": "1"} if self.wants_trace else {})


def _is_for_jobs(override: str) -> bool:
    """Return whether an override of Hydra's own config is for a sweep's jobs, not for the sweep."""
    return not override.startswith(("hydra.sweep", "hydra.launcher", "hydra.mode", "hydra.run", "hydra/", "hydra.job."))


def _config_folders() -> list[str]:
    """Return the command's flags that say where configs are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    folder = parser.parse_known_args()[0].config_dir
    return [] if folder is None else ["--config-dir", folder]


@contextlib.contextmanager
def _hydra_raises() -> Iterator[None]:
    """Make Hydra raise its exceptions instead of printing them."""
    original = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if original is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = original


def _temporary_folder() -> str:
    folder = tempfile.mkdtemp(prefix="mtcl_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def truncate_path(path: object, length: int = 200) -> str:
    """Return a path as text, cut in the middle where it is long."""
    text = str(path)
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 4 :]} ({len(text)} characters)"
