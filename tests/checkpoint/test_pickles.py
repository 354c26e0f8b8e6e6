"""Pickles of PyTorch: every tensor is read, and no code in the file runs."""

import argparse
import collections
import copyreg
import functools
import io
import os
import pickle
import pickletools
import re
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import nanoip2p.checkpoint.pickles
from nanoip2p.checkpoint.pickles import read_pickle

FORMATS = {"zip": True, "legacy": False}
TENSORS = {
    "half": torch.randn(3, 5).half(), "brain": torch.randn(7).bfloat16(), "full": torch.randn(2, 3, 4),
    "wide": torch.randn(2, dtype=torch.float64), "count": torch.tensor(12), "ids": torch.arange(9)[None],
    "bytes": torch.arange(5, dtype=torch.uint8), "mask": torch.tensor([True, False, True]),
    "turned": torch.randn(4, 6).T, "part": torch.randn(8, 8)[2:5, ::3], "none": torch.zeros(0, 4),
    "one number": torch.randn(1).expand(4, 2),
}
TENSORS |= {"tail": TENSORS["full"][1:], "again": TENSORS["full"]}  # shared storages
LITTLE = {"a": torch.randn(3), "b": torch.arange(2)}


def save(content, path, kind, **options):
    torch.save(content, path, _use_new_zipfile_serialization=FORMATS[kind], **options)
    return path


def same(a, b):
    return a.keys() == b.keys() and all(
        type(a[name]) is torch.Tensor and not a[name].requires_grad and a[name].device.type == "cpu"
        and a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def edit(path, change, at=3):
    """Pass the pickle of a file through `change`. at: index in the five pickles of a legacy file."""
    file = io.BytesIO(content := path.read_bytes())
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                new.writestr(name, change(old.read(name)) if name.endswith("/data.pkl") else old.read(name))
        return
    file.seek(0)
    ends = [0] + [[*pickletools.genops(file)] and file.tell() for _ in range(5)]
    begin, end = ends[at:at + 2]
    path.write_bytes(content[:begin] + change(content[begin:end]) + content[end:])


def inject(path, opcodes, at=3):
    """Add opcodes to a pickle. A pickled dict keeps their result; other pickles of a legacy file drop it."""
    if zipfile.is_zipfile(path) or at == 3:
        edit(path, lambda content: content[:-1] + push("outcome") + opcodes + b"s.", at)
    else:
        edit(path, lambda content: content[:2] + opcodes + b"0" + content[2:], at)


@pytest.mark.parametrize("kind", FORMATS)
def test_round_trip(kind, tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].bias.role = "an attribute"
    for content in (TENSORS, model.state_dict(), dict(model.named_parameters())):
        path = save(content, tmp_path / "x.bin", kind)
        assert same(read_pickle(path), content)


def test_numbers_stay_in_the_file_until_used(tmp_path):
    tensors = {"a": torch.randn(1000), "b": torch.randn(1000)}
    path = save(tensors, tmp_path / "x.ckpt", "zip")
    content = path.read_bytes()
    with torch.device("meta"):  # new tensors would be there
        read = read_pickle(path)
    begin = {name: content.index(tensor.numpy().tobytes()) for name, tensor in tensors.items()}
    assert read["b"].data_ptr() - read["a"].data_ptr() == begin["b"] - begin["a"]
    read["a"].zero_()
    assert path.read_bytes() == content


@pytest.mark.parametrize("kind", FORMATS)
def test_state_dict_within_bookkeeping(kind, tmp_path):
    inner = LITTLE | {"version": 3, 7: torch.ones(1), "deeper": {"c": torch.ones(1)}}
    outer = {"epoch": 4, "loose": torch.ones(2), "state_dict": inner, "optimizer": {0: torch.ones(3)}}
    circle = dict(LITTLE)
    circle["state_dict"] = circle
    for content in (inner, outer, {"state_dict": outer}, LITTLE | {"state_dict": None}, circle):
        assert same(read_pickle(save(content, tmp_path / "x.ckpt", kind)), LITTLE)


FOREIGN = """
class Callback: pass
class Names(list): pass
class Config:  # like omegaconf's
    def __getstate__(self):
        return {"_content": 1}
    def __setstate__(self, state):
        raise SystemExit("ran")
class Attributes(dict): pass
def function(): pass
"""


@pytest.fixture
def lightning(monkeypatch):
    """A module that exists while a file is written, but no longer when the file is read."""
    module = types.ModuleType("pytorch_lightning.callbacks")
    exec(FOREIGN, module.__dict__)
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        context.setitem(sys.modules, module.__name__, module)
        yield module


def test_foreign_classes_do_not_matter(lightning, tmp_path):
    callback = lightning.Callback()
    callback.best = [numpy.float32(1)]
    other = {
        "callbacks": {lightning.Callback: callback, lightning.Callback(): 2},
        "containers": [lightning.Config(), lightning.Attributes(), lightning.Names()],
        "more": (functools.partial(lightning.function, 1, a=2), Path("a"), argparse.Namespace(a=1)),
        "numpy": [numpy.float64(3.5), numpy.arange(3), numpy.dtype("f4"), {numpy.float32(1): 1}],
        "python": [{1, 2}, frozenset("a"), b"bytes", 2j, collections.defaultdict(list), int, len],
        "torch": [torch.half, torch.device("cpu"), torch.Size([3]), torch.ones(2).to_sparse(), nn.ReLU()],
    }
    path = save(other | {"state_dict": other | TENSORS}, tmp_path / "x", "zip")
    del sys.modules["pytorch_lightning.callbacks"], sys.modules["pytorch_lightning"]
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert same(read_pickle(path), TENSORS) and "pytorch_lightning" not in sys.modules


@pytest.mark.parametrize("kind", FORMATS)
def test_filled_containers_of_foreign_classes_are_refused_in_one_line(kind, lightning, tmp_path):
    """torch.load fills dicts and lists only. A file older than PyTorch 1.6 may name no foreign class."""
    for foreign in (lightning.Attributes(a=1), lightning.Names("ab"), lightning.Callback()):
        path = save(LITTLE | {"foreign": foreign}, tmp_path / "x.pt", kind)
        if kind == "legacy" or not isinstance(foreign, lightning.Callback):
            assert_one_line(path)
        else:
            assert same(read_pickle(path), LITTLE)


def compress(path):
    packed = path.with_suffix(".packed")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return packed


@pytest.mark.parametrize("kind", ["compressed", "shared"])
def test_a_file_that_unpacks_to_much_more_than_its_size_is_refused_before_that(kind, tmp_path, monkeypatch):
    zeros = torch.zeros(1).expand(2**20) if kind == "shared" else torch.zeros(2**20)
    path = save({"zeros": zeros}, tmp_path / "x.ckpt", "zip")
    if kind == "compressed":
        path = compress(path)
    assert same(read_pickle(path), {"zeros": zeros}), "4 MB are no harm"
    monkeypatch.setattr(nanoip2p.checkpoint.pickles, "FREE", 10**6)
    if kind == "compressed":
        monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match=r"to 4.2e\+06 bytes; the limit is 20 times its size plus 1e\+06"):
        read_pickle(path)


