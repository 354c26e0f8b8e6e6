"""What can be checked of how the code is written: sizes, docstrings, imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for folder in ("nanoip2p", "", "weights") for path in sorted((ROOT / folder).glob("*.py"))]
SHOWN = {path.name: ast.parse(path.read_text()) for path in FILES}


def functions_and_classes(node, prefix=""):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield prefix + child.name, child
        if isinstance(child, ast.ClassDef):
            yield from functions_and_classes(child, f"{prefix}{child.name}.")


@pytest.mark.parametrize("name", SHOWN)
def test_a_file_fits_in_one_sitting(name):
    tree = SHOWN[name]
    assert len(next(path for path in FILES if path.name == name).read_text().splitlines()) <= 350
    for function, node in functions_and_classes(tree):
        assert isinstance(node, ast.ClassDef) or node.end_lineno - node.lineno < 60, function


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_public_is_explained(name):
    """But for `forward`, which the docstring of its class tells."""
    if name != "__init__.py":
        assert ast.get_docstring(SHOWN[name])
    for shown, node in functions_and_classes(SHOWN[name]):
        if not any(part.startswith("_") for part in shown.split(".")) and not shown.endswith(".forward"):
            assert ast.get_docstring(node), shown


@pytest.mark.parametrize("name", SHOWN)
def test_peers_stay_in_the_tests(name):
    for node in ast.walk(SHOWN[name]):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
        assert not {module.split(".")[0] for module in modules} & {"diffusers", "transformers"}
