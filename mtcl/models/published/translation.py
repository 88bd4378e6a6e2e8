"""Translate the keys of a state dict by rules, so that every key is accounted for and every tensor filled."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtcl.errors import UserError, describe_load_error
from mtcl.models.weights import check_tensor_values

State = dict[str, Tensor]
Overrides = dict[str, dict[str, Any]]  # group of the config -> key -> value
# Classes that files of public code hold beside the weights: Lightning's record of its callbacks, numpy's scores.
UNUSED_CLASSES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


class Unused:
    """Stand-in for an object of a published file that is not read; holds nothing and runs nothing."""

    def __new__(cls, *_: Any) -> "Unused":
        """Return an empty object."""
        return super().__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        """Drop the state."""


class Rule(NamedTuple):
    """A rule that translates keys.

    In both patterns ``{task}`` is a task's name, ``{n}`` or ``{m}`` a number, ``*`` (at the end) the rest of the key.
    ``{other}`` is the name of a second task. In ``source`` only, ``{index}`` is a task's index in the authors' list,
    which is ``{task}`` in ``target``.

    Attributes:
        source: pattern of the authors' key.
        target: our key; None: their forward never uses the tensor, and it is dropped.
        convert: applied to the tensor.
    """

    source: str
    target: str | None
    convert: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Method:
    """How one method's public code names its tensors.

    Attributes:
        name: of the method.
        model: name of our class.
        tasks: in the order of the authors' code.
        rules: their state dict -> rules; the first that matches a key counts.
        config_overrides: (their state dict, height and width of training) -> group of the config -> key -> the value
            that the published network needs. A value that is a mapping is merged into the config's.
        prepare: (their state dict, names of our model's tensors) -> a state dict of the same network, as the rules
            expect it: for what one rule for one key can't say, such as two tensors that are one of ours.
        regularizer_keys: their state dict -> key of a tensor that only a training needs -> its key in the state of our
            regulariser; of a file without tasks alone.
        first_iteration: the number of the first iteration, where a file's ``iter_count`` is that of the last.
    """

    name: str
    model: str
    tasks: tuple[str, ...]
    rules: Callable[[Mapping[str, Tensor]], tuple[Rule, ...]]
    config_overrides: Callable[[Mapping[str, Tensor], tuple[int, int]], Overrides]
    prepare: Callable[[State, Collection[str]], State] | None = None
    regularizer_keys: Callable[[Mapping[str, Tensor]], dict[str, str]] | None = None
    first_iteration: int = 0


class Translation(NamedTuple):
    """A translated state dict.

    Attributes:
        state: under our names.
        unused_keys: the authors' keys that their forward never uses.
    """

    state: State
    unused_keys: list[str]


def read_published_checkpoint(path: Path, first_iteration: int = 0) -> tuple[State, int]:
    """Read a checkpoint as the authors' training code saves it.

    A file of InvPT's code and its relatives holds {"model", "optimizer", "scheduler", "epoch", "iter_count"}, one of
    Lightning {"state_dict", "global_step", "callbacks", ...}; a plain state dict is read as well. Code in the file is
    not run.

    Args:
        path: of the file.
        first_iteration: the number of the first iteration, where "iter_count" is that of the last.

    Returns:
        The state dict without DDP's prefix, and the number of iterations trained (0 if unknown).
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; give the published checkpoint")
    try:
        with torch.serialization.safe_globals([(Unused, name) for name in UNUSED_CLASSES]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} can't be read as a checkpoint ({describe_load_error(error)})") from error
    content = content if isinstance(content, dict) else {}
    state = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), content)
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"{path} holds no state dict of tensors, neither itself nor under model or state_dict")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    last = content.get("iter_count")
    step = last + 1 - first_iteration if isinstance(last, int) else content.get("global_step")
    return dict(state), step if isinstance(step, int) else 0


def translate_state_dict(
    state: Mapping[str, Tensor], method: Method, tasks: Sequence[str], names: Collection[str] = ()
) -> Translation:
    """Translate the authors' state dict to our names.

    Args:
        state: the authors' tensors.
        method: whose rules to use.
        tasks: names of the tasks of our model, in the order of its config.
        names: of the tensors of our model, for a method that decides by them (:attr:`Method.prepare`).

    Raises:
        UserError: no rule matches a key (nothing is dropped silently), or the tasks are in another order.
    """
    listed = [task for task in method.tasks if task in tasks]
    if listed != list(tasks):  # normalisations that run over all tasks' channels would be shuffled
        raise UserError(f"{method.name} lists its tasks as {', '.join(listed)}, the config as {', '.join(tasks)}")
    if method.prepare is not None:
        state = method.prepare(dict(state), names)
    patterns = [(_compile_pattern(rule.source, listed), rule) for rule in method.rules(state)]
    translated: State = {}
    unused_keys, unknown = [], []
    for key, value in state.items():
        for pattern, rule in patterns:
            name = _translate_key(pattern, key, rule, listed)
            if name is not None:
                break
        else:
            unknown.append(key)
            continue
        if not name:
            unused_keys.append(key)
        elif name in translated:
            raise ValueError(f"two keys of {method.name} become {name}, the second is {key}")
        else:
            translated[name] = value if rule.convert is None else rule.convert(value)
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(state)} keys are not known of {method.name} with the tasks {', '.join(listed)}, "
            f"the first: {unknown[0]}; is it a checkpoint of another method, or for other tasks?"
        )
    return Translation(translated, unused_keys)


def check_state_dict(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], method: str) -> None:
    """Raise ``UserError`` unless ``state`` has exactly the names and shapes of ``expected``."""
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    for verb, names in (("lacks", missing), ("has too much:", unexpected)):
        if names:
            raise UserError(
                f"the checkpoint {verb} {len(names)} of the tensors of the model that the config describes, the first: "
                f"{min(names)}; give the config of the published {method} (backbone, tasks)"
            )
    wrong = [
        f"{k} {tuple(v.shape)} instead of {tuple(expected[k].shape)}"
        for k, v in state.items()
        if v.shape != expected[k].shape
    ]
    if wrong:
        raise UserError(f"{len(wrong)} tensors have another shape in the model of the config: {'; '.join(wrong[:3])}")
    for name, tensor in state.items():
        check_tensor_values(name, tensor, expected[name], f"the checkpoint of {method}")


def _compile_pattern(source: str, tasks: Sequence[str]) -> re.Pattern[str]:
    """Compile the pattern of a rule."""
    groups = {f"{{{name}}}": f"(?P<{name}>{'|'.join(map(re.escape, tasks))})" for name in ("task", "other")}
    groups["*"] = "(?P<rest>.+)"
    groups |= {f"{{{name}}}": rf"(?P<{name}>\d+)" for name in ("index", "n", "m")}
    return re.compile("".join(groups.get(part, re.escape(part)) for part in re.split(r"(\{\w+\}|\*)", source)))


def _translate_key(pattern: re.Pattern[str], key: str, rule: Rule, tasks: Sequence[str]) -> str | None:
    """Return our name of ``key``; empty if it is dropped, None if the rule does not match."""
    match = pattern.fullmatch(key)
    if match is None:
        return None
    groups = match.groupdict()
    if "index" in groups:
        if int(groups["index"]) >= len(tasks):
            return None
        groups["task"] = tasks[int(groups["index"])]
    return "" if rule.target is None else rule.target.replace("*", "{rest}").format(**groups)
