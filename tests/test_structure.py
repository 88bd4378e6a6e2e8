"""Lower floors never import higher ones."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mtcl"
FLOORS = ["losses", "metrics", "tasks", "data", "models", "contrastive", "training", "inference", "entry"]
# losses and metrics are one floor; models know nothing of data or tasks
FORBIDDEN = {
    floor: set(FLOORS[i + 1 :]) | ({"metrics"} if floor == "losses" else {"losses"} if floor == "metrics" else set())
    for i, floor in enumerate(FLOORS)
}
FORBIDDEN["models"] |= {"data", "tasks"}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module == "mtcl":
            names = [f"mtcl.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("mtcl.")}
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_no_higher_one(floor):
    files = sorted((PACKAGE / floor).rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & FORBIDDEN[floor], path


@pytest.mark.parametrize("floor", [f for f in FLOORS if f != "entry"])
def test_no_config_object_below_the_entry_points(floor):
    for path in (PACKAGE / floor).rglob("*.py"):
        text = path.read_text()
        assert "omegaconf" not in text, path
        assert "import hydra" not in text, path
