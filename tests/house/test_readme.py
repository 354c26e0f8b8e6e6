"""What the README says exists: files, names in them, pictures, and nothing left out of its tree."""

import importlib
import importlib.util
import re
from functools import reduce
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
TREE = README.split("## What is in it")[1].split("```")[1]
TABLE = README.split("| paper | code |\n|---|---|\n")[1].split("\n\n")[0]
ROWS = [row.split("|")[2].strip() for row in TABLE.splitlines()]
PATHS = {path.name: path for folder in ("", "nanoip2p", "weights") for path in (ROOT / folder).glob("*.py")}


def module(path: Path):
    if path.parent.name == "nanoip2p":
        return importlib.import_module(f"nanoip2p.{path.stem}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("row", ROWS)
def test_every_name_that_the_paper_is_mapped_to_exists(row):
    parts = row.split("; ")
    for part in parts:
        file, names = re.match(r"`(\w+\.py)`: (.+)$", part).groups()
        for name in re.findall(r"`([\w.]+)`", names):
            reduce(getattr, name.split("."), module(PATHS[file]))  # AttributeError if there is none


def test_the_table_covers_the_paper():
    for place in ("3.1.1", "3.1.2", "3.2", "3.2.1", "4.1", "4.2", "equation 1", "equation 2", "equation 3",
                  "figure 2", "figure 3", "figure 4", "figure 8", "figure 10", "table 1", "appendix"):
        assert place in TABLE, place


def test_the_tree_has_every_file_and_no_other():
    named = set(re.findall(r"\w+\.py", TREE))
    assert named == {name for name in PATHS if name != "__init__.py"}


def test_every_picture_is_there_and_every_link_leads_somewhere():
    for file in (ROOT / "README.md", ROOT / "weights" / "README.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", file.read_text()):
            assert (file.parent / target).exists(), target


def test_every_file_that_is_named_exists():
    """`nanoip2p/x.py`, `tests/x.py`, `weights/...`: paths with a folder are meant from here."""
    for path in re.findall(r"`((?:nanoip2p|tests|weights)/[\w./-]+\.\w+)`", README):
        assert (ROOT / path).exists(), path
