"""Several processes give the weights of one process, at equal samples a step, also after restarts."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import train_jobs
from comparing import relative_error
from safetensors.torch import load_file
from tiny_editor import write_tiny_editor
from train_runs import STATE, UNET, rows, state, words, write_pictures

from nanoip2p.training import run_folder as runs
from nanoip2p.training import signals
from nanoip2p.training.ranks import TICKS, Watch
from nanoip2p.training.samples import order

MORE = ("--lr", 1e-4, "--log-every", 2, "--validate-every", 2, "--keep", 9)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_tiny_editor(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data")


@pytest.fixture(scope="module")
def server():
    server = train_jobs.Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return tmp_path_factory.mktemp("told")


@pytest.fixture(scope="module")
def out(start, folder, server, told, tmp_path_factory):
    """Runs of three steps of 8 samples, by 1, 2 and 4 ranks, on pictures with flips."""
    root = tmp_path_factory.mktemp("runs")
    more = ("--steps", 3, "--save-every", 2, *MORE)
    halves = ["--batch-size", 2, "--accumulate", 2]
    jobs = [("one", 1, ["--accumulate", 2]), ("two", 2, []), ("halves", 2, halves),
            ("four", 4, ["--batch-size", 2]), ("cache", 2, ["--cache", root / "latents", *halves])]
    for name, ranks, flags in jobs:
        argv = words(start, root / name, *more, *flags, data=folder)
        [codes] = server({"argv": argv, "ranks": ranks, "err": str(told / name)})
        assert codes == [0] * ranks, (told / name).read_text()[-3000:]
    return root


def assert_same(one, other):
    """Weights, averages and losses to 1e-6, Adam's moments to 1e-5, relative to the norm of each tensor."""
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
def test_ranks_train_what_one_would(out, name):
    assert_same(out / name, out / "one")
    newest, about = runs.newest_checkpoint(out / name)
    exported, average = load_file(out / name / UNET), load_file(newest / "ema.safetensors")
    assert about["batch"] == 8 and all(torch.equal(exported[key], average[key]) for key in average)


def test_only_one_rank_prints(out, told):
    text = (told / "two").read_text()
    assert text.count("batch     ") == text.count("step 2: ") == 1 and "2 devices = 8" in text


def test_ranks_fill_a_cache_together(start, folder, out, server, tmp_path):
    argv = words(start, tmp_path / "one", "--steps", 3, "--accumulate", 2, *MORE,
                 "--cache", tmp_path / "latents", data=folder)
    assert server({"argv": argv}) == [[0]]
    assert_same(out / "cache", tmp_path / "one")
    filled = [{path.name: path.read_bytes() for path in where.iterdir()}
              for where in (tmp_path / "latents", out / "latents")]
    assert len(filled[0]) == 3 and filled[0] == filled[1]


@pytest.mark.parametrize("name, ranks", [("two", 1), ("one", 2)])
def test_a_run_goes_on_with_other_ranks(out, server, told, tmp_path, name, ranks):
    """From its second step. The number of micro-batches changes with the number of ranks."""
    run = shutil.copytree(out / name, tmp_path / "run")
    shutil.rmtree(run / runs.CHECKPOINTS / "0000003")
    [codes] = server({"argv": ["--resume", str(run)], "ranks": ranks, "err": str(told / f"from {name}")})
    assert codes == [0] * ranks, (told / f"from {name}").read_text()[-3000:]
    assert_same(run, out / "one")


def own_lines(told):
    """What train.py said, without what torchrun adds about its children."""
    return [line for line in told.splitlines() if line.startswith(("error: ", "stopped;"))]


