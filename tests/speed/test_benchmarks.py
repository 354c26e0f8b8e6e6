"""The benchmarks run, and both sides of a comparison compute the same."""

import subprocess
import sys
from pathlib import Path

import attention as kernels_of_attention
import autoencoder
import edit
import few_steps
import measure
import numpy as np
import pair
import patches
import pytest
import startup
import torch
import train_step
from tiny_editor import DEFAULTS, write_tiny_editor

from nanoip2p.checkpoint.lora import write_lora
from nanoip2p.common.device import bf16_is_fast_on_this_cpu, pick_dtype
from nanoip2p.common.files import write_json
from nanoip2p.unet import UNet


@pytest.fixture(autouse=True)
def little_work(monkeypatch):
    """The rates of the machine are measured with a small matrix and a small copy."""
    monkeypatch.setattr(measure, "MATRIX", {"cpu": 128})
    monkeypatch.setattr(measure, "COPIED", 1 << 20)


@pytest.fixture(scope="module")
def networks():
    return train_step.make_networks("tiny")


SMALLEST = ["--width", "tiny", "--batch", "1", "--size", "64", "--repeat", "1", "--device", "cpu"]


def test_training_step_is_timed_beside_diffusers(networks, capsys, monkeypatch):
    monkeypatch.setattr(train_step, "make_networks", {"tiny": networks}.get)
    dtype = pick_dtype(None, torch.device("cpu"))  # the default, bf16, is slow on many CPUs
    train_step.main([*SMALLEST, "--dtype", dtype])
    out = capsys.readouterr().out.splitlines()
    off = [float(word) for word in out[0].replace("(", " ").split() if "e-" in word or "e+" in word]
    assert len(off) == 2 and max(off) < 1e-5
    rows = {line[:16].strip(): line[16:].split() for line in out[4:7]}
    assert list(rows) == ["diffusers", "ours, encoding", "ours, stored"]
    work = {name: float(row[5]) for name, row in rows.items()}
    assert work["diffusers"] >= work["ours, encoding"] > work["ours, stored"] > 0
    assert all(float(row[0]) > 0 and float(row[4]) > 0 for row in rows.values())


def test_another_computation_is_not_timed(networks, monkeypatch):
    monkeypatch.setattr(train_step, "make_networks", {"tiny": networks}.get)

    def another(batch, null, *rest):
        return plain(batch, torch.zeros_like(null), *rest) | {"target": batch["noise"] * 1.001}

    plain = train_step.Trainer.losses.__globals__["model_input"]
    monkeypatch.setitem(train_step.Trainer.losses.__globals__, "model_input", another)
    with pytest.raises(ValueError, match="do not agree"):
        train_step.main(SMALLEST)


FEW = ["--width", "tiny", "--latents", "8", "--repeat", "1", "--device", "cpu"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_edit_is_timed_beside_diffusers(dtype, capsys):
    if dtype == "bf16" and not bf16_is_fast_on_this_cpu():
        pytest.skip("bf16 is slow on this CPU")
    edit.main([*FEW, "--dtype", dtype])
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:20].strip(): line[20:].split() for line in lines[-3:]}
    assert list(rows) == ["diffusers", "ours", "ours, fast"] and rows["diffusers"][2] == "1.00"
    assert all(float(row[0]) >= 0 and float(row[4]) > 0 for row in rows.values())


def test_the_autoencoder_is_timed_beside_diffusers(capsys, monkeypatch):
    autoencoder.main(["--size", "16", "--width", "32", "--repeat", "1"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows[::3]] == ["encode", "decode"] and all(float(row[-2]) > 0 for row in rows)
    monkeypatch.setattr(autoencoder, "lay_out", lambda vae, winograd: vae.apply(
        lambda layer: getattr(layer, "bias", None) is not None and layer.bias.add_(0.01)))
    with pytest.raises(ValueError, match="ours, fast differs"):
        autoencoder.main(["--size", "16", "--width", "32", "--repeat", "1"])


def test_a_student_is_timed_beside_its_teacher(tmp_path, capsys):
    tiny = write_tiny_editor(tmp_path)
    write_json(DEFAULTS | {"steps": 20}, tmp_path / "defaults.json")
    factors = torch.zeros(1, 8, 3, 3), torch.zeros(16, 1)
    write_lora(tmp_path / "l.safetensors", {"conv_in": factors}, alpha=1)
    few_steps.main(["--weights", str(tiny), "--lora", str(tmp_path / "l.safetensors"), "--steps", "1",
                    "--batches", "1", "2", "--repeat", "1"])
    with pytest.raises(ValueError, match="is missing"):
        few_steps.main(["--weights", str(tiny), "--lora", str(tmp_path / "none.safetensors")])
    ratios = [line.split("1 steps")[1].split() for line in capsys.readouterr().out.splitlines()
              if "times as fast" in line]
    assert len(ratios) == 4 and all(float(median) > 2 for median, *_ in ratios)


def test_kept_features_are_timed_beside_whole_steps(capsys):
    few_steps.main(["--steps", "--deep-every", "1", "25", "--batches", "1", "--repeat", "1"])
    lines = capsys.readouterr().out.splitlines()[-2:]
    same, other = (line.split("deep_every")[1].split() for line in lines)
    assert same[0] == "1" and same[-3:-2] == ["0.00"] and float(other[1]) > 2 and float(other[-3]) > 0.01
    edit.main([*FEW, "--deep-every", "3"])
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(":")[0] for line in lines] == ["deep_every 1", "deep_every 3"]


