"""The recipe of section 3.2, and that stopping and going on changes nothing."""

import json
import shutil
import signal
import sys

import pytest
import torch
from helpers import randomise
from safetensors.torch import load_file
from tiny_editor import write_tiny_editor

import train
from nanoip2p.diffusion import NoiseSchedule
from nanoip2p.editor import Editor
from nanoip2p.network import load_network, save_network
from nanoip2p.scenes import random_scene
from nanoip2p.text_to_image import TextToImage
from nanoip2p.unet import UNet, UNetConfig

ALPHAS = NoiseSchedule().alphas_cumprod()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_tiny_editor(tmp_path_factory.mktemp("start"))


def run(start, out, *more):
    words = ["--weights", start, "--data", "scenes", "--pairs", 24, "--out", out, "--batch-size", 4,
             "--lr", 1e-3, "--resolution", 32, "--sample-every", 0, "--device", "cpu", *more]
    return train.main([str(word) for word in words])


def result(out):
    return load_file(out / "weights" / "unet" / "diffusion_pytorch_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    assert run(start, out, "--steps", 6, "--sample-every", 6) == 0
    return out


def test_resumed_run_equals_uninterrupted_run(start, uninterrupted, tmp_path):
    assert run(start, tmp_path / "run", "--steps", 3) == 0
    assert not same(result(tmp_path / "run"), result(uninterrupted))
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "6"]) == 0
    assert same(result(tmp_path / "run"), result(uninterrupted))


def test_ctrl_c_loses_nothing(start, uninterrupted, tmp_path, monkeypatch, capsys):
    plain = train.noise_loss

    def interrupted(*args):
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        calls.append(1)
        return plain(*args)

    calls, usual = [], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "noise_loss", interrupted)
    assert run(start, tmp_path / "run", "--steps", 6) == 130
    assert len(calls) == 3 and "--resume" in capsys.readouterr().err
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert len(calls) == 6 and same(result(tmp_path / "run"), result(uninterrupted))
    assert signal.getsignal(signal.SIGINT) is usual


