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
import torch
from packaging.requirements import Requirement
from tiny_editor import write_tiny_editor

from nanoip2p.app import __main__ as app
from nanoip2p.common import cli

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


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\n  Details"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
                 "you tried to allocate 4398046511104 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 4 GB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"), RuntimeError("std::bad_alloc"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("x" * 400 + " can't allocate memory " + "x" * 400),  # one_line leaves out the middle
])
def test_the_page_and_the_commands_know_each_lack_of_memory(error, capsys):
    gradio = pytest.importorskip("gradio", reason="the page needs pip install -e '.[app]'")
    from nanoip2p.app.page import in_words

    def work():
        raise error

    with pytest.raises(gradio.Error, match=r"^'Out of memory: make fewer samples"), in_words():
        work()
    assert cli.run(work, "stopped", "try less") == 2
    assert capsys.readouterr().err == "error: out of memory; try less\n"


def test_a_true_lack_of_memory_is_one():
    """What torch says on this machine. 2**50 bytes fit into no address space."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert cli.advised(caught.value, "less") == "less"


def test_on_the_page_other_errors_are_our_fault_or_one_line():
    gradio = pytest.importorskip("gradio", reason="the page needs pip install -e '.[app]'")
    from nanoip2p.app.page import in_words
    with pytest.raises(RuntimeError, match="size of tensor"), in_words():
        raise RuntimeError("size of tensor a must match")
    with pytest.raises(gradio.Error, match="^'a&lt;b c'$"), in_words():
        raise ValueError("a<b\nc")
