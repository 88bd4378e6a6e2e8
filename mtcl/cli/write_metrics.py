"""Write metrics.json and run.json, the results of train.py and of evaluate.py, into a run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtcl.atomic import write_json
from mtcl.evaluation.evaluator import Metrics
from mtcl.run_folder import RunFolder


def write_metrics(folder: Path, metrics: Metrics, record: Mapping[str, Any]) -> None:
    """Write the record, then the metrics: a folder that has both is a finished run.

    Args:
        folder: the run folder.
        metrics: task -> metric -> value, as metrics.json holds them (fractions, metres, degrees; NaN becomes null).
        record: what run.json holds, see :func:`mtcl.cli.run_record.build_run_record`.
    """
    write_json(RunFolder(folder).record, record)
    write_json(RunFolder(folder).metrics, metrics)
