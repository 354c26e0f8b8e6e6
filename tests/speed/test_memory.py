"""The memory that `memory.py` counts without allocating is the memory of a real step on the CPU."""

import functools
from dataclasses import replace

import memory
import pytest
import torch
from comparing import randomise
from live import Live
from memory import count_encoding, count_step, training_memory
from tiny_configs import TINY_VAE, tiny_unet
from torch._subclasses.fake_tensor import FakeTensorMode

from nanoip2p.clip import CLIPTextConfig, TextEncoder
from nanoip2p.unet import UNet
from nanoip2p.vae import VAE

CONFIG, TEXT = tiny_unet(8), CLIPTextConfig(600, 12, 24, 2, 4)
# One level, because tensors without storage take as much time as real ones of many channels
SMALL = replace(CONFIG, block_out_channels=(8,), down_block_types=CONFIG.down_block_types[1:],
                up_block_types=CONFIG.up_block_types[:1])
WORK = {
    "fp32": lambda unet, *_: count_step(unet, 8, 16, torch.float32, recompute=False),
    "bf16": lambda unet, *_: count_step(unet, 8, 16, torch.bfloat16, recompute=False),
    "recompute": lambda unet, *_: count_step(unet, 8, 16, torch.bfloat16, recompute=True),
    "encoding": lambda _, vae, text_encoder: count_encoding(vae, text_encoder, 8, 16, torch.float32),
}


def networks(config):
    made = UNet(config).train(), VAE(TINY_VAE).requires_grad_(False), TextEncoder(TEXT).requires_grad_(False)
    for weight in made[0].parameters():
        weight.grad = torch.empty_like(weight)
    return made


@pytest.mark.parametrize("name", WORK)
def test_counted_is_what_a_real_step_takes(name):
    config = CONFIG if name == "fp32" else SMALL
    with FakeTensorMode():
        counted = WORK[name](*networks(config))
    real = WORK[name](*map(randomise, networks(config)))
    assert real == pytest.approx(counted, rel=0.03)


def test_live_follows_storages():
    with Live() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1  # a view takes no memory
        a.add_(1)
        del a, b
        torch.zeros(1500)
    assert (live.peak, live.now) == (8000, 0)


def test_each_way_to_save_saves():
    @functools.cache
    def plan(**way):
        return training_memory(32, 8, configs=(SMALL, TINY_VAE, TEXT), **way)

    def total(**way):
        return sum(plan(**way).values())

    weights = 4 * sum(weight.numel() for weight in UNet(SMALL).parameters())
    assert [plan()[name] / weights for name in ("weights", "gradients", "Adam", "average")] == [1, 1, 2, 1]
    assert total(ema_on_cpu=True) == total() - weights
    assert total(recompute=True) < total() < total(dtype=torch.float32)
    assert total() < total(cache=False)
    encoders = VAE(TINY_VAE), TextEncoder(TEXT)
    assert plan(cache=False)["encoders"] == memory.weights_of(*encoders) and "encoders" not in plan()


def test_table_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(memory, "BATCHES", (2,))
    monkeypatch.setattr(memory, "WAYS", {"bf16": {}})
    memory.main([])
    lines = capsys.readouterr().out.splitlines()
    assert "not measured" in lines[1] and lines[-1].split()[0] == "bf16"
    assert 19 < float(lines[-1].split()[-1]) < 20.5
