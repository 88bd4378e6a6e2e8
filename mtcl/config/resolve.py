"""Resolve what a config names: classes of mtcl and their arguments."""

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from omegaconf import OmegaConf

from mtcl.errors import ParameterError, UserError

T = TypeVar("T")


def plain(config: Any) -> Any:
    """Return a config node as plain Python containers with interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


PACKAGES = {  # group -> what its classes are, and the package they come from
    "data": ("dataset", "mtcl.data"),
    "decoder": ("Decoder", "mtcl.models"),
    "regularizer": ("Regularizer", "mtcl.regularizers"),
}


# Where the modules are that a saved config may name by their place of before version 0.2: old -> new, longest first.
MOVED = {
    "mtcl.contrastive.regularizer": "mtcl.regularizers.contrastive",
    "mtcl.contrastive": "mtcl.regularizers",
    "mtcl.data.nyud": "mtcl.data.datasets.nyud",
    "mtcl.data.pascal": "mtcl.data.datasets.pascal_context",
    "mtcl.data.rooms": "mtcl.data.datasets.rooms",
}


def current_name(target: str) -> str:
    """Return the dotted name that a ``_target_`` of an older config has today."""
    for old, new in MOVED.items():
        if target.startswith(f"{old}."):
            return new + target.removeprefix(old)
    return target


@contextmanager
def add_key_prefix(prefix: str) -> Iterator[None]:
    """Put the config's ``prefix`` (``"regularizer.options."``) before the parameter that a constructor refuses."""
    try:
        yield
    except ParameterError as error:
        raise UserError(f"{prefix}{error}") from error


def locate(target: str, group: str, kind: type | None = None, required_attribute: str | None = None) -> Any:
    """Return the class that a config's ``_target_`` names.

    A config may come out of a checkpoint of a stranger: only the package of its group is imported from.

    Args:
        target: dotted name of the class; names of before version 0.2 are resolved, too (:data:`MOVED`).
        group: config group, a key of :data:`PACKAGES`.
        kind: base class that it must have, if any.
        required_attribute: attribute that it must have, if any.

    Raises:
        UserError: it is not a class of mtcl, of the group's package, or of that kind.
    """
    module, _, name = current_name(str(target)).rpartition(".")
    if not module.startswith("mtcl."):
        raise UserError(f"{group}._target_={target} is not part of mtcl, so it is not imported")
    expected, package = PACKAGES[group]
    if not f"{module}.".startswith(f"{package}."):
        raise UserError(f"{group}._target_={target} is not a {expected} of {package}")
    try:
        located = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{group}._target_={target} does not exist") from error
    if not isinstance(located, type) or (kind is not None and not issubclass(located, kind)):
        raise UserError(f"{group}._target_={target} is not a {expected}")
    if required_attribute is not None and not hasattr(located, required_attribute):
        raise UserError(f"{group}._target_={target} is not a dataset")
    return located


def construct(factory: Callable[..., T], group: str, /, *args: Any, **options: Any) -> T:
    """Call ``factory(*args, **options)`` with the options of a config.

    Raises:
        UserError: an option does not exist, or the factory refuses its value; the message names the key
            ``group.option``.
    """
    names = [name for name, p in inspect.signature(factory).parameters.items() if p.kind != p.VAR_KEYWORD]
    for name in options:
        if name not in names:
            raise UserError(
                f"{group}.{name} is not an option of {factory.__name__}; it has {', '.join(names[len(args) :])}"
            )
    try:
        return factory(*args, **options)
    except ParameterError as error:
        raise UserError(f"{_find_key(group, error.parameter)}{error.problem}") from error


def _find_key(group: str, parameter: str) -> str:
    """Return the key of a parameter: ``data.options.num_classes``, but ``data.root``, which is no option."""
    from mtcl.config.schema import RULES  # which needs this module

    parent = group.rpartition(".")[0]
    above = f"{parent}.{parameter}" if parent else parameter
    return above if f"{group}.{parameter}" not in RULES and above in RULES else f"{group}.{parameter}"
