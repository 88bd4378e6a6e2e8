"""Format the result of preparing a dataset, as the preparing scripts print it."""

import shlex

from mtcl.data.prepare.jobs import Prepared


def format_prepared(result: Prepared) -> str:
    """Return the summary of a prepared dataset, and the training command that reads it."""
    overrides = [f"data={result.group}", *(f"data.{key}={value}" for key, value in result.options.items())]
    if result.tasks is not None:
        overrides.append(f"tasks.names=[{','.join(result.tasks)}]")
    return f"{result.summary}\nNext: python train.py {shlex.join(overrides)}"