class Opcodes(bytes):
    """A program for the pickle machine. Each program below leaves a file "ran" in the working folder."""


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def push(value):
    """Opcodes for a value; for a tuple, the opcodes for each of its parts."""
    if isinstance(value, tuple):
        return b"(" + b"".join(map(push, value)) + b"t"
    return value if isinstance(value, Opcodes) else pickle.dumps(value, 2)[2:-1]


def named(name):
    return Opcodes("c{}\n{}\n".format(*name.split()).encode())


def call(function, *args, opcode=b"R"):
    return Opcodes((named(function) if isinstance(function, str) else function) + push(args) + opcode)


def saved(content):
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


SOURCE, SYSTEM, PICKLE = "open('ran', 'w').close()", named("os system"), named("torch.serialization pickle")
MAP = call("builtins map", SYSTEM, ["touch ran"], opcode=b"\x81")
GADGETS = {
    "os.system": call(SYSTEM, "touch ran"), "posix.system": call("posix system", "touch ran"),
    "Popen": call("subprocess Popen", ["touch", "ran"]), "open": call("builtins open", "ran", "w"),
    "eval": call("builtins eval", SOURCE), "exec": call("builtins exec", SOURCE),
    "eval of Python 2": call("__builtin__ eval", SOURCE), "__import__": call("builtins __import__", "bait"),
    "getattr": call(call("builtins getattr", call("builtins __import__", "os"), "system"), "touch ran"),
    "import_module": call("importlib import_module", "bait"), "a name is an import": named("bait os"),
    "runpy": call("runpy run_path", "bait.py"), "torch.hub": call("torch.hub _load_local", ".", "bait"),
    "pickle.loads": call("pickle loads", pickle.dumps(Evil())),
    "torch.load": call("torch load", "evil.pt", None, PICKLE),
    "torch.serialization.load": call("torch.serialization load", "evil.pt", None, PICKLE),
    "_load_from_bytes": call("torch.storage _load_from_bytes", saved(Evil())),
    "numpy.load": call("numpy load", "evil.npy", None, True),
    "partial": call(call("functools partial", SYSTEM, "touch ran")),
    "BUILD": call(call(call("functools partial", SYSTEM), SYSTEM, ("touch ran",), {}, None, opcode=b"b")),
    "attrgetter": call(call(call("operator attrgetter", "system"), named("torch.hub os")), "touch ran"),
    "codecs": call("builtins exec", call("codecs decode", SOURCE.encode("utf-16"), "utf-16")),
    "STACK_GLOBAL": call(Opcodes(push("os") + push("system") + b"\x93"), "touch ran"),
    "INST": Opcodes(b"(" + push("touch ran") + b"ios\nsystem\n"),
    "OBJ": Opcodes(b"(" + SYSTEM + push("touch ran") + b"o"),
    "NEWOBJ": call("builtins bytes", MAP, opcode=b"\x81"), "EX": call("builtins bytes", MAP, opcode=b"}\x92"),
    "EXT1": call(Opcodes(b"\x82\xe0"), "touch ran"), "EXT2": call(Opcodes(b"\x83\xe0\0"), "touch ran"),
    "EXT4": call(Opcodes(b"\x84\xe0\0\0\0"), "touch ran"),
}
SILENT = {  # these leave no file, but the interpreter reports them
    "webbrowser": call("webbrowser open", "http://localhost:9/"), "pip": call("pip main", ["--version"]),
    "a module that prints": named("this s"), "print": call("builtins print", "ran"), "Python 2": b"U\1\xff",
    "warning": call("warnings warn", "ran"), "socket": call("socket create_connection", ("localhost", 9)),
    "library": call("ctypes CDLL", "libc.so.6"), "remove": call("os remove", "bait.py"),
}

