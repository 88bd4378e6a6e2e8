"""Prepare overrides ``key=value`` for Hydra, so that paths need no quotes, and explain what Hydra refuses."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from mtcl.config.quoting import expand_tilde, quote_value
from mtcl.config.renamed import explain_renamed_key, explain_renamed_value
from mtcl.config.schema import PATH_KEYS, RULES, flatten
from mtcl.errors import UserError, find_similar, first_line, suggest

QUOTED_KEYS = (*PATH_KEYS, "hydra.run.dir", "hydra.sweep.dir")
ALIASES = {"logger=null": "logger=none"}  # Hydra refuses null for a group that has a default
FLAGS_WITH_VALUE = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p")
SPECIAL_CHARACTERS = re.compile(
    r"[^\w ./:$%*@?|+,-]|[^\x00-\x7f]"
)  # of those that Hydra's grammar takes only in quotes


def quote_paths(args: Sequence[str], sweeps: bool = False) -> list[str]:
    """Return a command's arguments as Hydra reads them: paths in quotes where they need some.

    Args:
        args: of the command line; flags and keys that name no path are kept, but for ``~`` at a value's beginning.
        sweeps: a comma separates the values of several runs; else it is a part of the path.

    >>> quote_paths(["data.root=/a=b", "name=run[1]", "resume=auto", "seed=1", "data.cache=null"])
    ["data.root='/a=b'", "name='run[1]'", 'resume=auto', 'seed=1', 'data.cache=null']
    """
    return [_quote_path(expand_tilde(ALIASES.get(arg, arg)), sweeps) for arg in args]


def _quote_path(arg: str, sweeps: bool) -> str:
    key, equals, text = arg.partition("=")
    if not equals or key.lstrip("+") not in QUOTED_KEYS or (key.endswith("genotype") and text.startswith("{")):
        return arg
    if not sweeps or _parse_value(text) is not None:
        return f"{key}={_quote_if_needed(text, sweeps)}"
    return f"{key}={','.join(_quote_if_needed(expand_tilde(f'={part}')[1:], sweeps) for part in text.split(','))}"


def _parse_value(text: str) -> Any:
    """Return a value as Hydra reads it; None if it cannot."""
    try:
        return OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        return None


def _quote_if_needed(text: str, sweeps: bool) -> str:
    if text[:1] in ("'", '"'):
        return text
    override = _parse_value(text)
    if override is not None:
        if override.is_sweep_override():
            return text if sweeps else quote_value(text)
        value = override.value()
        if value is None or isinstance(value, str):
            return text
    return quote_value(text)


def add_checkpoint_key(args: Sequence[str]) -> list[str]:
    """Return the arguments with the first path that has no key, say a run folder, as ``checkpoint=PATH``."""
    for index, arg in enumerate(args):
        if arg.startswith("-") or (index and args[index - 1] in FLAGS_WITH_VALUE):
            continue
        path = Path(os.path.expanduser(arg))
        if path.exists() or (re.fullmatch(r"[^=~]+", arg) and ("/" in arg or path.suffix == ".pt")):
            return [*args[:index], f"checkpoint={quote_value(path)}", *args[index + 1 :]]
    return list(args)


def expand_home(config: DictConfig, keys: Sequence[str] = PATH_KEYS) -> None:
    """Replace a ``~`` at the beginning of a path by the home folder, also in values that come from YAML files."""
    for key in keys:
        value = OmegaConf.select(config, key)
        if isinstance(value, str) and value.startswith("~"):
            with read_write(config), open_dict(config):
                OmegaConf.update(config, key, os.path.expanduser(value))


class ExpandHome(Callback):
    """Expand ``~`` in the path of a run's or a sweep's folder, also from a YAML file, before Hydra creates it."""

    def on_run_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Expand the folder of a single run."""
        expand_home(config, ["hydra.run.dir"])

    def on_multirun_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Expand the folder of a sweep."""
        expand_home(config, ["hydra.sweep.dir"])


def explain_parse_error(override: str, reason: str) -> str:
    """Return a sentence on why Hydra cannot read an override and what to type instead."""
    key, equals, text = override.partition("=")
    if not equals:
        if "/" in override or Path(os.path.expanduser(override)).exists():
            return f"{override} has no key; type the key before it, such as data.root={override} or resume={override}"
        return f"{override} is not of the form key=value; --help lists the groups, --cfg job all keys"
    sign = SPECIAL_CHARACTERS.search(text)
    if sign is None or text[:1] in "[{'\"":
        return f"{override} can't be read ({reason}); a list is [a,b], a mapping {{a:b}}, quotes come in pairs"
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    typed = shlex.quote(f'{key}="{escaped}"')
    return f"{key}: the value holds {sign[0]} (character {sign.start() + 1}), which needs quotes; type {typed}"


def refuse_idle_regularizer_keys(overrides: Sequence[str], config: DictConfig) -> None:
    """Refuse keys of a regulariser in a command or an experiment that has none, where they would have no effect.

    A command that names its choice keeps them, so that a sweep of ``regularizer=none,contrastive`` can set them.

    Args:
        overrides: of the command, ``key=value`` or ``group=choice``.
        config: that they are composed to.

    Raises:
        UserError: there is such a key; the sentence names it and what to add.
    """
    if config.regularizer._target_ is not None or names_regularizer(overrides):
        return
    keys = [override for override in overrides if override.lstrip("+~").startswith("regularizer.")]
    if config.regularizer.weight:
        keys.append(f"regularizer.weight={config.regularizer.weight}")
    if config.balancing.get("regularizer_as_objective"):
        keys.append("balancing.regularizer_as_objective=true")
    if keys:
        raise UserError(
            f"{keys[0]} has no effect without a regularizer, and none is the default; add regularizer=contrastive, or "
            "another choice"
        )


def names_regularizer(overrides: Sequence[str]) -> bool:
    """Return whether a command chooses a file of the group ``regularizer``.

    >>> names_regularizer(["regularizer=none"]), names_regularizer(["regularizer.weight=0.5"])
    (True, False)
    """
    return any(override.lstrip("+").startswith("regularizer=") for override in overrides)


LOGGERS = ("csv", "mlflow", "none", "tensorboard", "wandb")  # the files in configs/logger
GLOBAL_GROUPS = ("experiment", "debug")  # set keys of many groups, and are no keys themselves
COMMON_GROUPS = ("optimizer", "trainer", "data", "backbone", "decoder")  # first of several keys of one name


def format_error(error: BaseException) -> str:
    """Return an error of composing a config as one sentence: the key or choice, and what there is instead."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        if renamed := explain_renamed_value(group, choice):
            return renamed
        other = f", or backbone.name={choice}, as timm calls it" if group == "backbone" and _is_of_timm(choice) else ""
        hint = suggest(choice, error.options)
        return f"{group}={choice} is not known{hint}; choose one of {', '.join(error.options)}{other}"
    if isinstance(error, MissingConfigException) and str(error.missing_cfg_file).startswith("logger/"):  # of a list
        choice = str(error.missing_cfg_file).partition("/")[2]
        return f"logger={choice} is not known{suggest(choice, LOGGERS)}; choose one of {', '.join(LOGGERS)}"
    cause = error.__cause__
    if isinstance(error, OverrideParseException):
        return explain_parse_error(error.override, first_line(cause or error))
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException) and cause.key:
        key = str(cause.full_key)
        if renamed := explain_renamed_key(key):
            return renamed
        typed = re.match(r"Could not override '([^']+)'", str(error))
        return _explain_unknown_key(key, cause, typed[1] if typed else key)
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return text.split(" full_key:")[0].split(" Set the environment variable")[0]


