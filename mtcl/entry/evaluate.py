"""One evaluation: everything is rebuilt from the checkpoint, then the command's overrides apply."""

import logging
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from mtcl.entry import build
from mtcl.entry.report import format_table, run_facts
from mtcl.errors import UserError
from mtcl.training.checkpoint import load_checkpoint
from mtcl.training.evaluator import Evaluator
from mtcl.training.recorder import write_json, write_panels
from mtcl.training.runtime import choose_device, seed_everything

log = logging.getLogger(__name__)

FROZEN = ("backbone", "decoder")  # what a checkpoint's weights belong to
GLOBAL = ("experiment", "debug")


def evaluate(
    config: DictConfig, overrides: Sequence[str], groups: Sequence[str], folder: Path
) -> dict[str, dict[str, float]]:
    """Score ``config.checkpoint``; write metrics.json, run.json and panels into ``folder``; the metrics.

    ``config``: the composed defaults with the command's overrides in them; ``overrides``: those words; ``groups``:
    which of their keys choose a whole config group.
    """
    path = Path(config.checkpoint)
    state = load_checkpoint(path)
    for name in ("metrics.json", "run.json"):
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists already; choose another hydra.run.dir")
    saved = state["meta"]["tasks"]
    settings = OmegaConf.create(state["config"])
    settings.tasks.names = list(saved)  # whatever another dataset would offer
    settings.trainer.device = "auto"  # the machine it was trained on is not this one
    settings = overridden(settings, config, overrides, groups)
    tasks = build.build_tasks(settings)
    build.check_tasks(saved, tasks, path)
    device = choose_device(settings.trainer.device)
    seed_everything(settings.seed, settings.trainer.deterministic)
    reader = build.build_reader(settings, "val", tasks)
    model = build.build_model(settings, tasks, pretrained=False)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise UserError(f"the weights in {path} do not fit the model that its own config describes") from error
    evaluator = Evaluator(
        tasks,
        build.build_eval_loader(settings, reader, tasks, device),
        device,
        settings.trainer.precision,
        num_shown=settings.trainer.panels,
    )
    evaluation = evaluator.run(model.to(device))
    folder.mkdir(parents=True, exist_ok=True)
    write_panels(folder / "panels", evaluation.shown, tasks)
    facts = run_facts(settings, reader, evaluation.num_images, device, overrides)
    write_json(folder / "run.json", {**facts, "checkpoint": str(path), "step": state["step"]})
    write_json(folder / "metrics.json", evaluation.metrics)
    table = format_table(tasks, {f"step {state['step']}": evaluation.metrics})
    log.info("%s on %d pictures of %s:\n\n%s\n", path, evaluation.num_images, settings.data.name, table)
    log.info("metrics.json, run.json and panels/ are in %s", folder)
    return evaluation.metrics


def dataset_of(words: Sequence[str], configs: Path) -> str | None:
    """``data=NAME`` for the checkpoint named among the command's words, so that the keys of its dataset are known.

    None where the words choose a dataset themselves, or where there is nothing to know (evaluate will say so).
    """
    found = [word.partition("=")[2] for word in words if word.startswith("checkpoint=")]
    if not found or any(word.startswith("data=") for word in words):
        return None
    try:
        name = str(load_checkpoint(found[-1].strip("'\""))["config"]["data"]["name"])
    except (UserError, KeyError):
        return None
    return f"data={name}" if (configs / "data" / f"{name}.yaml").is_file() else None


def overridden(saved: DictConfig, composed: DictConfig, overrides: Sequence[str], groups: Sequence[str]) -> DictConfig:
    """The checkpoint's config with the command's overrides: whole groups first, then single keys."""
    words = OverridesParser.create().parse_overrides(list(overrides))
    for word in sorted(words, key=lambda w: w.key_or_group not in groups):
        key = word.key_or_group
        if key.split(".")[0] in FROZEN:
            raise UserError(f"{key} belongs to the checkpoint's model and can't be changed when evaluating")
        if key in GLOBAL:
            raise UserError(f"{key}= sets keys of many groups; when evaluating, override the keys themselves")
        if word.is_delete():
            raise UserError(f"{word.input_line}: nothing can be taken out of a checkpoint's config; set it to null")
        if key != "checkpoint":
            with open_dict(saved):
                OmegaConf.update(saved, key, OmegaConf.select(composed, key), merge=False)
    return saved
