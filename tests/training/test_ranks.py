"""Several processes train the same weights as one process with as many samples a step, also when resumed."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train_jobs
from comparing import relative_error
from safetensors.torch import load_file
from train_runs import STATE, UNET, rows, state, words, write_pictures

from nanoip2p.training import run_folder as runs
from nanoip2p.training import signals
from nanoip2p.training.ranks import TICKS, Watch
from nanoip2p.training.samples import order

ROOT = Path(__file__).resolve().parents[2]
MORE = ("--lr", 1e-4, "--log-every", 2, "--validate-every", 2, "--keep", 9)
# The number of ranks and the flags of runs with the same samples
RUNS = {"one": (1, "--accumulate", 2), "two": (2,), "halves": (2, "--batch-size", 2, "--accumulate", 2),
        "four": (4, "--batch-size", 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return tmp_path_factory.mktemp("told")


@pytest.fixture(scope="module")
def run_of(start, folder, launch, told, tmp_path_factory):
    """A function: the folder of a run in RUNS, three steps of 8 samples with flips. Each trains only once."""
    root = tmp_path_factory.mktemp("runs")

    def get(name):
        ranks, *flags = RUNS[name]
        argv = words(start, root / name, "--steps", 3, "--save-every", 2, *MORE, *flags, data=folder)
        if not (root / name).exists():
            [codes] = launch({"argv": argv, "ranks": ranks, "err": str(told / name)})
            assert codes == [0] * ranks, (told / name).read_text()[-3000:]
        return root / name
    return get


def assert_same(one, other):
    """Weights, averages and losses agree to 1e-6, Adam's moments to 1e-5, relative to each tensor's norm."""
    folders, loose = [path / runs.CHECKPOINTS / "0000003" for path in (one, other)], {}
    for part in STATE:
        a, b = (load_file(path / f"{part}.safetensors") for path in folders)
        assert a.keys() == b.keys()
        for name in a:
            error = relative_error(a[name], b[name])
            if error > (1e-6 if part in ("unet", "ema") else 1e-5):
                loose[f"{part} {name}"] = error
    assert not loose, (one, loose)
    for a, b in zip(rows(one), rows(other)):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for key in {"loss", "validation", "validation_ema", "grad_norm"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-6), key


@pytest.mark.parametrize("name", ["two", "halves", "four"])
def test_ranks_train_what_one_would(run_of, name):
    out = run_of(name)
    assert_same(out, run_of("one"))
    newest, about = runs.newest_checkpoint(out)
    exported, average = load_file(out / UNET), load_file(newest / "ema.safetensors")
    assert about["batch"] == 8 and all(torch.equal(exported[key], average[key]) for key in average)


def test_only_one_rank_prints(run_of, told):
    run_of("two")
    text = (told / "two").read_text()
    assert text.count("batch     ") == text.count("step 2: ") == 1 and "2 devices = 8" in text


def test_the_command_that_users_type(start, folder, tmp_path):
    """Other tests let torchrun's code fork the ranks, which is quick. Here it starts Python for each rank."""
    argv = words(start, tmp_path / "run", "--steps", 1, "--validate-every", 0, data=folder)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, "train.py", *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("batch     ") == 1 and "2 devices" in done.stdout
    assert runs.newest_checkpoint(tmp_path / "run")[1]["batch"] == 4 * 2


def test_ranks_fill_a_cache_together(start, folder, launch, tmp_path):
    outs, jobs = [tmp_path / name for name in ("one", "halves")], []
    for out in outs:
        ranks, *flags = RUNS[out.name]
        argv = words(start, out, "--steps", 3, *MORE, *flags, "--cache", out / "latents", data=folder)
        jobs.append({"argv": argv, "ranks": ranks})
    assert launch(*jobs) == [[0], [0, 0]]
    filled = [{path.name: path.read_bytes() for path in (out / "latents").iterdir()} for out in outs]
    assert_same(*outs)
    assert len(filled[0]) == 3 and filled[0] == filled[1]


@pytest.mark.parametrize("name, ranks", [("two", 1), ("one", 2)])
def test_a_run_goes_on_with_other_ranks(run_of, launch, told, tmp_path, name, ranks):
    """The run is resumed from its second step. Other ranks mean another number of micro-batches."""
    run = shutil.copytree(run_of(name), tmp_path / "run")
    shutil.rmtree(run / runs.CHECKPOINTS / "0000003")
    [codes] = launch({"argv": ["--resume", str(run)], "ranks": ranks, "err": str(told / f"from {name}")})
    assert codes == [0] * ranks, (told / f"from {name}").read_text()[-3000:]
    assert_same(run, run_of("one"))


def own_lines(told):
    """The last lines of train.py, without torchrun's messages."""
    return [line for line in told.splitlines() if line.startswith(("error: ", "stopped;"))]


