"""Files are written whole or not at all, read with errors that name the line, and claimed by one job."""

import builtins
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_editor import write_tiny_editor

import sample
from nanoip2p.checkpoint.load import open_checkpoint
from nanoip2p.checkpoint.lora import write_lora
from nanoip2p.checkpoint.save import convert
from nanoip2p.checkpoint.tensors import read_metadata, read_tensors, read_weights
from nanoip2p.common import files
from nanoip2p.common.files import (
    append,
    check_writable,
    claim_folder,
    inside,
    locked,
    mend_last_line,
    read_json,
    read_rows,
    regular,
    replacing,
    write_json,
)
from nanoip2p.common.plots import plot
from nanoip2p.common.saving import save_image
from nanoip2p.common.schema import checked, checked_rows
from nanoip2p.tokenizer import load_tokenizer


def read_jsonl(path):
    return checked_rows(path, {})


def test_every_new_file_has_the_rights_that_the_umask_leaves(tmp_path):
    """Not only its owner reads it, as with safetensors 0.8 (findings/safetensors-saves-for-one-user.sh)."""
    recipe = {"edit": ["make it night"], "negative": "", "steps": 4, "sampler": "lcm", "cfg_text": 2.0,
              "cfg_image": 1.0, "seed": 0, "weights": "w"}
    before = os.umask(0o027)
    try:
        write_tiny_editor(tmp_path / "editor", small=True)
        convert(open_checkpoint(tmp_path / "editor"), tmp_path / "single.safetensors")
        factors = torch.zeros(1, 8, 3, 3), torch.zeros(4, 1)
        write_lora(tmp_path / "lora.safetensors", {"conv_in": factors}, alpha=1)
        for ending in (".png", ".jpg", ".webp"):
            save_image(Image.new("RGB", (8, 8)), tmp_path / f"picture{ending}", recipe)
        append(tmp_path / "rows.jsonl", {"a": 1})
        write_json({}, tmp_path / "made" / "settings.json")
        assert plot(tmp_path / "plot.png", lambda axes: axes.plot([1, 2], label="a"), (2, 2), xlabel="x")
    finally:
        os.umask(before)
    rights = {path.relative_to(tmp_path): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert len(rights) > 20 and all(
        mode == (0o750 if (tmp_path / path).is_dir() else 0o640) for path, mode in rights.items()), rights


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    for interruption in (KeyboardInterrupt, OSError):
        with pytest.raises(interruption), replacing(path) as temporary:
            temporary.write_text("ne")
            raise interruption
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_file_of_another_user_is_named_with_advice(tmp_path, capsys, monkeypatch):
    """As diffusers leaves one with safetensors 0.8. Root may read all files, so the refusal is a fake."""
    write_tiny_editor(tmp_path / "editor", small=True)
    weights, usual = tmp_path / "editor/unet/diffusion_pytorch_model.safetensors", builtins.open

    def refuse(file, *more, **named):
        if Path(file) == weights:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return usual(file, *more, **named)

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    picture = Path(sample.__file__).with_name("weights") / "nano-ip2p" / "examples" / "house.png"
    assert sample.main(["--weights", str(tmp_path / "editor"), "--input", str(picture), "--edit", "a",
                        "--output", str(tmp_path / "out.png")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(weights) in said and "ask its owner" in said, said
    assert not (tmp_path / "out.png").exists()


def test_unwritable_places(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "a.png", tmp_path / ("x" * 300 + ".png"), "/dev/null"):
        with pytest.raises(ValueError) as caught:
            check_writable(path)
        assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match="/dev/null"), replacing("/dev/null"):
        pass
    check_writable(tmp_path / "new" / "a.png")
    assert list((tmp_path / "new").iterdir()) == []


def test_rows_of_every_kind_of_file(tmp_path):
    contents = {"a.jsonl": b'\xef\xbb\xbf{"input": "x", "n": 1}\r\n\n {"input": "\xc3\xbc"}',
                "a.csv": '"input",n\n"two\nlines",1\nü,2,3\n'.encode(), "a.txt": "x\n \rü\n".encode()}
    rows = {}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        rows[name] = list(read_rows(tmp_path / name))
    assert rows["a.jsonl"] == [(1, {"input": "x", "n": 1}), (3, {"input": "ü"})]
    assert [(number, row["input"]) for number, row in rows["a.csv"]] == [(3, "two\nlines"), (4, "ü")]
    assert rows["a.txt"] == [(1, {"input": "x"}), (3, {"input": "ü"})]
    (tmp_path / "a.txt").write_bytes(contents["a.jsonl"])
    assert list(read_rows(tmp_path / "a.txt", ".jsonl")) == rows["a.jsonl"]
    assert read_jsonl(tmp_path / "a.txt") == [row for _, row in rows["a.jsonl"]]
    for name in ("absent.csv", "absent.jsonl"):
        with pytest.raises(ValueError, match=f"{name} cannot be read: No such file"):
            list(read_rows(tmp_path / name))


@pytest.mark.parametrize("line", [
    b"[1]", b'{"a": ', b'{"a": "\xff"}', b"[" * 100_000, b'{"a": 1} {}', b'{"a": "' + b"x" * 2**20,
], ids=["list", "cut", "latin", "deep", "more", "long"])
def test_a_broken_line_is_named_or_collected(line, tmp_path):
    path, problems = tmp_path / "a.jsonl", []
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    with pytest.raises(ValueError, match="a.jsonl, line 2 is not a JSON object"):
        list(read_rows(path))
    assert list(read_rows(path, problems=problems)) == [(1, {"a": 1}), (3, {"a": 3})]
    assert len(problems) == 1 and problems[0].startswith("line 2 is not a JSON object")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("longest", [1, 2, 3, 7, 50])
def test_lines_are_those_of_the_whole_file_wherever_its_blocks_end(tmp_path, monkeypatch, end, longest):
    monkeypatch.setattr(files, "LONGEST_LINE", longest)
    path = tmp_path / "a.txt"
    for content in (b"", end, b"a", b"ab" + end + end + b"c", b"abc" * 9 + end + b"d" + end,
                    b"a" + end + b"bcd" * 9):
        path.write_bytes(content)
        problems = []
        rows = dict(read_rows(path, problems=problems))
        lines = dict(enumerate(content.splitlines(keepends=True), start=1))
        assert rows == {number: {"input": line.decode().strip()} for number, line in lines.items()
                        if line.strip() and len(line) <= longest}
        assert len(problems) == sum(len(line) > longest for line in lines.values())


@pytest.mark.parametrize("kind", [".jsonl", ".txt", ".csv"])
def test_a_long_line_takes_little_memory(tmp_path, kind):
    path = tmp_path / f"a{kind}"
    with path.open("wb") as file:
        file.truncate(50 * 10**6)  # zeros
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="longer than 1,048,576 bytes"):
            list(read_rows(path))
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [".jsonl", ".txt", ".csv"])
def test_a_fifo_is_refused(tmp_path, kind):
    os.mkfifo(tmp_path / f"a{kind}")
    for read in (lambda path: list(read_rows(path)), read_jsonl):
        with pytest.raises(ValueError, match="not a regular file"):
            read(tmp_path / f"a{kind}")


