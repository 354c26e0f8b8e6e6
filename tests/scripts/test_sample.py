"""sample.py as people use it: in this process for speed, and once as a command."""

import copy
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from safetensors.torch import load_file, save_file
from tiny_editor import DEFAULTS, write_tiny_editor

import nanoip2p
import sample
from nanoip2p.checkpoint import load
from nanoip2p.checkpoint.lora import write_lora
from nanoip2p.common import files as common_files
from nanoip2p.common.grids import grid
from nanoip2p.common.saving import save_png
from nanoip2p.editing import masks, pictures
from nanoip2p.editing.recipes import read_recipe
from nanoip2p.editor import Editor
from nanoip2p.images import open_image
from nanoip2p.speed import fast as speed
from nanoip2p.unet import UNet
from nanoip2p.vae import VAE

SCRIPT = Path(sample.__file__)
TWO_EDITS = ["--edit", "make it night", "--edit", "red"]
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_tiny_editor(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def opened(weights):
    """The checkpoint, and the editor: a copy of it is far quicker than opening the files for each command."""
    return load.open_checkpoint(weights), Editor.load(weights, device="cpu")


@pytest.fixture
def run(weights, opened, tmp_path, monkeypatch):
    """A folder with pictures to work in, and the command: run("--edit", ...) -> exit code.

    With the tiny weights and no flag that concerns them, a command gets a copy of `opened`. All other weights
    and flags, and the processes below, open the files.
    """
    monkeypatch.chdir(tmp_path)
    plain_open, plain_load = load.open_checkpoint, Editor.load

    def open_checkpoint(*given):
        return opened[0] if given == (str(weights), None, None, None) else plain_open(*given)

    def load_editor(source, device=None, dtype=torch.float32, low_memory=False):
        if source is opened[0] and (device, dtype, low_memory) == ("cpu", torch.float32, False):
            return copy.deepcopy(opened[1])
        return plain_load(weights if source is opened[0] else source, device, dtype, low_memory)

    monkeypatch.setattr(load, "open_checkpoint", open_checkpoint)
    monkeypatch.setattr(Editor, "load", staticmethod(load_editor))
    chance = np.random.default_rng(0)
    for name, (width, height) in {"house.png": (48, 48), "boat.png": (48, 48), "wide.jpg": (90, 50)}.items():
        low = chance.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC).save(name)
    return lambda *argv: sample.main(["--weights", str(weights), "--device", "cpu", "--steps", "2", *argv])


def one(*more, name="house.png", output="out.png"):
    return ["--input", name, "--edit", "make it night", "--output", output, *more]


def files(folder="."):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def again(run, recipe, *more, output="again.png"):
    """With the weights that `run` names, because they are not shipped."""
    return run("--recipe", recipe, "--output", output, *more)


def refusal(capsys, code):
    """The one line that a refused command prints."""
    printed = capsys.readouterr()
    assert code == 2 and printed.out == "", (code, printed)
    [line] = [line for line in printed.err.splitlines() if not line.startswith("opened ")]
    assert line.startswith("error: ") and "Traceback" not in line
    return line


def test_one_picture(run, weights, capsys):
    assert run(*one("--seed", "3", output="new/night.png")) == 0
    assert capsys.readouterr().out == "new/night.png  make it night  (seed 3)\n"
    editor = Editor.load(weights, device="cpu")
    [expected] = editor.edit([open_image("house.png")], ["make it night"], steps=2, seed=3)
    assert np.array_equal(pixels("new/night.png"), np.asarray(expected))


def test_the_recipe_names_everything(run, weights):
    assert run(*one("--seed", "3", "--cfg-image", "1.7", "--negative", "blurry", "--sampler", "ddim")) == 0
    recipe = read_recipe("out.png")
    expected = {
        "input": ["house.png"], "edit": ["make it night"], "turns": False, "n": 1, "seed": 3, "steps": 2,
        "cfg_text": DEFAULTS["cfg_text"], "cfg_image": 1.7, "sampler": "ddim", "negative": "blurry",
        "resolution": DEFAULTS["resolution"], "weights": str(weights), "dtype": "fp32",
        "show_mask": False, "keep_size": False, "side_by_side": False, "grid": False, "sweep": False,
        "low_memory": False, "deep_every": 1, "raw_weights": None, "raw_text": False, "embedding": None,
        "vae": None, "tokenizer": None, "lora": None, "lora_hash": [], "mask": None, "mask_hash": None,
        "mask_invert": False, "mask_blur": 4,
        "version": nanoip2p.__version__, "torch": torch.__version__,
    }
    assert recipe == expected


@pytest.mark.parametrize("flags", [
    ["--steps", "3"], ["--seed", "4"], ["--cfg-text", "5"], ["--cfg-image", "2"], ["--sampler", "dpmpp_2m"],
    ["--negative", "boat"], ["--resolution", "32"], ["--edit", "red"], ["--dtype", "bf16"],
    ["--deep-every", "3"],
])
def test_every_flag_counts(flags, run):
    assert run(*one("--seed", "3")) == 0
    assert run(*one("--seed", "3", output="other.png"), *flags) == 0
    outputs = ["other.png"] if Path("other.png").exists() else ["other_1.png", "other_2.png"]
    assert not np.array_equal(pixels(outputs[-1]), pixels("out.png"))


def test_embeddings_are_named_and_their_words_count(run, capsys):
    for name, seed in (("first", 1), ("second", 2)):
        vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))
        save_file({"emb_params": vectors}, f"{name}.safetensors")
    flags = ["--seed", "3", "--edit", "make it first", "--edit", "make it second", "--output", "out.png"]
    both = ["--embedding", "first.safetensors", "--embedding", "second.safetensors"]
    assert run("--input", "house.png", *flags) == 0
    plain = pixels("out_1.png")
    capsys.readouterr()
    assert run("--input", "house.png", *flags, *both) == 0
    assert "opened first.safetensors: its word is first (2 vectors)" in capsys.readouterr().err.splitlines()
    assert not np.array_equal(pixels("out_1.png"), plain)
    assert not np.array_equal(pixels("out_1.png"), pixels("out_2.png"))
    assert "give --embedding yourself" in refusal(capsys, again(run, "out_1.png"))
    assert again(run, "out_1.png", *both) == 0
    assert np.array_equal(pixels("again.png"), pixels("out_1.png"))
    capsys.readouterr()
    for wrong, complaint in (("gone.pt", "gone.pt is missing"), ("house.png", "house.png is damaged"),
                             ("", "not a regular file")):
        assert complaint in refusal(capsys, run("--input", "house.png", *flags, "--embedding", wrong))


def test_typed_quotes_are_plain_unless_the_text_is_raw(run):
    typed, plain = "make it “night” &amp; red", "make it \"night\" & red"
    for name, edit, *flags in (("typed", typed), ("plain", plain), ("raw", typed, "--raw-text")):
        argv = ["--input", "house.png", "--edit", edit, "--output", f"{name}.png", "--seed", "3", *flags]
        assert run(*argv) == 0
    assert np.array_equal(pixels("typed.png"), pixels("plain.png"))
    assert not np.array_equal(pixels("typed.png"), pixels("raw.png"))
    assert read_recipe("raw.png")["raw_text"] is True
    assert again(run, "raw.png") == 0
    assert np.array_equal(pixels("again.png"), pixels("raw.png"))


def test_low_memory_makes_the_same_picture(run, monkeypatch):
    rows, forward = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda *args: (rows.append(len(args[3].rows)), forward(*args))[1])
    assert run(*one("--seed", "3")) == 0
    assert run(*one("--seed", "3", "--low-memory", output="low.png")) == 0
    assert rows == [3, 3] + [1] * 6
    assert np.abs(pixels("low.png") - pixels("out.png")).max() <= 1


