"""train.py: a run that is stopped or killed, then resumed, gives the same result; each error is one line."""

import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train_jobs
from comparing import relative_error
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_editor import write_tiny_editor, write_tiny_painter
from torch.utils.data import DataLoader
from train_runs import STATE, UNET, rows, state, words, write_pictures

import train
from nanoip2p.checkpoint import load, save
from nanoip2p.common import device
from nanoip2p.dataset.layouts import read_data
from nanoip2p.dataset.rendered import scene_pairs
from nanoip2p.editor import Editor
from nanoip2p.text_to_image import TextToImage
from nanoip2p.training import run_folder as runs
from nanoip2p.training import signals
from nanoip2p.training.cache import Cache
from nanoip2p.training.config import MAY_CHANGE, NOT_STORED, PRESETS, TrainConfig, odd_settings
from nanoip2p.training.samples import order
from nanoip2p.training.trainer import Trainer, columns_of
from nanoip2p.world.scenes import random_scene

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data")


def run(start, out, *more, data="scenes"):
    return train.main(words(start, out, *more, data=data))


def resume(out, *more):
    return train.main(["--resume", str(out), *map(str, more)])


def errors(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def whole(start, quick_runs, tmp_path_factory):
    """A run of six steps on scenes without a stop: it logs, validates, draws losses and a sample sheet."""
    out = tmp_path_factory.mktemp("run") / "whole"
    more = ("--steps", 6, "--sample-every", 6, "--log-every", 2, "--validate-every", 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "plot_log", quick_runs)
        assert run(start, out, *more) == 0
    return out


# Resume is exact

@pytest.fixture(scope="module")
def straight(start, folder, tmp_path_factory):
    """A function of (cache, accumulate): state and log of four steps without a stop. Each trains once."""
    made = {}

    def get(cache, accumulate):
        if (cache, accumulate) not in made:
            out = tmp_path_factory.mktemp("straight")
            more = ["--cache", out / "cache"] if cache else []
            assert run(start, out, "--steps", 4, "--accumulate", accumulate, *more, data=folder) == 0
            made[cache, accumulate] = state(out), rows(out)
        return made[cache, accumulate]
    return get


@pytest.mark.parametrize("cache, workers, accumulate", [  # every pair of values occurs
    (False, 0, 1), (False, 2, 2), (True, 0, 2), (True, 2, 1)])
def test_a_resumed_run_equals_one_that_never_stopped(start, folder, straight, tmp_path, cache, workers,
                                                     accumulate):
    more = ["--workers", workers, *(["--cache", tmp_path / "run" / "cache"] if cache else [])]
    assert run(start, tmp_path / "run", "--steps", 2, "--accumulate", accumulate, *more, data=folder) == 0
    half = state(tmp_path / "run")
    assert resume(tmp_path / "run", "--steps", 4) == 0
    wanted, _ = straight(cache, accumulate)
    assert state(tmp_path / "run") == wanted
    assert all(half[part] != wanted[part] for part in (*STATE, "export")) and wanted["unet"] != wanted["ema"]


def test_with_and_without_cache_losses_are_the_same_to_rounding(straight):
    [one], [other] = (straight(cache, 2)[1] for cache in (False, True))     # stored in float16
    for name in ("loss", "validation", "validation_ema", "grad_norm"):
        assert one[name] != other[name] and one[name] == pytest.approx(other[name], rel=3e-4), name


def test_killed_before_a_write_and_resumed_it_ends_where_it_would_have(start, launch, tmp_path):
    """A process dies before its 3rd flush or rename, the next before its 12th, and so on to the end.

    tests/training/test_run_folder.py ends a write at each of its operations.
    """
    plain = {"argv": words(start, tmp_path / "plain", "--steps", 4, "--save-every", 2, "--seed", 5)}
    assert launch(plain) == [[0]]
    out, wanted, told, codes = tmp_path / "run", state(tmp_path / "plain"), tmp_path / "told", []
    again = words(start, out, "--steps", 4, "--save-every", 2, "--seed", 5)
    for event in range(3, 150, 9):
        argv = ["--resume", str(out)] if runs.checkpoints(out) else again
        [[code]] = launch({"argv": argv, "event": event, "err": str(told)})
        codes.append(code)
        if code != -signal.SIGKILL:
            break
        if runs.checkpoints(out):
            assert runs.newest_checkpoint(out)[1]["step"] in (2, 4)
    assert code == 0 and len(codes) > 3, (codes, told.read_text()[-500:])
    assert state(out) == wanted


def test_killed_at_random_moments_and_resumed_it_ends_where_it_would_have(start, folder, launch, tmp_path):
    outs, draw = [tmp_path / name for name in ("online", "cache")], random.Random(3)
    flags = [["--workers", 2], ["--cache", tmp_path / "latents", "--accumulate", 2]]
    begin = [words(start, out, "--steps", 4, "--save-every", 1, *more, data=folder)
             for out, more in zip(outs, flags)]
    plain = [words(start, tmp_path / f"plain{i}", "--steps", 4, *more, data=folder)
             for i, more in enumerate(flags)]
    assert launch(*({"argv": argv} for argv in plain)) == [[0], [0]]
    kills, finished = [0, 0], [False, False]
    for attempt in range(40):
        jobs = [{"argv": ["--resume", str(out), "--cache", str(tmp_path / "latents")][: 2 + 2 * i]
                 if runs.checkpoints(out) else argv,
                 "seconds": draw.uniform(0.04, 0.24) * 1.3**attempt, "err": str(tmp_path / "told")}
                for i, (out, argv) in enumerate(zip(outs, begin))]
        for i, [code] in enumerate(launch(*jobs)):
            assert code in (0, -signal.SIGALRM)
            finished[i] |= code == 0
            kills[i] += code != 0
        if all(finished):
            break
    assert all(finished) and min(kills) > 1
    assert [state(out) for out in outs] == [state(tmp_path / f"plain{i}") for i in (0, 1)]


@pytest.mark.parametrize("number, last", [(signal.SIGINT, 2), (signal.SIGTERM, 1), (signal.SIGHUP, 2)])
def test_a_signal_loses_nothing(start, whole, tmp_path, monkeypatch, capsys, number, last):
    step, taken, usual = Trainer.step, [], signal.getsignal(number)

    def signalled(self, batches, n, stop):
        if n == last:
            signal.raise_signal(number)
        taken.append(n)
        return step(self, batches, n, stop)

    monkeypatch.setattr(Trainer, "step", signalled)
    assert run(start, tmp_path / "run", "--steps", 6) == 130
    assert taken == [*range(last + 1)] and "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert runs.newest_checkpoint(tmp_path / "run")[1]["step"] == last and (tmp_path / "run" / UNET).exists()
    monkeypatch.undo()
    assert resume(tmp_path / "run") == 0 and state(tmp_path / "run") == state(whole)
    assert signal.getsignal(number) is usual


def test_ctrl_c_to_the_whole_group_with_workers_is_one_line(start, folder, tmp_path):
    argv = words(start, tmp_path / "run", "--steps", 3000, "--workers", 2, "--log-every", 1,
                 "--validate-every", 0, data=folder)
    process = subprocess.Popen([sys.executable, "train.py", *argv], cwd=train_jobs.ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                               env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"})
    second = next(line for line in process.stdout if line.startswith("step 2:"))
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in out + err
    assert err.splitlines()[-1].startswith("stopped; go on with --resume")
    last = [second, *(line for line in out.splitlines() if line.startswith("step "))][-1]
    assert runs.newest_checkpoint(tmp_path / "run")[1]["step"] == int(last.split()[1].strip(":"))


SIGNALS = [{"signal": int(number), "in": place, "pipe": pipe, "workers": workers}
           for number, place, pipe, workers in [  # every pair of values occurs
               (signal.SIGTERM, "step", "closed", 2), (signal.SIGTERM, "validate", "full", 0),
               (signal.SIGTERM, "validate", None, 2), (signal.SIGINT, "step", None, 0),
               (signal.SIGINT, "validate", "closed", 2), (signal.SIGINT, "step", "full", 2),
               (signal.SIGHUP, "step", "full", 0), (signal.SIGHUP, "validate", "closed", 0),
               (signal.SIGHUP, "step", None, 2)]]


def test_any_signal_ends_a_run_whatever_its_streams_with_a_checkpoint_and_no_process_left(
        start, folder, launch, tmp_path):
    more = ("--steps", 3000, "--validate-every", 2, "--log-every", 1)
    jobs = [job | {"argv": words(start, tmp_path / str(i), *more, "--workers", job["workers"], data=folder),
                   "err": str(tmp_path / f"told{i}")} for i, job in enumerate(SIGNALS)]
    began = time.monotonic()
    codes = launch(*jobs)
    assert codes == [[130]] * len(jobs) and time.monotonic() - began < 60  # nine runs share the processors
    for i, job in enumerate(jobs):
        step = runs.newest_checkpoint(tmp_path / str(i))[1]["step"]
        assert step == {"step": 2, "validate": 4}[job["in"]]
        told = (tmp_path / f"told{i}").read_text()
        assert "Traceback" not in told and ("stopped; go on" in told) == (job["pipe"] is None)


def test_a_run_goes_on_without_its_readers_and_without_streams(start, whole, launch, tmp_path,
                                                                monkeypatch):
    argv = words(start, tmp_path / "run", "--steps", 6, "--log-every", 2, "--validate-every", 3)
    job = {"argv": argv, "signal": signal.SIGWINCH, "in": "step", "pipe": "closed"}  # a signal without effect
    assert launch(job) == [[0]] and state(tmp_path / "run") == state(whole)
    monkeypatch.setattr(sys, "stdout", None)  # as in Python with closed streams
    monkeypatch.setattr(sys, "stderr", None)
    assert resume(tmp_path / "run", "--steps", 7) == 0


def test_a_line_is_written_at_once_so_that_the_lines_of_ranks_stay_apart():
    reading, writing = socket.socketpair(type=socket.SOCK_DGRAM)  # each write is received by itself
    with reading, writing, open(writing.fileno(), "w", closefd=False) as stream:
        print("step", 3, "loss", file=signals.Lasting(stream))
        assert reading.recv(100) == b"step 3 loss\n"


def test_loaders_which_ignore_signals_end_with_their_block():
    batches = iter(DataLoader([0] * 100, num_workers=2, worker_init_fn=signals.leave_signals_to_the_parent))
    with signals.ending_loaders(batches):
        next(batches)
        loaders = list(signals.LOADERS)
        assert len(loaders) == 2 and all(process.is_alive() for process in loaders)
    assert not any(process.is_alive() for process in loaders)


def test_nohup_still_keeps_a_run_from_a_closed_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stop_between_steps() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("times, saved", [(2, ["0000002"]), (3, [])])  # torchrun doubles the first
def test_the_third_ctrl_c_ends_at_once_and_saves_no_half_step(start, tmp_path, monkeypatch, times, saved):
    def pressed(self, n):
        for _ in range(times if n == 2 else 0):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "update_average", pressed)
    assert run(start, tmp_path / "run", "--steps", 6) == 130
    assert [path.name for path in runs.checkpoints(tmp_path / "run")] == saved


# Errors during training

def test_a_loss_that_is_not_finite_is_told_before_weights_change(start, tmp_path, monkeypatch, capsys):
    ninth, get = scene_pairs(24)[order(0, 0, 24)[9]], Cache.get

    def poisoned(self, pair, flip):
        before, after, text = get(self, pair, flip)
        return (before * torch.nan if pair == ninth else before), after, text

    assert run(start, tmp_path / "sound", "--steps", 2) == 0
    monkeypatch.setattr(Cache, "get", poisoned)
    assert run(start, tmp_path / "run", "--steps", 6, "--save-every", 1, "--keep", 9) == 2
    [error] = errors(capsys)
    assert "step 3: " in error and f" 9 ('{ninth.edit}'" in error and "not finite" in error
    assert [path.name for path in runs.checkpoints(tmp_path / "run")] == ["0000001", "0000002"]
    assert state(tmp_path / "run") == state(tmp_path / "sound")


def test_what_diverged_is_not_saved(start, tmp_path, capsys):
    assert run(start, tmp_path / "run", "--steps", 6, "--lr", 1e30, "--save-every", 4) == 2
    assert "smaller --lr" in errors(capsys)[0] and not runs.checkpoints(tmp_path / "run")


@pytest.mark.parametrize("save_every, left", [(1, 1), (6, None), (3, None)])
def test_a_gradient_that_is_not_finite_is_never_saved(start, tmp_path, monkeypatch, capsys, save_every, left):
    plain, calls = Trainer.losses, []

    def steep(self, unet, batch, recompute=False):
        calls.append(1)
        zero = next(unet.parameters()).sum() * 0
        return plain(self, unet, batch, recompute) + (zero.sqrt() if len(calls) == 2 else 0.0)  # slope 1/0

    monkeypatch.setattr(Trainer, "losses", steep)
    more = ("--save-every", save_every, "--validate-every", 0)
    assert run(start, tmp_path / "run", "--steps", 3, *more) == 2
    [error] = errors(capsys)
    assert "step 2: the gradient is not finite" in error  # the log counts from 1 too
    found = runs.checkpoints(tmp_path / "run")
    assert [int(path.name) for path in found] == ([left] if left else [])
    for path in (tmp_path / "run").glob("**/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_a_run_that_never_validates_encodes_no_sample_for_it(start, tmp_path, monkeypatch):
    monkeypatch.setattr("nanoip2p.training.samples.validation_batches", lambda *_: pytest.fail("encoded"))
    assert run(start, tmp_path / "run", "--steps", 1, "--validate-every", 0) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_stops_the_run_which_goes_on_without_it(start, folder, tmp_path, capsys, workers):
    data = shutil.copytree(folder, tmp_path / "data")
    item = order(0, 0, 10)[9].item()                            # 10 train items: visited in step 2 of 0, 1, 2
    for picture in (data / f"{item:07d}").glob("*_1.jpg"):
        picture.write_bytes(picture.read_bytes()[:100])
    more = ("--steps", 6, "--workers", workers)
    assert run(start, tmp_path / "run", *more, data=data) == 2
    [error] = errors(capsys)
    assert f"{item:07d}" in error and "_1.jpg" in error and "--skip-bad" in error
    assert runs.newest_checkpoint(tmp_path / "run")[1]["step"] == 2
    assert resume(tmp_path / "run", "--skip-bad") == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: left out")]
    assert notes and len(set(notes)) == len(notes) and f"{item:07d}" in notes[0]
    assert run(start, tmp_path / "skipping", *more, "--skip-bad", data=data) == 0
    assert state(tmp_path / "skipping") == state(tmp_path / "run")


def test_a_disk_that_is_full_loses_no_checkpoint(start, tmp_path, monkeypatch, capsys):
    write, calls = runs.write_tensors, []

    def full(*args):
        calls.append(1)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        write(*args)

    monkeypatch.setattr(runs, "write_tensors", full)
    assert run(start, tmp_path / "run", "--steps", 4, "--save-every", 1) == 2
    [error] = errors(capsys)
    assert "checkpoints/0000002 cannot be written: No space left" in error and "make room in" in error
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["0000001"]
    assert resume(tmp_path / "run") == 0


# The files of a run

def test_the_log_has_a_row_an_event_and_all_there_is_to_see(whole):
    found = rows(whole)
    assert [row["step"] for row in found] == [2, 3, 4, 6]
    numbers = {"loss", "lr", "grad_norm", "samples_per_second", "seconds_left"}
    assert set(found[0]) == {"step", *numbers} and set(found[1]) == {"step", "validation", "validation_ema"}
    assert set(found[3]) == set(found[0]) | set(found[1])
    assert all(number >= 0 for row in found for number in row.values()) and found[0]["lr"] == 1e-3
    assert found[1]["validation"] != found[1]["validation_ema"]
    names = sorted(path.name for path in whole.glob("[!.]*"))
    assert names == ["checkpoints", "latents", "log.jsonl", "loss.png", "samples-000006.png", "weights"]
    assert Image.open(whole / "samples-000006.png").width > 8 * 32


def test_the_model_opens_here_and_in_diffusers_and_is_the_average(whole):
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionInstructPix2PixPipeline
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(whole / "weights")
    assert type(pipeline.scheduler) is EulerAncestralDiscreteScheduler
    editor = Editor.load(whole / "weights", "cpu")
    generator = torch.Generator().manual_seed(0)
    z, text = torch.randn(2, 8, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    with torch.no_grad():
        assert relative_error(editor.unet(z, 7, text), pipeline.unet(z, 7, text).sample) < 1e-5
    average = load_file(whole / "checkpoints" / "0000006" / "ema.safetensors")
    exported = load_file(whole / UNET)
    assert exported.keys() == average.keys()
    assert all(torch.equal(exported[name], average[name]) for name in average)
    edited = editor.edit([random_scene("test", 0).render(32)], ["make it night"], steps=1)
    assert edited[0].size == (48, 48)


def test_the_average_is_that_of_the_original(start, tmp_path):
    """One update per step, also with --accumulate. The decay of step n is min(0.9, (1 + n) / (10 + n))."""
    more = ("--accumulate", 2, "--save-every", 1, "--keep", 9)
    assert run(start, tmp_path / "run", "--steps", 3, *more) == 0
    begin = load_file(start / UNET.removeprefix("weights/"))
    average = {name: tensor.double() for name, tensor in begin.items()}
    for n in (1, 2, 3):
        read = tmp_path / "run" / "checkpoints" / f"{n:07d}"
        raw, decay = load_file(read / "unet.safetensors"), min(0.9, (1 + n) / (10 + n))
        average = {name: decay * average[name] + (1 - decay) * raw[name] for name in raw}
        ours = load_file(read / "ema.safetensors")
        assert max(relative_error(ours[name], average[name]) for name in raw) < 1e-5


def test_the_update_is_that_of_torchs_adamw_with_a_clipped_gradient(start, tmp_path):
    assert run(start, tmp_path / "run", "--steps", 1, "--clip", 0.01) == 0
    read = tmp_path / "run" / "checkpoints" / "0000001"
    first, second = (load_file(read / f"{name}.safetensors") for name in ("exp_avg", "exp_avg_sq"))
    gradient = {name: moment.double() / 0.1 for name, moment in first.items()}      # beta1 = 0.9
    assert sum(g.square().sum() for g in gradient.values()).sqrt().item() == pytest.approx(0.01, rel=1e-3)
    raw, begin = load_file(read / "unet.safetensors"), load_file(start / UNET.removeprefix("weights/"))
    for name, g in gradient.items():
        assert relative_error(second[name] + 1e-30, 0.001 * g**2 + 1e-30) < 1e-4    # beta2 = 0.999
        wanted = begin[name].double() * (1 - 1e-3 * 0.01) - 1e-3 * g / (g.abs() + 1e-8)
        assert relative_error(raw[name], wanted) < 1e-5


def test_tensorboard_has_the_scalars_of_the_log(start, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert run(start, tmp_path / "run", "--steps", 2, "--log-every", 1, "--tensorboard") == 0
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in ("loss", "lr", "grad_norm", "validation_ema"):
        wanted = [(row["step"], row[name]) for row in rows(tmp_path / "run") if name in row]
        seen = [(event.step, event.value) for event in board.Scalars(name)]
        assert wanted and seen == [(step, pytest.approx(value)) for step, value in wanted]
    monkeypatch.setitem(sys.modules, "tensorboard", None)      # as if it were not installed
    capsys.readouterr()
    assert run(start, tmp_path / "other", "--tensorboard") == 2
    [error] = capsys.readouterr().err.splitlines()
    assert "pip install tensorboard" in error and not (tmp_path / "other").exists()


def test_training_learns(start, tmp_path):
    assert run(start, tmp_path / "run", "--steps", 90, "--lr", 3e-3, "--log-every", 30) == 0
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert len(losses) == 3 and losses[-1] < 0.8 * losses[0]


def test_a_finished_run_has_nothing_to_do_but_may_be_prolonged(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    before = state(out)
    assert resume(out) == 0 and state(out) == before
    assert resume(out, "--steps", 7) == 0 and state(out)["step"] == 7


def test_recomputing_and_an_average_on_the_cpu_change_nothing(start, whole, tmp_path):
    assert run(start, tmp_path / "run", "--steps", 6, "--recompute", "--ema-device", "cpu") == 0
    weights, wanted = load_file(tmp_path / "run" / UNET), load_file(whole / UNET)
    assert max(relative_error(weights[name], wanted[name]) for name in wanted) < 1e-5


# --check

def test_check_opens_all_the_data_and_writes_nothing(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = shutil.copytree(folder, tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    argv = ["--check", "--data", str(data), "--resolution", "64", "--batch-size", "4"]
    assert train.main(argv) == 0
    told = capsys.readouterr().out
    assert "10 items to train on, 15 pairs; held out for validation: 1" in told
    assert "pictures  36; sound pairs in all splits: 18" in told
    assert "None" not in told
    for name in ("0000001/101_0.jpg", "0000002/102_1.jpg"):
        (data / name).write_text("no picture")
    (data / "0000003/103_0.jpg").unlink()
    before = sorted(tmp_path.rglob("*"))
    assert train.main(argv) == 2
    out, err = capsys.readouterr()
    assert "101_0.jpg" in out and "102_1.jpg" in out and "103_0.jpg" in out
    assert [line for line in err.splitlines() if line.startswith("error: some pairs cannot be used")]
    assert train.main([*argv, "--skip-bad"]) == 0
    assert "sound pairs in all splits: 15" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_check_says_why_nothing_is_sound(folder, tmp_path, capsys):
    """The error names the reason, and does not advise a flag that is in use or would not help."""
    data = shutil.copytree(folder, tmp_path / "data")
    argv = ["--check", "--data", str(data), "--resolution", "64", "--batch-size", "4"]
    for text, reason in (("no picture", "pairs with a broken picture: 18"),
                         (None, "pairs that lack a picture: 18")):
        for picture in data.glob("*/*.jpg"):
            picture.unlink() if text is None else picture.write_text(text)
        for more in ([], ["--skip-bad"]):
            assert train.main([*argv, *more]) == 2
            out, err = capsys.readouterr()
            [error] = [line for line in err.splitlines() if line.startswith("error: ")]
            assert f"has no sound pair ({reason}); " in error and "--skip-bad" not in error
            assert "sound pairs in all splits: 0; left out: " in out and "items to train on" not in out


def test_the_plan_counts_sound_pairs(folder, tmp_path, capsys):
    data = shutil.copytree(folder, tmp_path / "data")
    argv = ["--check", "--data", str(data), "--resolution", "64", "--batch-size", "4", "--skip-bad"]
    (data / "0000001/101_0.jpg").write_text("no picture")
    (data / "0000002/102_1.jpg").unlink()
    (data / "0000003/prompt.json").unlink()
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    left = re.search(r"sound pairs in all splits: (\d+); left out: rows that cannot be read: 1, pairs that "
                     r"lack a picture: 1, pairs with a broken picture: 1", out)
    plan = re.search(r"(\d+) items to train on, (\d+) pairs; held out for validation: 1", out)
    assert int(left[1]) < 17 and int(plan[2]) == 15 - (18 - int(left[1]))
    for picture in data.glob("000000?/*_0.jpg"):
        picture.write_text("no picture")
    for picture in data.glob("0000011/*"):  # of the test split
        shutil.copy(folder / "0000011" / picture.name, picture)
    assert train.main(argv) == 2
    assert "no pair of the train split is sound" in errors(capsys)[0]


def test_a_run_without_a_sound_picture_gives_no_advice_that_was_followed(start, folder, tmp_path, capsys):
    data = shutil.copytree(folder, tmp_path / "data")
    for picture in data.glob("*/*.jpg"):
        picture.write_text("no picture")
    assert run(start, tmp_path / "run", "--steps", 1, "--skip-bad", data=data) == 2
    [error] = errors(capsys)
    assert "no other pair is sound" in error and "--skip-bad" not in error


def test_columns_are_named_by_a_flag_that_the_run_keeps(start, folder, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    lines = []
    for [pair, *_] in read_data(folder):
        shutil.copy(pair.before, data / f"{pair.before.name}")
        shutil.copy(pair.after, data / f"{pair.after.name}")
        lines.append(json.dumps({"old": pair.before.name, "say": pair.edit, "new": pair.after.name}))
    (data / "metadata.jsonl").write_text("\n".join(lines))
    assert run(start, tmp_path / "a", "--steps", 2, data=data) == 2
    assert 'no text under "input"; it has old, say, new' in errors(capsys)[0]
    columns = ("--columns", "old", "say", "new")
    assert run(start, tmp_path / "a", "--steps", 2, *columns, data=data) == 0
    assert run(start, tmp_path / "b", "--steps", 1, *columns, data=data) == 0
    assert resume(tmp_path / "b", "--steps", 2) == 0 and state(tmp_path / "a") == state(tmp_path / "b")
    assert resume(tmp_path / "b", "--columns", "new", "say", "old") == 2
    assert "--columns cannot change" in errors(capsys)[0]


@pytest.mark.parametrize("data, columns", [("scenes", "abc"), ("x.jsonl", "aba"), ("scenes", "aac")])
def test_columns_without_effect_are_refused(data, columns, capsys):
    assert train.main(["--check", "--data", data, "--columns", *columns]) == 2
    [error] = errors(capsys)
    assert ("--columns has no effect" if columns == "abc" else "the names have to differ") in error


@pytest.mark.parametrize("columns", [["a", "b"], ["a", "b", "c", "--out=x"], ["--out", "x", "c"], [1, 2, 3],
                                     "abc", ["a", "-h", "c"], ["a", "--", "b", "c"]])
def test_columns_of_a_strangers_run_are_names_only(columns, tmp_path, capsys):
    with pytest.raises(ValueError):
        flags = TrainConfig.as_flags({"columns": columns})
        train.parse(["--data", "x", "--out", "y", "--weights", "z", *flags])


def test_from_a_damaged_checkpoint_a_run_goes_back_to_the_one_before(start, whole, tmp_path, capsys):
    assert run(start, tmp_path / "run", "--steps", 4, "--save-every", 2) == 0
    damaged = runs.checkpoints(tmp_path / "run")[-1] / "ema.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert resume(tmp_path / "run", "--steps", 6) == 0
    assert "damaged" in capsys.readouterr().err and state(tmp_path / "run") == state(whole)


def test_without_accumulate_a_step_takes_the_papers_samples(folder, capsys):
    assert train.main(["--check", "--data", str(folder), "--resolution", "64", "--batch-size", "4"]) == 0
    assert "4 x 256 accumulated x 1 devices = 1024" in capsys.readouterr().out


def test_a_broken_picture_is_left_out_of_the_samples_too(start, folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    held_out = read_data(data, "validation")[0][0]
    held_out.after.write_text("no picture")
    assert columns_of(read_data(data, "validation"), 32, skip_bad=True) == []
    with pytest.raises(ValueError, match=held_out.after.name):
        columns_of(read_data(data, "validation"), 32, skip_bad=False)


def test_a_run_is_trained_by_one_process_at_a_time(start, whole, capsys):
    before = state(whole)
    with train_jobs.occupying(whole) as other:
        assert resume(whole, "--steps", 8) == 2
        assert "another process" in errors(capsys)[0] and state(whole) == before
        other.kill()
        other.wait()
        with runs.occupied(whole):  # free at once, although the child of the other process still runs
            pass
    assert resume(whole, "--steps", 3) == 2
    assert "is at step 6 already" in errors(capsys)[0]


def test_check_with_weights_and_out_writes_nothing_either(start, folder, tmp_path, capsys):
    assert run(start, tmp_path / "run", "--check", "--steps", 7, "--accumulate", 3, data=folder) == 0
    told = capsys.readouterr().out
    assert "4 x 3 accumulated x 1 devices = 12" in told and "7 steps = 84 samples" in told
    assert str(tmp_path / "run") in told and not (tmp_path / "run").exists()


# Bad input

def broken_json(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "seeds.json").write_text("[")
    return tmp_path / "data"


def no_column(tmp_path, folder):
    (tmp_path / "pairs.jsonl").write_text('{"input": "a.jpg", "output": "b.jpg"}\n' * 12)
    return tmp_path / "pairs.jsonl"


def empty_data(tmp_path, folder):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "seeds.json").write_text("[]")
    return tmp_path / "data"


@pytest.mark.parametrize("make, more, named", [
    (None, ["--data", "nowhere"], "nowhere"),
    (broken_json, [], "seeds.json"),
    (no_column, [], '"edit"'),
    (empty_data, [], "no pairs"),
    (None, ["--weights", "nowhere"], "nowhere"),
    (None, ["--weights", "weights/nano-clip"], "nano-clip"),
    (None, ["--device", "abacus"], "abacus"),
    (None, ["--batch-size", 0], "--batch-size"),
    (None, ["--kind-weights", *[0] * 7], "--kind-weights"),
    (None, ["--lr", "fast"], "fast"),
    (None, ["--lr", -1], "--lr"),
    (None, ["--clip", -1], "--clip"),
    (None, ["--ema-decay", 1.5], "--ema-decay"),
    (None, ["--cooldown", -0.1], "--cooldown"),
    (None, ["--drop", 0.5, 0.5, 0.1], "--drop"),
    (None, ["--resolution", 36], "multiple of 8"),
    (None, ["--resume", "nowhere"], "nowhere has no checkpoint"),
    (None, ["--text-to-image"], "this is an editor"),
    (None, ["--step", 3], "--step"),
    (None, ["--preset", "huge"], "huge"),
    (None, ["--distill", "weights/nano-ip2p"], "--distill or --weights"),
    (None, ["--cfg-text", 2, 4], "are for --distill"),
], ids=lambda value: getattr(value, "__name__", str(value)))
def test_bad_input_is_one_line_and_exit_code_2(start, folder, tmp_path, capsys, make, more, named):
    data = make(tmp_path, folder) if make else "scenes"
    assert run(start, tmp_path / "run", *more, data=data) == 2
    [error] = errors(capsys)
    assert named in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("argv, named", [
    ([], "--weights is needed"), (["--weights", "w"], "--data is needed"),
    (["--weights", "w", "--data", "d"], "--out is needed"), (["--check"], "--data is needed"),
])
def test_what_is_needed_is_asked_for(argv, named, capsys):
    assert train.main(argv) == 2
    assert named in errors(capsys)[0]


def test_a_cache_of_another_model_is_refused(start, tmp_path, capsys):
    assert run(start, tmp_path / "first", "--steps", 1, "--cache", tmp_path / "latents") == 0
    other = write_tiny_editor(tmp_path / "start", seed=9)
    assert run(other, tmp_path / "run", "--steps", 1, "--cache", tmp_path / "latents") == 2
    [error] = errors(capsys)
    assert "autoencoder" in error and "latents" in error and not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(start, whole, capsys):
    before = state(whole)
    assert run(start, whole, "--steps", 1) == 2
    assert "--resume" in errors(capsys)[0] and state(whole) == before


OTHERS = {"weights": ["elsewhere"], "data": ["elsewhere"], "pairs": [25], "kind-weights": [2, *[1] * 6],
          "seed": [1], "resolution": [64], "ema-decay": [0.5], "clip": [2.0], "snr-gamma": [5],
          "dtype": ["bf16"], "flip": [], "text-to-image": [], "warmup": [3],
          "cooldown": [0.1], "drop": [0, 0, 0], "vae": ["elsewhere"], "tokenizer": ["elsewhere"],
          "raw-weights": [], "columns": ["a", "b", "c"], "distill": ["elsewhere"], "cfg-text": [1, 2],
          "cfg-image": [1, 2], "lora": [4], "lora-layers": ["all"]}


def test_every_flag_of_the_recipe_is_known_to_the_next_test():
    fixed = vars(TrainConfig()).keys() - MAY_CHANGE - {"preset"}
    assert {key.replace("_", "-") for key in fixed} == set(OTHERS)


@pytest.mark.parametrize("flag", OTHERS)
def test_a_run_does_not_go_on_with_another_recipe(whole, capsys, flag):
    before = state(whole)
    assert resume(whole, "--steps", 9, f"--{flag}", *OTHERS[flag]) == 2
    [error] = errors(capsys)
    assert re.fullmatch(rf"error: --{flag} cannot change: {whole} was begun with (--(no-)?{flag}[= ,.\w/-]*|"
                        "another setting); leave the flag out, or begin another run", error), error
    assert not re.search("None|True|False", error) and state(whole) == before


def test_a_run_does_not_go_on_with_more_or_less_data(start, folder, tmp_path, capsys):
    data = shutil.copytree(folder, tmp_path / "data")
    assert run(start, tmp_path / "run", "--steps", 1, data=data) == 0
    (data / "seeds.json").write_text(json.dumps(json.loads((data / "seeds.json").read_text())[:6]))
    before = state(tmp_path / "run")
    assert resume(tmp_path / "run", "--steps", 2) == 2
    [error] = errors(capsys)
    assert "5 items" in error and "begun with 10 items" in error and state(tmp_path / "run") == before


def test_a_preset_gives_way_to_flags_and_not_to_resume(whole, capsys):
    args = train.parse("--preset 24gb --accumulate 2 --weights w --data d --out o".split())
    assert (args.batch_size, args.accumulate, args.recompute, args.ema_device) == (16, 2, True, "cpu")
    for name, preset in PRESETS.items():
        args = vars(train.parse(["--preset", name, *"--weights w --data d --out o".split()]))
        assert {key: args[key] for key in preset} == preset
    assert resume(whole, "--preset", "nano") == 2
    assert "--preset" in errors(capsys)[0]


def test_a_run_goes_on_with_as_many_samples_a_step(start, tmp_path, capsys):
    assert run(start, tmp_path / "run", "--steps", 1, "--accumulate", 3) == 0
    assert resume(tmp_path / "run", "--steps", 2, "--batch-size", 6) == 0        # x 2
    assert runs.newest_checkpoint(tmp_path / "run")[1]["batch"] == 12
    assert resume(tmp_path / "run", "--steps", 3, "--batch-size", 5) == 2
    assert "12 samples a step" in errors(capsys)[0]
    assert resume(tmp_path / "run", "--steps", 3, "--accumulate", 1) == 2


# Run folders from strangers

def restate(out, **changed):
    """Change state.json of the newest checkpoint."""
    path = runs.newest_checkpoint(out)[0] / "state.json"
    content = json.loads(path.read_text())
    content["settings"] |= changed.pop("settings", {})
    path.write_text(json.dumps(content | changed))


@pytest.fixture
def copy(whole, tmp_path):
    """The run's checkpoint with a number in place of its tensors, which takes long to read."""
    newest = runs.newest_checkpoint(whole)[0]
    target = shutil.copytree(newest, tmp_path / "copy" / newest.relative_to(whole))
    for name in STATE:
        save_file({"a": torch.zeros(1)}, target / f"{name}.safetensors")
    return tmp_path / "copy"


BAD = [None, True, -1, 0.5, 10**400, float("nan"), "x", "--", "--check", "-h", [], ["--check"], [[1]], {}]


@pytest.mark.parametrize("key", sorted(vars(TrainConfig()).keys() - NOT_STORED))
def test_the_flags_check_every_stored_setting(copy, key):
    """A bad value raises an error that names it, unless the flag accepts the same value."""
    for value in BAD:
        restate(copy, settings={key: value})
        try:
            config = train.parse(["--resume", str(copy)])
        except ValueError as error:
            assert "state.json" in str(error) or f"--{key}" in str(error) or key == "cache", error
        else:
            default, taken = getattr(TrainConfig(), key), getattr(config, key)
            assert not config.check
            assert taken == default or type(taken) is type(value) or str(taken) in (
                str(value), str(copy / str(value)))  # a cache is below its run


@pytest.mark.parametrize("key, value", [("workers", 10**6), ("pairs", 10**9), ("resolution", 10**6),
                                        ("batch_size", 10**9)])
def test_a_size_beyond_all_machines_is_refused(copy, key, value):
    restate(copy, settings={key: value})
    for argv in (["--resume", str(copy)], [f"--{key.replace('_', '-')}", str(value)]):
        with pytest.raises(ValueError, match="is not a whole number from"):
            train.parse(argv)


def test_a_cache_outside_of_the_run_needs_its_flag_again(start, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(start, "runs/a", "--steps", 1, "--cache", "data/latents", data=folder) == 0
    assert resume("runs/a", "--steps", 2) == 2
    assert errors(capsys)[0].endswith("name it again: --cache data/latents")
    assert resume("runs/a", "--steps", 2, "--cache", "data/latents") == 0
    assert run(start, "runs/b", "--steps", 1, "--cache", "runs/b/latents", data=folder) == 0
    Path("runs/b").rename("elsewhere")
    assert resume("elsewhere", "--steps", 2) == 0 and not Path("runs/b").exists()
    Path("elsewhere/latents").rename("victim")
    Path("elsewhere/latents").symlink_to(tmp_path / "victim")
    for cache in ("latents", "../victim", "x/../../victim", str(tmp_path / "victim")):
        restate(Path("elsewhere"), settings={"cache": cache})
        assert resume("elsewhere", "--steps", 3) == 2
        assert "--cache" in errors(capsys)[0]
    for path in ("runs/b", "elsewhere"):  # older versions: paths relative to the working directory
        restate(Path("runs/a"), settings={"out": "runs/a", "cache": f"{path}/latents"})
        assert resume("runs/a", "--steps", 3) == 2
        restate(Path("runs/a"), settings={"out": path, "cache": f"{path}/latents"})
        assert train.parse(["--resume", "runs/a"]).cache == Path("runs/a/latents")


@pytest.mark.parametrize("flag", ["weights", "vae", "tokenizer"])
def test_a_run_folder_fetches_no_model_that_the_user_has_not_named(start, copy, tmp_path, capsys, monkeypatch,
                                                                   flag):
    """Not even for a model that the cache has in part, or at another revision."""
    from huggingface_hub import HfApi, constants
    asked, cached = [], tmp_path / "hub" / "models--some-owner--model"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    # Without a list of files, hub.py downloads nothing
    monkeypatch.setattr(HfApi, "model_info", lambda _, *name, **more: asked.append(name))
    one_file = tmp_path / "model.safetensors"
    if flag == "tokenizer":  # a folder brings its own
        save.convert(load.open_checkpoint(start), one_file)
    source = {"weights": str(one_file if flag == "tokenizer" else start)}
    cached.mkdir(parents=True)
    for name in ("some-owner/model", "some-owner/model@other", "../model"):
        restate(copy, settings=source | {flag: name})
        assert resume(copy, "--check") == 2
        [error] = errors(capsys)
        assert name in error and not asked
        assert flag == "vae" or name[0] == "." or "name it again with its flag" in error
    shutil.copytree(start, cached / "snapshots" / ("a" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    for name, code in (("some-owner/model", 0), ("some-owner/model@main", 0), ("some-owner/model@other", 2)):
        restate(copy, settings=source | {flag: name})
        assert flag == "vae" or resume(copy, "--check") == code, errors(capsys)
        assert not asked
    resume(copy, "--check", f"--{flag}", "some-owner/model@other")
    assert bool(asked) == (flag != "vae")  # an autoencoder has a file or folder
    asked.clear()
    train.main(["--check", "--data", "scenes", "--pairs", "9", "--weights", "some-owner/model@other"])
    assert asked


def test_what_is_in_the_way_is_told_before_a_run_trains(start, copy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "step", None)
    (copy / "tensorboard").symlink_to(tmp_path)
    assert resume(copy, "--steps", 9) == 2
    assert "tensorboard is a link" in errors(capsys)[0]
    (tmp_path / "file").touch()
    assert run(start, tmp_path / "file") == 2
    assert "file is no folder" in errors(capsys)[0]


def test_control_characters_of_a_run_folder_do_not_reach_the_terminal(capsys):
    config = TrainConfig(data="x\x1b[2J", out=Path("y\x1b[2J"), accumulate=1)
    train.print_plan(config, [(1,)], [(1,)], 1, "z\x1b[2J")
    told = capsys.readouterr().out
    assert "\x1b" not in told and told.count("\\x1b[2J") == 3


# A text-to-image model

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_painter(tmp_path_factory.mktemp("base"))


def test_a_text_to_picture_model_becomes_an_editor(base, tmp_path):
    assert run(base, tmp_path / "run", "--steps", 2) == 0
    weights = load_file(tmp_path / "run" / UNET)["conv_in.weight"]
    assert weights.shape[1] == 8 and (weights[:, 4:] != 0).any()  # the picture has begun to count
    Editor.load(tmp_path / "run" / "weights", "cpu")


def test_a_text_to_picture_model_learns_captions(base, tmp_path, capsys):
    more = ("--text-to-image", "--steps", 4, "--sample-every", 4)
    assert run(base, tmp_path / "whole", *more) == 0
    assert run(base, tmp_path / "halves", "--text-to-image", "--steps", 2) == 0
    assert resume(tmp_path / "halves", "--steps", 4) == 0
    assert state(tmp_path / "halves") == state(tmp_path / "whole")
    assert load_file(tmp_path / "whole" / UNET)["conv_in.weight"].shape[1] == 4
    assert (tmp_path / "whole" / "samples-000004.png").exists()
    painter = TextToImage.load(tmp_path / "whole" / "weights", "cpu")
    pictures = [painter.generate(caption, seed=0).tobytes() for caption in ("a red house", "a tree")]
    assert pictures[0] != pictures[1]
    assert run(base, tmp_path / "run", "--text-to-image", "--data", "somewhere") == 2
    assert "needs --data scenes" in errors(capsys)[0] and not (tmp_path / "run").exists()


def test_bf16_products_move_weights_where_fp32_does(start, whole, tmp_path):
    assert run(start, tmp_path / "run", "--steps", 6, "--dtype", "bf16") == 0

    def distance(a, b):
        return sum((a[name] - b[name]).square().sum() for name in a) ** 0.5

    narrow, wide = (load_file(out / UNET) for out in (tmp_path / "run", whole))
    assert 0 < distance(narrow, wide) < 0.5 * distance(wide, load_file(start / UNET.removeprefix("weights/")))


def test_paths_of_a_run_survive_json(whole):
    settings = runs.newest_checkpoint(whole)[1]["settings"]
    args = train.parse(["--resume", str(whole)])
    assert args.out == whole and args.cache == whole / "latents" and isinstance(args.cache, Path)
    assert settings["kind_weights"] == list(args.kind_weights) and not settings.keys() & NOT_STORED
    assert settings["cache"] == "latents"


# The output of a run

class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_shows_loss_and_time_left_from_the_first_step(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    assert run(start, tmp_path / "run", "--steps", 2, "--accumulate", 3, "--log-every", 1) == 0
    bars = [line for line in re.split("[\r\n]", screen.getvalue()) if "samples/s" in line and "step" in line]
    assert re.search(r"step 2/2: 100%.*24/24 \[.*loss=\d\.\d{4}\]", bars[-1])
    told = capsys.readouterr().out
    assert "the first step took" in told and "step 1: " in told and "samples/s" not in told


def test_a_run_goes_on_in_the_dtype_in_which_it_began(start, tmp_path, monkeypatch, capsys):
    argv = words(start, tmp_path / "run", "--steps", 1)
    place = argv.index("--dtype")
    del argv[place : place + 2]
    monkeypatch.setattr(device, "pick_dtype", lambda name, device: name or "bf16")
    assert train.main(argv) == 0
    assert runs.newest_checkpoint(tmp_path / "run")[1]["settings"]["dtype"] == "bf16"
    monkeypatch.setattr(device, "pick_dtype", lambda name, device: name or "fp32")  # as on another machine
    capsys.readouterr()
    assert resume(tmp_path / "run", "--steps", 2) == 0
    assert "computed in bf16" in capsys.readouterr().out
    assert runs.newest_checkpoint(tmp_path / "run")[1]["settings"]["dtype"] == "bf16"


@pytest.mark.parametrize("more, items, note", [
    ({"steps": 10_000, "batch_size": 4, "accumulate": 256}, 18,
     "568,889 epochs|1024 samples is longer than an epoch of 18 items"),
    ({"steps": 10_000, "batch_size": 8}, 200, r"400 epochs.*--steps 909 here$"),
    ({"steps": 3, "batch_size": 8}, 200, "shorter than one epoch"),
    ({"steps": 3, "batch_size": 300}, 200, "300 samples is longer than an epoch of 200 items"),
    ({"steps": 90, "warmup": 91, "batch_size": 8}, 200, "--warmup 91 is longer than the run"),
    ({"steps": 100, "save_every": 100, "batch_size": 8}, 200, "no checkpoint before"),
    ({"steps": 300, "save_every": 100, "batch_size": 8}, 200, None),
])
def test_odd_settings_are_noted(more, items, note):
    config = TrainConfig(**{"accumulate": 1} | more)
    notes = odd_settings(config, config.batch_size * config.accumulate, items)
    assert bool(notes) == (note is not None) and all(re.search(note, one) for one in notes)


def test_without_clipping_the_gradient_is_used_as_it_is(start, tmp_path):
    assert train.parse("--preset paper --weights w --data d --out o".split()).clip == 0
    found = []
    for clip in (0, 1e9):
        assert run(start, tmp_path / str(clip), "--steps", 2, "--clip", clip) == 0
        found.append(state(tmp_path / str(clip)))
    assert found[0] == found[1]


def test_a_run_of_another_version_goes_on_unless_it_used_what_is_gone(whole):
    settings = runs.newest_checkpoint(whole)[1]["settings"]
    old = settings | {"fsdp": False, "offset_noise": 0.0}
    assert TrainConfig.as_flags(old) == TrainConfig.as_flags(settings)
    with pytest.raises(ValueError, match="another version.*'offset_noise': 0.1"):
        TrainConfig.as_flags(settings | {"offset_noise": 0.1})


@pytest.mark.parametrize("flags, dtype", [([], "fp32"), (["--dtype", "bf16"], "bf16")])
def test_the_device_chooses_the_dtype_and_the_plan_says_it(flags, dtype, monkeypatch, capsys):
    monkeypatch.setattr(device, "pick_dtype", lambda name, device: name or "fp32")
    assert train.main(["--check", "--data", "scenes", "--pairs", "40", "--device", "cpu", *flags]) == 0
    assert f"computed in {dtype}" in capsys.readouterr().out
