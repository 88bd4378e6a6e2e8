"""Read config, record and metrics of a run folder, which anybody may have written or edited.

Each reader returns plain values of checked types, or raises a :class:`UserError` of one sentence that names the file.
The log is read by :mod:`mtcl.run_log`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mtcl.config.renamed import upgrade_config, upgrade_override
from mtcl.config.schema import flatten
from mtcl.errors import UserError, escape_control_characters
from mtcl.results.columns import NOT_FINITE, make_column, primary_metrics
from mtcl.safe_files import MAX_DIGITS, read_json, read_yaml
from mtcl.tasks.names import TASK_NAMES

MAX_METRIC = 1e12  # no measurement is larger, and its square is still finite
MAX_INT = 10**MAX_DIGITS

Metrics = dict[str, dict[str, float]]
Check = tuple[str, Callable[[Any], bool]]


def _is_int(value: Any, low: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < MAX_INT


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


NON_NEGATIVE_INT: Check = ("a whole number >= 0", _is_int)
POSITIVE_INT: Check = ("a whole number >= 1", lambda value: _is_int(value, 1))
TEXT: Check = ("text", _is_text)
BOOL: Check = ("true or false", lambda value: isinstance(value, bool))
SECONDS: Check = (
    "a number of seconds",
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
)
TEXT_LIST: Check = ("a list of texts", lambda value: isinstance(value, list) and all(map(_is_text, value)))
TEXT_MAPPING: Check = (
    "a mapping {name: text}",
    lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
)
MAPPING: Check = ("a mapping {key: value}", lambda value: isinstance(value, dict))

# Types of the values that are computed or compared with; null counts as absent. Other keys may hold any plain value.
RECORD_CHECKS: Mapping[str, Check] = {
    "seed": NON_NEGATIVE_INT,
    "step": NON_NEGATIVE_INT,
    "num_images": NON_NEGATIVE_INT,
    "best_step": NON_NEGATIVE_INT,
    "validations_without_improvement": NON_NEGATIVE_INT,
    "stop_reason": TEXT,
    "seconds": SECONDS,
    "clean": BOOL,
    "overrides": TEXT_LIST,
    "versions": TEXT_MAPPING,
    "evaluation": MAPPING,
    **dict.fromkeys(("command", "commit", "checkpoint", "predictions", "split", "data_fingerprint"), TEXT),
    **dict.fromkeys(("device", "precision", "protocol"), TEXT),
}
CONFIG_CHECKS: Mapping[str, Check] = {
    "seed": NON_NEGATIVE_INT,
    "trainer.max_steps": POSITIVE_INT,
    "trainer.patience": POSITIVE_INT,
    "trainer.dry_run": BOOL,
    "regularizer._target_": TEXT,
    "backbone.name": TEXT,
}


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; ``UserError`` if the file contains anything else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def read_record(path: Path) -> dict[str, Any]:
    """Read a run.json, leaving out keys that are null."""
    return check_record(path, read_json_object(path))


def check_record(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a run.json without nulls and with the config keys of today.

    Args:
        path: the file, for messages.
        content: the file's content.

    Raises:
        UserError: a value has the wrong type.
    """
    record = {key: value for key, value in content.items() if value is not None}
    check_types(path, record, RECORD_CHECKS)
    if "overrides" in record:
        record["overrides"] = [upgrade_override(override) for override in record["overrides"]]
    if "evaluation" in record:
        record |= upgrade_config({"evaluation": record["evaluation"]})
    return record


def is_stopped_early(record: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Return whether early stopping has ended a run for good: its patience has not been raised since.

    Args:
        record: of :func:`read_record`.
        config: of :func:`read_config`.
    """
    count, patience = record.get("validations_without_improvement", 0), config.get("trainer.patience")
    return record.get("stop_reason") == "patience" and patience is not None and count >= patience


def read_config(path: Path) -> dict[str, Any]:
    """Read a run's config.yaml, in which everything is resolved, as dotted key -> value."""
    return {key: value for key, value in flatten(read_nested_config(path)) if value != {}}


def read_nested_config(path: Path) -> dict[str, Any]:
    """Read a run's config.yaml as nested dicts, checked as by :func:`read_config`; empty for an empty file."""
    content = read_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping, not a {type(content).__name__}.")
    plain = upgrade_config(dict(_plain_items(path, content)))
    check_types(path, {key: value for key, value in flatten(plain) if value is not None}, CONFIG_CHECKS)
    return plain


def _plain_items(path: Path, mapping: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield a mapping's items with keys as text; ``UserError`` for values that JSON can't represent."""
    for key, value in mapping.items():
        if not isinstance(key, str | int | float | None):
            raise UserError(f"{path} has a key of type {type(key).__name__}; keys are texts.")
        yield "null" if key is None else str(key), _plain(path, str(key), value)


def _plain(path: Path, key: str, value: Any) -> Any:
    """Return a value if JSON can represent it, its mappings with keys as text; otherwise raise ``UserError``."""
    if isinstance(value, dict):
        return dict(_plain_items(path, value))
    if isinstance(value, list):
        return [_plain(path, key, item) for item in value]
    if isinstance(value, int) and abs(value) >= MAX_INT:
        raise UserError(f"{path} has a whole number of more than {MAX_DIGITS} digits for {key}.")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise UserError(
        f"{path} has a value of type {type(value).__name__} for {key}; write a number, text, list or mapping."
    )


def check_types(path: Path, content: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Raise ``UserError`` for the first value of ``content``, read from ``path``, that fails its check."""
    for key, (expected, is_valid) in checks.items():
        if key in content and not is_valid(content[key]):
            raise UserError(f"{path} has {_shorten(content[key])} for {key}; it must be {expected}, or null.")


def _shorten(value: Any) -> str:
    """Return a value for a message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_metrics(path: Path) -> Metrics:
    """Read a file of metrics; see :func:`parse_metrics`."""
    return parse_metrics(path, read_json_object(path))


def parse_metrics(path: Path, content: Mapping[str, Any]) -> Metrics:
    """Return task -> metric -> value; null becomes NaN.

    Args:
        path: the file, for messages.
        content: ``{task: {metric: number or null}}``, or ``{task: number}`` for its primary metric.

    Raises:
        UserError: the content has another form, or a value that is no measurement.
    """
    metrics: Metrics = {}
    for task, values in content.items():
        if task not in TASK_NAMES:
            raise UserError(
                f"{path} has {_shorten(task)} in place of a task; it must be {{task: {{metric: value}}}} with tasks "
                f"among {', '.join(TASK_NAMES)}."
            )
        by_name = values if isinstance(values, dict) else {primary_metrics(task)[0]: values}
        metrics[task] = {
            name: _parse_metric(path, task, name, value)
            for name, value in zip(map(escape_control_characters, by_name), by_name.values())
        }
    if not metrics:
        raise UserError(f"{path} contains no task.")
    return {task: metrics[task] for task in TASK_NAMES if task in metrics}


def _parse_metric(path: Path, task: str, metric: str, value: Any) -> float:
    column = make_column(task, metric)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > MAX_METRIC:
        raise UserError(f"{path} has {_shorten(value)} for {column.key}; it must be a finite number or null.")
    if metric in primary_metrics(task) and column.unit == "%" and value > 1:
        raise UserError(
            f"{path} has {value:g} for {column.key}; files contain fractions, for percent write {value / 100:g}."
        )
    if metric == NOT_FINITE and value < 0:
        raise UserError(f"{path} has {value:g} for {column.key}, a number of pixels; it must be 0 or more.")
    return float(value)
