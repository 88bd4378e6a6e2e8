"""Read runs from their folders, and tell in which settings they differ."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from mtcl.config.schema import LEGACY_VALUES, flatten, role_of
from mtcl.errors import UserError
from mtcl.results.run_files import is_stopped_early, read_config, read_metrics, read_record
from mtcl.run_folder import CONFIG, LAST_CHECKPOINT, METRICS, RunFolder, find_run_folders

REGULARIZER = "regularizer._target_"  # null if the regulariser is off
WEIGHT = "regularizer.weight"  # 0 means off, too


@dataclass(frozen=True, eq=False)
class Run:
    """The numbers of one run and where they come from.

    Attributes:
        path: the run folder, or a single JSON file of metrics.
        metrics: task -> metric -> value; fractions, metres, degrees; NaN where the file has null.
        record: the content of its run.json; empty if there is none.
        config: dotted key -> value of its config.yaml, or of the one beside the checkpoint that it evaluates.
    """

    path: Path
    metrics: Mapping[str, Mapping[str, float]]
    record: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int | None:
        """The run's seed; None if neither record nor config has one."""
        return self.record.get("seed", self.config.get("seed"))

    @property
    def name(self) -> str:
        """The name of the folder of predictions that the run scores, otherwise of its own folder or file."""
        if "predictions" in self.record:
            path = PurePath(self.record["predictions"])
            return (path.stem if path.suffix == ".json" else path.name) or str(path)
        return self.path.stem if self.path.suffix == ".json" else self.path.resolve().name


# Reading


