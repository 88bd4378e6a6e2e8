"""Define every config key: what its value must be and what the value bears on."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mtcl.config.renamed import explain_renamed_key
from mtcl.config.resolve import add_key_prefix
from mtcl.errors import UserError, find_similar
from mtcl.models.backbone_options import TRAINABLE, TRAINABLE_CHOICES, check_backbone_kwargs
from mtcl.tasks.names import IMAGE_WEIGHTINGS, TASK_NAMES

# What a key's value bears on.
RESULT = "result"  # what is learned or measured: runs that differ in it are rows of their own in a table
SEED = "seed"  # which of many equal runs it is: the runs of one row differ in it
MACHINE = "machine"  # where it runs: folders, device, workers
ENGINE = "engine"  # how it is computed, what is done about faults: time and memory, of a result at most the rounding
RECORD = "record"  # what is written down of it, and how often
COMMAND = "command"  # what a command does: resume or evaluate which file
ROLES = (RESULT, SEED, MACHINE, ENGINE, RECORD, COMMAND)


@dataclass(frozen=True)
class Rule:
    """Rule of a config key: the values that it may have, and its role.

    Attributes:
        text: what a value must be, for messages.
        is_valid: the test of a value.
        nullable: whether null is allowed, too.
        role: what the value bears on, one of :data:`ROLES`.
        must_match: whether ``resume=auto`` takes no run that differs in the key although its role allows it: the
            key changes the rounding or the meaning of ``best.pt``.
        extendable: whether a run that is resumed may have another value although the key bears on the result.
        orders_samples: whether the order of the training samples depends on the key.
        is_path: whether the value is a path, or a part of one; or a keyword such as auto, hub, one.
    """

    text: str
    is_valid: Callable[[Any], bool]
    nullable: bool = False
    role: str = "result"
    must_match: bool = False
    extendable: bool = False
    orders_samples: bool = False
    is_path: bool = False

    def or_null(self) -> "Rule":
        """Return this rule with null allowed, too."""
        return replace(self, text=f"{self.text}, or null", nullable=True)

    def with_role(
        self, role: str, *, must_match: bool = False, extendable: bool = False, orders_samples: bool = False
    ) -> "Rule":
        """Return this rule for a key of another role."""
        return replace(self, role=role, must_match=must_match, extendable=extendable, orders_samples=orders_samples)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_weighting(value: Any) -> bool:
    """Return whether a value is auto or a mapping of mappings to numbers."""
    if not isinstance(value, dict):
        return value == "auto"
    return all(isinstance(row, dict) and all(map(_is_number, row.values())) for row in value.values())


def number(low: float = -math.inf, high: float = math.inf) -> Rule:
    """Return the rule of a finite number in a range."""
    bounds = f" from {low:g} to {high:g}" if high < math.inf else f" >= {low:g}" if low > -math.inf else ""
    return Rule(f"a number{bounds}", lambda v: _is_number(v) and low <= v <= high)


def count(low: int = 0, high: int | None = None) -> Rule:
    """Return the rule of a whole number; without ``high`` up to 10^12, where floats still count exactly."""
    bounds = f">= {low}" if high is None else f"from {low} to {high}"
    return Rule(f"a whole number {bounds}", lambda v: _is_int(v) and low <= v <= (10**12 if high is None else high))


def pair(text: str, is_valid: Callable[[Any], bool]) -> Rule:
    """Return the rule of a list of two values that each pass ``is_valid``."""
    return Rule(f"a list of two, {text}", lambda v: isinstance(v, list) and len(v) == 2 and all(map(is_valid, v)))


FLAG = Rule("true or false", lambda v: isinstance(v, bool))
TEXT = Rule("text", lambda v: isinstance(v, str))
PATH = replace(TEXT, is_path=True)
MAPPING = Rule("a mapping {key: value}", lambda v: isinstance(v, dict))
THRESHOLDS = "a positive and a negative threshold"
MAX_SIDE = 16384
MAX_PIXELS = 1 << 24
SIZE = Rule(
    f"a list of two, height and width in pixels, at most {MAX_SIDE} each and {MAX_PIXELS:,} together",
    lambda v: (
        isinstance(v, list)
        and len(v) == 2
        and all(_is_int(side) and 0 < side <= MAX_SIDE for side in v)
        and v[0] * v[1] <= MAX_PIXELS
    ),
)
COLOR = Rule(
    "a list of three numbers on the 0..1 scale, from -10 to 10",
    lambda v: isinstance(v, list) and len(v) == 3 and all(_is_number(x) and abs(x) <= 10 for x in v),
)
SPREAD = Rule(
    "a list of three numbers on the 0..1 scale, from 0.001 to 10", lambda v: COLOR.is_valid(v) and min(v) >= 0.001
)
WIDTH = count(1, 100_000)  # of feature maps
BLOCKS = count(1, 128)
SEED_VALUE = count(0, 2**32 - 1)
BELOW_ONE = Rule("a number from 0 to below 1", lambda v: _is_number(v) and 0 <= v < 1)
POSITIVE = Rule("a number > 0", lambda v: _is_number(v) and v > 0)
NAMES = Rule(
    "auto or a list of different names",
    lambda v: (
        v == "auto" or (isinstance(v, list) and all(isinstance(name, str) for name in v) and len(set(v)) == len(v))
    ),
)
LEVELS = Rule(
    "a list of up to 128 whole numbers", lambda v: isinstance(v, list) and 0 < len(v) <= 128 and all(map(_is_int, v))
)
FILE_NAME = Rule(
    "a name of letters, digits, - _ and .", lambda v: isinstance(v, str) and bool(re.fullmatch(r"\w[\w.-]{0,99}", v))
)
TEACHER_NAMES = Rule(
    "a list of up to 32 different names of letters, digits and _",
    lambda v: (
        isinstance(v, list)
        and 0 < len(v) <= 32
        and all(isinstance(name, str) and re.fullmatch(r"\w{1,40}", name) for name in v)
        and len(set(v)) == len(v)
    ),
)
TARGET = Rule("a class of mtcl", lambda v: isinstance(v, str) and v.startswith("mtcl."))

MODEL_GROUPS = ("backbone", "decoder")  # what a checkpoint's weights belong to

# Every key of a config: its rule and its role.
RULES: dict[str, Rule] = {
    "name": PATH.with_role(RECORD),
    "seed": SEED_VALUE.with_role(SEED, orders_samples=True),
    "resume": PATH.or_null().with_role(COMMAND),
    "checkpoint": PATH.or_null().with_role(COMMAND),
    "predictions": PATH.or_null().with_role(COMMAND),
    "save_predictions": PATH.or_null().with_role(COMMAND),
    "data.name": FILE_NAME.with_role(RESULT, orders_samples=True),
    "data._target_": TARGET,
    "data.root": PATH.or_null().with_role(MACHINE),
    "data.split": FILE_NAME.with_role(RESULT, orders_samples=True),
    "data.size": SIZE,
    "data.batch_size": count(1, 1_000_000).with_role(RESULT, orders_samples=True),
    "data.eval_batch_size": count(1, 65536).with_role(MACHINE),
    "data.workers": count(0, 1024).with_role(MACHINE),
    "data.limit": count(1).or_null().with_role(RESULT, orders_samples=True),
    "data.cache": PATH.or_null().with_role(MACHINE),
    "data.memory_map": FLAG.with_role(MACHINE),
    "data.shards": PATH.or_null().with_role(MACHINE, must_match=True, orders_samples=True),
    "data.shuffle_buffer": count(1, 10**6).with_role(MACHINE, must_match=True, orders_samples=True),
    "data.feature_cache": PATH.or_null().with_role(MACHINE),
    "data.feature_precision": TEXT,
    "data.views": count(1, 65536).or_null(),
    "data.views_seed": SEED_VALUE,
    "data.views_per_step": count(1, 2),
    "data.normals_valid": TEXT,
    "data.strict": FLAG.with_role(MACHINE),
    "data.label_assignment": PATH,
    "data.label_fractions": Rule(
        "a mapping {task: fraction of the images that keep its label}",
        lambda v: isinstance(v, dict) and all(name in TASK_NAMES and _is_number(f) for name, f in v.items()),
    ).or_null(),
    "data.label_tasks": Rule(
        f"a list of different tasks among {', '.join(TASK_NAMES)}",
        lambda v: isinstance(v, list) and bool(v) and set(v) <= set(TASK_NAMES) and len(set(v)) == len(v),
    ).or_null(),
    "data.labels_seed": SEED_VALUE,
    "data.options.num_classes": count(1, 65535).with_role(RESULT, orders_samples=True),
    "data.options.resize": SIZE.or_null().with_role(RESULT, orders_samples=True),
    "data.options.length": pair(
        "images to train and to validate on, at most a million", lambda v: _is_int(v) and 0 < v <= 10**6
    ).with_role(RESULT, orders_samples=True),
    "data.options.seed": SEED_VALUE.with_role(RESULT, orders_samples=True),
    "data.options.num_val": count(1, 10**6).with_role(RESULT, orders_samples=True),
    "data.augment.scale": pair("from and to", lambda v: _is_number(v) and v > 0),
    "data.augment.flip": number(0, 1),
    "data.augment.photometric": FLAG,
    "data.augment.area": pair("from and to, parts of the image above 0", lambda v: _is_number(v) and 0 < v <= 1),
    "data.augment.ratio": pair("from and to, width / height", lambda v: _is_number(v) and 0 < v <= 100),
    "data.augment.class_cap": number(0, 1),
    "data.boundary_distance": POSITIVE,
    "tasks.names": NAMES,
    "backbone.name": TEXT,
    "backbone.weights": PATH.or_null(),
    "backbone.trainable": Rule(TRAINABLE_CHOICES, lambda v: isinstance(v, str) and bool(TRAINABLE.fullmatch(v))),
    "backbone.lora.rank": count(1, 4096),
    "backbone.lora.alpha": number(0, 100_000),
    "backbone.lora.dropout": BELOW_ONE,
    "backbone.lora.targets": Rule(
        "a list of up to 128 names of layers",
        lambda v: isinstance(v, list) and 0 < len(v) <= 128 and all(isinstance(n, str) and n for n in v),
    ).or_null(),
    "backbone.mean": COLOR.or_null(),
    "backbone.std": SPREAD.or_null(),
    "backbone.out_indices": LEVELS.or_null(),
    "backbone.maps_after": TEXT,
    "backbone.upsample_mode": TEXT.or_null(),
    "backbone.kwargs": MAPPING.or_null(),
    "decoder._target_": TARGET,
    "decoder.width": WIDTH,
    "decoder.head_width": WIDTH,
    "decoder.depth": BLOCKS,
    "decoder.final_width": WIDTH,
    "decoder.level_widths": Rule(
        "a list of up to 32 whole numbers from 1 to 100000",
        lambda v: isinstance(v, list) and 0 < len(v) <= 32 and all(_is_int(w) and 0 < w <= 100_000 for w in v),
    ),
    "decoder.shared_neck": FLAG,
    "decoder.use_bn": FLAG,
    "decoder.stride": WIDTH,
    "decoder.prediction_width": WIDTH,
    "decoder.heads": WIDTH,
    "decoder.mlp_ratio": number(0.001, 1000),
    "decoder.downsample": WIDTH.or_null(),
    "decoder.aggregate_first": FLAG,
    "decoder.cross_scale": TEXT,
    "decoder.key_fraction": number(0, 1),
    "decoder.rates": Rule(
        "a list of up to 32 dilations from 1 to 1000",
        lambda v: isinstance(v, list) and len(v) <= 32 and all(_is_int(r) and 0 < r <= 1000 for r in v),
    ),
    "decoder.skip_width": count(0, 100_000),
    "decoder.trunk_width": WIDTH.or_null(),
    "decoder.pyramid_width": WIDTH.or_null(),
    "decoder.attention_over": TEXT,
    "decoder.size": SIZE,
    "decoder.windows": WIDTH,
    "decoder.cross_task": FLAG,
    "decoder.queries": WIDTH,
    "decoder.denoise": TEXT,
    "decoder.steps": count(1, 1000),
    "decoder.blocks": BLOCKS,
    "decoder.noise_at_inference": FLAG,
    "decoder.label_scale": POSITIVE,
    "decoder.separate_tasks": Rule(
        f"a list of different names among {', '.join(TASK_NAMES)}",
        lambda v: isinstance(v, list) and all(name in TASK_NAMES for name in v) and len(set(v)) == len(v),
    ),
    **{f"decoder.class_thresholds.{task}": number(0, 1).or_null() for task in TASK_NAMES},
    "decoder.num_experts": count(1, 1000),
    "decoder.kernel": count(1, 31),
    "decoder.gate_width": WIDTH,
    "decoder.gating": TEXT,
    "decoder.memory_update": TEXT,
    "decoder.drop_path": number(0, 1),
    "decoder.query_drop_path": number(0, 1),
    "decoder.genotype": replace(
        PATH, text="text or a mapping {target: {source: kind}}", is_valid=lambda v: isinstance(v, str | dict)
    ),
    "decoder.kinds": Rule(
        f"a mapping whose keys are among {', '.join(TASK_NAMES)}",
        lambda v: isinstance(v, dict) and all(name in TASK_NAMES for name in v),
    ).or_null(),
    **{f"decoder.bin_weights.{task}": number(0).or_null() for task in TASK_NAMES},
    "decoder.reduction": WIDTH,
    "decoder.context_reduction": WIDTH,
    "decoder.window": WIDTH,
    "decoder.dropout": number(0, 1),
    "decoder.widest": WIDTH,
    "decoder.teachers": TEACHER_NAMES,
    "decoder.routing": TEXT,
    "decoder.noisy_gating": FLAG,
    "decoder.weights": PATH.or_null(),
    "regularizer._target_": TARGET.or_null(),
    "regularizer.weight": number(0),
    "regularizer.warmup_steps": count(),
    "regularizer.lr": number(0),
    "regularizer.weight_decay": number(0),
    "regularizer.start_fraction": number(0, 1),
    "regularizer.stop_fraction": number(0, 1),
    "regularizer.weighting": TEXT,
    "regularizer.weighting_cap": POSITIVE.or_null(),
    "regularizer.detach_trunk": FLAG,
    "regularizer.options.source_tasks": TEXT,
    "regularizer.options.excluded_pairs": Rule(
        "a list of target<-source", lambda v: isinstance(v, list) and all(isinstance(pair, str) for pair in v)
    ),
    "regularizer.options.source_labels": Rule(
        "true, other_image, random or distance", lambda v: v is True or isinstance(v, str)
    ),
    "regularizer.options.class_balanced": FLAG,
    "regularizer.options.window": number(0, 1).or_null(),
    "regularizer.options.drop_conflicting_positives": FLAG,
    "regularizer.options.drop_conflicting_negatives": FLAG,
    "regularizer.options.mispredicted_fraction": number(0, 1),
    "regularizer.options.across_images": FLAG,
    "regularizer.options.criterion": TEXT,
    "regularizer.options.temperature": POSITIVE,
    "regularizer.options.targets": Rule(
        "null or a list of tasks", lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v)
    ).or_null(),
    "regularizer.options.negative_margin": number(0, 2),
    "regularizer.options.all_sources": FLAG,
    "regularizer.options.source_weights": Rule("auto or a mapping {target: {source: weight}}", _is_weighting).or_null(),
    "regularizer.options.source_weight_batches": count(1),
    "regularizer.options.teacher": FLAG,
    "regularizer.options.projector_sharing": TEXT,
    "regularizer.options.feature": TEXT,
    "regularizer.options.num_pixels": count(1, 65536),
    "regularizer.options.margin": number(0),
    "regularizer.options.embed_dim": count(1, 4096).or_null(),
    "regularizer.options.hidden_dim": count(1, 4096).or_null(),
    "regularizer.options.stride": count(1),
    "regularizer.options.widths": Rule(
        "a list of up to 32 whole numbers from 1 to 4096",
        lambda v: isinstance(v, list) and 0 < len(v) <= 32 and all(_is_int(width) and 0 < width <= 4096 for width in v),
    ),
    "regularizer.options.num_sources": count(1),
    "regularizer.options.source_rule": TEXT,
    "regularizer.options.image_weight": number(0),
    "regularizer.options.variance_weight": number(0),
    "regularizer.options.min_spread": number(0, 1),
    "regularizer.options.distance_weight": number(0),
    "regularizer.options.encoder_distance_weight": number(0),
    "regularizer.options.reconstruction_weight": number(0),
    "regularizer.options.hard_classes": FLAG,
    "regularizer.options.depth_mean": number(),
    "regularizer.options.depth_std": POSITIVE,
    "regularizer.options.detach_rule": TEXT,
    "regularizer.options.value_confidence": number(0, 1),
    **{f"regularizer.options.task_confidences.{task}": number(0, 1).or_null() for task in TASK_NAMES},
    "regularizer.options.prediction_weight": number(0),
    "regularizer.options.feature_weight": number(0),
    "regularizer.options.teachers": Rule("a mapping {teacher: {name: timm model}}", lambda v: isinstance(v, dict)),
    "regularizer.options.cosine_weight": number(0),
    "regularizer.options.smooth_l1_weight": number(0),
    "regularizer.options.confidence": number(0, 1),
    "regularizer.options.tsr_weight": number(0),
    "regularizer.options.csa_weight": number(0),
    **{f"regularizer.options.thresholds.{task}": pair(THRESHOLDS, _is_number).or_null() for task in TASK_NAMES},
    **{f"loss.weights.{task}": number(0).or_null() for task in TASK_NAMES},
    "loss.intermediate_weight": number(0),
    "loss.options.edge.positive_weight": number(0, 1),
    "loss.options.normals.distance_loss": Rule("l1 or cosine", lambda v: v in ("l1", "cosine")),
    "loss.views": Rule("all or first", lambda v: v in ("all", "first")),
    "loss.image_weighting": Rule("pixels, images or tasks_per_label", lambda v: v in IMAGE_WEIGHTINGS),
    "balancing.method": TEXT,
    "balancing.regularizer_as_objective": FLAG,
    "balancing.lr": number(0),
    "balancing.every": count(1).or_null(),
    "balancing.temperature": POSITIVE,
    "balancing.scalarizer": TEXT,
    "balancing.scale": POSITIVE,
    "balancing.target": TEXT,
    "balancing.beta": BELOW_ONE,
    "balancing.sigma": number(0),
    "balancing.aggregator": TEXT,
    "balancing.options": MAPPING.or_null(),
    "evaluation.score_boundaries": FLAG,
    "evaluation.fast_boundaries": pair("thresholds, and every how many images", lambda v: _is_int(v) and v > 0)
    .or_null()
    .with_role(RECORD),
    "evaluation.workers": count(0, 1024).with_role(MACHINE),
    "evaluation.options.depth.max_depth": POSITIVE.or_null(),
    "evaluation.options.edge.max_distance": POSITIVE.or_null(),
    "evaluation.options.edge.thresholds": count(1).or_null(),
    "evaluation.options.semseg.protocol": TEXT,
    "evaluation.options.depth.protocol": TEXT,
    "evaluation.options.normals.protocol": TEXT,
    "evaluation.options.sal.protocol": TEXT,
    "evaluation.options.edge.preset": TEXT,
    "optimizer.name": TEXT,
    "optimizer.lr": number(0),
    "optimizer.backbone_lr": number(0).or_null(),
    "optimizer.weight_decay": number(0),
    "optimizer.momentum": number(0, 1).or_null(),
    "optimizer.betas": Rule(
        "a list of two or three numbers, decays of running means from 0 to below 1",
        lambda v: isinstance(v, list) and len(v) in (2, 3) and all(_is_number(beta) and 0 <= beta < 1 for beta in v),
    ).or_null(),
    "optimizer.eps": POSITIVE.or_null(),
    "optimizer.nesterov": FLAG.or_null(),
    "optimizer.options": MAPPING.or_null(),
    "optimizer.layer_decay": Rule("a number above 0 up to 1", lambda v: _is_number(v) and 0 < v <= 1).or_null(),
    "schedule.name": TEXT,
    "schedule.power": number(0),
    "schedule.warmup_steps": count(),
    "schedule.step_size": count(1).or_null(),
    "schedule.gamma": number(0),
    "logger.mlflow.tracking_uri": PATH.or_null().with_role(RECORD),
    "logger.mlflow.experiment": TEXT.with_role(RECORD),
    "logger.mlflow.run_name": TEXT.or_null().with_role(RECORD),
    "logger.wandb.project": TEXT.with_role(RECORD),
    "logger.wandb.entity": TEXT.or_null().with_role(RECORD),
    "logger.wandb.run_name": TEXT.or_null().with_role(RECORD),
    "logger.wandb.group": TEXT.or_null().with_role(RECORD),
    "logger.wandb.tags": Rule(
        "a list of up to 32 texts",
        lambda v: isinstance(v, list) and len(v) <= 32 and all(isinstance(tag, str) for tag in v),
    ).with_role(RECORD),
    "logger.wandb.mode": Rule("online or offline", lambda v: v in ("online", "offline")).or_null().with_role(RECORD),
    "trainer.max_steps": count(1).with_role(RESULT, extendable=True),
    "trainer.val_interval": count(1).or_null().with_role(RECORD),
    "trainer.checkpoint_interval": count(1).or_null().with_role(RECORD),
    "trainer.log_interval": count(1).with_role(RECORD),
    "trainer.num_panels": count(0, 10_000).with_role(RECORD),
    "trainer.clip_norm": POSITIVE.or_null(),
    "trainer.monitor": TEXT.with_role(RECORD, must_match=True),
    "trainer.patience": count(1).or_null().with_role(RESULT, extendable=True),
    "trainer.precision": TEXT,
    "trainer.device": TEXT.with_role(MACHINE),
    "trainer.channels_last": FLAG.with_role(ENGINE, must_match=True),
    "trainer.parallel": Rule("ddp or fsdp", lambda v: v in ("ddp", "fsdp")).with_role(ENGINE),
    "trainer.compile": FLAG.with_role(ENGINE),
    "trainer.accumulate_grad_batches": count(1).with_role(RESULT, orders_samples=True),
    "trainer.ema": BELOW_ONE.or_null(),
    "trainer.ema_warmup": FLAG,
    "trainer.tf32": FLAG,
    "trainer.async_checkpoints": FLAG.with_role(RECORD),
    "trainer.save_backbone": Rule("auto, true or false", lambda v: v == "auto" or isinstance(v, bool)).with_role(
        RECORD
    ),
    "trainer.keep_checkpoint_interval": count(1).or_null().with_role(RECORD),
    "trainer.max_nonfinite_steps": count(1).with_role(ENGINE),
    "trainer.on_unreadable": TEXT.with_role(ENGINE),
    "trainer.grad_checkpointing": FLAG.with_role(ENGINE),
    "trainer.deterministic": FLAG.with_role(ENGINE, must_match=True),
    "trainer.validate_first": FLAG.with_role(RECORD),
    "trainer.dry_run": FLAG,
    "trainer.profile": count(1, 1000).or_null().with_role(RECORD),
}

PATH_KEYS = tuple(key for key, rule in RULES.items() if rule.is_path)


# Keys younger than some run folders, and what those runs did: with and without the key they are one row of a table.
LEGACY_VALUES: dict[str, Any] = {
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-8,
    "optimizer.nesterov": False,
    "optimizer.layer_decay": None,
    "optimizer.options": None,
    "backbone.trainable": "full",
    "backbone.lora.rank": 8,
    "backbone.lora.alpha": 16,
    "backbone.lora.dropout": 0.0,
    "backbone.lora.targets": None,
    "backbone.maps_after": "stages",
    "backbone.upsample_mode": None,
    "decoder.attention_over": "tasks",
    "regularizer.start_fraction": 0.0,
    "regularizer.weighting_cap": None,
    "regularizer.detach_trunk": False,
    "loss.intermediate_weight": 1.0,
    "regularizer.options.targets": None,
    "regularizer.options.all_sources": False,
    "regularizer.options.source_weights": None,
    "regularizer.options.source_weight_batches": 32,
    "regularizer.options.teacher": False,
    "regularizer.options.negative_margin": 0.65,
    "regularizer.options.drop_conflicting_negatives": False,
    "regularizer.options.mispredicted_fraction": 0.0,
    "regularizer.options.variance_weight": 0.0,
    "regularizer.options.min_spread": 0.1,
    "data.shards": None,
    "data.shuffle_buffer": 512,
    "data.feature_precision": "fp16",
    "data.label_fractions": None,
    "data.label_tasks": None,
    "data.views": None,
    "data.views_seed": 0,
    "data.views_per_step": 1,
    "loss.views": "all",
    "loss.image_weighting": "pixels",
    "loss.options.normals.distance_loss": "l1",
    "trainer.patience": None,
    "trainer.ema_warmup": False,
    "evaluation.options.semseg.protocol": "standard",
    "evaluation.options.normals.protocol": "standard",
}


def role_of(key: str) -> str:
    """Return a config key's role; a key without a rule (of another version) bears on the result."""
    rule = RULES.get(key)
    return RESULT if rule is None else rule.role