def test_a_broken_picture_on_one_rank_stops_all_with_one_line_each(start, folder, launch, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    first, second = (order(0, epoch, 10).tolist() for epoch in (0, 1))      # 8 samples in a step
    item = next(item for item in first[8:] if item not in second[2:6])      # only rank 0 reads it, in step 1
    for picture in (data / f"{item:07d}").glob("*_1.jpg"):
        picture.write_bytes(b"no picture")
    argv, told = words(start, tmp_path / "run", "--steps", 4, data=data), tmp_path / "told"
    assert launch({"argv": argv, "ranks": 2, "err": str(told)}) == [[2, 2]]
    lines = told.read_text()
    assert f"{item:07d}" in lines and "another process met a broken picture" in lines
    assert len(own_lines(lines)) == 2 and "Traceback" not in lines
    assert runs.newest_checkpoint(tmp_path / "run")[1]["step"] == 1
    assert launch({"argv": ["--resume", str(tmp_path / "run"), "--skip-bad"], "ranks": 2,
                   "err": str(told)}) == [[0, 0]], told.read_text()


# Under torchrun itself

def under_torchrun(start, folder, launch, out, *more, **job):
    """Exit code and output of a run with two ranks. Its first steps are those of RUNS["two"]."""
    told = out.with_name("told")
    argv = words(start, out, "--steps", 3000, "--save-every", 1, *MORE, *more, data=folder)
    [[code]] = launch({"argv": argv, "ranks": 2, "torchrun": True, "err": str(told), **job})
    return code, told.read_text()


def test_sigterm_to_torchrun_saves_and_the_run_goes_on(start, folder, run_of, launch, tmp_path):
    run = tmp_path / "run"
    code, told = under_torchrun(start, folder, launch, run, "--validate-every", 1, signal=signal.SIGTERM,
                                parent=True, **{"in": "validate", "of": 1})
    assert code != 0 and len(own_lines(told)) == 2 and all("--resume" in line for line in own_lines(told))
    assert runs.newest_checkpoint(run)[1]["step"] == 2 == rows(run)[-1]["step"]
    assert launch({"argv": ["--resume", str(run), "--steps", "3"], "ranks": 2}) == [[0, 0]]
    assert state(run) == state(run_of("two"))


def test_a_rank_that_dies_ends_the_job_and_the_run_goes_on(start, folder, run_of, launch, tmp_path):
    run = tmp_path / "run"
    code, told = under_torchrun(start, folder, launch, run, "--timeout", 3, signal=signal.SIGKILL,
                                **{"in": "step", "of": 1})
    assert code != 0 and "SIGKILL" in told
    assert runs.newest_checkpoint(run)[1]["step"] in (1, 2)
    assert launch({"argv": ["--resume", str(run), "--steps", "3"], "ranks": 2}) == [[0, 0]]
    assert state(run) == state(run_of("two"))


# A rank that is stopped, killed or slow

MISSING = [{"signal": number, "in": place, "of": lost} for number, place, lost in [
    (signal.SIGSTOP, "step", 0), (signal.SIGSTOP, "validate", 1), (signal.SIGKILL, "step", 1),
    (signal.SIGKILL, "validate", 0)]]


def test_the_others_end_and_name_the_rank_that_is_missing(start, folder, launch, tmp_path):
    more = ("--steps", 3000, "--save-every", 1, "--validate-every", 1, "--timeout", 3, "--workers", 1)
    jobs = [job | {"argv": words(start, tmp_path / str(i), *more, data=folder), "ranks": 2,
                   "err": str(tmp_path / f"told{i}")} for i, job in enumerate(MISSING)]
    began = time.monotonic()
    codes = launch(*jobs)
    assert time.monotonic() - began < 60
    for i, job in enumerate(jobs):
        lines = (tmp_path / f"told{i}").read_text()
        [error] = [line for line in lines.splitlines() if "error: " in line]
        assert f"rank {job['of']} ended or was stopped" in error and "Traceback" not in lines
        runs.newest_checkpoint(tmp_path / str(i))
    assert [pair[1 - job["of"]] for pair, job in zip(codes, jobs)] == [2] * len(jobs)


def test_a_full_pipe_does_not_keep_the_watch_from_ending_its_rank():
    child = os.fork()
    if child == 0:
        try:
            train_jobs.spoil_streams("full")
            sys.stderr = signals.Lasting(sys.__stderr__)
            watch = SimpleNamespace(rank=0, timeout=0.1, beats=[b"1", b"1"], silent=[0, TICKS], failed=False,
                                    left=threading.Event())
            Watch.judge(watch)
        finally:
            os._exit(1)
    threading.Timer(20, lambda: os.path.exists(f"/proc/{child}") and os.kill(child, signal.SIGKILL)).start()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2


def test_a_rank_that_works_for_long_is_waited_for(start, folder, launch, tmp_path):
    argv, told = words(start, tmp_path / "run", "--steps", 3, "--validate-every", 1, "--timeout", 1,
                       data=folder), tmp_path / "told"
    job = {"signal": signal.SIGWINCH, "in": "validate", "of": 1, "seconds_in": 2}  # a signal without effect
    assert launch({"argv": argv, "ranks": 2, "err": str(told), **job}) == [[0, 0]], told.read_text()


def test_ctrl_c_works_while_a_rank_is_stopped(start, folder, launch, tmp_path):
    """It is pressed three times, long before the timeout."""
    argv = words(start, tmp_path / "run", "--steps", 3000, "--timeout", 300, data=folder)
    told = tmp_path / "told"
    [codes] = launch({"argv": argv, "ranks": 2, "err": str(told), "signal": signal.SIGSTOP, "in": "step",
                      "of": 1, "pressed": 3})
    assert codes == [130, "stopped"] and "Traceback" not in told.read_text()
