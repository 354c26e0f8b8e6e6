"""`make_dataset.py pair`: the command paints the pair that the library paints, and shows its heat maps."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_editor import difference
from tiny_editor import write_tiny_editor

import make_dataset
from nanoip2p.checkpoint.lora import write_lora
from nanoip2p.common import device
from nanoip2p.common.grids import grid
from nanoip2p.dataset import changes, show
from nanoip2p.diffusion import NoiseSchedule
from nanoip2p.prompt_to_prompt import PairPainter
from nanoip2p.text_to_image import TextToImage

CAPTIONS = ("turn the red house into a boat", "turn the blue house into a boat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random text-to-image model."""
    folder = tmp_path_factory.mktemp("weights") / "flat"
    return write_tiny_editor(folder, NoiseSchedule(steps_offset=1).to_json(), in_channels=4)


@pytest.fixture(scope="module")
def painter(folder):
    return TextToImage.load(folder, "cpu")


def command(folder, out, *flags):
    return make_dataset.main(
        ["pair", *CAPTIONS, "--weights", str(folder), "--out", str(out), "--steps", "2", "--dtype", "fp32",
         *flags])


@pytest.mark.parametrize("flags, settings", [
    ([], {"inject": "self"}), (["--inject", "none"], {"inject": "none"}),
    (["--inject", "cross", "--p", "0.8", "--reweight", "blue", "3", "--reweight", "boat", "-1", "--window",
      "house", "0.2", "0.9"],
     {"inject": "cross", "p": 0.8, "reweight": {"blue": 3.0, "boat": -1.0},
      "windows": {"house": (0.2, 0.9)}}),
    (["--deep-every", "2", "--steps", "3"], {"deep_every": 2, "steps": 3}),
    (["--blend", "auto"], {"blend": ([[3]], [[3]]), "blend_most": changes.MOST}),
    (["--inject", "both", "--blend", "red", "boat", "--sampler", "euler", "--seed", "7", "--cfg-text", "5",
      "--negative", "night", "--resolution", "32"],
     {"inject": "both", "blend": ("red", "boat"), "sampler": "euler", "seed": 7, "cfg_text": 5.0,
      "negative": "night", "resolution": 32}),
], ids=lambda given: " ".join(given) if isinstance(given, list) else "")
def test_the_command_paints_the_pair(painter, folder, tmp_path, capsys, flags, settings):
    out = tmp_path / "new" / "pair.png"
    assert command(folder, out, *flags) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{out}  turn the red") and "Traceback" not in printed.err
    settings = {"p": 0.5, "seed": 0, "cfg_text": 3.0} | settings
    drawn = [settings.pop(key) for key in ("seed", "p", "cfg_text")]
    model = PairPainter(painter, *CAPTIONS, **{"steps": 2} | settings)
    [pair] = model.paint(*([value] for value in drawn))
    assert list(out.parent.iterdir()) == [out]
    assert np.array_equal(Image.open(out), grid([list(pair)], [CAPTIONS]))


@pytest.mark.parametrize("faster", ["bf16", "fp32"])
def test_the_device_chooses_the_dtype(folder, tmp_path, monkeypatch, capsys, faster):
    loaded, load = [], TextToImage.load
    monkeypatch.setattr(device, "pick_dtype", lambda name, device: name or faster)
    monkeypatch.setattr(TextToImage, "load", lambda *args: (loaded.append(args[2]), load(*args))[1])
    words = ["--weights", str(folder), "--out", str(tmp_path / "pair.png"), "--steps", "1", "--device", "cpu"]
    assert make_dataset.main(["pair", *CAPTIONS, *words]) == 0
    assert f"; computes in {faster}\n" in capsys.readouterr().err
    assert loaded == [torch.bfloat16 if faster == "bf16" else torch.float32]


@pytest.mark.parametrize("map_", [
    torch.zeros(6, 6), -torch.ones(6, 6), torch.arange(36.).view(6, 6) - 30, torch.arange(36.).view(6, 6) - 5,
    -torch.arange(36.).view(6, 6), torch.full((6, 6), 1e-45), torch.linspace(-1, 1, 36).view(6, 6) * 3e38,
    torch.linspace(-1e-40, 1e-41, 36).view(6, 6), torch.eye(6) * -0.0], ids=range(9))
def test_any_finite_heat_map_is_shown_by_its_size(painter, monkeypatch, map_):
    """The strongest attention, of either sign, keeps the picture; none is black; the rest in proportion."""
    monkeypatch.setattr(show, "grid", lambda rows, labels: rows)
    model = PairPainter(painter, "red", "red", "none", steps=1)
    monkeypatch.setattr(model, "sample", lambda *_: (torch.zeros(2, 4, 9, 9), map_.expand(2, 1, 6, 6)))
    monkeypatch.setattr(painter, "decode", lambda latents: [Image.new("RGB", (6, 6), "white")] * 2)
    most = max(map(abs, map_.flatten().tolist())) or 1.0
    wanted = [abs(value) / most * 255 for value in map_.flatten().tolist()]
    for _, lit in show.draw_heatmaps(model, 0, 0.5, 3.0, None):
        found = np.asarray(lit, float)
        assert np.abs(found - np.reshape(wanted, (6, 6, 1))).max() <= 1.01


