"""Evaluate a checkpoint, or maps that any code has saved, as ``mtcl evaluate`` does; see configs/evaluate.yaml.

Usage::

    python evaluate.py [checkpoint=]PATH [save_predictions=DIR] [key=value ...]
    python evaluate.py predictions=DIR data=NAME [data.root=PATH] [key=value ...]
"""

from mtcl.cli.hydra_commands import evaluate

if __name__ == "__main__":
    evaluate()
