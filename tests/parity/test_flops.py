"""The number of operations of a step at Stable Diffusion 1.5's size, counted without computing them.

Runs the real loops on the meta device. A change that adds operations fails here, and so does a loop that
reads a value back from the device, which would stall a GPU. One multiplication with its addition counts as
two operations.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanoip2p.diffusion import NoiseSchedule, Plan, plan
from nanoip2p.guidance import guided_denoiser, text_guided_denoiser
from nanoip2p.objective import prediction_losses
from nanoip2p.prompt_to_prompt import PairPainter
from nanoip2p.unet import UNet, UNetConfig

SIGMA, SIDE = 1.5, 64
LEVELS = Plan([500.0], torch.tensor([[SIGMA, 0.0]]), 1.0)


@pytest.fixture(scope="module")
def unets() -> dict[int, UNet]:
    """UNets by their number of input channels: 8 for an editor."""
    with torch.device("meta"):
        return {channels: UNet(replace(UNetConfig(), in_channels=channels)) for channels in (4, 8)}


def giga(run) -> float:
    """The billions of operations of run()."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def meta(*shape):
    return torch.empty(shape, device="meta")


def step(denoise):
    with torch.no_grad():
        return giga(lambda: denoise(meta(1, 4, SIDE, SIDE), SIGMA))


def edit_step(unet, *guidance):
    text = meta(1, 77, 768)
    with torch.no_grad():
        return step(guided_denoiser(unet, LEVELS, meta(1, 4, SIDE, SIDE), text, text, *guidance))


def plain_step(unet, rows):
    """The operations of a UNet that shares nothing between rows or between steps."""
    latents = meta(rows, unet.config.in_channels, SIDE, SIDE)
    with torch.no_grad():
        return giga(lambda: unet(latents, meta(1), meta(rows, 77, 768)))


def test_an_edit_step(unets):
    assert 2_350 < edit_step(unets[8], 7.5, 1.5) <= 2_360
    assert 2_409 < plain_step(unets[8], 3) < 2_411
    assert edit_step(unets[8], 7.5, 1.0) < 1_561  # no third branch, because cfg_image = 1


def test_a_text_to_picture_step(unets):
    text, cfg_text = meta(1, 77, 768), torch.tensor([7.5])
    with torch.no_grad():
        shared = step(text_guided_denoiser(unets[4], LEVELS, text, text, cfg_text))
    assert 1_550 < shared < 1_561 and 1_605 < plain_step(unets[4], 2) < 1_608


class MetaPainter:
    """The parts of a TextToImage that the loop of a PairPainter uses."""

    def __init__(self, unet):
        self.unet = unet

    def latent_shape(self, _):
        return 4, SIDE, SIDE


def pair_step(unet, inject, share, **settings):
    """One step of PairPainter.sample, of both pictures and both halves of guidance."""
    model = PairPainter.__new__(PairPainter)  # not __init__: the texts have to be on the meta device
    model.painter, model.inject, model.blend, model.share_prefix = MetaPainter(unet), inject, None, True
    model.deep_every = 1
    model.settings = {"resolution": 8 * SIDE, "sampler": "euler", "steps": 1}
    model.plan = plan(NoiseSchedule(), "euler", 1)
    model.source = model.edit = model.null = meta(77, 768)
    model.windows, model.coarse = [], [16, 16]
    model.mapping, model.has_source, model.weights = meta(77, 77), meta(77), meta(77)
    with torch.no_grad():
        once = giga(lambda: unet.project_context(meta(4, 77, 768)))
        sample = PairPainter.sample.__wrapped__
        return giga(lambda: sample(model, [0], [share], [7.5], **settings)) - once


def test_a_pair_step(unets):
    plain = pair_step(unets[4], "self", 0.0)
    assert 3_100 < plain <= 3_120 and 3_212 < plain_step(unets[4], 4) < 3_214
    assert pair_step(unets[4], "self", 1.0) == plain  # the maps of other rows cost nothing
    both = pair_step(unets[4], "both", 1.0)
    assert plain < both < plain + 5  # cross-attention of the edits uses two maps
    assert 0 < pair_step(unets[4], "both", 1.0, words=[meta(77, 2)] * 2) - both < 3  # heat of five layers


def test_a_training_sample(unets, monkeypatch):
    """The forward and the backward pass at 256 pixels."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # the meta device has no autocast
    given = {"z_in": meta(1, 8, 32, 32), "context": meta(1, 77, 768), "target": meta(1, 4, 32, 32)}
    timestep = torch.zeros(1, dtype=torch.long, device="meta")
    losses = lambda: prediction_losses(unets[8], 8, given, timestep, torch.float32)  # noqa: E731
    assert 530 < giga(lambda: losses().sum().backward()) <= 538
