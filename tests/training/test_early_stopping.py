"""A training whose validation score has ceased to improve ends, and goes on with a greater patience."""

import json
import math

import pytest
import torch
from helpers.common import TINY, composed

from mtcl import UserError
from mtcl.cli.train import train
from mtcl.config.build_data import build_tasks
from mtcl.config.build_training import build_validation_policy
from mtcl.evaluation.evaluator import Evaluator
from mtcl.results.list_runs import read_state
from mtcl.results.runs import read_run, result_settings
from mtcl.training.checkpoint_file import read_checkpoint_file
from mtcl.training.early_stopping import EarlyStopping
from mtcl.training.trainer import Trainer

RUN = [*TINY, "trainer.num_panels=0", "trainer.validate_first=false", "trainer.log_interval=20", "schedule=constant"]
RUN += ["trainer.val_interval=1", "trainer.checkpoint_interval=1", "trainer.max_steps=8"]
RUN += ["tasks.names=[depth,normals]", "data.limit=4", "data.eval_batch_size=4"]
SCORES = [math.nan, 5, 3, 4, 4, 2, 2, 3, 1]  # of depth by step; lower is better


@pytest.mark.parametrize("higher_is_better", [False, True])
@pytest.mark.parametrize("patience", [1, 2, 3, None])
def test_the_count_against_the_whole_history(patience, higher_is_better):
    sign = -1 if higher_is_better else 1
    early_stopping, history = EarlyStopping(patience, higher_is_better), []
    for score in (sign * value for value in (5, 3, 3, math.nan, 2, 4, 4, 4)):
        early_stopping.update(score)
        history.append(score)
        numbers = [sign * value for value in history if not math.isnan(value)]
        best_at = history.index(sign * min(numbers))
        assert early_stopping.wait_count == len(history) - 1 - best_at
        assert early_stopping.should_stop == (patience is not None and len(history) - 1 - best_at >= patience)
        copy = EarlyStopping(patience, higher_is_better)
        copy.load_state_dict(early_stopping.state_dict())
        assert vars(copy) == vars(early_stopping)


def test_without_any_score_there_is_nothing_to_stop_by():
    with pytest.raises(UserError, match=r"early stopping has no score .*monitor another metric, or set no patience"):
        EarlyStopping(3, higher_is_better=True).update(math.nan)
    uncounted = EarlyStopping(None, higher_is_better=True)
    uncounted.update(math.nan)
    assert not uncounted.should_stop


def test_a_patience_needs_validations_on_the_way():
    config = composed(*RUN, "trainer.patience=2", "trainer.val_interval=null")
    with pytest.raises(UserError, match=r"trainer\.patience=2 counts .*set trainer\.val_interval, or .*patience=null"):
        build_validation_policy(config, build_tasks(config))


