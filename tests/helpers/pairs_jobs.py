"""A process that starts jobs of make_dataset.py and ends some of them at a chosen moment; see test_pairs.py.

It reads a JSON list of jobs a line, forks one child for each, and prints their exit codes. Importing once and
forking takes milliseconds where a new Python takes seconds. A job is
    {"argv": of make_dataset.py, "env": more environment,
     "seconds": after which a timer kills it, or "event": number of the file operation before which it dies}
or, with "fake" (arguments of `fake_job`) in place of argv, a job without networks.
"""

import json
import os
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from PIL import Image

import make_dataset
from nanoip2p.clip_filter import SIMILARITIES
from nanoip2p.dataset import pairs

FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock", "shutil.rmtree"}
SETTINGS = pairs.pair_settings({}, Path("nowhere"), {"steps": 2, "resolution": 32, "sampler": "euler"})
FEW = replace(SETTINGS, n_samples=5, batch=2, max_out_samples=2, clip_dir_threshold=0.0)


class FakePainter:
    """Pairs whose grey says their seed, p and caption. Writes down what it was asked for."""

    log = None

    def __init__(self, painter, source, output, inject, steps, sampler, resolution, deep_every, blend):
        self.source = source

    def measure(self, seeds, shares, cfg_text):
        if self.log:
            with self.log.open("a") as file:
                file.write("".join(f"{self.source} {seed}\n" for seed in seeds))
        return [(Image.new("RGB", (8, 8), (seed % 256, int(99 * share), 0)),
                 Image.new("RGB", (8, 8), (seed % 256, int(cfg * 9), 0)))
                for seed, share, cfg in zip(seeds, shares, cfg_text)], [
                    {"leakage": seed % 10 / 10 or None} for seed in seeds]


class FakeJudge:
    """Likes pictures by their red, which is any number from 0 to 255: half of all pairs pass."""

    clip = torch.nn.Linear(1, 1)
    clip.scaling_factor = 1.0
    mean, std = torch.zeros(3), torch.ones(3)
    tokenizer = SimpleNamespace(backend=SimpleNamespace(to_str=lambda: "words"))

    def encode_texts(self, texts):
        return texts

    def score(self, before, after, captions):
        reds = [picture.getpixel((0, 0))[0] / 255 for picture in before]
        return [dict(zip(SIMILARITIES, (1.0, 1.0, 2 * red - 1, 1.0))) for red in reds]


def fake_job(out, count=3, log=None, **settings):
    """`count` prompts without networks, a few candidates each."""
    torch.nn.init.ones_(FakeJudge.clip.weight)
    torch.nn.init.ones_(FakeJudge.clip.bias)
    FakePainter.log = log and Path(log)
    painter = SimpleNamespace(unet=FakeJudge.clip, vae=FakeJudge.clip, text_encoder=FakeJudge.clip,
                              tokenizer=FakeJudge.tokenizer, schedule="a schedule")
    prompts = [pairs.Prompt(n, f"a {n}", f"b {n}", {"input": f"a {n}", "edit": "e", "output": f"b {n}"})
               for n in range(count)]
    settings = replace(FEW, **settings)
    with mock.patch.object(pairs, "MeasuredPainter", FakePainter):
        pairs.make_pairs(prompts, Path(out), painter, FakeJudge(), settings, {"weights": "w", "clip": "c"})


def die_before(event: int) -> None:
    """Kill this process right before its file operation number `event`, or in the middle of a file."""
    count = iter(range(1, 10**9))
    write, save = Path.write_text, Image.Image.save

    def operation(name, _=None):
        if name in FILE_EVENTS and next(count) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_by_halves(path, text, **settings):
        write(path, text[: len(text) // 2], **settings)
        operation("open")
        write(path, text, **settings)

    def save_by_halves(image, path, **settings):
        write(path, "half a picture")
        operation("open")
        save(image, path, **settings)

    Path.write_text, Image.Image.save = write_by_halves, save_by_halves
    sys.addaudithook(operation)


def run(job: dict) -> int:
    """In the child, whose standard output is not for the codes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ.update(job.get("env", {}))
    if job.get("seconds"):
        signal.setitimer(signal.ITIMER_REAL, job["seconds"])  # whose signal ends a process at once
    if job.get("event"):
        die_before(job["event"])
    if "fake" in job:
        fake_job(**job["fake"])
        return 0
    return make_dataset.main(job["argv"])


def main() -> None:
    torch.set_num_threads(1)
    torch.nn.Embedding(1, 1, device="meta")  # the first of its kind imports for seconds
    with tempfile.TemporaryDirectory() as folder:
        fake_job(folder, 1)  # what is first imported in a child, each child would import
    for line in sys.stdin:
        children = []
        for job in json.loads(line):
            children.append(os.fork())
            if children[-1] == 0:
                code = 1
                try:
                    code = run(job)
                finally:
                    os._exit(code)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
