"""The model card of an exported folder: README.md as the Hugging Face hub shows and reads it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import timm
import yaml

from mtcl.config.load import LoadedModel
from mtcl.errors import UserError, escape_control_characters
from mtcl.evaluation.format_metrics import COUNT_UNITS, format_value
from mtcl.inference.export import RAW_MEANINGS, round_values
from mtcl.results.run_files import read_metrics, read_record
from mtcl.run_folder import METRICS, RunFolder
from mtcl.tasks.base import Task
from mtcl.version import __version__

DATASETS = {  # dataset of the config -> its name on the hub, its title
    "nyud": ("nyu_depth_v2", "NYUD-v2"),
    "nyud_small": ("nyu_depth_v2", "NYUD-v2, small edition"),
    "nyuv2_13": ("nyu_depth_v2", "NYUv2, 13 classes, in MTAN's layout"),
    "cityscapes_mtl": ("cityscapes", "Cityscapes in MTAN's layout"),
    "pascal": ("pascal_context", "PASCAL-Context"),
}
PAPER = "https://arxiv.org/abs/2307.07934"
BIBTEX = """@inproceedings{yang2023contrastive,
  title     = {Contrastive Multi-Task Dense Prediction},
  author    = {Yang, Siwei and Ye, Hanrong and Xu, Dan},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2023},
  note      = {arXiv:2307.07934}
}"""


class Score(NamedTuple):
    """A metric of a task."""

    task: str
    metric: str
    value: float
    text: str  # with its unit


def format_model_card(loaded: LoadedModel) -> str:
    """Return the card's text: what the model is, how to use it, what it scored."""
    config, saved = loaded.saved.config, loaded.saved
    data = config["data"]
    height, width = loaded.size
    parameters = sum(p.numel() for p in loaded.model.parameters())
    name = cell(config.get("name") or data["name"])
    scores, scored_on = read_scores(loaded)
    front = yaml.safe_dump(front_matter(loaded, name, scores), sort_keys=False, allow_unicode=True)
    rows = "\n".join(f"| {key} | {task.channels} | {describe_output(task)} |" for key, task in loaded.tasks.items())
    target = str(config["decoder"]["_target_"]).rpartition(".")[2]
    return f"""---
{front}---

# {name}: {", ".join(loaded.tasks)}

One network, {len(loaded.tasks)} pixel-wise task{"s" * (len(loaded.tasks) > 1)}.
Backbone {cell(config["backbone"]["name"])} (timm), decoder {cell(target)}, {parameters:,} parameters,
step {saved.step:,} of its training. Exported with mtcl {__version__}.

```sh
pip install 'mtcl[hub]'
```

```python
import mtcl

predictor = mtcl.load("FOLDER_OR_USER/MODEL")
maps = predictor("image.jpg")  # task -> array of the image's height and width
```

| task | channels | classes, or what it predicts |
| --- | ---: | --- |
{rows}

- **Training data**: {cell(data["name"])}, the training part of its split `{cell(data.get("split"))}`.
- **Size**: frames of {height} x {width} (height x width); other sizes work, larger images are shrunk to about that.
- **Normalisation** (inside the predictor): RGB on the 0..1 scale,
  mean {round_values(loaded.model.mean)}, std {round_values(loaded.model.std)}.

## Metrics

{format_scores(scores, scored_on)}

## Licence

{describe_license(config)}

## Citation

mtcl implements the method of [Contrastive Multi-Task Dense Prediction]({PAPER}):

```bibtex
{BIBTEX}
```
"""


def is_procedural(config: Mapping[str, Any]) -> bool:
    """Tell whether a model was trained on rendered rooms alone, from random weights, without teachers of others."""
    weights = (config["backbone"].get("weights"), config["decoder"].get("weights") or "none")
    teachers = (config["regularizer"].get("options") or {}).get("teachers")
    return config["data"]["name"] == "rooms" and weights == ("none", "none") and not teachers


