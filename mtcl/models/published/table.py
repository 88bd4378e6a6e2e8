"""What a table of key names is, and how a state dict goes through it: every key accounted for, every tensor filled."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtcl.errors import UserError, describe_load_error
from mtcl.models.weights import check_tensor_values

State = dict[str, Tensor]


class Rule(NamedTuple):
    """Keys that look like ``theirs`` become ``ours``; None: their forward never uses them, and they are left out.

    In both, ``{task}`` is a task's name, ``{n}`` or ``{m}`` a number, ``*`` (at the end) all that remains. In
    ``theirs`` only, ``{index}`` is a task's place in their list, which is ``{task}`` in ``ours``. ``change`` is applied
    to the tensor.
    """

    theirs: str
    ours: str | None
    change: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Method:
    """How one method's public code names what it saves."""

    name: str
    model: str  # the class that decoder._target_ must name
    tasks: tuple[str, ...]  # in the order in which their code lists them
    # their state dict -> rules, of which the first that fits a key counts
    table: Callable[[Mapping[str, Tensor]], tuple[Rule, ...]]
    # (their state dict, height and width they trained at) -> config keys without which the network would be another
    # one. A mapping is merged into the config's own.
    settings: Callable[[Mapping[str, Tensor], tuple[int, int]], dict[str, Any]]


class Translation(NamedTuple):
    state: State  # under our names
    unused_keys: list[str]  # their keys that their forward never uses


def read_published_checkpoint(path: Path) -> tuple[State, int]:
    """The state dict in a checkpoint of InvPT's lineage, without DDP's prefix, and the iterations it was trained for.

    Such a file holds {"model", "optimizer", "scheduler", "epoch", "iter_count"}; a bare state dict is read, too. No
    code in the file is run.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; give the published checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} can't be read as a checkpoint ({describe_load_error(error)})") from error
    content = content if isinstance(content, dict) else {}
    state = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), content)
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"{path} holds no state dict of tensors, neither itself nor under model or state_dict")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    last = content.get("iter_count")  # of the last iteration, counted from 0
    return dict(state), last + 1 if isinstance(last, int) else 0


def translate_state_dict(state: Mapping[str, Tensor], method: Method, tasks: Sequence[str]) -> Translation:
    """Their state dict under our names. UserError for a key that no rule fits: nothing is dropped in silence."""
    listed = [task for task in method.tasks if task in tasks]
    if listed != list(tasks):  # normalisations that run over all tasks' channels would be shuffled
        raise UserError(f"{method.name} lists its tasks as {', '.join(listed)}, the config as {', '.join(tasks)}")
    patterns = [(_pattern(rule.theirs, listed), rule) for rule in method.table(state)]
    ours: State = {}
    unused_keys, unknown = [], []
    for key, value in state.items():
        for pattern, rule in patterns:
            name = _renamed(pattern, key, rule, listed)
            if name is not None:
                break
        else:
            unknown.append(key)
            continue
        if not name:
            unused_keys.append(key)
        elif name in ours:
            raise ValueError(f"two keys of {method.name} become {name}, the second is {key}")
        else:
            ours[name] = value if rule.change is None else rule.change(value)
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(state)} keys are not known of {method.name} with the tasks {', '.join(listed)}, "
            f"the first: {unknown[0]}; is it a checkpoint of another method, or for other tasks?"
        )
    return Translation(ours, unused_keys)


def check_state_dict(state: Mapping[str, Tensor], own: Mapping[str, Tensor], method: str) -> None:
    """UserError unless ``state`` fills exactly the tensors ``own``, shape by shape."""
    for what, names in (("lacks", own.keys() - state.keys()), ("has too much:", state.keys() - own.keys())):
        if names:
            raise UserError(
                f"the checkpoint {what} {len(names)} of the tensors of the model that the config describes, the first: "
                f"{min(names)}; give the config of the published {method} (backbone, tasks)"
            )
    wrong = [
        f"{k} {tuple(v.shape)} instead of {tuple(own[k].shape)}" for k, v in state.items() if v.shape != own[k].shape
    ]
    if wrong:
        raise UserError(f"{len(wrong)} tensors have another shape in the model of the config: {'; '.join(wrong[:3])}")
    for name, tensor in state.items():
        check_tensor_values(name, tensor, own[name], f"the checkpoint of {method}")


def _pattern(theirs: str, tasks: Sequence[str]) -> re.Pattern[str]:
    groups = {"{task}": f"(?P<task>{'|'.join(map(re.escape, tasks))})", "*": "(?P<rest>.+)"}
    groups |= {f"{{{name}}}": rf"(?P<{name}>\d+)" for name in ("index", "n", "m")}
    return re.compile("".join(groups.get(part, re.escape(part)) for part in re.split(r"(\{\w+\}|\*)", theirs)))


def _renamed(pattern: re.Pattern[str], key: str, rule: Rule, tasks: Sequence[str]) -> str | None:
    """Our name of ``key``; empty where it is left out, None where the rule does not fit."""
    match = pattern.fullmatch(key)
    if match is None:
        return None
    found = match.groupdict()
    if "index" in found:
        if int(found["index"]) >= len(tasks):
            return None
        found["task"] = tasks[int(found["index"])]
    return "" if rule.ours is None else rule.ours.replace("*", "{rest}").format(**found)
