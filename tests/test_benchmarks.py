"""The benchmarks run, and measure the same computation on both sides."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))

import train_step  # noqa: E402

SMALLEST = ["--width", "tiny", "--batch", "1", "--size", "64", "--repeat", "1", "--device", "cpu"]


def test_training_step_is_timed_beside_diffusers(capsys):
    train_step.main(SMALLEST)
    out = capsys.readouterr().out.splitlines()
    off = [float(word) for word in out[0].replace("(", " ").split() if "e-" in word or "e+" in word]
    assert len(off) == 2 and max(off) < 1e-5
    rows = {line[:16].strip(): line[16:].split() for line in out[4:7]}
    assert list(rows) == ["diffusers", "ours, encoding", "ours, stored"]
    work = {name: float(row[5]) for name, row in rows.items()}
    assert work["diffusers"] >= work["ours, encoding"] > work["ours, stored"] > 0
    assert all(float(row[0]) > 0 and float(row[4]) > 0 for row in rows.values())


def test_another_computation_is_not_timed(monkeypatch):
    def another(batch, null, *rest):
        return plain(batch, torch.zeros_like(null), *rest) | {"noise": batch["noise"] * 1.001}

    plain = train_step.Trainer.losses.__globals__["model_input"]
    monkeypatch.setitem(train_step.Trainer.losses.__globals__, "model_input", another)
    with pytest.raises(ValueError, match="do not agree"):
        train_step.main(SMALLEST)