def test_run_leaves_log_plot_samples_and_an_editor_that_opens(uninterrupted):
    rows = [json.loads(line) for line in (uninterrupted / "loss.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [6] and rows[0]["loss"] > 0
    assert (uninterrupted / "samples-000006.png").exists()
    before = random_scene("test", 0).render(32)
    editor = Editor.load(uninterrupted / "weights", "cpu")
    assert editor.edit([before], ["make it night"], steps=1)[0].size == (48, 48)


def test_losses_are_drawn_where_matplotlib_is(uninterrupted, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    (uninterrupted / "loss.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    train.plot_loss(uninterrupted)
    assert not (uninterrupted / "loss.png").exists() and "pip install matplotlib" in capsys.readouterr().out
    monkeypatch.undo()
    train.plot_loss(uninterrupted)
    assert (uninterrupted / "loss.png").exists()


def test_training_learns(start, tmp_path):
    assert run(start, tmp_path / "run", "--steps", 150, "--lr", 3e-3) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "loss.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [50, 100, 150]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


def fake_data(n=4000):
    """Moments whose mean is the picture's number and whose spread is none; texts that are their number."""
    mean = torch.arange(2.0 * n).view(-1, 1, 1, 1).expand(-1, 4, 2, 2) / n + 1
    return {
        "moments": torch.cat([mean, torch.full_like(mean, -60.0)], 1),
        "texts": torch.arange(n + 1.0).view(-1, 1, 1).expand(-1, 3, 2),
        "rows": torch.stack([torch.arange(n), torch.arange(n) + n, torch.arange(n) + 1], 1),
    }


def test_batch_is_what_the_paper_feeds():
    """Target scaled and noised, picture condition the unscaled mode, 5% / 5% / 5% dropped."""
    data, n = fake_data(), 4000
    batch = train.draw_batch(data, 0.5, ALPHAS, seed=3, step=0, batch=n)
    text, image = batch["context"][:, 0, 0], batch["z_image"][:, 0, 0, 0]
    no_text, no_image = text == 0, image == 0
    for dropped in (no_text & ~no_image, no_image & ~no_text, no_text & no_image):
        assert 0.035 < dropped.float().mean() < 0.065
    kept = ~no_text & ~no_image
    torch.testing.assert_close(image[kept], (text[kept] - 1) / n + 1)  # the pair's own picture, unscaled
    a = ALPHAS[batch["timestep"]].view(-1, 1, 1, 1)
    target = (batch["z_t"] - (1 - a).sqrt() * batch["noise"]) / a.sqrt()
    expected = 0.5 * ((text[kept] - 1 + n) / n + 1)
    torch.testing.assert_close(target[kept][:, 0, 0, 0], expected, rtol=0, atol=2e-3)
    assert 480 < batch["timestep"].float().mean() < 520 and batch["timestep"].max() > 990


def test_target_is_a_sample_of_the_posterior_and_the_condition_is_not():
    data = fake_data()
    data["moments"][:, 4:] = 0.0  # spread 1
    first, again, other = (train.draw_batch(data, 1.0, ALPHAS, 3, step, 2000) for step in (0, 0, 1))
    assert torch.equal(first["z_t"], again["z_t"]) and not torch.equal(first["z_t"], other["z_t"])
    a = ALPHAS[first["timestep"]].view(-1, 1, 1, 1)
    target = (first["z_t"] - (1 - a).sqrt() * first["noise"]) / a.sqrt()
    early = first["timestep"] < 500  # later, dividing by a enlarges rounding
    assert 0.9 < target[early].var(dim=(1, 2, 3)).mean() < 1.1
    assert first["z_image"].var(dim=(1, 2, 3)).max() == 0


def test_min_snr_weights():
    timestep = torch.tensor([0, 400, 999])
    snr = ALPHAS[timestep] / (1 - ALPHAS[timestep])
    assert train.loss_weight(timestep, ALPHAS, None).tolist() == [1, 1, 1]
    weights = train.loss_weight(timestep, ALPHAS, 5.0)
    assert snr[0] > 5 > snr[2] and weights[2] == 1
    torch.testing.assert_close(weights[0] * snr[0], torch.tensor(5.0))


def test_learning_rate_rises_stays_and_falls():
    args = train.parse("--weights w --data d --out o --steps 100 --lr 1 --warmup 10 --cooldown 0.2".split())
    rates = [train.learning_rate(step, args) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:81] == [1.0] * 72
    assert rates[90] == pytest.approx(0.5) and 0 < rates[99] <= 0.05


def test_average_follows_the_originals_decay():
    model, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average.weight.data.fill_(0.0)
    train.update_average(average, model, 1, 0.9999)
    assert average.weight.item() == pytest.approx(9 / 11)   # decay 2/11
    average.weight.data.fill_(0.0)
    train.update_average(average, model, 10**9, 0.75)
    assert average.weight.item() == pytest.approx(0.25)


@pytest.mark.parametrize("words, named", [
    (["--data", "nowhere"], "seeds.json"),
    (["--weights", "nowhere"], "nowhere"),
    (["--device", "abacus"], "abacus"),
    (["--resume", "nowhere"], "state.pt"),
    (["--batch-size", 0], "--batch-size"),
    (["--kind-weights", *[0] * 7], "--kind-weights"),
    (["--lr", "fast"], "fast"),
])
def test_bad_input_is_one_line_and_exit_code_2(start, tmp_path, capsys, words, named):
    assert run(start, tmp_path / "run", *words) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("opened ")]
    assert named in error and not (tmp_path / "run").exists()


def test_a_finished_run_is_not_overwritten(start, uninterrupted, capsys):
    assert run(start, uninterrupted) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.fixture(scope="module")
def base(start, tmp_path_factory):
    """The tiny editor as a text-to-picture model."""
    folder = shutil.copytree(start, tmp_path_factory.mktemp("base") / "weights")
    config = UNetConfig(**{**vars(load_network(UNet, start / "unet").config), "in_channels": 4})
    save_network(randomise(UNet(config)), folder / "unet")
    return folder


def test_a_text_to_picture_model_becomes_an_editor(base, tmp_path):
    with pytest.raises(ValueError, match="text-to-picture"):
        Editor.load(base, "cpu")
    assert run(base, tmp_path / "run", "--steps", 2) == 0
    weights = result(tmp_path / "run")["conv_in.weight"]
    assert weights.shape[1] == 8 and (weights[:, 4:] != 0).any()  # the picture has begun to count
    Editor.load(tmp_path / "run" / "weights", "cpu")


def test_a_text_to_picture_model_learns_captions(base, tmp_path):
    def learn(out, *more):
        assert run(base, tmp_path / out, "--text-to-image", *more) == 0
        return result(tmp_path / out)

    whole = learn("whole", "--steps", 4, "--sample-every", 4)
    learn("halves", "--steps", 2)
    assert train.main(["--resume", str(tmp_path / "halves"), "--steps", "4"]) == 0
    assert same(result(tmp_path / "halves"), whole) and whole["conv_in.weight"].shape[1] == 4
    assert (tmp_path / "whole" / "samples-000004.png").exists()
    painter = TextToImage.load(tmp_path / "whole" / "weights", "cpu")
    pictures = [painter.generate([caption])[0].tobytes() for caption in ("a red house", "a tree")]
    assert pictures[0] != pictures[1]

    def distance(a, b):
        return sum((a[name] - b[name]).square().sum() for name in a) ** 0.5

    before = load_network(UNet, base / "unet").state_dict()
    moved = distance(whole, before)
    assert 0 < distance(learn("half", "--steps", 4, "--dtype", "bf16"), whole) < 0.5 * moved


def test_what_a_caption_model_is_not_trained_from_is_told(start, base, tmp_path, capsys):
    assert run(start, tmp_path / "run", "--text-to-image") == 2
    assert "this is an editor" in capsys.readouterr().err
    assert run(base, tmp_path / "run", "--text-to-image", "--data", "somewhere") == 2
    assert "captions of --data scenes" in capsys.readouterr().err and not (tmp_path / "run").exists()
