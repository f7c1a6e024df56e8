"""The house rules: imports go one way, Prefect stays above, torch stays in models/."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "corpora": {"corpora"},
    "models": {"models", "corpora"},
    "tasks": {"tasks", "models", "corpora"},
    "flows": {"flows", "tasks", "models", "corpora", "deployments"},
    "deployments": {"deployments", "models", "corpora"},
}
FILES = [p for room in MAY_IMPORT for p in sorted((ROOT / room).rglob("*.py"))]


def imports(tree: ast.AST) -> set[str]:
    """Return the top-level packages that a tree imports, at any depth."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    tree = ast.parse(path.read_text("utf-8"))
    assert imports(tree) & set(MAY_IMPORT) <= MAY_IMPORT[room]
    if room not in ("flows", "tasks"):
        assert "prefect" not in imports(tree)
    if room == "corpora":
        assert "torch" not in imports(tree)
    if room != "models":
        at_import = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        assert "torch" not in imports(at_import)


def test_every_room_is_checked() -> None:
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert packages == set(MAY_IMPORT)
