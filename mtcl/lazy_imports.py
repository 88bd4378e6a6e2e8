"""Import a package's names only once they are used: torch, timm and torchmetrics take seconds of every command."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def import_on_use(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's ``__getattr__`` (PEP 562), which imports a name's module when the name is first asked for.

    Args:
        package: its ``__name__``.
        modules: name -> module that defines it.
    """

    def getattr_of_package(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(modules[name]), name)
        import_module(package).__dict__[name] = value
        return value

    return getattr_of_package
