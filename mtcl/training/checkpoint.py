"""A run's checkpoints: what one holds, and from which one a run is continued."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mtcl.errors import UserError
from mtcl.models.lora import is_base_weight, remove_inserted_names
from mtcl.models.weights import hash_weights
from mtcl.training.checkpoint_file import CorruptCheckpointError, read_checkpoint_file, write_checkpoint_file

NUMBERED = re.compile(r"step_(\d+)")


@dataclass(eq=False)
class Checkpoint:
    """Everything that a resumed run needs: tensors and plain containers only.

    A checkpoint that was imported from another code base has weights only: its ``optimizer`` is empty.

    Attributes:
        model: the model's state dict.
        config: the run's config, from which the model can be rebuilt.
        step: the optimiser steps taken.
        meta: ``tasks`` (their channels and classes), ``best`` (the monitored metric of ``best.pt``), ``skipped`` (the
            number of steps that were not finite), ``overflows`` (the number of steps whose scaled gradients were not);
            of an imported checkpoint also ``imported``; where the frozen weights of the backbone are left out of
            ``model`` and ``ema`` also ``backbone``, see :func:`leave_out_backbone`.
        ema: ``model`` (the averaged weights) and ``updates``; None: the run keeps no average.
        regularizer: the regulariser's state dict; None: there is no regulariser.
        gradient_norm_weight: the state of lambda's gradient-norm weighting; None: there is none.
        balancer: the balancer's state; None: written before there were balancers.
        scaler: the state of the gradient scaler; None: losses are not scaled.
        optimizer: ``model`` and ``regularizer``, state dicts of the two optimisers.
        rng: random states, a list with one per process; before there were several processes, a single one.
    """

    model: Mapping[str, Tensor]
    config: dict[str, Any]
    step: int
    meta: Mapping[str, Any] = field(default_factory=dict)
    ema: Mapping[str, Any] | None = None
    regularizer: Mapping[str, Any] | None = None
    gradient_norm_weight: Mapping[str, Any] | None = None
    balancer: Mapping[str, Any] | None = None
    scaler: Mapping[str, Any] | None = None
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    rng: list[dict[str, Tensor]] | dict[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The weights that were validated: the averaged ones, or where there are none the model's."""
        return self.ema["model"] if self.ema is not None else self.model

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of a checkpoint file."""
        return {
            "model": self.model,
            "ema": self.ema,
            "regularizer": self.regularizer,
            "share": self.gradient_norm_weight,
            "balancer": self.balancer,
            "scaler": self.scaler,
            "optimizer": self.optimizer,
            "schedule": {},  # a function of the step
            "step": self.step,
            "rng": self.rng,
            "config": self.config,
            "meta": self.meta,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Checkpoint":
        """Build a checkpoint from the entries of a file; older files lack some."""
        return cls(
            model=content["model"],
            config=content["config"],
            step=content["step"],
            meta=content.get("meta", {}),
            ema=content.get("ema") or None,
            regularizer=content.get("regularizer"),
            gradient_norm_weight=content.get("share"),
            balancer=content.get("balancer"),
            scaler=content.get("scaler"),
            optimizer=content.get("optimizer", {}),
            rng=content.get("rng", {}),
        )


class LoadedCheckpoint(NamedTuple):
    """A checkpoint, the file it was read from, and the newer files that were rejected as damaged."""

    path: Path
    checkpoint: Checkpoint
    rejected: list[CorruptCheckpointError]


def leave_out_backbone(checkpoint: Checkpoint, backbone: Mapping[str, str]) -> Checkpoint:
    """Return a checkpoint without the weights of a backbone of which no weight is trained.

    Args:
        checkpoint: a complete one.
        backbone: what is saved instead as ``meta["backbone"]``: its ``name``, its ``weights`` (``hub`` or the name of a
            file) and their ``sha256``.

    Returns:
        A checkpoint of everything else; adapters stay.
    """
    ema = checkpoint.ema
    return replace(
        checkpoint,
        model=_remove_backbone(checkpoint.model),
        ema=None if ema is None else {**ema, "model": _remove_backbone(ema["model"])},
        meta={**checkpoint.meta, "backbone": dict(backbone)},
    )


def hash_backbone(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the backbone's weights in a model's state dict, whether there are adapters or none."""
    return hash_weights({remove_inserted_names(n): value for n, value in weights.items() if is_base_weight(n)})


def _remove_backbone(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if not is_base_weight(name)}


def save_checkpoint(path: Path, checkpoint: Checkpoint, keep: Path | None = None) -> None:
    """Write a checkpoint to ``path``; an existing file is replaced in one step, or moved to ``keep``."""
    write_checkpoint_file(path, checkpoint.to_dict(), keep)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. Never runs code from the file.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint of mtcl.
    """
    return Checkpoint.from_dict(read_checkpoint_file(path))


def latest_valid_checkpoint(folder: Path) -> LoadedCheckpoint | None:
    """Read the checkpoint from which a run is continued; None where ``folder`` has none.

    That is ``last``, or where it is damaged ``previous``; or what the run wrote afterwards at a later step: ``best``,
    or a numbered one.

    Raises:
        UserError: all checkpoints are damaged.
    """
    numbered = {path: int(match[1]) for path in folder.glob("*.pt") if (match := NUMBERED.fullmatch(path.stem))}
    last_two = [folder / f"{name}.pt" for name in ("last", "previous")]
    candidates = [*last_two, *sorted(numbered, key=lambda path: -numbered[path]), folder / "best.pt"]
    latest: LoadedCheckpoint | None = None
    rejected: list[CorruptCheckpointError] = []
    for path in (path for path in candidates if path.is_file()):
        if latest is not None:
            # An older file is of an earlier step, or of a course of training that the run has been reset from.
            is_newer = path.stat().st_mtime_ns > latest.path.stat().st_mtime_ns
            step = latest.checkpoint.step
            if path in last_two or not is_newer or numbered.get(path, step + 1) <= step:
                continue
        try:
            checkpoint = load_checkpoint(path)
        except CorruptCheckpointError as error:
            rejected.append(error)
            continue
        if latest is None or checkpoint.step > latest.checkpoint.step:
            latest = LoadedCheckpoint(path, checkpoint, rejected)
    if latest is None and rejected:
        raise UserError(
            f"no checkpoint in {folder} is intact: {', '.join(f'{e.path.name} ({e.why})' for e in rejected)}; "
            "choose another run folder to start afresh"
        )
    return latest
