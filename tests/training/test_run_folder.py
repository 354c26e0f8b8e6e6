"""Run folders: checkpoints are complete or absent; on resume, the log loses rows after the checkpoint."""

import errno
import json
import os
import shutil
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file

from nanoip2p.common.schema import checked_rows
from nanoip2p.training import run_folder as runs

FILES = [f"{name}.safetensors" for name in runs.FILES]


def write(run, step, keep=2):
    """A checkpoint whose numbers are all the step."""
    files = {name: {"w": torch.full((5,), float(step))} for name in runs.FILES}
    runs.write_checkpoint(run, step, files, {"batch": 4, "items": 9, "settings": {"lr": 1e-3}}, keep)


def names(run):
    return [path.name for path in runs.checkpoints(run)]


def hidden(run):
    return [path.name for path in (run / runs.CHECKPOINTS).iterdir() if not path.name.isdigit()]


def newest(run):
    """The step of the newest checkpoint, and the warnings. Checks that its files are of that step."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        folder, state = runs.newest_checkpoint(run)
    assert folder.name == f"{state['step']:07d}" and state["batch"] == 4
    assert all((load_file(folder / name)["w"] == state["step"]).all() for name in FILES)
    return state["step"], [str(warning.message) for warning in told]


def test_a_checkpoint_holds_what_it_was_given_and_the_newest_stay(tmp_path):
    for step in (1, 2, 5, 12):
        write(tmp_path, step)
        assert newest(tmp_path) == (step, [])
    assert names(tmp_path) == ["0000005", "0000012"] and hidden(tmp_path) == []
    write(tmp_path, 13, keep=1)
    assert names(tmp_path) == ["0000013"]


class Crash(BaseException):
    """A power cut: no code of nanoip2p may catch this."""


OPERATIONS = [(runs, "write_tensors"), (runs, "flush"), (os, "fsync"), (os, "replace"),
              (runs.Path, "write_text"), (runs.Path, "mkdir"), (runs.shutil, "rmtree")]


@pytest.mark.parametrize("error", [Crash, OSError])
@pytest.mark.parametrize("owner, name", OPERATIONS, ids=[name for _, name in OPERATIONS])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_interrupted_write_leaves_a_whole_checkpoint_or_the_one_before(
        tmp_path, monkeypatch, owner, name, after, error):
    """The write fails before or after the 1st, 2nd, ... call of an operation, until it makes no such call."""
    plain = getattr(owner, name)
    for ends_at in range(1, 99):
        run = tmp_path / str(ends_at)
        write(run, 1, keep=1)
        count = iter(range(1, 10**9))

        def ending(*args, ends_at=ends_at, count=count, **settings):
            now = next(count) == ends_at
            if now and not after:
                raise error
            result = plain(*args, **settings)
            if now:
                raise error
            return result

        monkeypatch.setattr(owner, name, ending)
        ended = False
        try:
            write(run, 2, keep=1)
        except error:
            ended = True
        monkeypatch.undo()
        step, told = newest(run)
        assert step in (1, 2) and told == []
        write(run, 3, keep=1)                                   # and the run goes on
        assert newest(run) == (3, []) and names(run) == ["0000003"]
        if not ended:
            assert ends_at > 1
            return
    raise AssertionError("no end of calls")


def test_nothing_gets_its_name_before_it_is_on_the_disk(tmp_path, monkeypatch):
    """The order: flush every file and the folder, rename the folder, flush the folder above."""
    events, replace = [], os.replace
    monkeypatch.setattr(runs, "flush", lambda path: events.append(path.name))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(f"-> {b.name}") or replace(a, b))
    write(tmp_path, 7)
    for name in FILES:
        assert events.index(f"-> {name}") < events.index(name)
    renamed = events.index("-> 0000007")
    assert {*FILES, "state.json"} <= set(events[:renamed]) and events[renamed - 1].startswith(".0000007.")
    assert events[renamed + 1 :] == ["checkpoints", tmp_path.name]


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])  # two bytes: the last may be a line break


def text(content):
    return lambda path: path.write_text(content)


DAMAGES = {
    "cut": ("ema.safetensors", cut),
    "gone": ("unet.safetensors", os.remove), "empty": ("unet.safetensors", text("")),
    "no state": ("state.json", os.remove),
    "cut state": ("state.json", cut), "empty state": ("state.json", text("")),
    "bytes": ("state.json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    "list": ("state.json", text("[]")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(tmp_path, damage):
    write(tmp_path, 1)
    write(tmp_path, 2)
    name, harm = DAMAGES[damage]
    harm(tmp_path / runs.CHECKPOINTS / "0000002" / name)
    step, [told] = newest(tmp_path)
    assert step == 1 and f"0000002/{name}" in told and "going back" in told and "\n" not in told
    harm_all = tmp_path / runs.CHECKPOINTS / "0000001" / "state.json"
    harm_all.unlink()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no checkpoint") as error:
        runs.newest_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_checkpoints_do_not_push_out_sound_ones(tmp_path):
    """After a damaged checkpoint, a run writes a checkpoint of an earlier step, which has to stay."""
    write(tmp_path, 2)
    write(tmp_path, 6)
    cut(tmp_path / runs.CHECKPOINTS / "0000006" / FILES[0])
    write(tmp_path, 4, keep=1)
    assert newest(tmp_path) == (4, []) and names(tmp_path) == ["0000004"]


def test_a_checkpoint_takes_the_place_of_a_damaged_one_of_its_step(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / runs.CHECKPOINTS / "0000002" / FILES[0]).unlink()
    write(tmp_path, 2)
    assert newest(tmp_path) == (2, [])


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_without_checkpoints_is_one_line(tmp_path, there):
    if there:
        (tmp_path / runs.CHECKPOINTS / ".0000003.tmp").mkdir(parents=True)
        (tmp_path / runs.CHECKPOINTS / "notes").mkdir()
    assert runs.checkpoints(tmp_path) == []
    with pytest.raises(ValueError, match="has no checkpoint to resume from") as error:
        runs.newest_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_going_on_drops_rows_of_the_future_and_a_line_cut_in_the_middle(tmp_path):
    log = runs.Log(tmp_path, 0)
    for step in (2, 4, 6, 8):
        log.write({"step": step, "loss": 1 / step})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert [row["step"] for row in checked_rows(tmp_path / "log.jsonl", {})] == [2, 4, 6, 8]
    runs.Log(tmp_path, 4).write({"step": 5, "loss": 0.2})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 2, "loss": 0.5}, {"step": 4, "loss": 0.25}, {"step": 5, "loss": 0.2}]
    runs.Log(tmp_path, 0)
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_losses_are_drawn_where_matplotlib_is(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    log = runs.Log(tmp_path, 0)
    log.write({"step": 1, "loss": 1.0, "lr": 0.1})
    log.write({"step": 2, "loss": 0.5, "validation": 0.6, "validation_ema": 0.7})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    assert runs.plot_log(tmp_path) is False and not (tmp_path / "loss.png").exists()
    monkeypatch.undo()
    from matplotlib.axes import Axes
    drawn, plot = {}, Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **how: drawn.update({how["label"]: (x, y)})
                        or plot(self, x, y, **how))
    assert runs.plot_log(tmp_path) is True
    assert drawn == {"training": ([1, 2], [1.0, 0.5]), "validation": ([2], [0.6]),
                     "validation, averaged": ([2], [0.7])}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "loss.png"]
    shutil.rmtree(tmp_path)


# What a run writes lies in its folder

PLACES = [*[f"weights/{part}" for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")],
          "checkpoints", "checkpoints/0000002", "checkpoints/.0000003.tmp", "weights", "tensorboard",
          "log.jsonl", ".lock", "loss.png", "samples-000004.png"]


@pytest.mark.parametrize("place", PLACES)
def test_a_link_or_another_kind_of_file_in_the_way_is_told(tmp_path, place):
    (tmp_path / "elsewhere").mkdir()
    run, is_file = tmp_path / "run", place.endswith(("jsonl", "lock", "png"))
    write(run, 1)
    runs.check_folder(run)
    path = run / place
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(exist_ok=True)
    for make in (lambda: path.symlink_to(tmp_path / "elsewhere"),
                 lambda: path.symlink_to(tmp_path / "nowhere"),
                 path.mkdir if is_file else path.touch, lambda: os.mkfifo(path)):
        make()
        with pytest.raises(ValueError, match="away, or name another folder") as error:
            runs.check_folder(run)
        assert str(path) in str(error.value)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    path.touch() if is_file else path.mkdir()
    runs.check_folder(run)


def test_the_run_itself_may_be_a_link_but_no_file(tmp_path):
    write(tmp_path / "disk", 1)
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    runs.check_folder(tmp_path / "run")
    runs.check_folder(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is no folder"):
        runs.check_folder(tmp_path / "file")


@pytest.mark.parametrize("key", runs.STATE)
def test_a_state_of_wrong_types_is_a_damaged_checkpoint(tmp_path, key):
    write(tmp_path, 1)
    write(tmp_path, 2)
    path = tmp_path / runs.CHECKPOINTS / "0000002" / "state.json"
    state = json.loads(path.read_text())
    for value in (None, "2", [2], 2.5, True, -1, 10**30):
        path.write_text(json.dumps(state | {key: value}))
        step, [told] = newest(tmp_path)
        assert step == 1 and f"state.json: {key} = " in told


@pytest.mark.parametrize("row, named", [
    ({"loss": 1.0}, "step"), ({"step": "1"}, "step"), ({"step": 1.0}, "step"),
    ({"step": 1, "loss": None}, "loss"),
    ({"step": 1, "loss": {}}, "loss"), ({"step": 1, "loss": 10**400}, "loss"), ({"step": -1}, "step")])
def test_a_log_with_something_else_than_numbers_is_one_line(tmp_path, row, named):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "validation": NaN}\n' + json.dumps(row) + "\n")
    for read in (lambda: runs.Log(tmp_path, 9), lambda: runs.plot_log(tmp_path)):
        with pytest.raises(ValueError, match=rf"log\.jsonl, row 2: {named} = "):
            read()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", ["flush", "write_tensors"])
def test_a_full_disk_is_told_with_the_file_and_what_to_free(tmp_path, monkeypatch, name, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(runs, name, full)
    with pytest.raises(OSError, match="make room in") as error:
        write(tmp_path, 1)
    assert "checkpoints/0000001 cannot be written" in str(error.value)
