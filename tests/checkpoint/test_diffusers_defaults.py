"""diffusers makes the same pictures as nanoip2p from the folders that we ship or write, without a size."""

import json
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_editor import write_tiny_editor

from nanoip2p.checkpoint.load import load_model, open_checkpoint
from nanoip2p.checkpoint.save import convert

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
STEPS, TEXT = 3, "make it night"
SIZES = {"nano-sd": (16, 64), "nano-ip2p": (16, 64), "nano-ip2p-paper": (16, 64),
         "painter": (12, 48), "editor": (12, 48)}


@pytest.fixture(scope="module", params=SIZES)
def folder(request, tmp_path_factory):
    """Shipped weights, or a random painter or editor that was converted to a single file and back."""
    shipped = WEIGHTS / request.param
    if shipped.exists():
        return shipped
    home = tmp_path_factory.mktemp("converted")
    written = write_tiny_editor(home / "tiny", in_channels=8 if request.param == "editor" else 4)
    convert(open_checkpoint(written), home / "single.safetensors")
    checkpoint = open_checkpoint(home / "single.safetensors", tokenizer=str(written / "tokenizer"))
    convert(checkpoint, home / request.param)
    return home / request.param


@pytest.fixture(scope="module")
def pipeline(folder):
    """Open a folder with diffusers. A warning about its configuration fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        opened = diffusers.DiffusionPipeline.from_pretrained(folder)
    opened.set_progress_bar_config(disable=True)
    return opened


def test_sizes_are_written(folder):
    sizes = tuple(json.loads((folder / part / "config.json").read_text())["sample_size"]
                  for part in ("unet", "vae"))
    assert sizes == SIZES[folder.name]
    assert json.loads((folder / "scheduler/scheduler_config.json").read_text())["steps_offset"] == 1


def test_the_default_call_gives_our_picture(folder, pipeline):
    compare("euler_ancestral", folder, pipeline)
    if folder.name in ("nano-ip2p", "painter"):  # all folders have the same steps_offset
        compare("ddim", folder, pipeline)


def compare(sampler, folder, pipeline):
    edits = "InstructPix2Pix" in type(pipeline).__name__
    model, generator = load_model(folder, edits=edits), torch.Generator().manual_seed(7)
    if sampler == "ddim":  # its spacing "leading" is the only one that adds steps_offset
        scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    else:
        scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.register_modules(scheduler=scheduler)
    settings = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "generator": generator}
    if edits:
        side = model.defaults["resolution"]
        pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        image = Image.fromarray(pixels)
        theirs = pipeline(TEXT, image, **settings).images[0]
        ours = model.edit([image], [TEXT], seed=[7], steps=STEPS, cfg_text=3.0, cfg_image=1.5,
                          sampler=sampler)[0]
    else:
        theirs = pipeline(TEXT, **settings).images[0]
        ours = model.generate([TEXT], seed=[7], steps=STEPS, cfg_text=3.0, sampler=sampler)[0]
    assert ours.size == theirs.size and np.asarray(theirs).std() > 1
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