def describe_license(config: Mapping[str, Any]) -> str:
    """Return the sentence on the model's licence."""
    if is_procedural(config):
        return "MIT, as mtcl: trained from random weights on images that mtcl renders itself."
    return "To be filled in by the publisher: the licences of the training data and the backbone's weights apply, too."


def describe_output(task: Task) -> str:
    """Return a task's classes, or what its prediction means, for a table's cell."""
    return cell(", ".join(getattr(task, "classes", ())) or RAW_MEANINGS[task.prediction_type])


def front_matter(loaded: LoadedModel, name: str, scores: Sequence[Score]) -> dict[str, Any]:
    """Return the fields by which the hub describes the model."""
    config = loaded.saved.config
    has_classes = any(task.prediction_type == "class" for task in loaded.tasks.values())
    pipeline = "image-segmentation" if has_classes else "image-to-image"
    pipeline = "depth-estimation" if list(loaded.tasks) == ["depth"] else pipeline
    front: dict[str, Any] = {
        "library_name": "mtcl",
        "license": "mit" if is_procedural(config) else "other",
        "pipeline_tag": pipeline,
        "tags": ["mtcl", "multi-task-learning", "dense-prediction", *loaded.tasks, "arxiv:2307.07934"],
    }
    dataset = DATASETS.get(config["data"]["name"])
    if dataset is not None:
        front["datasets"] = [dataset[0]]
    base = find_base_model(loaded)
    if base is not None:
        front["base_model"] = base
    if scores:
        kind, title = dataset or (cell(config["data"]["name"]),) * 2
        results = [
            {
                "task": {"type": pipeline, "name": task},
                "dataset": {"type": kind, "name": title},
                "metrics": [
                    {"type": score.metric, "name": f"{score.metric} ({score.text})", "value": score.value}
                    for score in scores
                    if score.task == task
                ],
            }
            for task in dict.fromkeys(score.task for score in scores)
        ]
        front["model-index"] = [{"name": name, "results": results}]
    return front


def find_base_model(loaded: LoadedModel) -> str | None:
    """Return the hub's name of the model whose weights the backbone was initialised with, or None."""
    backbone = loaded.saved.config["backbone"]
    if backbone.get("weights") != "hub":
        return None
    pretrained = timm.get_pretrained_cfg(str(backbone["name"]), allow_unregistered=True)
    return getattr(pretrained, "hf_hub_id", None)


def read_scores(loaded: LoadedModel) -> tuple[list[Score], str]:
    """Read the metrics of the run whose last checkpoint this is; return them and what they were computed on."""
    run = RunFolder(loaded.saved.path.parent.parent)
    try:
        metrics, record = read_metrics(run.metrics), read_record(run.record)
    except UserError:  # missing or damaged
        return [], ""
    if record.get("step") != loaded.saved.step:
        return [], ""
    scores = []
    for name, task in loaded.tasks.items():
        values = {key: value for key, value in metrics.get(name, {}).items() if math.isfinite(value)}
        first, _ = task.choose_metric(values)
        others = [key for key in values if key != first and not key.startswith("IoU/") and key not in COUNT_UNITS]
        scores += [
            Score(name, key, values[key], format_value(task, key, values[key]))
            for key in (first, *others)
            if key in values
        ]
    return scores, f"{cell(record.get('num_images'))} validation images ({cell(record.get('protocol'))})"


def format_scores(scores: Sequence[Score], scored_on: str) -> str:
    """Format metrics as a table."""
    if not scores:
        return f"Not known: this checkpoint's run has no {METRICS}."
    rows = [f"| {score.task} | {cell(score.metric)} | {score.text} |" for score in scores]
    return "\n".join([f"On {scored_on}:", "", "| task | metric | value |", "| --- | --- | ---: |", *rows])


def cell(text: Any) -> str:
    """Escape text of a config or a file for Markdown."""
    return (
        escape_control_characters(str(text))
        .replace("\\", "\\\\")
        .replace("|", "\\|")
        .replace("<", "&lt;")
        .replace("`", "'")
    )
