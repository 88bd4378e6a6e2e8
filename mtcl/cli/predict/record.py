"""``predict.json``: what the maps of an output folder were predicted with, and for which inputs."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mtcl.atomic import convert_disk_errors, write_atomically
from mtcl.cli.predict.output import OUTPUT_FOLDERS, RECORD_FILE, RETRY_HINT, Settings, is_inside
from mtcl.config.load import LoadedModel
from mtcl.errors import UserError
from mtcl.inference import Predictor
from mtcl.inference.map_files import describe_values
from mtcl.safe_files import read_json

OLD_MODES = {"shrink": "resize", "slide": "sliding_window", "whole": "full"}


def describe_predictions(loaded: LoadedModel, predictor: Predictor) -> dict[str, Any]:
    """Describe what the maps depend on, and what their values mean."""
    return {
        "checkpoint": str(loaded.saved.path.resolve()),
        "step": loaded.saved.step,
        "mode": predictor.mode,
        "flip": predictor.flip,
        "scales": list(predictor.scales),
        "precision": predictor.precision,
        "tasks": {name: describe_values(task) for name, task in predictor.tasks.items()},
    }


class PredictionRecord:
    """``predict.json`` of an output folder: the maps of one model, and which of them belong to which input.

    Names are those of :func:`output_names`; a video's is ``NAME.mp4``, and ``NAME/`` for the maps of its frames.

    Args:
        settings: The output folder, and whether it may be overwritten.
        source: The input, as it is typed.
        facts: What :func:`describe_predictions` says of the model and its options.

    Raises:
        UserError: The record was written for another model or with other options, and is not to be overwritten.
    """

    def __init__(self, settings: Settings, source: str, facts: Mapping[str, Any]) -> None:
        self.path, self.facts, self.overwrite = settings.output / RECORD_FILE, facts, settings.overwrite
        self.source = source if source.isdecimal() else str(Path(source).resolve())
        self.previous = self._read() if self.path.exists() else {"inputs": {}, "tasks": {}}
        changed = [key for key in facts if key in self.previous and key != "tasks" and facts[key] != self.previous[key]]
        if changed and not self.overwrite:
            key = changed[0]
            raise UserError(
                f"{settings.output} holds predictions with {key}={self.previous[key]}, not {facts[key]}; choose "
                "another --output, or replace them with --overwrite"
            )
        self.is_stale = bool(changed)  # all maps are deleted before anything is written
        inputs = self.previous["inputs"]
        self.names = set(inputs.get(self.source, []))  # of this input
        self.other_names = {name for source, names in inputs.items() if source != self.source for name in names}
        self.other_folders = tuple(name for name in self.other_names if name.endswith("/"))

    def is_foreign(self, name: str, exists: bool) -> bool:
        """Tell whether the maps of this name belong to another input, or to none that is recorded."""
        if self.overwrite:
            return False
        contains_others = name.endswith("/") and any(other.startswith(name) for other in self.other_names)
        return (
            contains_others
            or name in self.other_names
            or name.startswith(self.other_folders)
            or (exists and name not in self.names)
        )

    def begin(self, names: Iterable[str]) -> None:
        """Record that these names belong to this input from now on."""
        new = set(names)
        inputs = {
            source: [name for name in names if name not in new] for source, names in self.previous["inputs"].items()
        }
        with convert_disk_errors(self.path, RETRY_HINT):
            if self.is_stale:
                self._delete_maps()
                inputs, self.names = {}, set()
            inputs[self.source] = sorted(self.names | new)
            tasks = self.facts["tasks"] if self.is_stale else self.previous["tasks"] | self.facts["tasks"]
            text = json.dumps({**self.facts, "tasks": tasks, "inputs": inputs}, indent=2) + "\n"
            write_atomically(self.path, lambda temporary: temporary.write_text(text, "utf-8"))

    def _delete_maps(self) -> None:
        """Delete the maps of the previous model; the record is replaced last, so that remaining ones are known."""
        folder = self.path.parent
        for name in self.other_names | self.names:
            if not all(is_inside(folder, folder / kind / name) for kind in OUTPUT_FOLDERS):
                continue
            if name.endswith(".mp4"):
                (folder / name).unlink(missing_ok=True)
            for kind in OUTPUT_FOLDERS:
                if name.endswith("/"):
                    shutil.rmtree(folder / kind / name, ignore_errors=True)
                else:
                    (folder / kind / f"{name}{'.jpg' if kind == 'panel' else '.png'}").unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            content = read_json(self.path)
            inputs = {source: list(names) for source, names in content["inputs"].items()}
            if any(Path(name).is_absolute() or ".." in Path(name).parts for names in inputs.values() for name in names):
                raise ValueError("a name leads out of the folder")  # and could be deleted
            if "large" in content:  # of version 0.1
                content["mode"] = OLD_MODES[content.pop("large")]
            return {**content, "inputs": inputs, "tasks": dict(content["tasks"])}
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if self.overwrite:
                return {"inputs": {}, "tasks": {}}
            raise UserError(
                f"{self.path} was not written by mtcl predict, or is damaged; choose another --output, or --overwrite"
            ) from error


class Job(NamedTuple):
    """A call of the command: the model, what it writes and where, and the record of that folder."""

    predictor: Predictor
    settings: Settings
    record: PredictionRecord