def test_a_broken_picture_on_one_rank_stops_all_with_one_line_each(start, folder, server, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    first, second = (order(0, epoch, 10).tolist() for epoch in (0, 1))      # 8 samples in a step
    item = next(item for item in first[8:] if item not in second[2:6])      # not in step 0, nor of rank 1
    for picture in (data / f"{item:07d}").glob("*_1.jpg"):
        picture.write_bytes(b"no picture")
    argv, told = words(start, tmp_path / "run", "--steps", 4, data=data), tmp_path / "told"
    assert server({"argv": argv, "ranks": 2, "err": str(told)}) == [[2, 2]]
    lines = told.read_text()
    assert f"{item:07d}" in lines and "another process met a broken picture" in lines
    assert len(own_lines(lines)) == 2 and "Traceback" not in lines
    assert runs.newest_checkpoint(tmp_path / "run")[1]["step"] == 1
    assert server({"argv": ["--resume", str(tmp_path / "run"), "--skip-bad"], "ranks": 2,
                   "err": str(told)}) == [[0, 0]], told.read_text()


# Under torchrun itself

class Torchrun:
    """Two processes of train.py; output lines as they come."""

    def __init__(self, *argv, script="train.py"):
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port",
                 train_jobs.free_port(), script, *argv]
        self.process = subprocess.Popen(
            [str(word) for word in start], cwd=train_jobs.ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"})

    def until(self, begins):
        return next(line for line in self.process.stdout if line.startswith(begins))

    def end(self):
        """Exit code and the rest of the output; a hang fails the test."""
        try:
            told, _ = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        return self.process.returncode, told


def test_sigterm_to_torchrun_saves_and_the_run_goes_on(start, folder, server, tmp_path):
    more = (*MORE, "--log-every", 1, "--validate-every", 0)
    job = Torchrun(*words(start, tmp_path / "run", "--steps", 3000, *more, data=folder))
    job.until("step 2:")
    job.process.send_signal(signal.SIGTERM)
    code, told = job.end()
    assert code != 0 and len(own_lines(told)) == 2 and all("--resume" in line for line in own_lines(told))
    step = runs.newest_checkpoint(tmp_path / "run")[1]["step"]
    assert step >= 2 and step == rows(tmp_path / "run")[-1]["step"]
    more_steps = ["--resume", str(tmp_path / "run"), "--steps", str(step + 1)]
    assert server({"argv": more_steps, "ranks": 2}) == [[0, 0]]
    plain = words(start, tmp_path / "plain", "--steps", step + 1, *more, data=folder)
    assert server({"argv": plain, "ranks": 2}) == [[0, 0]]
    assert state(tmp_path / "run") == state(tmp_path / "plain")


def test_a_rank_that_dies_ends_the_job_and_the_run_goes_on(start, folder, out, server, tmp_path):
    more = (*MORE, "--log-every", 1, "--validate-every", 0, "--save-every", 2)
    job = Torchrun(*words(start, tmp_path / "run", "--steps", 3000, *more, data=folder))
    job.until("step 3:")
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(job.process.pid)], capture_output=True,
                              text=True, check=True).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    code, told = job.end()
    assert code != 0 and "SIGKILL" in told
    step = runs.newest_checkpoint(tmp_path / "run")[1]["step"] + 2
    [codes] = server({"argv": ["--resume", str(tmp_path / "run"), "--steps", str(step)], "ranks": 2})
    assert codes == [0, 0]
    plain = words(start, tmp_path / "plain", "--steps", step, *more, data=folder)
    assert server({"argv": plain, "ranks": 2}) == [[0, 0]]
    assert state(tmp_path / "run") == state(tmp_path / "plain")


# A rank that is missing

MISSING = [{"signal": number, "in": place, "of": lost} for number, place, lost in [
    (signal.SIGSTOP, "step", 0), (signal.SIGSTOP, "validate", 1), (signal.SIGKILL, "step", 1),
    (signal.SIGKILL, "validate", 0)]]


def test_the_others_end_and_name_the_rank_that_is_missing(start, folder, server, tmp_path):
    more = ("--steps", 3000, "--save-every", 1, "--validate-every", 1, "--timeout", 3, "--workers", 1)
    jobs = [job | {"argv": words(start, tmp_path / str(i), *more, data=folder), "ranks": 2,
                   "err": str(tmp_path / f"told{i}")} for i, job in enumerate(MISSING)]
    began = time.monotonic()
    codes = server(*jobs)
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


def test_a_rank_that_works_for_long_is_waited_for(start, folder, server, tmp_path):
    argv, told = words(start, tmp_path / "run", "--steps", 3, "--validate-every", 1, "--timeout", 1,
                       data=folder), tmp_path / "told"
    job = {"signal": signal.SIGWINCH, "in": "validate", "of": 1, "seconds_in": 2}  # a signal without effect
    assert server({"argv": argv, "ranks": 2, "err": str(told), **job}) == [[0, 0]], told.read_text()


def test_ctrl_c_works_while_a_rank_is_stopped(start, folder, server, tmp_path):
    """Pressed three times. The timeout is far away."""
    argv = words(start, tmp_path / "run", "--steps", 3000, "--timeout", 300, data=folder)
    told = tmp_path / "told"
    job = {"argv": argv, "ranks": 2, "err": str(told), "signal": signal.SIGSTOP, "in": "step", "of": 1,
           "pressed": 3}
    [codes] = server(job)
    assert codes == [130, "stopped"] and "Traceback" not in told.read_text()
