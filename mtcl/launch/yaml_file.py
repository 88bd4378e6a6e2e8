"""Read the YAML files of studies and searches, in which every value is text and no key appears twice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mtcl.errors import UserError, suggest
from mtcl.safe_files import check_depth, read_text


class _Loader(yaml.BaseLoader):
    """Load every scalar as text, as a variant may be called ``off``; a repeated key is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} appears twice", key.start_mark
                )
            keys.add(key.value)
        return super().construct_mapping(node, deep)


def read_texts(path: Path) -> Any:
    """Return the content of a YAML file: lists, mappings and texts; ``UserError`` if it is none or repeats a key."""
    try:
        content = yaml.load(read_text(path), _Loader)
        check_depth(content, path)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not a readable YAML file: {' '.join(str(error).split())}.") from error
    return content


def check_mapping(path: Path, where: str, content: Any, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """Return a copy of a mapping; ``UserError`` names the file and the place of what is none, or has another key.

    Args:
        path: The file.
        where: What the mapping is in the file, for messages.
        content: Should be a mapping.
        keys: Those that it may have; None: any.
    """
    if not isinstance(content, dict):
        allowed = f" with keys among {', '.join(keys)}" if keys else ""
        raise UserError(f"{path}: {where} must be a mapping{allowed}.")
    for key in content:
        if keys is not None and key not in keys:
            hint = suggest(str(key), keys)
            raise UserError(f"{path}: {where} has an unknown key {key}{hint}; it may have {', '.join(keys)}.")
    return dict(content)
