"""What a run folder contains, and when it counts as finished."""

import ast
import os
from pathlib import Path

from mtcl.run_folder import CONFIG, LOG, METRICS, RECORD, RunFolder, find_run_folders
from mtcl.run_lock import lock_run

ROOT = Path(__file__).parents[1]


def test_a_run_is_finished_once_record_and_metrics_are_written(tmp_path):
    run = RunFolder(tmp_path / "run")
    assert not any((run.is_run, run.is_finished, run.is_locked, run.has_checkpoints))
    assert run.modified == 0
    run.checkpoints.mkdir(parents=True)
    assert not run.is_run
    for file in (run.config, run.record):
        file.touch()
    assert run.is_run
    assert not run.is_finished
    run.metrics.touch()
    assert run.is_finished
    os.utime(run.metrics, (2e9, 2e9))
    assert run.modified == 2e9
    run.last_checkpoint.touch()
    assert run.has_checkpoints
    assert RunFolder.of_checkpoint(run.best_checkpoint) == run
    assert RunFolder.of_checkpoint(tmp_path / "other" / "last.pt") is None
    with lock_run(run.path):
        assert run.is_locked
    assert not run.is_locked


def test_run_folders_are_found_below_a_folder_but_not_within_their_parts(tmp_path):
    names = ["a", "a/evaluated", "b/seed_0", "b/.hidden", "b/seed_0/checkpoints", "b/seed_0/panels"]
    names += ["wandb/run", "a/wandb/offline-run-1/files", "a/hparams"]
    for name in names:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        RunFolder(tmp_path / name).metrics.touch()
    runs = {str(run.path.relative_to(tmp_path)) for run in find_run_folders(tmp_path)}
    assert runs == {"a", "a/evaluated", "b/seed_0", "wandb/run"}
    assert [run.path for run in find_run_folders(tmp_path / "b" / "seed_0")] == [tmp_path / "b" / "seed_0"]


def test_the_names_of_the_files_are_spelled_in_one_module():
    """Docstrings may name them: they are for readers."""
    places = set()
    for path in [*ROOT.glob("mtcl/**/*.py"), *ROOT.glob("scripts/**/*.py"), *ROOT.glob("*.py")]:
        tree = ast.parse(path.read_text("utf-8"))
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                names = [name for name in (METRICS, RECORD, CONFIG, LOG) if name in node.value]
                places |= {f"{path.relative_to(ROOT)}:{node.lineno} {name}" for name in names}
    modules = {reference.partition(":")[0] for reference in places}
    assert modules == {"mtcl/run_folder.py"}, "\n".join(sorted(places))
