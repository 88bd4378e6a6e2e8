"""How an entry point starts and how it fails: a user's mistake is one sentence and exit code 1."""

import atexit
import contextlib
import difflib
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtcl.entry.schema import check_config
from mtcl.errors import UserError
from mtcl.training.preemption import Preempted

REQUEUE = 75  # EX_TEMPFAIL: the exit code of a run that was told to make room; for the scheduler's list of such codes


def launch(job: Callable[[DictConfig], None], configs: Path, name: str) -> None:
    """Run ``job`` on ``configs/name.yaml`` and the command line's overrides, as ``hydra.main`` does (``-m`` sweeps,
    too).

    A UserError, or Hydra's complaint about the command line, is printed as one sentence, exit code 1. Other exceptions
    keep their trace; a run that was told to make room exits with :data:`REQUEUE`; HYDRA_FULL_ERROR=1 shows every trace.
    """
    if (
        int(os.environ.get("RANK", "0")) > 0
    ):  # torchrun: process 0 has the run's folder, Hydra's of the others goes away
        sys.argv.append(f"hydra.run.dir={_temporary_folder()}")
    wants_trace = os.environ.get("HYDRA_FULL_ERROR", "0") == "1"
    failures: list[UserError] = []

    def guarded(config: DictConfig) -> None:
        try:
            check_config(cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True)))
            job(config)
        except UserError as error:
            if wants_trace or HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # Hydra says which job of the sweep it was
            failures.append(error)

    try:
        with _hydra_raises():
            hydra.main(version_base="1.3", config_path=str(configs.resolve()), config_name=name)(guarded)()
        if failures:
            raise failures[0]
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if wants_trace:
            raise
        print(f"error: {sentence(error)}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if wants_trace or error.errno not in (errno.EROFS, errno.EACCES, errno.ENOSPC):
            raise
        where = error.filename or "the run folder"
        print(f"error: {where} can't be written ({error.strerror}); choose another hydra.run.dir", file=sys.stderr)
        sys.exit(1)
    except Preempted as stopped:
        print(f"{stopped}, its state is saved; the same command with resume=auto goes on from there", file=sys.stderr)
        sys.exit(REQUEUE)
    except KeyboardInterrupt:
        print("interrupted; resume=auto continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def _hydra_raises() -> Iterator[None]:
    """Let Hydra's exceptions reach us instead of being printed by it."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def _temporary_folder() -> str:
    folder = tempfile.mkdtemp(prefix="mtcl_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def sentence(error: BaseException) -> str:
    """A config error in one line: the key or choice, and what there is instead."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice} is not known; choose one of {', '.join(error.options)}"
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException) and cause.key:
        key = str(cause.full_key)
        parent, known = key.rpartition(".")[0], _keys(cause)
        close = difflib.get_close_matches(str(cause.key), known, n=1)
        if close:
            return f"there is no config key {key}; did you mean {parent + '.' if parent else ''}{close[0]}?"
        return f"there is no config key {key}; {parent or 'the config'} has {', '.join(known)}"
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return text.split(" full_key:")[0].split(" Set the environment variable")[0]


def _keys(error: OmegaConfBaseException) -> list[str]:
    parent = error.parent_node
    return [str(key) for key in parent] if isinstance(parent, DictConfig) else []