def rule_of(key: str) -> Rule | None:
    """Return a config key's rule, None for a key that does not exist."""
    return RULES.get(key)


def may_differ_on_resume(key: str) -> bool:
    """Return whether an interrupted run may differ in this key from the run that continues it."""
    rule = RULES.get(key)
    if rule is None:
        return False
    return rule.extendable or (rule.role not in (RESULT, SEED) and not rule.must_match)


def is_extendable(key: str) -> bool:
    """Return whether the key bears on the result, and a resumed run may have another value nevertheless."""
    rule = RULES.get(key)
    return rule is not None and rule.extendable


def affects_sample_order(key: str) -> bool:
    """Return whether the order of the training samples depends on a config key."""
    rule = RULES.get(key)
    return rule is not None and rule.orders_samples


def flatten(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of a nested config; a mapping with a rule of its own counts as a value."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and rule_of(key) is None:
            yield from flatten(value, f"{key}.")
        else:
            yield key, value


def check_config(config: dict[str, Any]) -> None:
    """Raise ``UserError`` for the first key of a plain config that is unknown or has a wrong value."""
    keys = dict(flatten(config))
    for key, value in keys.items():
        rule = rule_of(key)
        if rule is None:
            raise UserError(describe_unknown_key(key, value, [other for other in keys if other in RULES]))
        if not (rule.is_valid(value) or (value is None and rule.nullable)):
            raise UserError(f"{key}={'null' if value is None else truncate(value)} must be {rule.text}")
    with add_key_prefix("backbone."):
        check_backbone_kwargs((config.get("backbone") or {}).get("kwargs"))


def describe_unknown_key(key: str, value: Any, present: Sequence[str]) -> str:
    """Return a sentence on a key without a rule, with the nearest of the config's ``present`` keys."""
    if any(pattern.startswith(f"{key}.") for pattern in RULES):
        return f"{key}={truncate(value)} must be a mapping with the keys of that group"
    if renamed := explain_renamed_key(key):
        return renamed
    group, _, name = key.rpartition(".")
    siblings = {other.rpartition(".")[2]: other for other in present if other.rpartition(".")[0] == group}
    anywhere = {other.rpartition(".")[2]: other for other in present}
    for candidates, cutoff in ((siblings, 0.6), (anywhere, 0.8)):
        if similar := find_similar(name, candidates, cutoff=cutoff):
            return f"there is no config key {truncate(key)}; did you mean {candidates[similar[0]]}?"
    hint = f"{group} has {', '.join(siblings)}" if group and siblings else "--cfg job shows all keys"
    return f"there is no config key {truncate(key)}; {hint}"


def truncate(value: Any) -> str:
    """Return a value as text for a message, cut where it is long."""
    try:
        text = str(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"(a {type(value).__name__})"
    return text if len(text) <= 200 else f"{text[:200]}..."
