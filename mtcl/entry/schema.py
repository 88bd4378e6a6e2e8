"""What each config value must be, checked once, before anything is built."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from mtcl.errors import UserError


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words and as a test; ``nullable``: null is allowed, too."""

    words: str
    holds: Callable[[Any], bool]
    nullable: bool = False

    def or_null(self) -> "Rule":
        return Rule(f"{self.words}, or null", self.holds, nullable=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def number(low: float = -math.inf, high: float = math.inf) -> Rule:
    bounds = f" from {low:g} to {high:g}" if high < math.inf else f" >= {low:g}" if low > -math.inf else ""
    return Rule(f"a number{bounds}", lambda v: _is_number(v) and low <= v <= high)


def count(low: int = 0) -> Rule:
    return Rule(f"a whole number >= {low}", lambda v: _is_int(v) and v >= low)


def pair(of: str, holds: Callable[[Any], bool]) -> Rule:
    return Rule(f"a list of two, {of}", lambda v: isinstance(v, list) and len(v) == 2 and all(map(holds, v)))


FLAG = Rule("true or false", lambda v: isinstance(v, bool))
TEXT = Rule("text", lambda v: isinstance(v, str))
MAPPING = Rule("a mapping {key: value}", lambda v: isinstance(v, dict))
SIZE = pair("height and width in pixels", lambda v: _is_int(v) and v > 0)
COLOUR = Rule("a list of three numbers", lambda v: isinstance(v, list) and len(v) == 3 and all(map(_is_number, v)))
POSITIVE = Rule("a number > 0", lambda v: _is_number(v) and v > 0)
NAMES = Rule(
    "auto or a list of different names",
    lambda v: (
        v == "auto" or (isinstance(v, list) and all(isinstance(name, str) for name in v) and len(set(v)) == len(v))
    ),
)
LEVELS = Rule("a list of whole numbers", lambda v: isinstance(v, list) and bool(v) and all(map(_is_int, v)))

# The first pattern that fits a key counts.
RULES: dict[str, Rule] = {
    "name": TEXT,
    "seed": count(),
    "resume": TEXT.or_null(),
    "checkpoint": TEXT.or_null(),
    "predictions": TEXT.or_null(),
    "save_predictions": TEXT.or_null(),
    "data.name": TEXT,
    "data.root": TEXT.or_null(),
    "data.split": TEXT,
    "data.size": SIZE,
    "data.batch_size": count(1),
    "data.eval_batch_size": count(1),
    "data.workers": count(),
    "data.limit": count(1).or_null(),
    "data.cache": TEXT.or_null(),
    "data.memory_map": FLAG,
    "data.normals_valid": TEXT,
    "data.labels": TEXT,
    "data.labels_seed": count(),
    "data.options.num_classes": count(1),
    "data.options.resize": SIZE.or_null(),
    "data.options.length": pair("pictures to train and to validate on", lambda v: _is_int(v) and v > 0),
    "data.options.seed": count(),
    "data.augment.scale": pair("from and to", lambda v: _is_number(v) and v > 0),
    "data.augment.flip": number(0, 1),
    "data.augment.photometric": FLAG,
    "data.augment.class_cap": number(0, 1),
    "data.boundary_distance": POSITIVE,
    "tasks.names": NAMES,
    "backbone.name": TEXT,
    "backbone.weights": TEXT.or_null(),
    "backbone.mean": COLOUR.or_null(),
    "backbone.std": COLOUR.or_null(),
    "backbone.out_indices": LEVELS.or_null(),
    "backbone.kwargs": MAPPING.or_null(),
    "decoder.width": count(1),
    "decoder.head_width": count(1),
    "decoder.depth": count(1),
    "decoder.stride": count(1),
    "decoder.prediction_width": count(1),
    "decoder.heads": count(1),
    "decoder.mlp_ratio": POSITIVE,
    "decoder.downsample": count(1).or_null(),
    "decoder.aggregate_first": FLAG,
    "decoder.rates": Rule("dilations >= 1", lambda v: isinstance(v, list) and all(_is_int(r) and r > 0 for r in v)),
    "decoder.skip_width": count(),
    "decoder.trunk_width": count(1).or_null(),
    "decoder.pyramid_width": count(1).or_null(),
    "decoder.size": SIZE,
    "decoder.windows": count(1),
    "decoder.cross_task": FLAG,
    "decoder.queries": count(1),
    "decoder.drop_path": number(0, 1),
    "decoder.query_drop_path": number(0, 1),
    "decoder.genotype": Rule("text or a mapping {target: {source: kind}}", lambda v: isinstance(v, str | dict)),
    "decoder.kinds": MAPPING.or_null(),
    "decoder.reduction": count(1),
    "decoder.context_reduction": count(1),
    "decoder.window": count(1),
    "decoder.dropout": number(0, 1),
    "decoder.widest": count(1),
    "regularizer.weight": number(0),
    "regularizer.warmup_steps": count(),
    "regularizer.lr": number(0),
    "regularizer.weight_decay": number(0),
    "regularizer.until": number(0, 1),
    "regularizer.balance": TEXT,
    "regularizer.options.sources": TEXT,
    "regularizer.options.exclude": Rule(
        "a list of target<-source", lambda v: isinstance(v, list) and all(isinstance(pair, str) for pair in v)
    ),
    "regularizer.options.shuffle": FLAG,
    "regularizer.options.quotas": FLAG,
    "regularizer.options.window": number(0, 1).or_null(),
    "regularizer.options.agree": FLAG,
    "regularizer.options.across_images": FLAG,
    "regularizer.options.criterion": TEXT,
    "regularizer.options.temperature": POSITIVE,
    "regularizer.options.share": TEXT,
    "regularizer.options.tap": TEXT,
    "regularizer.options.pixels": count(1),
    "regularizer.options.margin": number(0),
    "regularizer.options.dim": count(1),
    "regularizer.options.hidden": count(1).or_null(),
    "regularizer.options.stride": count(1),
    "regularizer.options.widths": Rule(
        "a list of whole numbers >= 1",
        lambda v: isinstance(v, list) and bool(v) and all(_is_int(width) and width > 0 for width in v),
    ),
    "regularizer.options.num_sources": count(1),
    "regularizer.options.source_rule": TEXT,
    "regularizer.options.image_weight": number(0),
    "regularizer.options.thresholds.*": pair("near and far", _is_number).or_null(),
    "loss.weights.*": number(0).or_null(),
    "loss.options.edge.positive_weight": number(0, 1),
    "balancing.method": TEXT,
    "balancing.contrast": TEXT,
    "balancing.lr": number(0),
    "balancing.every": count(1).or_null(),
    "balancing.temperature": POSITIVE,
    "balancing.aggregator": TEXT,
    "balancing.options": MAPPING.or_null(),
    "evaluation.boundaries": FLAG,
    "evaluation.quick": pair("thresholds, and every how many pictures", lambda v: _is_int(v) and v > 0).or_null(),
    "evaluation.workers": count(),
    "evaluation.options.depth.max_depth": POSITIVE.or_null(),
    "evaluation.options.edge.max_distance": POSITIVE.or_null(),
    "evaluation.options.edge.thresholds": count(1).or_null(),
    "evaluation.options.depth.protocol": TEXT,
    "evaluation.options.sal.protocol": TEXT,
    "evaluation.options.edge.preset": TEXT,
    "optimizer.name": TEXT,
    "optimizer.lr": number(0),
    "optimizer.backbone_lr": number(0).or_null(),
    "optimizer.weight_decay": number(0),
    "optimizer.momentum": number(0, 1),
    "optimizer.betas": pair("of the two running means, from 0 to below 1", lambda v: _is_number(v) and 0 <= v < 1),
    "optimizer.eps": POSITIVE,
    "optimizer.nesterov": FLAG,
    "schedule.name": TEXT,
    "schedule.power": number(0),
    "schedule.warmup_steps": count(),
    "trainer.max_steps": count(1),
    "trainer.val_interval": count(1).or_null(),
    "trainer.checkpoint_interval": count(1).or_null(),
    "trainer.log_interval": count(1),
    "trainer.panels": count(),
    "trainer.clip_norm": POSITIVE.or_null(),
    "trainer.monitor": TEXT,
    "trainer.precision": TEXT,
    "trainer.device": TEXT,
    "trainer.channels_last": FLAG,
    "trainer.parallel": Rule("ddp or fsdp", lambda v: v in ("ddp", "fsdp")),
    "trainer.compile": FLAG,
    "trainer.accumulate": count(1),
    "trainer.ema": number(0, 1).or_null(),
    "trainer.tf32": FLAG,
    "trainer.async_checkpoints": FLAG,
    "trainer.keep_interval": count(1).or_null(),
    "trainer.max_skipped": count(1),
    "trainer.unreadable": TEXT,
    "trainer.grad_checkpointing": FLAG,
    "trainer.deterministic": FLAG,
    "trainer.val_first": FLAG,
    "trainer.dry_run": FLAG,
}


@functools.cache  # a comparison asks for a thousand runs' keys
def rule_of(key: str) -> Rule | None:
    return next((rule for pattern, rule in RULES.items() if fnmatch(key, pattern)), None)


def leaves(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that is not a group of further keys; a mapping with a rule counts as a value."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and rule_of(key) is None:
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def check_config(config: dict[str, Any]) -> None:
    """UserError for the first value of a plain config that is not what it must be."""
    for key, value in leaves(config):
        rule = rule_of(key)
        if rule is not None and not (rule.holds(value) or (value is None and rule.nullable)):
            raise UserError(f"{key}={'null' if value is None else value} must be {rule.words}")