def test_networks_work_one_at_a_time_with_low_memory(run, monkeypatch):
    """Where they wait is the CPU: a device that is another is put in its place."""
    moves, to = [], torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, where, *rest: (
        moves.append((type(self).__name__, str(where))), to(self, "cpu"))[1])
    monkeypatch.setattr(
        Editor, "device", property(lambda self: "there", lambda self, device: None), raising=False)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *where, to=torch.Tensor.to: (
        to(self, *["cpu" if one == "there" else one for one in where])))
    assert run(*one("--seed", "3", "--low-memory")) == 0
    here, moves = moves[:5], moves[5:]
    assert {where for _, where in here} == {"cpu"}
    order = ("TextEncoder", "VAE", "UNet", "VAE")
    assert moves == [(name, where) for name in order for where in ("there", "cpu")]


def test_fast_makes_the_same_picture(run, monkeypatch, capsys):
    used, real = [], speed.speed_up
    monkeypatch.setattr(speed, "speed_up", lambda model, fast, *given, **more: (
        used.append((fast, given[1])), real(model, fast, *given, **more)))
    for words, fast in (((), None), (("--fast",), True), (("--no-fast",), False)):
        assert run(*one("--seed", "3", *words, output=f"{fast}.png")) == 0
        assert used.pop() == (fast, 2 * 12 * 12)  # steps x positions of the latents
        assert np.abs(pixels(f"{fast}.png") - pixels("None.png")).max() <= 1
        assert "fast" not in read_recipe(f"{fast}.png")
    capsys.readouterr()
    assert "--low-memory" in refusal(capsys, run(*one("--fast", "--low-memory")))
    assert run(*one("--low-memory")) == 0 and not used


def test_the_choice_of_attention_reaches_the_network_and_no_recipe(run, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(speed, "speed_up", lambda model, fast, say, _, **how: (
        given.append(how), say("a\nb\x1b")))
    assert run(*one("--fast")) == 0 and run(*one("--fast", "--attention", "ours", "--verbose")) == 0
    assert run(*one("--fast", "--attention", "sdpa")) == 0
    assert given == [{"attention": "auto", "verbose": False}, {"attention": "ours", "verbose": True},
                     {"attention": "sdpa", "verbose": False}]
    assert "a b\\x1b\n" in capsys.readouterr().err
    assert not {"attention", "verbose"} & read_recipe("out.png").keys()
    assert "add --fast" in refusal(capsys, run(*one("--attention", "ours")))


def test_numbered_outputs(run):
    assert run("--input", "house.png", *TWO_EDITS, "--n", "2", "--seed", "7",
               "--output", "out.png") == 0
    made = [name for name in files() if name.startswith("out")]
    assert made == ["out_1.png", "out_2.png", "out_3.png", "out_4.png"]
    recipes = [read_recipe(name) for name in made]
    made = [(recipe["edit"], recipe["seed"]) for recipe in recipes]
    assert made == [(["make it night"], 7), (["make it night"], 8), (["red"], 7), (["red"], 8)]


def test_several_inputs_into_a_folder(run):
    shutil.copy("boat.png", "copy.png")
    Path("other").mkdir()
    shutil.copy("boat.png", "other/House.png")
    assert run("--input", ".", "*.jpg", "other/House.png", "--edit", "red", "--output", "done") == 0
    assert files("done") == ["House-2.png", "boat.png", "copy.png", "house.png", "wide.png"]
    assert pixels("done/wide.png").shape == (32, 56, 3)
    assert run(*one(output="done/")) == 0 and run(*one(name="boat.png", output="new.png/")) == 0
    assert files("new.png") == ["boat.png"]


def test_pictures_of_one_size_share_a_forward(run, monkeypatch):
    rows, forward = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda *args: (rows.append(len(args[3].rows)), forward(*args))[1])
    common = ["--edit", "red", "--n", "2", "--seed", "1", "--steps", "1"]
    assert run("--input", "house.png", "wide.jpg", "boat.png", "--output", "all", *common) == 0
    assert rows == [3 * 4, 3 * 2]
    rows.clear()
    assert run("--input", "house.png", "boat.png", "--output", "parts", "--batch", "3", *common) == 0
    assert rows == [3 * 3, 3 * 1]
    for name in files("parts"):
        assert np.abs(pixels(f"all/{name}") - pixels(f"parts/{name}")).max() <= 1


def test_an_input_is_encoded_once_for_all_its_edits(run, monkeypatch):
    encoded, encode = [], VAE.encode
    monkeypatch.setattr(VAE, "encode", lambda self, x: (encoded.append(len(x)), encode(self, x))[1])
    assert run(*one("--n", "4", "--edit", "make it day", output="out/")) == 0
    assert encoded == [1] and len(files("out")) == 8


def test_turns_follow_each_other(run):
    assert run("--input", "house.png", *TWO_EDITS, "--turns", "--seed", "7",
               "--output", "turns.png") == 0
    assert run(*one("--seed", "7", output="first.png")) == 0
    assert run("--input", "first.png", "--edit", "red", "--seed", "7", "--output", "second.png") == 0
    assert np.array_equal(pixels("turns.png"), pixels("second.png"))
    assert read_recipe("turns.png")["edit"] == ["make it night", "red"] and read_recipe("turns.png")["turns"]


def test_keep_size(run):
    assert run(*one("--keep-size", "--seed", "1", name="wide.jpg")) == 0
    assert pixels("out.png").shape == (50, 90, 3)
    Image.new("RGB", (1, 1), "red").save("dot.png")
    assert run(*one("--keep-size", name="dot.png", output="dot_out.png")) == 0
    assert pixels("dot_out.png").shape == (1, 1, 3)


def test_grid(run, monkeypatch):
    seen = []
    monkeypatch.setattr(pictures, "grid", lambda rows, labels: (seen.append((rows, labels)), rows[0][0])[1])
    assert run("--input", "house.png", "wide.jpg", *TWO_EDITS, "--seed", "5", "--grid",
               "--output", "grid.png") == 0
    [(rows, labels)] = seen
    assert labels == [["input", "make it night", "red"]] * 2
    assert [[image.size for image in row] for row in rows] == [[(48, 48)] * 3, [(56, 32)] * 3]
    assert rows[0][0] == open_image("house.png")
    assert run("--input", "house.png", "--edit", "red", "--seed", "5", "--output", "red.png") == 0
    assert np.abs(np.asarray(rows[0][2]).astype(int) - pixels("red.png")).max() <= 1
    assert run("--input", "house.png", *TWO_EDITS, "--turns", "--n", "2", "--seed", "5",
               "--grid", "--output", "grid.png") == 0
    turns = [f"{edit} (seed {seed})" for seed in (5, 6) for edit in ("make it night", "red")]
    assert seen[1][1] == [["input", *turns]]
    assert "grid.png" in files() and not any("_1" in name for name in files())


def test_a_drawn_grid_is_one_labelled_picture(run):
    assert run("--input", "house.png", "--edit", "red", "--grid", "--output", "grid.png") == 0
    assert pixels("grid.png").shape[1] > 2 * 192 and read_recipe("grid.png")["grid"] is True


def test_a_sweep_is_the_same_edit_at_other_scales(run, monkeypatch, capsys):
    seen, flags = [], ["--seed", "5", "--cfg-text", "5", "--negative", "boat"]
    monkeypatch.setattr(pictures, "grid", lambda *args: (seen.append(args), grid(*args))[1])
    assert run(*one("--sweep", "--cfg-image", "1.5", *flags, name="wide.jpg")) == 0
    assert capsys.readouterr().out == "out.png  make it night, by cfg_text and cfg_image  (seed 5)\n"
    [(rows, labels)] = seen
    scales = [[(text, image) for image in (1, 1.25, 1.5, 1.75, 2)] for text in (2, 3.5, 5, 6.5, 8)]
    assert labels == [["input"], *(
        [f"cfg_text {text}, cfg_image {image}" for text, image in row] for row in scales)]
    assert len({cell.tobytes() for row in rows for cell in row}) == 26 and rows[0][0].size == (56, 32)
    for row, column in ((0, 0), (1, 3), (4, 2)):
        text, image = map(str, scales[row][column])
        alone = one(*flags, "--cfg-text", text, "--cfg-image", image, name="wide.jpg", output="alone.png")
        assert run(*alone) == 0
        assert np.array_equal(np.asarray(rows[row + 1][column]), pixels("alone.png"))
    assert again(run, "out.png") == 0
    assert np.array_equal(pixels("again.png"), pixels("out.png"))


