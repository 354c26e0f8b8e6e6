"""The memory plan against what a real training step takes on the CPU."""

import copy
from dataclasses import replace

import memory
import pytest
import torch
from live import Live
from memory import USUAL, training_memory
from tiny_configs import tiny_unet
from tiny_editor import write_tiny_editor

from nanoip2p.checkpoint.load import load_model
from nanoip2p.training.ranks import Ranks
from nanoip2p.training.samples import draw
from nanoip2p.training.trainer import Trainer
from nanoip2p.unet import UNet
from nanoip2p.vae import VAE

BATCH, SIDE = 8, 16


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return load_model(write_tiny_editor(tmp_path_factory.mktemp("editor")))


def settings(**way):
    return replace(USUAL, **{"batch_size": BATCH, "device": "cpu", **way})


def batches(args):
    """As collate makes them: encoded, or with pictures and token ids."""
    shape, numbers = (4, SIDE, SIDE), list(range(BATCH))
    drawn = [draw(0, number, shape, 1000) for number in numbers]
    batch = {key: torch.stack([torch.as_tensor(one[key]) for one in drawn]) for key in drawn[0]}
    batch["number"] = torch.tensor(numbers)
    if args.cache:
        pictures, text = torch.zeros(BATCH, 8, SIDE, SIDE), torch.zeros(BATCH, 77, 32)
    else:
        pictures, text = torch.zeros(BATCH, 3, 4 * SIDE, 4 * SIDE), torch.zeros(BATCH, 77, dtype=torch.long)
    while True:
        whole = {**batch, "before": pictures, "after": pictures, "text": text}
        yield {key: value.clone() for key, value in whole.items()} | {"skipped": [], "pair": [""] * BATCH}


def plan(parts, args, ranks=1, batch=BATCH):
    return training_memory(parts.unet.config, batch, SIDE, args, ranks, parts.vae.config,
                           parts.text_encoder.config)


@pytest.mark.parametrize("way", [
    {"dtype": "fp32"}, {}, {"recompute": True}, {"cache": None}, {"cache": None, "recompute": True},
    {"accumulate": 1}, {"accumulate": 1, "cache": None, "dtype": "fp32"}], ids=str)
def test_plan_is_what_a_step_takes(parts, way):
    args = settings(**way)
    ranks, source = Ranks(0, 1, torch.device("cpu")), batches(args)
    trainer = Trainer(args, copy.deepcopy(parts), ranks, items=4)
    trainer.step(source, 0)  # makes Adam's state
    with Live() as live:
        trainer.step(source, 1)
    planned = plan(parts, args)
    made = planned["gradients"] + planned["activations"]
    assert live.peak == pytest.approx(made, rel=0.03 if args.cache else 0.06)
    state = [weight for weights in trainer.optimizer.state.values() for weight in weights.values()]
    assert planned["Adam"] == 4 * sum(weight.numel() for weight in state if weight.ndim)
    assert planned["weights"] == 4 * sum(weight.numel() for weight in trainer.unet.parameters())
    assert planned["average"] == planned["weights"]


def test_state_and_its_shares():
    config = tiny_unet(8)
    with torch.device("meta"):
        weights = 4 * sum(weight.numel() for weight in UNet(config).parameters())

    def state(ranks, **way):
        planned = training_memory(config, 2, 8, replace(USUAL, **way), ranks)
        return [planned[name] / weights for name in ("weights", "gradients", "Adam", "average")]

    assert state(1) == [1, 1, 2, 1] and state(1, ema_device="cpu") == [1, 1, 2, 0]
    assert state(1, ema_device="cpu", device="cpu") == [1, 1, 2, 1]  # "there" is where everything is


def test_each_way_to_save_saves(parts):
    def total(ranks=1, **way):
        return sum(plan(parts, settings(**way), ranks, batch=32).values())

    assert total(recompute=True) < total() < total(dtype="fp32")
    assert total(accumulate=1) < total()
    assert total(2, accumulate=1) == total(2)  # DistributedDataParallel keeps gradients between steps
    assert total() < total(device="cuda") < total(device="cuda", cache=None)  # norms in float32


def test_encoders_count(parts):
    planned = plan(parts, settings(cache=None))
    sizes = [4 * sum(weight.numel() for weight in network.parameters())
             for network in (VAE(parts.vae.config), parts.text_encoder)]
    assert planned["encoders"] == sum(sizes) and "encoders" not in plan(parts, settings())


def test_table_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(memory, "BATCHES", (2,))
    monkeypatch.setattr(memory, "WAYS", {"bf16": {}, "--recompute": {"recompute": True}})
    assert memory.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "not" in lines[0] and lines[-2].split()[0] == "bf16"
    plain, recomputed = (float(line.split()[-1]) for line in lines[-2:])
    assert 19 < plain < 20.5 and 17 < recomputed < plain
    assert memory.main(["--batch", "2"]) == 2