READ = {"Popen", "open", "eval", "exec", "__import__", "runpy", "pickle.loads", "numpy.load", "warning"}


@pytest.fixture
def baits(tmp_path, monkeypatch):
    """A working folder with the files that the gadgets use. os.system gets the extension code 0xE0."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("bait.py", "hubconf.py"):
        Path(name).write_text(f"import os\n{SOURCE}\ndef bait(): pass\n")
    torch.save(Evil(), "evil.pt")
    numpy.save("evil.npy", numpy.array([Evil()], dtype=object))
    copyreg.add_extension("posix", "system", 0xE0)
    yield
    copyreg.remove_extension("posix", "system", 0xE0)
    sys.modules.pop("bait", None)


@pytest.mark.parametrize("name", GADGETS)
def test_the_bait_is_live(name, baits):
    result = pickle.loads(b"\x80\x02" + GADGETS[name] + b".")
    if isinstance(result, subprocess.Popen):
        result.wait()
    assert Path("ran").exists()


EVENTS, LISTENERS = set(), []
"x".encode("cp437")  # imports the codec now; else zipfile would, at its first name


@sys.addaudithook
def listen(event, args):
    if LISTENERS:
        EVENTS.add((event, str(args[0])) if event in ("open", "import") else event)


def watched(path):
    """The result or message of read_pickle, and the interpreter's events meanwhile."""
    EVENTS.clear()
    LISTENERS.append(path)
    try:
        return read_pickle(path), set(EVENTS)
    except ValueError as error:
        return str(error), set(EVENTS)
    finally:
        LISTENERS.clear()


@pytest.mark.parametrize("name", [*GADGETS, *SILENT])
def test_nothing_runs(name, baits, capfd, recwarn):
    path = Path("x.ckpt")
    innocent = {event for kind in FORMATS for event in watched(save(LITTLE, path, kind))[1]}
    for kind, at in [("zip", 0), *(("legacy", at) for at in range(5))]:
        assert pickle.loads(b"\x80\x02\x82\xe0.") is os.system  # unpicklers know the code
        files, modules = sorted(os.listdir()), set(sys.modules)
        inject(save(LITTLE, path, kind), (GADGETS | SILENT)[name], at)
        read, events = watched(path)
        assert (isinstance(read, str) or same(read, LITTLE)) and events <= innocent
        assert name not in READ or kind == "legacy" or same(read, LITTLE)
        assert sorted(os.listdir()) == files and set(sys.modules) == modules
    assert capfd.readouterr() == ("", "") and not recwarn.list


@pytest.mark.parametrize("kind", FORMATS)
def test_tensors_saved_on_a_gpu_are_read_on_the_cpu(kind, tmp_path):
    path = save(LITTLE, tmp_path / "x.pt", kind)
    for old, new in [(b"\3\0\0\0cpu", b"\6\0\0\0cuda:0"), (b"ctorch\nFloat", b"ctorch.cuda\nFloat")]:
        edit(path, lambda content: content.replace(old, new))  # noqa: B023
        assert new in path.read_bytes()
    assert same(read_pickle(path), LITTLE)


