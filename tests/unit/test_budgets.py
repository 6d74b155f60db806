"""Budgets of the code's shape, so that it stays readable: long files, long functions, stray prints, import circles."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dino_exp"
FILES = sorted(PACKAGE.rglob("*.py"))


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [node.name for node in functions if length(node) > 70] == []


def test_nothing_prints_outside_the_command_line() -> None:
    prints = [
        path.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        if "cli" not in path.parts
    ]
    assert prints == []


def test_fsync_and_replace_stay_in_the_file_layer() -> None:
    users = {
        path.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
        if node.attr in ("fsync", "fdatasync", "replace", "rename")
    }
    assert users == {"fsio.py"}


def test_torch_distributed_stays_in_a_few_places() -> None:
    """What trains, saves and restores sees ranks through `dist`, the layouts, and the checkpoint's sharding."""
    users = {
        str(path.relative_to(PACKAGE).with_suffix(""))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"))
        or (isinstance(node, ast.Import) and any(name.name.startswith("torch.distributed") for name in node.names))
    }
    allowed = ("dist/ranks", "training/parallel", "training/sharded", "checkpoint/sharding/")
    assert {user for user in users if not user.startswith(allowed)} == set()
    assert len(users) >= 4
