"""Flags and data for small runs of train.py, and readers of the files of a run."""

import json

import torch
from PIL import Image

from nanoip2p.dataset.layouts import Pair
from nanoip2p.dataset.rendered import scene_pairs
from nanoip2p.training import run_folder as runs
from nanoip2p.world.scenes import random_scene

STATE = ("unet", "ema", "exp_avg", "exp_avg_sq")
UNET = "weights/unet/diffusion_pytorch_model.safetensors"


def write_pictures(root, count=12):
    """Write pairs in the layout of the original data: one or two pairs per prompt."""
    seeds, before = [], None
    for i in range(count):
        path, names = root / f"{i:07d}", [str(100 + i), str(200 + i)][: 1 + i % 2]
        path.mkdir(parents=True)
        (path / "prompt.json").write_text(json.dumps({"input": "a", "edit": "make it night", "output": "b"}))
        for j, name in enumerate(names):
            for side in (0, 1):
                before = random_scene("test", 4 * i + 2 * j + side).render(32)
                before.save(path / f"{name}_{side}.jpg", quality=95)
        seeds.append([path.name, names])
    (root / "seeds.json").write_text(json.dumps(seeds))
    return root


def write_pairs(folder):
    """10 pairs of 12 or more pictures: scenes, and files of an odd size."""
    for i in range(2):
        noise = torch.randint(256, (41, 57, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
    return [*scene_pairs(9), Pair(folder / "0.png", "swap the colours", folder / "1.png")]


def words(start, out, *more, data="scenes"):
    given = ["--weights", start, "--data", data, "--pairs", 24, "--out", out, "--batch-size", 4,
             "--accumulate", 1, "--lr", 1e-3, "--resolution", 32, "--dtype", "fp32", "--device", "cpu",
             "--sample-every", 0, "--ema-decay", 0.9, *more]
    return [str(word) for word in given]


def state(out):
    """The bytes from which a run resumes (weights, averages, moments), and of the exported model."""
    newest, about = runs.newest_checkpoint(out)
    files = {name: (newest / f"{name}.safetensors").read_bytes() for name in STATE}
    return files | {"step": about["step"], "export": (out / UNET).read_bytes()}


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