def state_of_functions():
    found = [*vars(torch._utils).values(), *vars(nanoip2p.checkpoint.pickles).values()]
    return [(value, dict(vars(value)), value.__name__, getattr(value, "__defaults__", None))
            for value in found if isinstance(value, (types.FunctionType, type))]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
                                  "collections OrderedDict", "torch FloatStorage", "pathlib Path"])
def test_nothing_is_changed(name, kind, tmp_path):
    path, before = tmp_path / "x.ckpt", state_of_functions()
    for state in [({"keys": 1}, {}), (None, {"__defaults__": (1, 2), "__name__": "ran", "keys": 1})]:
        for then in (b"", push("a") + push(1) + b"s", push(1) + b"a", b"(" + push(1) + b"\x90"):
            inject(save(LITTLE, path, kind), call(name, *state, opcode=b"b") + then)
            read, _ = watched(path)
            assert (isinstance(read, str) or same(read, LITTLE)) and state_of_functions() == before


def test_sources_are_not_patched(tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    path = save(LITTLE, Path("x.pt"), "legacy")
    attributes = {"dump_patches": True, "__name__": "ran"}
    function = call("torch._utils _rebuild_parameter", None, attributes, opcode=b"b")
    inject(path, push(("module", function, "file.py", "source")) + b"Q")
    assert_one_line(path)
    assert os.listdir() == ["x.pt"] and not recwarn.list


def test_torchscript_is_not_run_and_tar_files_are_not_unpacked(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(torch.jit, "load", None)
    script, tar = save(LITTLE, tmp_path / "x.pt", "zip"), tmp_path / "y.pt"
    with zipfile.ZipFile(script, "a") as archive:
        archive.writestr("x/constants.pkl", b"\x80\x02).")
    with tarfile.open(tar, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    assert "torchscript" in watched(script)[0].lower() and not recwarn.list
    message, events = watched(tar)
    assert ".tar format" in message and not [event for event in events if "storages" in event[1]]


def assert_one_line(path, message="fetch it again"):
    with pytest.raises(ValueError, match=message) as caught:
        read_pickle(path)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()


def test_other_files_are_one_line(tmp_path):
    for content in (
        b"", b"Once upon a time there was a file.\n" * 50, b"<!DOCTYPE html>\n<html>" * 9, bytes(5000),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", b"F\x1b[31m\n.",
        pickle.dumps(LITTLE), b"PK\3\4" + bytes(99), b"\2" + bytes(7) + b"{}",
    ):
        (tmp_path / "x.ckpt").write_bytes(content)
        assert_one_line(tmp_path / "x.ckpt")


@pytest.mark.parametrize("kind", FORMATS)
def test_files_without_named_tensors_or_truncated_are_one_line(kind, tmp_path):
    path, nameless = tmp_path / "x.pt", {1: torch.ones(1)}
    for content in (3, {}, nameless, [torch.ones(1)], nn.Linear(1, 1), LITTLE | {"state_dict": nameless}):
        assert_one_line(save(content, path, kind), "no named tensors|GLOBAL torch.nn.modules.linear.Linear")
    content = save({"state_dict": LITTLE}, path, kind).read_bytes()
    for length in {*range(0, len(content), 61), len(content) - 1}:
        path.write_bytes(content[:length])
        assert_one_line(path)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("place", [
    (0, (7,), (1,)), (0, (2, 4), (4, 1)), (5, (2,), (1,)), (-1, (2,), (1,)), (0, (-1,), (1,)),
    (4, (3,), (-1,)), (0, (2**40, 2**40), (2**40, 1)), (0, 1, 1), (0, ("a",), (1,)),
])
def test_a_tensor_must_lie_in_its_storage(place, kind, tmp_path):
    path = save({"a": torch.ones(6)}, tmp_path / "x.pt", kind)
    honest, changed = rb"(?s)K\x00K\x06\x85q.K\x01\x85q.", b"".join(map(push, place))
    edit(path, lambda content: re.sub(honest, lambda _: changed, content))
    assert changed in path.read_bytes()
    assert_one_line(path)


def test_a_file_packed_again_with_compression(tmp_path):
    torch.save(TENSORS, tmp_path / "stored.pt")
    with zipfile.ZipFile(tmp_path / "stored.pt") as stored, \
            zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for part in stored.infolist():
            packed.writestr(part.filename, stored.read(part))
    read = read_pickle(tmp_path / "packed.pt")
    assert read.keys() == TENSORS.keys() and all(torch.equal(read[name], TENSORS[name]) for name in read)


def test_an_old_torch_reads_no_pickle(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.ckpt")
    assert read_pickle(tmp_path / "a.ckpt")
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cpu"))
    with pytest.raises(ValueError, match=r"torch 2\.9\.1\+cpu does not read safely; update"):
        read_pickle(tmp_path / "a.ckpt")