def test_after_a_kill_at_any_byte_whole_rows_stay(tmp_path):
    path, rows = tmp_path / "a.jsonl", [{"input": "a"}, {"input": "ü", "n": [1]}]
    assert read_jsonl(path) == []
    mend_last_line(path)
    assert not path.exists()
    for row in rows:
        append(path, row)
    content = path.read_bytes()
    first = content.index(b"\n")
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = rows[: (cut >= first) + (cut >= len(content) - 1)]
        assert read_jsonl(path) == whole
        mend_last_line(path)
        assert path.read_bytes() == b"".join(content.splitlines(True)[: len(whole)])


@pytest.mark.parametrize("content", [b"a cat", b'{"a": 1}\n[{"a": ', b'{"a": \n'])
def test_other_broken_files_are_refused_and_left_alone(content, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="line"):
        read_jsonl(path)


@pytest.mark.parametrize("read", [
    read_json, read_jsonl, mend_last_line, read_tensors, read_metadata, open_checkpoint,
    lambda path: list(read_rows(path, ".csv")), lambda path: append(path, {}),
    lambda path: read_weights(path.parent), lambda path: load_tokenizer(path.parent)])
def test_a_fifo_or_a_device_is_refused_at_once(read, tmp_path):
    for name in ("vocab.json", "model.safetensors"):
        os.mkfifo(tmp_path / name)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for the other end"))
    signal.alarm(2)
    try:
        with pytest.raises(ValueError, match="vocab.json.* is not a|model.safetensors.* is not a"):
            read(tmp_path / "vocab.json")
    finally:
        signal.alarm(0)
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="zero.json is not a regular file"):
        regular(tmp_path / "zero.json")