def test_a_run_stops_early_and_says_so(tmp_path, monkeypatch, caplog):
    """Started again it takes no step, says why and has the same scores."""
    monkeypatch.setattr(Trainer, "_monitored_score", lambda self, _: float(SCORES[self.step]))
    caplog.set_level("INFO")
    overrides = [*RUN, "trainer.patience=1", "regularizer=none"]
    metrics = train(composed(*overrides), tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    ending = {"step": 3, "stop_reason": "patience", "best_step": 2, "validations_without_improvement": 1}
    assert {key: record[key] for key in ending} == ending
    assert "the run ended at step 3 of 8: depth/rmse was best at step 2, and not in the 1 validations" in caplog.text
    monkeypatch.setattr(Trainer, "train_step", None)
    assert train(composed(*overrides, "resume=auto"), tmp_path) == metrics
    assert "the run had already ended at step 3 of 8: " in caplog.text
    assert "trainer.patience=1" in caplog.text
    assert json.loads((tmp_path / "run.json").read_text())["stop_reason"] == "patience"
    assert (read_state(tmp_path).state, read_state(tmp_path).step) == ("finished", 3)
    assert result_settings(read_run(tmp_path))["step"] == "last"
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    (evaluation / "metrics.json").write_text((tmp_path / "metrics.json").read_text())
    scored = {"checkpoint": str(tmp_path / "checkpoints" / "last.pt"), "step": 3}
    (evaluation / "run.json").write_text(json.dumps(scored))
    assert result_settings(read_run(evaluation))["step"] == "last"
    config = (tmp_path / "config.yaml").read_text().replace("patience: 1", "patience: 2")
    (tmp_path / "config.yaml").write_text(config)  # as a run that continues writes it
    assert read_state(tmp_path).state == "interrupted"


@pytest.mark.slow
def test_a_run_continues_with_a_greater_patience(tmp_path, monkeypatch):
    """It ends as one that had this patience from the start; killed between two steps it stops at the same step."""
    monkeypatch.setattr(Trainer, "_monitored_score", lambda self, _: float(SCORES[self.step]))

    def run(name, *overrides):
        train(composed(*RUN, *overrides), tmp_path / name)
        return json.loads((tmp_path / name / "run.json").read_text())

    assert run("early", "trainer.patience=2")["step"] == 4
    step = Trainer.train_step
    with monkeypatch.context() as patch:

        def train_step(self, *batches, **options):
            if self.step == 3:  # its count of validations is 1
                raise KeyboardInterrupt
            return step(self, *batches, **options)

        patch.setattr(Trainer, "train_step", train_step)
        with pytest.raises(KeyboardInterrupt):
            run("killed", "trainer.patience=2")
    assert run("killed", "trainer.patience=2", "resume=auto")["step"] == 4
    early, killed = ((tmp_path / name / "metrics.json").read_text() for name in ("early", "killed"))
    assert killed == early

    record = run("early", "trainer.patience=3", "resume=auto")
    uncut = run("uncut", "trainer.patience=3")
    for one in (record, uncut):
        assert (one["step"], one["stop_reason"], one["best_step"]) == (8, "max_steps", 8)
    a, b = (read_checkpoint_file(tmp_path / name / "checkpoints" / "last.pt") for name in ("early", "uncut"))
    assert a["meta"] == b["meta"]
    assert a["meta"]["early_stopping"] == {"best": 1.0, "wait_count": 0}
    for part in ("model", "optimizer", "regularizer"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)


@pytest.mark.slow
def test_a_run_that_stopped_early_is_not_continued_by_its_neighbour(tmp_path, monkeypatch):
    """resume=auto of an empty folder beside it starts afresh, and with a greater patience takes it up."""
    monkeypatch.setattr(Trainer, "_monitored_score", lambda self, _: float(SCORES[self.step]))
    train(composed(*RUN, "trainer.patience=1"), tmp_path / "a")
    starts = []
    monkeypatch.setattr(Trainer, "fit", lambda self: starts.append(self.step) or self.evaluator.run(self.model))
    for patience in (1, 2):
        train(composed(*RUN, f"trainer.patience={patience}", "resume=auto"), tmp_path / f"{patience}", tmp_path)
    assert starts == [0, 3]


@pytest.mark.slow
def test_the_final_scores_are_full_ones(tmp_path, monkeypatch):
    """Where validations on the way leave something out, the last state is evaluated once more."""
    monkeypatch.setattr(Trainer, "_monitored_score", lambda self, _: float(SCORES[self.step]))
    calls, evaluate = [], Evaluator.run

    def run(self, *args, fast=False):
        calls.append(fast)
        return evaluate(self, *args, fast=fast)

    monkeypatch.setattr(Evaluator, "run", run)
    train(composed(*RUN, "trainer.patience=1"), tmp_path / "plain")
    assert calls == [False] * 3
    calls.clear()
    train(composed(*RUN, "trainer.patience=1", "tasks.names=[depth,edge]"), tmp_path / "edge")
    assert calls == [True, True, True, False]
    metrics = json.loads((tmp_path / "edge" / "metrics.json").read_text())
    assert "odsF" in metrics["edge"]