@pytest.mark.parametrize("flags", [
    [], ["--blend", "red", "boat", "--inject", "both"], ["--inject", "none"]], ids=str)
def test_heatmaps_show_each_word(painter, folder, tmp_path, monkeypatch, flags):
    shown = []
    monkeypatch.setattr(show, "grid", lambda rows, labels: (
        shown.append((rows, labels)), Image.new("RGB", (8, 8)))[1])
    assert command(folder, tmp_path / "heat.png", "--heatmaps", *flags) == 0
    [(rows, labels)] = shown
    assert labels == [[caption, *caption.split()] for caption in CAPTIONS]
    inject, blend = flags[-1] if flags else "self", ("red", "boat") if "--blend" in flags else None
    model = PairPainter(painter, *CAPTIONS, inject, 2, blend=blend)
    [pair] = model.paint([0], [0.5], [3.0])
    columns = [model.columns([[i] for i in range(1, 8)])] * 2  # each word is one token
    if blend:
        columns = [torch.cat(two, dim=1) for two in zip(columns, model.blend)]
    _, heat = model.sample([0], [0.5], [3.0], columns)
    assert difference(*pair) > 2
    assert all(difference(row[0], picture) <= 1 for row, picture in zip(rows, pair))
    for row, maps in zip(rows, heat.flip(0)):
        base = np.asarray(row[0], float)
        for picture, lit in zip(row[1:], maps, strict=not blend):
            share = np.asarray(Image.fromarray((lit / lit.max() * 255).byte().numpy()).resize(
                row[0].size, Image.Resampling.BICUBIC), float)[..., None] / 255
            assert np.abs(np.asarray(picture) - base * share).max() < 2


@pytest.mark.parametrize("flags, message", [
    (["--inject", "all"], "argument --inject: invalid choice: 'all'"),
    (["--blend"], "argument --blend: expected at least one argument"),
    (["--blend", "red"], "--blend needs a word of each caption, or auto"),
    (["--blend", "auto", "blue", "red"], "--blend needs a word of each caption, or auto"),
    (["--blend", "auto", "blue"], "'auto' is not in 'turn the red house"),
    (["--blend", "red", "night"], "'night' is not in 'turn the blue house into a boat'; name a word of it"),
    (["--reweight", "blue", "much", "--inject", "cross"], "'much'"),
    (["--reweight", "green", "2", "--inject", "cross"], "'green' is not in"),
    (["--reweight", "blue", "2"], "reweighting and windows need the mode cross or both, not self"),
    (["--window", "blue", "0", "late", "--inject", "cross"], "'late'"),
    (["--window", "gree", "0", "1", "--inject", "both"], "'gree' is not in"),
    (["--p", "inf"], "argument --p: 'inf' is not a number"), (["--seed", "-1"], "argument --seed"),
    (["--p", "7"], "--p must be in [0, 1]"),
    (["--window", "blue", "0.8", "0.2", "--inject", "both"], "a --window needs 0 <= FROM <= TO"),
    (["--resolution", "20"], "take a multiple of 8"),
    (["--blend", "red", "boat", "--sampler", "ddim"], "a local blend needs the sampler"),
    (["--blend", "auto", "--sampler", "ddim"], "a local blend needs the sampler"),
    (["--weights", "/nowhere/at/all"], "/nowhere/at/all"),
], ids=lambda given: " ".join(given) if isinstance(given, list) else "")
def test_mistakes_are_one_line(folder, tmp_path, capsys, flags, message):
    assert command(folder, tmp_path / "pair.png", *flags) == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert printed.err.splitlines()[-1:] == errors and message in errors[0] and "Traceback" not in printed.err
    assert not printed.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("captions", [("", "a blue house"), ("a red house", " ")])
def test_an_empty_caption_is_refused(captions, capsys):
    assert make_dataset.main(["pair", *captions]) == 2
    assert "a caption is empty" in capsys.readouterr().err


def test_an_editor_cannot_paint(tmp_path, capsys):
    folder = write_tiny_editor(tmp_path / "editor")
    assert command(folder, tmp_path / "pair.png") == 2
    assert "this is an editor, for sample.py" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "pair.png").exists()


def test_a_lora_changes_the_pair(folder, painter, tmp_path, capsys):
    path, layer = tmp_path / "l.safetensors", painter.unet.conv_out
    torch.manual_seed(0)
    write_lora(path, {"conv_out": (torch.randn(2, *layer.weight.shape[1:]), torch.randn(4, 2))}, 2)
    assert command(folder, tmp_path / "a.png") == 0
    assert command(folder, tmp_path / "b.png", "--lora", f"{path}:0.1") == 0
    assert f"added {path} at weight 0.1" in capsys.readouterr().err
    assert not np.array_equal(Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png"))
    assert command(folder, tmp_path / "c.png", "--lora", f"{path}:much") == 2