def _explain_unknown_key(key: str, cause: OmegaConfBaseException, typed: str) -> str:
    """Return a sentence on a key that the composed config lacks; it proposes only keys that the config has.

    Args:
        key: the typed key up to its first part that the config lacks.
        cause: OmegaConf's error, which knows the node.
        typed: the key as it was typed.
    """
    parent, siblings = key.rpartition(".")[0], _list_siblings(cause)
    if key in RULES and parent:  # of another choice of the group
        return f"the {key.partition('.')[0]} chosen here has no key {key}; {parent} has {', '.join(siblings)}"
    if similar := find_similar(str(cause.key), [*siblings, *(() if parent else GLOBAL_GROUPS)]):
        nearest = f"{parent}.{similar[0]}" if parent else similar[0]
        rest = typed.removeprefix(key)  # of trainr.max_steps: the group is misspelled, the rest may be right
        if rest and f"{nearest}{rest}" in _list_keys(cause.parent_node):
            nearest += rest
        return f"there is no config key {typed}; did you mean {nearest}?"
    if similar := _find_similar_keys(typed.rpartition(".")[2], cause.parent_node):
        return f"there is no config key {typed}; did you mean {' or '.join(similar)}?"
    return f"there is no config key {key}; {parent or 'the config'} has {', '.join(siblings)}"


def _find_similar_keys(name: str, node: Any) -> list[str]:
    """Return the keys of any group with this name or one much like it; at most three, the most used first.

    Args:
        name: the last part of a key.
        node: a node of the config; only keys of its config are returned.
    """
    by_name: dict[str, list[str]] = {}
    for key in _list_keys(node):
        if key in RULES:
            by_name.setdefault(key.rpartition(".")[2], []).append(key)
    similar = find_similar(name, by_name, cutoff=0.8)
    group = {key: key.partition(".")[0] for key in by_name[similar[0]]} if similar else {}
    order = {name: index for index, name in enumerate(COMMON_GROUPS)}
    return sorted(group, key=lambda key: (key.count("."), order.get(group[key], len(order))))[:3]


def _list_keys(node: Any) -> list[str]:
    """Return the dotted keys of the config that a node is a part of."""
    root = OmegaConf.to_container(node._get_root(), resolve=False) if isinstance(node, DictConfig) else {}
    return [key for key, _ in flatten(cast(dict[str, Any], root))]


def _list_siblings(error: OmegaConfBaseException) -> list[str]:
    parent = error.parent_node
    return [str(key) for key in parent if key not in ("hydra", "_target_")] if isinstance(parent, DictConfig) else []


def _is_of_timm(name: str) -> bool:
    import timm  # takes a moment

    return bool(timm.is_model(name))
