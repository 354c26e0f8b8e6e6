"""The extra `app` gets gradio 6, not the gradio 3 that pip takes beside a newer Pillow."""

import errno
import os
import re
import socket
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tiny_editor import write_tiny_editor

from nanoip2p.app import __main__ as app

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


@pytest.mark.parametrize("version", [None, "3.36.1", "5.49.1"])
def test_without_gradio_6_one_line_says_what_to_install(version, monkeypatch, capsys):
    module = version and types.SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "gradio", module)  # None: an import fails
    assert app.main(["--no-browser", "--port", "0"]) == 2
    assert capsys.readouterr().err == "error: the page needs gradio 6: pip install 'nanoip2p[app]'\n"


@pytest.mark.parametrize("words, line", [
    (["--auth", "anna"], "--auth needs a name and a password"), (["--auth", ":x"], "--auth needs a name"),
    (["--auth", ""], "--auth needs a name"), (["--port", "99999"], "argument --port"),
    (["--weights", "no/such/folder"], "no/such/folder"),
])
def test_mistakes_are_one_line(words, line, capsys):
    pytest.importorskip("gradio", reason="the page needs pip install -e '.[app]'")
    assert app.main(["--no-browser", "--port", "0", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and line in error and error.count("\n") == 1


def test_a_port_in_use_is_one_line(capsys):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert app.main(["--no-browser", "--port", str(port)]) == 2
    reason = os.strerror(errno.EADDRINUSE)
    assert capsys.readouterr().err == f"error: --port {port}: {reason}; give another, or 0\n"


@pytest.mark.parametrize("words, fast", [([], None), (["--no-fast"], False), (["--fast"], True),
                                         (["--low-memory"], "not called")])
def test_a_cpu_gets_faster_layers_unless_memory_is_low(words, fast, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="the page needs pip install -e '.[app]'")
    from nanoip2p.app import page
    from nanoip2p.speed import fast as module
    called = []
    monkeypatch.setattr(module, "speed_up", lambda model, fast, say: called.append(fast))
    monkeypatch.setattr(page, "Page", lambda *_: (_ for _ in ()).throw(ValueError("it would open now")))
    assert app.main(["--no-browser", "--port", "0", "--device", "cpu", *words,
                     "--weights", str(write_tiny_editor(tmp_path / "tiny"))]) == 2
    assert (called or ["not called"]) == [fast]
