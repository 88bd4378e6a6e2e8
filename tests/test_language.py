"""The code speaks the field's language: no fillers as names, no config keys below the config package."""

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import pytest
from helpers.common import ROOT

from mtcl.config.schema import RULES

FILLERS = frozenset(
    [
        "found",
        "told",
        "given",
        "own",
        "whole",
        "there",
        "left",
        "what",
        "words",
        "known",
        "place",
        "before",
        "after",
        "wanted",
        "seen",
        "taken",
        "kept",
        "said",
        "done",
        "held",
        "named",
        "meant",
        "gone",
    ]
)
SOURCES = [path for folder in ("mtcl", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
SOURCES += [ROOT / "train.py", ROOT / "evaluate.py"]
TESTS = [*sorted((ROOT / "tests").rglob("*.py")), ROOT / "noxfile.py"]
KNOWS_KEYS = ("config", "results", "launch", "cli")  # the packages that may name config keys
BELOW_CONFIG = [
    path
    for path in SOURCES
    if path.is_relative_to(ROOT / "mtcl") and path.relative_to(ROOT / "mtcl").parts[0] not in KNOWS_KEYS
]
DOTTED = re.compile(r"(?<![\w./])[a-z_]+(\.[a-z_]+)+(?![\w(/])")
PREFIXES = {key.rpartition(".")[0] for key in RULES if key.count(".") > 1}  # regularizer.options, ...


def find_keys(text: str) -> list[str]:
    """Return the config keys, and beginnings of such, that a text names."""
    dotted = [match[0] for match in DOTTED.finditer(text)]
    return [name for name in dotted if name in RULES or any(f"{name}.".startswith(f"{one}.") for one in PREFIXES)]


def find_bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every name that a file binds: variables, parameters, functions, classes, attributes and aliases."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node.lineno
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.alias(asname=str(name)):
                yield name, node.lineno


def find_texts(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the strings of a file that a user may read: all but docstrings."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value, node.lineno


def group_by_folder(paths: Iterable[Path]) -> list[tuple[Path, list[Path]]]:
    """Return folder -> its files, for a test per folder: one per file would take longer to start than to run."""
    by_folder = sorted(paths, key=lambda path: path.parent)
    return [(folder, list(files)) for folder, files in groupby(by_folder, key=lambda path: path.parent)]


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def name_folder(value: object) -> str | None:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else ""


@pytest.mark.parametrize(("folder", "paths"), group_by_folder([*SOURCES, *TESTS]), ids=name_folder)
def test_names_say_what_they_hold(folder: Path, paths: list[Path]):
    fillers = [
        f"{path.relative_to(ROOT)}, line {line}: {name}"
        for path in paths
        for name, line in find_bound_names(parse(path))
        if name in FILLERS
    ]
    assert not fillers, f"give these a name that says what they hold: {fillers}"


@pytest.mark.parametrize(("folder", "paths"), group_by_folder(BELOW_CONFIG), ids=name_folder)
def test_no_message_below_config_names_a_key(folder: Path, paths: list[Path]):
    keys = [
        f"{path.relative_to(ROOT)}, line {line}: {key}"
        for path in paths
        for text, line in find_texts(parse(path))
        for key in find_keys(text)
    ]
    assert not keys, f"name the constructor's parameter (mtcl.errors.ParameterError) instead of a config key: {keys}"


def test_the_search_for_keys_finds_them():
    assert find_keys("regularizer.options.num_pixels=0 must be at least 1; set trainer.precision=fp32") == [
        "regularizer.options.num_pixels",
        "trainer.precision",
    ]
    assert find_keys("of regularizer.options") == ["regularizer.options"]
    assert not find_keys("mtcl.data.Rooms reads data.json and decoder.logits.depth")