def test_a_recipe_repeats_one_picture_of_many(run):
    assert run("--input", "house.png", "wide.jpg", "boat.png", *TWO_EDITS, "--n", "2",
               "--sampler", "dpmpp_2m", "--negative", "blurry", "--output", "done") == 0
    for name in ("house_1.png", "boat_4.png", "wide_2.png"):
        assert again(run, f"done/{name}") == 0
        assert read_recipe("again.png") == read_recipe(f"done/{name}")
        # In a batch of another size sums are rounded differently
        assert np.abs(pixels("again.png") - pixels(f"done/{name}")).max() <= 1


@pytest.mark.parametrize("flags", [["--turns", "--keep-size"], ["--grid", "--n", "2"], ["--low-memory"],
                                   ["--deep-every", "2"]])
def test_other_recipes(flags, run):
    assert run("--input", "wide.jpg", *TWO_EDITS, "--output", "out.png", *flags) == 0
    for path in [path for path in files() if path.startswith("out")]:
        assert again(run, path) == 0
        assert read_recipe("again.png") == read_recipe(path)
        assert np.abs(pixels("again.png") - pixels(path)).max() <= 1


def test_flags_override_a_recipe(run):
    assert run(*one("--seed", "3", "--cfg-text", "5")) == 0
    assert again(run, "out.png", "--input", "boat.png", "--seed", "4", output="b.png") == 0
    assert run(*one("--seed", "4", "--cfg-text", "5", name="boat.png", output="c.png")) == 0
    assert np.array_equal(pixels("b.png"), pixels("c.png"))


def test_the_random_seed_is_told(run, capsys):
    assert run(*one()) == 0
    assert f"(seed {read_recipe('out.png')['seed']})" in capsys.readouterr().out
    assert run(*one(output="other.png")) == 0
    assert read_recipe("other.png")["seed"] != read_recipe("out.png")["seed"]


def test_a_long_instruction_is_cut_with_a_note(run, capsys):
    assert run("--input", "house.png", "--edit", "night " * 100 + "tail", "--output", "out.png") == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "tail" in notes[0]


def test_weights_are_also_found_in_the_checkout(run, weights, monkeypatch):
    monkeypatch.setattr(common_files, "CHECKOUT", weights.parent)
    assert sample.main(one("--weights", weights.name, "--steps", "1")) == 0
    assert read_recipe("out.png")["weights"] == weights.name


