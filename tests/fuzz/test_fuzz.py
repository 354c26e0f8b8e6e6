"""Mutated inputs for every reader, and the proof that the list of readers is complete."""

import ast
import sys
from functools import partial
from pathlib import Path

import mutators
import pytest
from fuzz import Fuzzer, fuzz, problem_of
from readers import READERS

ROOT = Path(__file__).resolve().parents[2]
# What opens or parses a file; a function that calls one of these is a reader
OPENING = {
    "read_json", "read_rows", "checked_rows", "read_tensors", "read_metadata", "read_pickle", "open_image",
    "loads", "safe_open", "load_file", "ParquetFile", "read_bytes", "read_text", "DictReader", "open"}
# These read nothing that comes from outside, or hand a file on unread
EXEMPT = {
    "__main__.py:add", "__main__.py:make_parser",  # their own docstrings
    "files.py:append", "files.py:locked", "files.py:claim_folder", "files.py:mend_last_line",
    "finetune.py:start", "rendered.py:write_scenes", "tensors.py:write_tensors", "run_folder.py:flush",
    "magicbrush.py:score", "magicbrush.py:run", "calls.py:run", "sample.py:run", "pictures.py:edit_batch",
    "pictures.py:sweep", "pipeline.py:as_image", "trainer.py:load", "signals.py:flush",
    "signals.py:lasting_streams", "train.py:train", "web_ui.py:model_hash", "tune.py:card",
    "names.py:unused", "page.py:read"}


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def valid(fuzzer):
    """What is wrong with each valid input, and all functions (file:name) that read these inputs."""
    called = set()

    def trace(frame, *_):
        called.add((frame.f_code.co_filename, frame.f_code.co_name))

    def read(name, folder):
        sys.settrace(trace)
        try:
            READERS[name][1](folder)
        except ValueError as error:  # problem_of allows it
            raise AssertionError("a valid input is refused") from error
        finally:
            sys.settrace(None)

    problems = {name: problem_of(partial(read, name), fuzzer.folder(name)) for name in READERS}
    return problems, {f"{Path(file).name}:{name}" for file, name in called}


@pytest.mark.parametrize("name", READERS)
def test_the_valid_input_is_read(name, valid):
    assert valid[0][name] is None


def test_every_input_is_read_or_refused_in_one_line(fuzzer, monkeypatch):
    """20 inputs for each reader. `make fuzz` tries more."""
    met, structured = set(), dict(mutators.STRUCTURED)

    def noting(change):
        return lambda rng, content: met.add(change) or change(rng, content)

    for suffix, change in structured.items():
        monkeypatch.setitem(mutators.STRUCTURED, suffix, noting(change))
    others = mutators.raw, mutators.recipe
    for change in others:
        monkeypatch.setattr(mutators, change.__name__, noting(change))
    failures = fuzz(20 * len(READERS), 0, fuzzer)
    assert not failures, "\n\n".join(f"{name}, seed {seed!r}: {text}" for name, seed, text in failures[:5])
    assert met == {*structured.values(), *others}


def test_every_function_that_reads_is_reached_by_a_reader(valid):
    reached = valid[1]
    files = [*(ROOT / "nanoip2p").rglob("*.py"), *ROOT.glob("*.py")]
    readers = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                functions = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
                calls = {getattr(function, "attr", getattr(function, "id", "")) for function in functions}
                if calls & OPENING:
                    readers.add(f"{path.name}:{node.name}")
    assert sorted(readers - reached - EXEMPT) == []
    assert sorted(EXEMPT - readers) == []  # these no longer read
