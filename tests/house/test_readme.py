"""Files, names, pictures and links in README.md and docs/ exist, and their commands parse."""

import importlib
import importlib.util
import re
import shlex
import subprocess
from functools import reduce
from pathlib import Path

import pytest
from parsed import parsed

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text()
         for path in [ROOT / "README.md", *DOCS, ROOT / "weights" / "README.md", ROOT / "CONTRIBUTING.md",
                      ROOT / "tests" / "benchmarks" / "RESULTS.md"]}
TREE = README.split("## What is in it")[1].split("```")[1]
TABLE = re.search(r"^\| paper \| code \|\n\|[-|]+\|\n((?:\|.*\n?)+)", "\n".join(PAGES.values()), re.M)[1]
ROWS = [row.split("|")[2].strip() for row in TABLE.splitlines()]
SCRIPTS = {path.name for path in ROOT.glob("*.py")}
CORE = {path.name for path in (ROOT / "nanoip2p").glob("*.py")} - {"__init__.py", "__main__.py"}
FOLDERS = {path.parent.name for path in (ROOT / "nanoip2p").glob("*/__init__.py")}
INSTALLED = {"nanoip2p-edit": "sample.py", "nanoip2p-train": "train.py",
             "nanoip2p-dataset": "make_dataset.py"}


def module(path: Path):
    if "nanoip2p" in path.parts:
        return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def find(name: str) -> Path:
    """A file as the table names it: from the root, or from nanoip2p/."""
    return next(path for path in (ROOT / name, ROOT / "nanoip2p" / name) if path.exists())


def commands(page: str):
    """The lines of a page, in fences or indented by four, that start a command of this repository."""
    text, fenced = PAGES[page].replace("\\\n", " "), False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        words = line.strip().removeprefix("$ ").removeprefix("OMP_NUM_THREADS=1 ")
        if (fenced or line.startswith("    ")) and re.match(r"(python |make \w|torchrun |nanoip2p-)", words):
            yield words


@pytest.mark.parametrize("row", ROWS)
def test_every_name_that_the_paper_is_mapped_to_exists(row):
    for part in row.split("; "):
        file, names = re.match(r"`([\w/]+\.py)`: (.+)$", part).groups()
        for name in re.findall(r"`([\w.]+)`", names):
            reduce(getattr, name.split("."), module(find(file)))  # AttributeError if there is none


def test_the_table_covers_the_paper():
    for place in ("3.1.1", "3.1.2", "3.2", "3.2.1", "4.1", "4.2", "equation 1", "equation 2", "equation 3",
                  "figure 2", "figure 3", "figure 4", "figure 8", "figure 10", "table 1", "appendix"):
        assert place in TABLE, place


def test_the_tree_has_the_scripts_the_core_and_every_folder():
    assert set(re.findall(r"\w+\.py", TREE)) == SCRIPTS | CORE
    assert {f"{folder}/" for folder in FOLDERS} <= set(re.findall(r"\w+/", TREE))


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 220


@pytest.mark.parametrize("page", [path.name for path in DOCS])
def test_a_page_begins_with_its_command(page):
    heading, first = [line for line in PAGES[f"docs/{page}"].splitlines() if line.strip()][:2]
    assert heading.startswith("# ")
    assert re.match(r"    (python|make|nanoip2p-)", first) or first.startswith("```")
    assert next(commands(f"docs/{page}"))


@pytest.mark.parametrize("page", PAGES)
def test_every_picture_is_there_and_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", PAGES[page]):
        assert ((ROOT / page).parent / target).exists(), target
    for path, heading in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", PAGES[page]):
        text = ((ROOT / page).parent / path if path else ROOT / page).read_text()
        headings = [re.sub(r"[^\w\- ]", "", line.lstrip("# ")).lower().replace(" ", "-")
                    for line in text.splitlines() if line.startswith("#")]
        assert heading in headings, heading


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    """`nanoip2p/x.py`, `tests/x.py`, `weights/...`: paths that begin so are meant from the root."""
    for path in re.findall(r"`((?:nanoip2p|tests|weights|docs)/[\w./-]+\.\w+)`", PAGES[page]):
        assert (ROOT / path).exists(), path


def test_every_row_of_the_compatibility_page_names_its_test():
    lines = PAGES["docs/compatibility.md"].splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    for *_, last in (cells for cells in rows if cells[0] != "| what"):
        names = re.findall(r"`([\w/]+\.py)::(\w+)`", last)
        assert names, last
        for file, name in names:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), (file, name)


def made():
    """The commands of this repository in every target of the Makefile."""
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    for target in targets:
        dry = ["env", "--unset=MAKEFLAGS", "make", "--dry-run", target]
        lines = subprocess.run(dry, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name, first in re.findall(r"for (\w+) in (\S+)", lines):  # the first value of a loop's variable
            lines = lines.replace(f"${name}", first)
        lines = re.sub(r"\\\n\s*", "", lines)
        yield from re.findall(r"\.venv/bin/(python .+?)(?: \|\||;|$)", lines, re.M)


@pytest.mark.parametrize("command", sorted({line for page in PAGES for line in commands(page)} | {*made()}))
def test_every_command_parses(command, monkeypatch):
    """By its own parser. Nothing runs; files in it need not exist; "..." stands for more flags."""
    program, *words = shlex.split(command.replace("<", "").replace(">", ""), comments=True)
    words = [word for word in words if word != "..."]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words) <= set(targets)
    elif program in INSTALLED or program in ("python", "torchrun"):
        while program == "torchrun" and not words[0].endswith(".py"):
            words.pop(0)
        if program in INSTALLED:
            script, argv = INSTALLED[program], words
        elif words[0] == "-m":
            script, argv = f"{words[1].replace('.', '/')}/__main__.py", words[2:]
            if not (ROOT / script).exists():
                return  # a module of another package, as pytest
        else:
            script, *argv = words
        main = module(ROOT / script).main
        if "--recipe" in argv or "--resume" in argv or "..." in command:  # needs a file, or is not complete
            argv = [*argv, "--help"]
        parsed(main, argv, monkeypatch)
