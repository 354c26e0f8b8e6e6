"""The extra `app` gets gradio 6, not the gradio 3 that pip takes beside a newer Pillow."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PINS = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.M))


def test_the_extra_wants_gradio_6():
    wanted = next(Requirement(text) for text in re.findall(
        r'"(gradio[^"]+)"', (ROOT / "pyproject.toml").read_text()))
    assert wanted.specifier.contains(PINS["gradio"])
    assert not any(wanted.specifier.contains(version) for version in ("3.36.1", "5.49.1", "7.0.0"))


def test_the_pinned_packages_are_what_gradio_wants():
    pytest.importorskip("gradio", reason="the page needs pip install -e '.[app]'")
    assert metadata.version("gradio") == PINS["gradio"]
    wanted = {need.name: need for need in map(Requirement, metadata.requires("gradio")) if not need.marker}
    for name in wanted.keys() & PINS.keys() | {"pillow"}:
        assert wanted[name].specifier.contains(PINS[name]), (name, wanted[name])
        assert wanted[name].specifier.contains(metadata.version(name)), name