def test_a_full_disk_names_the_file_and_where_to_make_room(tmp_path):
    with pytest.raises(OSError) as caught, replacing(tmp_path / "out") as folder:
        folder.mkdir()
        with replacing(folder / "inner"):
            raise OSError(errno.ENOSPC, "")
    assert str(caught.value) == (
        f"{tmp_path / 'out'} cannot be written: No space left on device; make room in {tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_loses_no_row(tmp_path):
    path = tmp_path / "a.jsonl"
    append(path, {"input": "a"})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 7, hard))
    try:
        with pytest.raises(OSError):
            append(path, {"input": "b" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_jsonl(path) == [{"input": "a"}]
    mend_last_line(path)
    assert path.read_bytes() == before


def test_a_folder_belongs_to_one_job(tmp_path):
    folder, job = tmp_path / "new" / "out", {"size": (1, 2), "nested": {"seed": 0, "weights": "f" * 64}}
    claim_folder(folder, "job.json", job, "--out", {"made by": "me"})
    before = json.loads((folder / "job.json").read_text())
    assert before == {"made by": "me", "size": [1, 2], "nested": job["nested"]}
    (folder / "result").touch()
    claim_folder(folder, "job.json", job, "--out", {"made by": "you"})
    nested = job["nested"]
    for other, named in (({"size": (1, 3)}, "was begun with size = [1, 2], not [1, 3]"),
                         ({"nested": nested | {"seed": 1}}, "was begun with seed = 0, not 1"),
                         ({"nested": nested | {"weights": "0" * 64}}, "was not begun with the same weights"),
                         ({"late": True}, "was begun with late = None, not True")):
        with pytest.raises(ValueError) as error:
            claim_folder(folder, "job.json", job | other, "--out")
        assert str(error.value) == f"{folder} {named}; use the same setting, or another --out"
    assert json.loads((folder / "job.json").read_text()) == before
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="holds mine.txt but no job.json"):
        claim_folder(tmp_path, "job.json", job, "--out")


@pytest.mark.parametrize("name", ["autoencoder", "text encoder", "dataset", "networks", "job"])
@pytest.mark.parametrize("there", [None, 0, "f" * 16])
def test_what_is_too_long_to_show_is_named_in_plain_english(tmp_path, name, there):
    """Names for one thing and for several: no article fits both."""
    claim_folder(tmp_path / "out", "job.json", {name: there}, "--out")
    with pytest.raises(ValueError, match=f"out was not begun with the same {name}; use the same setting"):
        claim_folder(tmp_path / "out", "job.json", {name: "0" * 16}, "--out")


def test_true_is_no_number():
    assert checked(1, float, "x") == 1 and type(checked(1, float | None, "x")) is float
    for kind in (int, float, float | None, list[int]):
        with pytest.raises(ValueError, match=r"^x = \[?True\]? should be "):
            checked([True] if kind == list[int] else True, kind, "x")


def test_a_lock_excludes_other_processes_but_not_beyond_death(tmp_path):
    path = tmp_path / "new" / ".lock"
    code = ("import sys, time; from pathlib import Path; from nanoip2p.common.files import locked\n"
            "with locked(Path(sys.argv[1])) as held: print(held, flush=True); time.sleep(60 * held)")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def start():
        return subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True,
                                env=environment)

    first = start()
    assert first.stdout.readline() == "True\n"
    with locked(path) as held:
        assert not held
    threading.Timer(0.2, first.kill).start()
    with locked(path, wait=True) as held:
        first.communicate()
        assert held and start().communicate()[0] == "False\n"
        if not (child := os.fork()):  # inherits no lock, and must not free its parent's when it closes files
            os._exit(0)
        os.waitpid(child, 0)
        assert start().communicate()[0] == "False\n"


@pytest.mark.parametrize("name", ["", ".", "/", "..", "../x", "a/../../x", "a/..", "/etc/hostname", "//a",
                                  "a//b", "a\x1b[2J", "a\nb", "\x00", "\ud800"])
def test_a_name_in_data_stays_inside(name, tmp_path):
    with pytest.raises(ValueError, match="is not a file inside"):
        inside(tmp_path, name)


def test_links_in_data_stay_inside(tmp_path):
    root, other = tmp_path / "data", tmp_path / "other"
    for folder in (root / "a", other):
        folder.mkdir(parents=True)
        (folder / "x").touch()
    for link, target in (("data/out", other), ("data/a/up", "../../other/x"), ("data/in", "a"),
                         ("data/loop", "loop"), ("link", root)):
        (tmp_path / link).symlink_to(target)
    for name in ("a/x", "in/x", "in/missing", "./a/x", "a b/é"):
        assert inside(root, name) == root / name
        assert inside(tmp_path / "link", name) == tmp_path / "link" / name
    for name in ("out/x", "out/missing", "a/up", "in/up", "out"):
        with pytest.raises(ValueError, match="is a link that leads out of"):
            inside(root, name)
    inside(root, "loop")  # reading it is an error


def test_the_links_of_the_hubs_cache_lead_to_its_blobs(tmp_path):
    root = tmp_path / "datasets--a--b" / "snapshots" / "1"
    root.mkdir(parents=True)
    (root / "x").symlink_to("../../blobs/1")
    (root / "y").symlink_to("../../../other/1")
    with pytest.raises(ValueError, match="leads out"):
        inside(root, "x")
    (root.parent.parent / "blobs").mkdir()
    assert inside(root, "x") == root / "x"
    with pytest.raises(ValueError, match="leads out"):
        inside(root, "y")