def test_products_of_patches_are_timed_beside_convolutions(monkeypatch, capsys):
    monkeypatch.setattr(patches, "CASES", [(2, 32, 48, 4)])
    monkeypatch.setattr(patches, "WEIGHTS", 1e5)
    monkeypatch.setattr(patches, "steps", lambda *_: None)  # of the full width
    patches.main(["--repeat", "1"])
    rates = capsys.readouterr().out.splitlines()[-1]
    assert rates.startswith(" 2 x 32 to 48, 4 x 4") and all(float(rate) >= 0 for rate in rates.split()[-2:])


def test_another_edit_is_not_timed(monkeypatch):
    monkeypatch.setattr(UNet, "forward", lambda self, *given, plain=UNet.forward: 1.1 * plain(self, *given))
    with pytest.raises(ValueError, match="not the same pictures"):
        edit.main(FEW)


def test_pictures_far_from_single_precision_are_refused():
    exact = {name: np.zeros(9) for name in ("diffusers", "ours")}
    assert edit.check({"diffusers": np.full(9, 8.0), "ours": np.full(9, 9.0)}, exact)
    with pytest.raises(ValueError, match="farther"):
        edit.check({"diffusers": np.full(9, 8.0), "ours": np.full(9, 12.0)}, exact)


def test_injection_is_timed_beside_maps_in_memory(capsys, monkeypatch):
    """Two of the four cases: test_prompt_to_prompt.py compares every kind of injection with the same maps."""
    monkeypatch.setattr(pair, "CAPTIONS", {name: pair.CAPTIONS[name] for name in ("refine", "both")})
    pair.main([*FEW, "--steps", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["refine", "both"]
    assert all(float(line.split()[-1]) > 0 for line in lines[-2:])
    with pytest.raises(ValueError, match="not the same latents"):
        pair.check("", {"maps": lambda: torch.ones(2), "without": lambda: torch.zeros(2),
                        "ours": lambda: torch.tensor([1, 1.1]), "fast": lambda: torch.ones(2)})


def test_operations_and_bytes_are_counted():
    a, b = torch.zeros(10, 20), torch.zeros(20, 30)
    assert measure.work(lambda: a @ b.t().t()) == (2 * 10 * 20 * 30, 4 * (200 + 600 + 300))


def test_attention_is_timed_by_each_kernel_of_torch(capsys):
    few = ["--device", "cpu", "--batch", "1", "--repeat", "1", "--shrink", "64", "--dtype", "float32"]
    kernels_of_attention.main(few)
    heading, *rows = capsys.readouterr().out.splitlines()[1:]
    assert heading.split()[2:7] == ["cudnn", "flash", "efficient", "math", "ours"] and len(rows) == 8
    assert all(float(word) > 0 for row in rows for word in row.split()[4:8] if word != "-")
    with pytest.raises(AssertionError, match="wrong differs"):
        kernels_of_attention.usable({"wrong": lambda: torch.ones(3)}, torch.zeros(3) + 0.5, (RuntimeError,))


def test_a_start_is_compared_with_the_import_of_torch():
    """The aims of issue 20: 1.4 and 330 MB for an edit, 0.5 for --help. A busy machine can miss them."""
    # In a new process: on Linux, the peak memory of a child starts at that of its parent
    code = "import startup; startup.HELP = startup.HELP[:2]; startup.main(['--repeat', '1'])"
    out = subprocess.run([sys.executable, "-c", code], cwd=Path(startup.__file__).parent, text=True,
                         capture_output=True, check=True).stdout
    rows = [line.split()[-3:] for line in out.splitlines()[2:]]
    assert len(rows) == 1 + 2
    assert all(float(ratio) > 0 and float(megabytes) > 0 for ratio, _, megabytes in rows), out
