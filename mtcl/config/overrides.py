"""The words ``key=value`` of a command, before Hydra reads them: paths need no quotes, ``~`` is the home folder."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from mtcl.entry.processes import quoted
from mtcl.entry.words import with_home

# Keys whose value is a path, or a part of one; or a word such as auto, hub, one.
PATHS: tuple[str, ...] = ("data.root", "data.cache", "data.labels", "backbone.weights", "resume", "checkpoint")
PATHS += ("predictions", "save_predictions", "name", "hydra.run.dir", "hydra.sweep.dir", "decoder.genotype")
VALUED_FLAGS = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p")
SIGNS = re.compile(r"[^\w ./:$%*@?|+,-]|[^\x00-\x7f]")  # of those that Hydra's grammar takes only in quotes


def readable(words: Sequence[str], sweeps: bool = False) -> list[str]:
    """Return a command's words as Hydra reads them: values of :data:`PATHS` in quotes where they need some.

    Args:
        words: of the command line; flags and keys that name no path are kept, but for ``~`` at a value's beginning.
        sweeps: a comma separates the values of several runs; else it is a part of the path.

    >>> readable(["data.root=/a=b", "name=run[1]", "resume=auto", "seed=1", "data.cache=null"])
    ["data.root='/a=b'", "name='run[1]'", 'resume=auto', 'seed=1', 'data.cache=null']
    """
    return [_readable(with_home(word), sweeps) for word in words]


def _readable(word: str, sweeps: bool) -> str:
    key, equals, text = word.partition("=")
    if not equals or key.lstrip("+") not in PATHS or (key.endswith("genotype") and text.startswith("{")):
        return word
    if not sweeps or _parsed(text) is not None:
        return f"{key}={_quoted_where_needed(text, sweeps)}"
    return f"{key}={','.join(_quoted_where_needed(with_home(f'={part}')[1:], sweeps) for part in text.split(','))}"


def _parsed(text: str) -> Any:
    """Return a value as Hydra reads it; None where it can't."""
    try:
        return OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        return None


def _quoted_where_needed(text: str, sweeps: bool) -> str:
    if text[:1] in ("'", '"'):
        return text
    override = _parsed(text)
    if override is not None:
        if override.is_sweep_override():
            return text if sweeps else quoted(text)
        value = override.value()
        if value is None or isinstance(value, str):
            return text
    return quoted(text)


def named_checkpoint(words: Sequence[str]) -> list[str]:
    """Return the words with the first that is a path and has no key, a run's folder say, as ``checkpoint=PATH``."""
    for place, word in enumerate(words):
        if word.startswith("-") or (place and words[place - 1] in VALUED_FLAGS):
            continue
        path = Path(os.path.expanduser(word))
        if path.exists() or (re.fullmatch(r"[^=~]+", word) and ("/" in word or path.suffix == ".pt")):
            return [*words[:place], f"checkpoint={quoted(path)}", *words[place + 1 :]]
    return list(words)


def expand_home(config: DictConfig, keys: Sequence[str] = PATHS) -> None:
    """Replace a ``~`` at the beginning of a path by the home folder, also in values that come from YAML files."""
    for key in keys:
        value = OmegaConf.select(config, key)
        if isinstance(value, str) and value.startswith("~"):
            with read_write(config), open_dict(config):
                OmegaConf.update(config, key, os.path.expanduser(value))


class Home(Callback):
    """Expands ``~`` in the path of a run's or a sweep's folder, also from a YAML file, before Hydra makes it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        expand_home(config, ["hydra.run.dir"])

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        expand_home(config, ["hydra.sweep.dir"])


def complaint(word: str, reason: str) -> str:
    """Say in one sentence why Hydra can't read a word, and what to type instead."""
    key, equals, text = word.partition("=")
    if not equals:
        named = Path(os.path.expanduser(word))
        if named.exists() or "/" in word:
            return f"{word} has no key; type the key before it, such as data.root={word} or resume={word}"
        return f"{word} is not of the form key=value; --help lists the groups, --cfg job all keys"
    sign = SIGNS.search(text)
    if sign is None or text[:1] in "[{'\"":
        return f"{word} can't be read ({reason}); a list is [a,b], a mapping {{a:b}}, quotes come in pairs"
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    typed = shlex.quote(f'{key}="{escaped}"')
    return f"{key}: the value holds {sign[0]} (character {sign.start() + 1}), which needs quotes; type {typed}"