def find_runs(sources: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read every run at or below ``sources``, each once.

    Args:
        sources: run folders, folders of runs, files of metrics.

    Returns:
        The runs, and notes on what was left out. The sources keep their order; the runs of one source are sorted by the
        settings in which they differ.

    Raises:
        UserError: a source contains no run, or no run can be read, or the only source is a run that can't be read.
    """
    resolved_paths: set[Path] = set()
    runs: list[Run] = []
    notes: list[str] = []
    errors: list[UserError] = []
    for source in sources:
        is_run, paths = _find_finished_runs(source, notes)
        source_runs = []
        for path in paths:
            resolved = path.resolve()
            if resolved in resolved_paths:
                continue
            resolved_paths.add(resolved)
            try:
                source_runs.append(read_run(path))
            except UserError as error:
                if is_run and len(sources) == 1:
                    raise
                errors.append(error)
        runs += sort_by_settings(source_runs)
    if errors and not runs:
        raise errors[0]
    return runs, [*notes, *(f"warning: left out: {error}" for error in errors)]


def _find_finished_runs(source: Path, notes: list[str]) -> tuple[bool, list[Path]]:
    """Return whether ``source`` itself is a run, and the runs at or below it; add a note on unfinished ones."""
    if not os.path.exists(source):
        raise UserError(f"{source} does not exist; give run folders (with a {METRICS}) or folders of runs.")
    if source.is_file():
        return True, [source.parent if source.name == METRICS else source]
    if RunFolder(source).metrics.is_file():
        return True, [source]
    folders = list(find_run_folders(source))
    with_metrics = sorted((run.path for run in folders if run.has_metrics), key=natural_key)
    unfinished = sorted(
        (run.path for run in folders if os.path.lexists(run.config) and not run.has_metrics), key=natural_key
    )
    if unfinished and not with_metrics:
        raise UserError(
            f"{unfinished[0]} is an unfinished run: it has a {CONFIG}, but no {METRICS}; "
            "continue it with resume=auto or leave it out."
        )
    if not with_metrics:
        raise UserError(f"There is no run in {source}: no {METRICS} in it or below it.")
    if unfinished:
        names = ", ".join(str(folder.relative_to(source)) for folder in unfinished)
        notes.append(f"warning: {source} contains unfinished runs, left out here (no {METRICS}): {names}.")
    return with_metrics == [source], with_metrics


def read_run(path: Path) -> Run:
    """Read a run folder, or a single JSON file of metrics, which has neither record nor config."""
    if path.is_file():
        return Run(path, read_metrics(path))
    run = RunFolder(path)
    record = read_record(run.record) if os.path.lexists(run.record) else {}
    config_path = run.config
    if not os.path.lexists(config_path) and "checkpoint" in record:  # an evaluation: use its training run's config
        training_run = RunFolder.of_checkpoint(Path(record["checkpoint"]))
        if training_run is not None and os.path.isfile(training_run.config):
            config_path = training_run.config
            record |= _read_ending(training_run, record.get("step"))
    config = read_config(config_path) if os.path.lexists(config_path) else {}
    if "evaluation" in record:  # how it was scored, which may differ from the training run's evaluations
        config = {key: value for key, value in config.items() if not key.startswith("evaluation.")}
        config |= flatten({"evaluation": record["evaluation"]})
    return Run(path, read_metrics(run.metrics), record, config)


def _read_ending(run: RunFolder, step: int | None) -> dict[str, Any]:
    """Return what a training run's record says of an early stop at ``step``, which an evaluation has scored."""
    record = read_record(run.record) if os.path.isfile(run.record) else {}
    if record.get("stop_reason") != "patience" or record.get("step") != step:
        return {}
    return {key: record[key] for key in ("stop_reason", "validations_without_improvement") if key in record}


# Settings


def is_regularizer_off(run: Run) -> bool:
    """Is the regulariser off: none, or of weight 0, which trains bit for bit the same?

    With a balancing method that counts the regulariser's loss among its objectives, a weight of 0 is not off.
    """
    if REGULARIZER not in run.config:
        return False
    is_objective = (
        run.config.get("balancing.regularizer_as_objective") is True and run.config.get("balancing.method") != "fixed"
    )
    return run.config[REGULARIZER] is None or (run.config.get(WEIGHT) == 0 and not is_objective)


def result_settings(run: Run) -> dict[str, Any]:
    """Return the settings that, besides the seed, determine a run's numbers; empty if its config is unknown.

    These are the keys of role ``result``, and which checkpoint was scored.
    """
    settings = {key: value for key, value in run.config.items() if role_of(key) == "result"}
    if settings:
        settings = LEGACY_VALUES | settings
        settings["tasks.names"] = list(run.metrics)  # "auto" resolves to these
        step, checkpoint = run.record.get("step"), PurePath(run.record.get("checkpoint", LAST_CHECKPOINT)).name
        is_complete = checkpoint != LAST_CHECKPOINT or step in (None, run.config.get("trainer.max_steps"))
        is_complete = is_complete or is_stopped_early(run.record, run.config)
        settings |= {"checkpoint": checkpoint, "step": "last" if is_complete else step}
    return settings


def distinguishing_settings(run: Run) -> dict[str, Any]:
    """Return :func:`result_settings`, without those of a regulariser that is off."""
    off = is_regularizer_off(run)
    return {key: value for key, value in result_settings(run).items() if not (off and key.startswith("regularizer."))}


def differing_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values are not the same in all ``settings``; a missing key counts as None."""
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)]


def sort_by_settings(runs: Sequence[Run]) -> list[Run]:
    """Sort runs by the settings in which they differ: off first, numbers by size, text with 10 after 9."""
    settings = {id(run): result_settings(run) for run in runs}
    keys = differing_keys([one for one in settings.values() if one] or [{}])

    def key(run: Run) -> tuple[Any, ...]:
        off = is_regularizer_off(run)
        values = [(0,) if off and k.startswith("regularizer.") else _rank(settings[id(run)].get(k)) for k in keys]
        return not settings[id(run)], values, natural_key(run.path)

    return sorted(runs, key=key)


def _rank(value: Any) -> tuple[Any, ...]:
    """Return a sort key for a config value of any type: null, then numbers, text, lists, the rest."""
    if value is None:
        return (0,)
    if isinstance(value, int | float):
        return 1, value
    if isinstance(value, str):
        return 2, natural_key(value)
    return (3, len(value), natural_key(json.dumps(value))) if isinstance(value, list) else (4, json.dumps(value))


def natural_key(path: PurePath | str) -> list[tuple[int, int | str]]:
    """Return a sort key that puts 10 after 9, as Hydra numbers the runs of a sweep."""
    parts = re.split(r"(\d+|/)", str(path))
    return [(0, int(part)) if part.isdecimal() and len(part) < 20 else (1, part) for part in parts]