WRONG = {
    "no input": (["--edit", "red", "--output", "o.png"], "needed, but not given: --input"),
    "nothing": ([], "--input, --edit"),
    "absent": (one(name="absent.png"), "there is no picture at absent.png"),
    "no glob": (one(name="*.bmp"), r"\*.bmp"),
    "empty folder": (one(name="void"), "there is no picture at void"),
    "empty edit": (one("--edit", " "), "instruction is empty"),
    "no quotes": (["--edit", "make", "it", "night", "--input", "house.png"], "arguments: it night"),
    "no step": (one("--deep-every", "0"), "--deep-every: '0' is not a whole number from 1"),
    "steps before": (one("--deep-every=-1"), "--deep-every: '-1' is not a whole number from 1"),
    "no number of steps": (one("--deep-every", "x"), "--deep-every: 'x' is not a whole number from 1"),
    "dashes": (one("--edit=--"), "--edit=--: -- cannot be a value"),
    "no output": (one(output=""), "not given: --output"),
    "large": (one("--resolution", "10001"), "'10001' is not a whole number from 1 to 10,000"),
    "a long text": (one("--negative", "x" * 10_001), "a text has 10001 characters; the limit is 10000"),
    "bytes": (["--input", "house.png", "--edit", "\udcff", "--output", "o.png"], "not valid Unicode"),
    "gif": (one(output="out.gif"), "should end in .png, .jpg, .jpeg, .webp, or in / for a folder"),
    "beside a grid": (one("--side-by-side", "--grid"), "leave out --side-by-side"),
    "beside a sweep": (one("--side-by-side", "--sweep"), "leave out --side-by-side"),
    "many to one": (["--input", "house.png", "boat.png", "--edit", "x", "--output", "o.png"], "2 inputs"),
    "grid to folder": (one("--grid", output="grids/"), "must end in .png"),
    "sweep to folder": (one("--sweep", output="sweeps/"), "--sweep writes one file: --output sweeps/"),
    "sweep of inputs": (one("--sweep", "--input", "boat.png"), "--sweep needs one --edit and one --input"),
    "sweep of edits": (one("--sweep", "--turns", "--edit", "red"), "--sweep needs one --edit"),
    "sweep of samples": (one("--sweep", "--n", "2"), "excludes --n"),
    "sweep in a grid": (one("--sweep", "--grid"), "--sweep needs one"),
    "sweep to size": (one("--sweep", "--keep-size"), "excludes --n, --grid and --keep-size"),
    "onto input": (one(output="./house.png"), "would overwrite an input"),
    "file as folder": (one(output="house.png/out.png"), "cannot be written"),
    "folder as file": (one("--edit", "red", output="taken.png"), "taken_1.png"),
    "long name": (one(output="x" * 300 + ".png"), "too long"),
    "sampler": (one("--sampler", "magic"), "invalid choice: 'magic'"),
    "steps": (one("--steps", "0"), "'0' is not a whole number from 1 up"),
    "too many steps": (one("--steps", "1001"), "1001 steps"),
    "too many steps for two": (["--input", "house.png", "boat.png", "--edit", "x", "--output", "o/",
                                "--steps", "1001"], "1001 steps"),
    "fraction": (one("--n", "1.5"), "'1.5' is not a whole number"),
    "seed": (one("--seed", "-1"), "'-1' is not a whole number from 0"),
    "guidance": (one("--cfg-text", "nan"), "'nan' is not a number"),
    "resolution": (one("--resolution", "5"), "house.png: a resolution of 5 is too small"),
    "flag": (one("--cgf-text", "3"), "unrecognized arguments: --cgf-text 3"),
    "device": (one("--device", "warp"), "device 'warp' does not work here"),
    "dtype": (one("--dtype", "fp8"), "invalid choice: 'fp8'"),
    "weights": (one("--weights", "nowhere"), "no file or folder nowhere"),
    "no recipe": (["--recipe", "house.png", "--output", "o.png"], "has no recipe of an edit"),
    "no recipe of an edit": (one("--recipe", str(Path(sample.__file__).parent / "weights/first-editor.png")),
                             "first-editor.png has no recipe of an edit"),
    "no LoRA": (one("--lora", "house.png", output="o.png"), "house.png is damaged or no safetensors file"),
    "absent LoRA": (one("--lora", "x.safetensors:2", output="o.png"), "x.safetensors is missing"),
    "a weight of a LoRA": (one("--lora", "x:much", output="o.png"), "--lora x:much: .* 'much' is no weight"),
    "absent recipe": (["--recipe", "absent.png", "--output", "o.png"], "absent.png"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_one_line(name, run, capsys, tmp_path):
    (tmp_path / "void").mkdir()
    (tmp_path / "taken_1.png").mkdir()
    before = files()
    argv, message = WRONG[name]
    line = refusal(capsys, run(*argv))
    assert re.search(message, line), line
    assert files() == before, "a refused command writes nothing"


RECIPES = {
    "nonsense": ({"steps": "many"}, "steps = 'many' should be a whole number"),
    "no input": ({"input": None}, "not given: --input"),
    "no edit": ({"edit": []}, "has no recipe of an edit"),
    "an object": ({"input": {"a": 1}}, "input = {'a': 1} should be a list"),
    "a number": ({"input": 5}, "input = 5 should be a list"),
    "a number as text": ({"edit": [3]}, "edit = [3] should be a list, each item a text"),
    "empty": ({"edit": [""], "unknown": "--help"}, "instruction is empty"),
    "dashes": ({"edit": ["--"]}, "--edit=--: -- cannot be a value"),
    "a choice": ({"sampler": "magic"}, "invalid choice: 'magic'"),
    "below": ({"steps": 0}, "'0' is not a whole number from 1"),
    "huge": ({"cfg_text": 10**400}, "cfg_text = 10000"),
    "not finite": ({"cfg_text": float("nan")}, "cfg_text = nan"),
    "samples": ({"n": 10**8}, "brings --n 100000000, more than 16; if you mean it, give --n yourself"),
    "steps": ({"steps": 1001}, "more than 1000; if you mean it, give --steps"),
    "resolution": ({"resolution": 4096}, "more than 2048; if you mean it, give --resolution"),
    "edits": ({"edit": ["red"] * 65}, "brings --edit 65, more than 64"),
    "inputs": ({"input": ["house.png"] * 101}, "brings --input 101, more than 100"),
    "a glob": ({"input": ["*.png"]}, "no file here; if you mean it, give --input yourself"),
    "a folder": ({"input": ["."]}, "no file here"),
    "absent": ({"input": ["house.png", "gone.png"]}, "no file here"),
    "a device": ({"input": ["/dev/zero"]}, "no file here"),
    "no name": ({"input": ["a\x00b"]}, "no file here"),
    "the Hub": ({"weights": "owner/name"},
                "names the weights owner/name, not in weights/; if you mean it, give --weights yourself"),
    "a way out": ({"weights": "weights/../house.png"}, "house.png, not in weights"),
    "own weights": ({"weights": "void"}, "names the weights void, not in"),
    "not shipped": ({"weights": "weights/none"}, "names the weights weights/none"),
    "autoencoder": ({"vae": "weights/nano"}, "names the vae weights/nano, not in weights"),
    "tokenizer": ({"tokenizer": "owner/name"}, "give --tokenizer yourself"),
    "embedding": ({"embedding": ["weights/nano-sd/defaults.json", "void/x.pt"]},
                  "names the embedding void/x.pt, not in weights/; if you mean it, give --embedding"),
    "embeddings": ({"embedding": ["x"] * 17}, "brings --embedding 17, more than 16"),
    "lora": ({"lora": ["weights/nano-sd/defaults.json:0.5", "void/x.safetensors:0.5"]},
             "names the lora void/x.safetensors, not in weights/; if you mean it, give --lora yourself"),
    "a way out by a weight": ({"lora": ["weights/../house.png:0.5"]}, "house.png, not in weights/"),
    "a weight": ({"lora": ["weights/x:much"]}, "'much' is no weight"),
    "loras": ({"lora": ["x"] * 17}, "brings --lora 17, more than 16"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_odd_recipes_are_one_line(name, run, capsys, monkeypatch):
    monkeypatch.setattr(load, "open_checkpoint", lambda *_: pytest.fail("opened weights"))
    monkeypatch.setattr(sample, "plan_pictures", lambda *_: pytest.fail("planned"))
    Path("void").mkdir()
    recipe, message = RECIPES[name]
    save_png(Image.new("RGB", (8, 8)), "odd.png", {"input": ["house.png"], "edit": ["red"], **recipe})
    line = refusal(capsys, sample.main(["--recipe", "odd.png", "--output", "o.png"]))
    assert message in line


def test_what_a_recipe_may_not_say_the_user_may(run, weights):
    odd = {"n": 17, "steps": 1001, "resolution": 4096, "weights": "owner/name", "vae": "a/b",
           "tokenizer": "c/d", "input": ["*.png"], "edit": ["red"] * 65, "embedding": ["e.pt"]}
    save_png(Image.new("RGB", (8, 8)), "odd.png", odd)
    given = [f"--{key}={value[0] if isinstance(value, list) else value}" for key, value in odd.items()]
    settings = sample.parse(["--recipe", "odd.png", "--output", "out/", *given])
    assert settings.n == 17 and settings.weights == "owner/name" and settings.input == ["*.png"]
    assert settings.embedding == ["e.pt"]


def test_the_weight_of_a_lora_is_checked_before_weights_are_opened(run, capsys):
    assert run(*one("--lora", "x:much")) == 2
    assert "opened" not in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--low-memory",), ("--fast",), ("--dtype", "bf16")])
def test_loras_are_added_and_their_hashes_are_in_the_recipe(more, run, weights, capsys):
    editor = Editor.load(weights, device="cpu")
    for seed, name in enumerate(("a.safetensors", "b.safetensors")):
        torch.manual_seed(seed)
        write_lora(Path(name), {layer: (torch.randn(2, *module.weight.shape[1:]) / 16,
                                        torch.randn(len(module.weight), 2) / 2)
                                for layer, module in editor.unet.named_modules()
                                if layer.endswith(("conv1", "conv_in", "to_q"))}, 2)
    assert run(*one("--seed", "3", *more, output="plain.png")) == 0
    assert run(*one("--seed", "3", *more, "--lora", "a.safetensors:0.5", "--lora", "a.safetensors")) == 0
    assert "added a.safetensors once more at weight 1: diffusers LoRA" in capsys.readouterr().err
    assert abs(pixels("out.png") - pixels("plain.png")).mean() > 1
    recipe = read_recipe("out.png")
    assert recipe["lora"] == ["a.safetensors:0.5", "a.safetensors"]
    assert recipe["lora_hash"] == [hashlib.sha256(Path("a.safetensors").read_bytes()).hexdigest()[:10]] * 2
    argv = [*more, "--lora", "a.safetensors:0.5", "--lora", "a.safetensors"]
    assert again(run, "out.png", *argv) == 0
    assert np.array_equal(pixels("again.png"), pixels("out.png"))
    assert "other content" not in capsys.readouterr().err
    Path("b.safetensors").rename("a.safetensors")
    assert again(run, "out.png", *argv) == 0
    assert "out.png was made with a LoRA file of other content" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["weights/nano-sd", "./weights/nano-sd",
                                  f"{common_files.CHECKOUT}/weights/nano-sd"])
def test_a_recipe_may_name_shipped_weights_by_any_path(run, name):
    recipe = {"input": ["house.png"], "edit": ["red"], "weights": name}
    save_png(Image.new("RGB", (8, 8)), "odd.png", recipe)
    assert sample.parse(["--recipe", "odd.png", "--output", "o.png"]).weights == name


@pytest.mark.parametrize("recipe, raw", [({}, True), ({"raw_text": False}, False)])
def test_a_recipe_from_before_texts_were_cleaned_keeps_its_picture(run, recipe, raw):
    save_png(Image.new("RGB", (8, 8)), "old.png", {"input": ["house.png"], "edit": ["“red”"]} | recipe)
    assert sample.parse(["--recipe", "old.png", "--output", "o.png"]).raw_text is raw


def test_a_recipe_of_shipped_weights_needs_no_flag_and_is_shown(run, capsys):
    flags = ["--seed", "3", "--weights", "weights/nano-ip2p-paper", "--steps", "1", "--device", "cpu"]
    assert sample.main(one(*flags, output="night.png")) == 0
    capsys.readouterr()
    assert sample.main(["--recipe", "night.png", "--output", "again.png", "--device", "cpu"]) == 0
    shown = capsys.readouterr().err.splitlines()
    for word in ("--input=house.png", "--edit=make it night", "--steps=1", "--seed=3",
                 "--weights=weights/nano-ip2p-paper"):
        assert f"night.png brings {word}" in shown
    assert np.array_equal(pixels("again.png"), pixels("night.png"))


def test_no_more_pictures_than_a_plan_can_hold(run, capsys, monkeypatch):
    monkeypatch.setattr(sample, "MOST_PICTURES", 5)
    assert "x --n 6 are more than 5 pictures" in refusal(capsys, run(*one("--n", "6", output="out/")))


def test_data_never_steers_the_terminal(run, capsys):
    """A file name, an edit and a recipe with escape sequences."""
    evil = "a\x1b[2Jb\x07\u202e"
    shutil.copy("house.png", f"{evil}.png")
    argv = ["--input", ".", "--edit", evil, "--output", "done/"]
    assert run(*argv) == 0 and run("--recipe", f"done/{evil}.png", "--output", "again.png") == 0
    assert sample.main(one("--edit", f"{evil} word", "--steps", "1", output="o/")) == 0
    assert run("--input", f"{evil}?", "--edit", "x", "--output", "again.png") == 2
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert "a\\x1b[2Jb" in printed.out and "brings --edit=a\\x1b" in printed.err and "unknown here" in text
    assert all(letter.isprintable() or letter in "\n\r" for letter in text)


def write_bad_pictures():
    Path("text.png").write_text("no picture")
    Path("cut.png").write_bytes(Path("house.png").read_bytes()[:60])
    Image.new("1", (30_000, 3400)).save("large.png")


def test_bad_pictures_are_refused_before_any_work(run, capsys, monkeypatch):
    write_bad_pictures()
    monkeypatch.setattr(Editor, "load", lambda *_: pytest.fail("work began"))
    for name in ("text.png", "cut.png", "large.png"):
        assert name in refusal(capsys, run("--input", name, *TWO_EDITS, "--output", "done"))
    assert run("--input", "text.png", "cut.png", "--edit", "red", "--output", "done") == 2
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("left out: text.png") and last.startswith("error: cut.png")


def test_bad_pictures_of_many_are_left_out_and_named(run, capsys):
    write_bad_pictures()
    Image.new("RGB", (30_000, 10)).save("thin.png")
    Path("._house.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    shutil.copy("wide.jpg", "wide.jfif")
    assert run("--input", ".", "--edit", "red", "--seed", "1", "--output", "done") == 1
    assert files("done") == ["boat.png", "house.png", "wide-2.png", "wide.png"]
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 4
    lines = [line for line in printed.err.splitlines() if line.startswith(("left out", "opened", "not made"))]
    bad = ("cut.png", "large.png", "text.png", "thin.png")
    assert [line.split()[:3] for line in lines if line[0] == "l"] == [["left", "out:", name] for name in (
        *bad[:3], "thin.png:")]
    assert [line[0] for line in lines] == [*"lllol", *"nnnn"], "told before the weights are opened, and again"
    assert all(name in line for name, line in zip(bad, lines[-4:]))
    assert run("--input", ".", "--edit", "red", "--seed", "1", "--grid", "--output", "grid.png") == 1
    assert read_recipe("grid.png")["input"] == ["boat.png", "house.png", "wide.jfif", "wide.jpg"]


@pytest.fixture
def black_becomes_nan(monkeypatch):
    """Each picture that is black all over comes out as NaN."""
    def encode(self, x, real=VAE.encode):
        mean, *rest = real(self, x)
        return torch.where((x == -1).flatten(1).all(1)[:, None, None, None], torch.nan, mean), *rest

    monkeypatch.setattr(VAE, "encode", encode)
    Image.new("RGB", (48, 48)).save("black.png")
    Image.new("RGB", (48, 48), "white").save("mask.png")


def test_a_picture_that_comes_out_as_nan_is_left_out(run, capsys, black_becomes_nan):
    flags = ["--edit", "red", "--edit", "make it night", "--seed", "1"]
    assert run("--input", "black.png", "boat.png", "house.png", *flags, "--output", "done") == 1
    assert files("done") == ["boat_1.png", "boat_2.png", "house_1.png", "house_2.png"]
    lines = capsys.readouterr().err.splitlines()[-2:]
    assert all(line.startswith("not made: black.png: the picture came out as NaN") for line in lines), lines
    assert run("--input", "boat.png", *flags, "--output", "alone") == 0
    for name in files("alone"):
        assert np.abs(pixels(f"alone/{name}") - pixels(f"done/{name}")).max() <= 1
    assert run("--input", "house.png", "black.png", *flags, "--grid", "--output", "grid.png") == 1
    capsys.readouterr()
    for more in ([], ["--sweep"], ["--grid"]):
        assert "came out as NaN" in run_alone(run, capsys, *more)


def run_alone(run, capsys, *more):
    """The last line of a command whose only picture comes out as NaN."""
    assert run(*one(*more, name="black.png")) == 2 and not Path("out.png").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_the_text_of_the_web_uis_lies_beside_the_recipe(run, weights):
    assert run("--input", "wide.jpg", *TWO_EDITS, "--turns", "--seed", "3", "--negative", "blurry",
               "--keep-size", "--output", "out.png") == 0
    with Image.open("out.png") as image:
        assert set(image.text) == {"nanoip2p", "parameters"}
        assert image.text["parameters"] == (
            "make it night, then red\nNegative prompt: blurry\nSteps: 2, Sampler: Euler a, CFG scale: 3.0, "
            f"Image CFG scale: 1.2, Seed: 3, Size: 90x50, Model: {weights.name}")


def test_odd_pictures_work(run, capsys):
    Image.new("RGB", (1, 1), "red").save("dot.png")
    assert run(*one(name="dot.png")) == 0 and pixels("out.png").shape == (48, 48, 3)
    Image.new("RGB", (3000, 300)).save("wide.png")
    assert run(*one(name="wide.png")) == 0 and pixels("out.png").shape == (8, 80, 3)
    capsys.readouterr()
    Image.new("RGB", (30_000, 10)).save("thin.png")
    assert "thin.png: 30000x10 is too thin" in refusal(capsys, run(*one(name="thin.png")))
    kinds = {"rgba": "RGBA", "grey": "L", "palette": "P", "bits": "I;16", "cmyk": "CMYK"}
    for name, mode in kinds.items():
        Image.new(mode, (20, 20)).save(f"{name}.{'jpg' if mode == 'CMYK' else 'png'}")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    Image.open("wide.jpg").save("turned.jpg", exif=exif)
    inputs = [f"{name}.*" for name in (*kinds, "turned")]
    assert run("--input", *inputs, "--edit", "red", "--output", "done") == 0
    assert files("done") == sorted(f"{name}.png" for name in (*kinds, "turned"))
    assert pixels("done/turned.png").shape == (56, 32, 3), "upright"


def test_bad_weights_are_one_line(run, capsys, weights, tmp_path):
    def broken(name, change):
        folder = shutil.copytree(weights, tmp_path / name)
        change(folder / UNET_FILE)
        return refusal(capsys, run(*one("--weights", name)))

    def put(value):
        return lambda path: save_file(load_file(path) | {"conv_in.bias": value}, path)

    assert "is missing" in broken("gone", lambda path: path.unlink())
    assert "damaged" in broken("cut", lambda path: path.write_bytes(path.read_bytes()[:500]))
    assert "conv_in.bias of (3,)" in broken("shape", put(torch.zeros(3)))
    assert "NaN" in broken("nan", put(torch.full((16,), torch.nan)))
    assert files("nan") == files(weights) and not Path("out.png").exists()


@pytest.mark.parametrize("error, code, message", [
    (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(28, "No space left on device"), 2, "No space left"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\n  Details"), 2, "--low-memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "--low-memory"),
    (MemoryError(), 2, "--low-memory"),
])
@pytest.mark.parametrize("during", ["work", "writing"])
def test_an_interruption_leaves_no_half_file(error, code, message, during, run, capsys, monkeypatch):
    assert run(*one("--seed", "1")) == 0
    capsys.readouterr()
    old, before = Path("out.png").read_bytes(), files()

    def fail(self, file, *_, **__):
        Path(file).write_bytes(b"half a file")
        raise error

    def fail_at_work(*_):
        raise error

    owner, name = (UNet, "forward") if during == "work" else (Image.Image, "save")
    monkeypatch.setattr(owner, name, fail_at_work if during == "work" else fail)
    assert run(*one("--seed", "2")) == code
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert files() == before and Path("out.png").read_bytes() == old


def test_another_autoencoder_and_a_tokenizer_by_name(run, weights, tmp_path_factory):
    other = write_tiny_editor(tmp_path_factory.mktemp("other"), seed=5)
    assert run(*one("--seed", "3")) == 0
    assert run(*one("--seed", "3", "--tokenizer", str(weights / "tokenizer"), output="same.png")) == 0
    assert run(*one("--seed", "3", "--vae", str(other / "vae"), output="other.png")) == 0
    assert np.array_equal(pixels("out.png"), pixels("same.png"))
    assert not np.array_equal(pixels("out.png"), pixels("other.png"))
    assert again(run, "other.png", "--vae", str(other / "vae")) == 0
    assert np.array_equal(pixels("other.png"), pixels("again.png"))


def test_an_error_of_ours_is_not_hidden(run, monkeypatch):
    monkeypatch.setattr(UNet, "forward", lambda *_: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="size of tensor"):
        run(*one())


def command(weights, *argv):
    """Started as from a terminal: under nohup it would inherit that SIGINT is ignored."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--weights", str(weights), "--device", "cpu", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def interrupt(process, after):
    """Send Ctrl-C when the progress shows `after`. Returns what was printed, and the last line of stderr."""
    progress = ""
    while not re.search(after, progress) and process.poll() is None:
        progress += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    printed, rest = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in rest
    assert rest.splitlines()[-1] == "interrupted; the pictures named above are kept"
    return printed.splitlines()


# At the third batch of 1,000 pictures, which take a minute
MANY = ["--n", "1000", "--batch", "2", "--seed", "5", "--steps", "3"]
TWO_BATCHES = r"(?s)( 0/3.*){3}"


def test_ctrl_c_keeps_finished_pictures(run, weights):
    printed = interrupt(command(weights, *one(*MANY, output="done/")), TWO_BATCHES)
    made = [f"done/{name}" for name in files("done")]
    assert len(made) >= 4 and [line.split()[0] for line in printed] == made
    for i, path in enumerate(made):
        assert pixels(path).shape == (48, 48, 3) and read_recipe(path)["seed"] == 5 + i


def interrupt_call(number, monkeypatch):
    """In this process: Ctrl-C during one of the calls of Editor.edit."""
    calls, real = [], Editor.edit

    def edit(*given, **more):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*given, **more)

    monkeypatch.setattr(Editor, "edit", edit)


def test_ctrl_c_draws_the_grid_of_what_is_finished(run, monkeypatch, capsys):
    interrupt_call(4, monkeypatch)
    assert run(*one(*MANY, "--grid", output="grid.webp")) == 130
    assert re.search(r"grid.webp  6 of 1000 edits  \(seed 5\)\n$", capsys.readouterr().out)
    assert Image.open("grid.webp").height == 8 + 2 * (192 + 18 + 8)  # at most five edits in a row
    assert read_recipe("grid.webp")["n"] == 1000
    assert not [name for name in files() if name.startswith(".")]


def test_ctrl_c_draws_the_finished_part_of_a_sweep(run, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(pictures, "grid", lambda *args: (seen.append(args), grid(*args))[1])
    interrupt_call(8, monkeypatch)
    assert run(*one("--sweep", "--seed", "5", "--steps", "1")) == 130
    printed = capsys.readouterr()
    assert printed.out == "out.png  make it night, by cfg_text and cfg_image: 7 of 25 edits  (seed 5)\n"
    [(rows, labels)] = seen
    assert list(map(len, rows)) == list(map(len, labels)) == [1, 5, 2] and pixels("out.png").size


def test_nothing_finished_is_no_picture(run, monkeypatch, capsys):
    monkeypatch.setattr(UNet, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    before = files()
    for more in (["--grid"], ["--sweep"], [], ["--side-by-side"]):
        assert run("--input", "house.png", "--edit", "red", *more) == 130
    assert files() == before and capsys.readouterr().out == ""


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "webp"])
def test_other_formats_bring_their_recipe(suffix, run):
    assert run(*one("--seed", "3", "--negative", "böse <&>")) == 0
    assert run(*one("--seed", "3", "--negative", "böse <&>", output=f"a.{suffix}")) == 0
    assert read_recipe(f"a.{suffix}") == read_recipe("out.png")
    assert np.abs(pixels(f"a.{suffix}") - pixels("out.png")).mean() <= (0 if suffix == "webp" else 4)
    assert again(run, f"a.{suffix}") == 0 and np.array_equal(pixels("again.png"), pixels("out.png"))
    assert run(*one("--n", "2", output=f"b.{suffix}")) == 0
    assert [name for name in files() if name[0] == "b" and name != "boat.png"] == [
        f"b_1.{suffix}", f"b_2.{suffix}"]


@pytest.mark.parametrize("more", [[], ["--keep-size"], ["--turns", "--edit", "red"], ["--n", "2"],
                                  ["--mask", "mask.png", "--mask-blur", "0"]], ids=str)
def test_side_by_side(more, run):
    Image.new("L", (48, 48), 255).save("mask.png")
    flags = ["--input", "house.png", "wide.jpg", "--edit", "make it night", "--seed", "3", *more]
    assert run(*flags, "--output", "alone") == 0 and run(*flags, "--side-by-side", "--output", "both") == 0
    assert files("alone") == files("both") and len(files("both")) in (2, 4)
    for name in files("both"):
        alone, both = pixels(f"alone/{name}"), pixels(f"both/{name}")
        width, parts = alone.shape[1], 3 if "--turns" in more else 2
        assert both.shape == (alone.shape[0], width * parts, 3)
        assert np.array_equal(both[:, -width:], alone)
        if "house" in name or "--keep-size" in more:
            source = "house.png" if "house" in name else "wide.jpg"
            assert np.array_equal(both[:, :width], np.asarray(open_image(source)))
    assert read_recipe(f"both/{name}") == read_recipe(f"alone/{name}") | {"side_by_side": True}
    if parts == 3:
        assert run(*one("--seed", "3")) == 0
        assert np.array_equal(pixels("both/house.png")[:, 48:96], pixels("out.png"))


def test_a_recipe_brings_side_by_side(run):
    assert run(*one("--side-by-side", "--seed", "3", name="wide.jpg", output="a.webp")) == 0
    assert again(run, "a.webp") == 0 and np.array_equal(pixels("again.png"), pixels("a.webp"))


def test_names_without_output(run, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "SWEEP_FACTORS", (1,))

    def names():
        return [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]

    assert run("--input", "house.png", "--edit", "Make it ночь!", "--seed", "3") == 0
    assert names() == ["out/house-make-it-ночь.png"]
    old = Path("out/house-make-it-ночь.png").read_bytes()
    assert run("--input", "house.png", "--edit", "Make it ночь!", "--edit", "red", "--n", "2") == 0
    assert names() == ["out/house-make-it-ночь-2.png", "out/house-make-it-ночь-3.png", "out/house-red.png",
                       "out/house-red-2.png"]
    assert Path("out/house-make-it-ночь.png").read_bytes() == old
    assert run("--input", "house.png", *TWO_EDITS, "--turns") == 0
    assert names() == ["out/house-make-it-night-red.png"]
    for more, name in ((["--grid"], "house-grid"), (["--sweep"], "house-red-sweep"),
                       (["--grid", "--input", "boat.png"], "grid"), (["--grid"], "house-grid-2")):
        assert run("--input", "house.png", "--edit", "red", *more) == 0
        assert names() == [f"out/{name}.png"]
    assert run("--recipe", "out/house-red.png") == 0 and names() == ["out/house-red-3.png"]
    shutil.rmtree("out")
    Path("out").write_text("a file")
    line = refusal(capsys, run("--input", "house.png", "--edit", "red"))
    assert "out/house-red.png cannot be written" in line


@pytest.mark.parametrize("edit", ["../../victim", "/etc/passwd", "..", ". . .", "con\x00.png", "a" * 5000,
                                  "夜" * 3000, "\u202egnp.exe", "C:\\x", "nul"])
def test_a_stranger_s_edit_names_a_file_in_out_only(edit, run, weights, tmp_path):
    (tmp_path / "work").mkdir()
    os.chdir("work")
    shutil.copy("../house.png", ".x y.png")
    save_png(Image.new("RGB", (8, 8)), "odd.png", {"input": [".x y.png"], "edit": [edit]})
    before = files(tmp_path)
    assert run("--recipe", "odd.png", "--steps", "1") == 0
    [made] = set(files(tmp_path)) - set(before)
    assert re.fullmatch(r"work/out/x-y-[\w-]+\.png", made) and "--" not in made


def test_converted_colours_are_told_once_for_each_profile(run, capsys):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    other = srgb.replace(b"rXYZ", b"xXYZ").replace(b"gXYZ", b"rXYZ").replace(b"xXYZ", b"gXYZ")
    other = other.replace("sRGB built-in".encode("utf-16-be"), "Display P\x1b[2J".encode("utf-16-be"))
    for name, icc in (("a", other), ("b", other), ("c", other), ("same", srgb), ("broken", other[:200])):
        Image.open("house.png").save(f"{name}.png", icc_profile=icc)
    assert run("--input", ".", "--edit", "red", "--output", "done/") == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "colours" in line]
    assert notes == ["note: a.png and 2 more: colours converted from Display P\\x1b[2J to sRGB"]
    assert run(*one(name="b.png")) == 0
    assert "note: b.png: colours converted from Display P\\x1b[2J to sRGB\n" in capsys.readouterr().err


def test_as_a_command(run, weights):
    process = command(weights, *one("--seed", "1", "--steps", "2"))
    printed, progress = process.communicate()
    assert process.returncode == 0 and printed == "out.png  make it night  (seed 1)\n"
    assert "2/2" in progress
    assert run(*one("--seed", "1", output="same.png")) == 0
    assert np.array_equal(pixels("out.png"), pixels("same.png"))


def test_the_nano_weights_say_what_they_do_not_know(run, capsys):
    Image.new("RGB", (300, 200)).save("photo.png")
    flags = ["--edit", "make it a Cyborg", "--steps", "1", "--device", "cpu", "--output", "out/"]
    assert sample.main(["--input", "photo.png", "house.png", *flags]) == 0
    world = "note: the nano weights know a small painted world; "
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")] == [
        f"{world}unknown here: cyborg",
        f"{world}photo.png is 300x200, larger than the training data: photographs need other --weights"]
    assert run("--input", "photo.png", *flags) == 0
    assert "note: " not in capsys.readouterr().err, "other weights"


def test_help_names_the_defaults_and_the_painted_world(capsys):
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("(default: 8)", "default: weights/nano-ip2p", "mushroom", "remove the car"):
        assert part in text


def test_ctrl_c_during_imports_prints_no_traceback(run):
    Path("torch.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run([sys.executable, str(SCRIPT), *one()], env=os.environ | {"PYTHONPATH": "."},
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted; the pictures named above are kept\n")


@pytest.fixture
def mask(run):
    """White on the left of a 48 x 48 picture, beginning and ending between two latents."""
    white = np.zeros((48, 48), np.uint8)
    white[:, 3:21] = 255
    Image.fromarray(white).save("mask.png")
    return white > 0


SHARP = ["--mask", "mask.png", "--mask-blur", "0", "--seed", "3"]


@pytest.mark.parametrize("more", [
    [], ["--sampler", "dpmpp_2m"], ["--low-memory"], ["--turns", "--edit", "red"], ["--keep-size"]], ids=str)
def test_a_mask_keeps_the_pixels_outside(more, run, mask):
    assert run(*one(*SHARP, *more)) == 0
    changed = (pixels("out.png") != pixels("house.png")).any(-1)
    assert not changed[~mask].any() and changed[mask].mean() > 0.5
    assert run(*one(*SHARP, *more, "--mask-invert", output="other.png")) == 0
    changed = (pixels("other.png") != pixels("house.png")).any(-1)
    assert not changed[mask].any() and changed[~mask].mean() > 0.5


def test_a_mask_is_soft_by_default(run, mask):
    assert run(*one("--mask", "mask.png", "--seed", "3")) == 0
    changed = (pixels("out.png") != pixels("house.png")).any(-1)
    assert changed[:, 22].mean() > 0.5 and not changed[:, 40:].any()


def test_a_mask_covers_pictures_of_any_size(run, mask):
    """At their own size with --keep-size; in a batch, and in a grid. The mask is stretched over each."""
    Image.open("mask.png").resize((90, 50), Image.Resampling.NEAREST).save("mask.png")
    inside = np.asarray(Image.open("mask.png")) > 0
    assert run(*one(*SHARP, "--keep-size", "--n", "2", name="wide.jpg", output="a/")) == 0
    for name in ("a/wide_1.png", "a/wide_2.png"):
        changed = (pixels(name) != pixels("wide.jpg")).any(-1)
        assert not changed[~inside].any() and changed[inside].mean() > 0.5
    assert run("--input", "house.png", "wide.jpg", "--edit", "red", *SHARP, "--output", "b/") == 0
    assert not (pixels("b/house.png") != pixels("house.png"))[:, 24:].any()
    assert run("--input", "house.png", "wide.jpg", *TWO_EDITS, *SHARP, "--grid", "--show-mask", "--output",
               "grid.png") == 0
    assert run("--input", "house.png", "wide.jpg", *TWO_EDITS, *SHARP, "--grid", "--output", "plain.png") == 0
    assert Image.open("grid.png").width > 1.5 * Image.open("plain.png").width


def test_a_sweep_stays_inside_the_mask(run, mask, monkeypatch):
    monkeypatch.setattr(pictures, "SWEEP_FACTORS", (1,))
    cells = []
    monkeypatch.setattr(pictures, "grid", lambda rows, labels: cells.extend(rows[1]) or rows[0][0])
    assert run(*one(*SHARP, "--sweep")) == 0
    for cell in cells:
        changed = (np.asarray(cell) != pixels("house.png")).any(-1)
        assert not changed[~mask].any() and changed[mask].mean() > 0.5


def test_the_recipe_brings_the_mask(run, mask, capsys):
    assert run(*one(*SHARP)) == 0
    assert again(run, "out.png") == 0 and np.array_equal(pixels("again.png"), pixels("out.png"))
    assert "other content" not in capsys.readouterr().err
    Image.open("mask.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("mask.png")
    assert again(run, "out.png") == 0
    assert not np.array_equal(pixels("again.png"), pixels("out.png"))
    assert "out.png was made with a mask of other content" in capsys.readouterr().err
    os.remove("mask.png")
    assert "mask mask.png, which is no file here" in refusal(capsys, again(run, "out.png"))


@pytest.mark.parametrize("more", [[], ["--keep-size"], ["--low-memory"]], ids=str)
def test_a_mask_where_the_instruction_acts(more, run, monkeypatch):
    """Found from a difference that only the left side of the picture has."""
    def guided(unet, levels, z_image, *given, cfg_image, **more):
        cfg_text = given[2]
        left = torch.arange(z_image.shape[3]) < z_image.shape[3] // 3
        return lambda x, sigma: x + cfg_text * left

    monkeypatch.setattr(masks, "guided_denoiser", guided)
    assert run(*one("--mask", "auto", "--mask-blur", "0", "--seed", "3", *more)) == 0
    changed = (pixels("out.png") != pixels("house.png")).any(-1)
    assert changed[:, :12].mean() > 0.5 and not changed[:, 28:].any()
    assert again(run, "out.png", *more) == 0 and np.array_equal(pixels("again.png"), pixels("out.png"))


def test_masks_that_are_found_depend_on_the_seed_only(run, monkeypatch):
    """Not on the batch."""
    seeds, usual = set(), masks.draw_noise
    monkeypatch.setattr(masks, "draw_noise", lambda shape, generators: seeds.update(
        generator.initial_seed() for generator in generators) or usual(shape, generators))
    flags = ["--input", "house.png", "boat.png", "--edit", "red", "--mask", "auto", "--seed", "3"]
    assert run(*flags, "--output", "a/") == run(*flags, "--batch", "1", "--output", "b/") == 0
    for name in ("house.png", "boat.png"):
        assert np.abs(pixels(f"a/{name}") - pixels(f"b/{name}")).max() <= 1
    assert seeds == {3}


@pytest.mark.parametrize("more, message", [
    (["--mask", "missing.png"], "there is no picture missing.png"),
    (["--mask", "notes.txt"], "notes.txt cannot be used"),
    (["--mask", "black.png"], "house.png: the mask, scaled and cropped like its picture, has no white"),
    (["--mask-invert"], "--mask-invert is for a file"),
    (["--mask", "auto", "--mask-invert"], "--mask-invert is for a file"),
    (["--mask", "auto", "--show-mask"], "add --mask and --grid"),
    (["--grid", "--show-mask"], "add --mask and --grid"),
    (["--mask", "auto", "--mask-blur", "-1"], "--mask-blur"),
    (["--mask", "mask.png", "--output", "mask.png"], "would overwrite an input or the mask"),
    (["--mask", ""], "")], ids=str)
def test_unusable_masks(more, message, run, capsys):
    Path("notes.txt").write_text("white")
    Image.new("RGB", (48, 48)).save("black.png")
    Image.new("RGB", (48, 48), "white").save("mask.png")
    assert message in refusal(capsys, run(*one(*more)))
    assert not Path("out.png").exists()


def test_the_mask_of_a_stretched_picture_is_stretched_alike(run, mask, monkeypatch):
    """100 x 30 becomes 48 x 16: --keep-size stretches it, otherwise a tenth of its width is cropped."""
    Image.open("wide.jpg").resize((100, 30)).save("thin.png")
    white = Image.new("L", (100, 30), 0)
    white.paste(255, (10, 0, 20, 30))
    white.save("mask.png")
    seen, plain = {}, Editor.edit
    monkeypatch.setattr(Editor, "edit", lambda self, *given, masks, **more: (
        seen.update({keep: np.asarray(masks[0], float)[8]}), plain(self, *given, masks=masks, **more))[1])
    for keep in (False, True):
        assert run(*one(*SHARP, *["--keep-size"] * keep, name="thin.png")) == 0
    centres = {keep: (row * (np.arange(48) + 0.5)).sum() / row.sum() for keep, row in seen.items()}
    assert abs(centres[True] - 15 * 48 / 100) < 0.2 and abs(centres[False] - (15 - 5) * 48 / 90) < 0.2


def test_found_masks_are_smooth(run, monkeypatch):
    """A latent of 32 x 32 that differs grows by two latents to each side; by 16 calls of the network. One
    with a quarter of the largest change is white. At an edge, replicas count too, so a tenth is enough."""
    calls, seen, changes = [], [], {(10, 20): 1.0, (20, 6): -0.26, (28, 28): 0.24, (0, 13): 0.1}

    def guided(unet, levels, z_image, *given, cfg_image, **more):
        points = torch.zeros(z_image.shape[2:])
        for place, change in changes.items():
            points[place] = given[2] * change
        return lambda x, sigma: calls.append(sigma) or seen.append((x, z_image)) or x + points

    monkeypatch.setattr(masks, "guided_denoiser", guided)
    assert run(*one("--mask", "auto", "--show-mask", "--grid", "--resolution", "128")) == 0
    assert len(calls) == 16 and len(set(calls)) == 4
    assert again(run, "out.png") == 0 and Image.open("again.png").size == Image.open("out.png").size
    monkeypatch.setattr(masks, "draw_noise", lambda shape, generators: torch.zeros(shape))
    editor = Editor.load(Path(read_recipe("out.png")["weights"]), "cpu")
    [found] = masks.find_masks(editor, [Image.open("house.png").resize((128, 128))], ["red"], [3], "blurry")
    assert torch.equal(seen[-1][0], seen[-1][1] * editor.vae.scaling_factor)
    white = np.asarray(found) > 0
    assert white.any(1).sum() == (5 + 5 + 1) * 4 and white.any(0).sum() == 15 * 4
    assert white[40:44, 80:84].all() and white[80:84, 24:28].all() and white[:4, 52:56].all()


def test_a_sweep_blurs_the_mask(run, mask, monkeypatch):
    blurs, plain = [], Editor.edit
    monkeypatch.setattr(pictures, "SWEEP_FACTORS", (1,))
    monkeypatch.setattr(Editor, "edit", lambda self, *given, mask_blur, **more: (
        blurs.append(mask_blur), plain(self, *given, mask_blur=mask_blur, **more))[1])
    assert run(*one("--mask", "mask.png", "--mask-blur", "2.5", "--sweep")) == 0 and set(blurs) == {2.5}


def test_a_mask_without_white_in_one_crop_leaves_that_picture_out(run, capsys):
    white = Image.new("L", (90, 50), 0)
    white.paste(255, (0, 0, 3, 50))  # a twentieth of a flat picture is cropped on each side
    white.save("mask.png")
    Image.open("house.png").resize((100, 30)).save("flat.png")
    assert run("--input", "house.png", "flat.png", "--edit", "red", *SHARP, "--output", "a/") == 1
    assert files("a") == ["house.png"] and "not made: flat.png: the mask" in capsys.readouterr().err


def test_a_mask_smaller_than_its_blur_still_edits(run):
    white = Image.new("L", (48, 48), 0)
    white.paste(255, (20, 20, 24, 24))
    white.save("mask.png")
    seen = []
    for blur in ("0", "4"):
        assert run(*one("--mask", "mask.png", "--seed", "3", "--mask-blur", blur)) == 0
        seen.append(np.abs(pixels("out.png") - pixels("house.png"))[20:24, 20:24].mean())
    assert seen[0] > seen[1] > seen[0] / 20


def test_nan_in_a_found_mask_is_named(run, weights, capsys, monkeypatch):
    monkeypatch.setattr(masks, "guided_denoiser", lambda *given, **more: lambda x, sigma: x * float("nan"))
    assert run(*one("--mask", "auto")) == 2
    assert "house.png: the mask came out as NaN or infinity; try" in capsys.readouterr().err


def test_an_instruction_that_changes_nothing_is_not_masked(run):
    flags = one("--negative", "make it night", "--mask-blur", "0", "--seed", "3")
    assert run(*flags, "--mask", "auto") == 0
    masked = pixels("out.png")
    assert run(*flags) == 0 and np.array_equal(masked, pixels("out.png"))


def test_another_mask_than_the_recipe_s_is_not_inverted(run, mask):
    assert run(*one(*SHARP, "--mask-invert")) == 0
    assert again(run, "out.png", "--mask", "auto") == 0 and not read_recipe("again.png")["mask_invert"]
    assert again(run, "out.png") == 0 and read_recipe("again.png")["mask_invert"]


def test_the_size_of_the_job_decides_about_fast(run, monkeypatch):
    """Latents of all pictures, turns and cells of a sweep, times steps."""
    seen = []

    def speed_up(editor, fast, say, size, **more):
        seen.append(size)
        raise ValueError("no edit is needed")

    monkeypatch.setattr(speed, "speed_up", speed_up)
    for more in ([], ["--n", "3"], ["--turns", "--edit", "red"], ["--sweep"]):
        assert run(*one(*more, output="a/" if "--n" in more else "out.png")) == 2
    assert [size / seen[0] for size in seen] == [1, 3, 2, 25]
    assert seen[0] == 2 * (48 // 4)**2


def test_masks_of_several_edits_encode_their_picture_once(run, monkeypatch):
    """Once to find the masks, once to edit."""
    seen, plain = [], VAE.encode
    monkeypatch.setattr(VAE, "encode", lambda self, x: (seen.append(len(x)), plain(self, x))[1])
    assert run("--input", "house.png", *TWO_EDITS, "--mask", "auto", "--output", "a/") == 0
    assert seen == [1, 1]
