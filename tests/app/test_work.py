"""The page without gradio: edits that are watched and stopped, masks, recipes."""

import copy
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from tiny_editor import DEFAULTS, write_tiny_editor

import sample
from nanoip2p import Editor
from nanoip2p.app import work
from nanoip2p.app.work import LIMITS, Stopped, mask_of, read_settings, watched, write_result
from nanoip2p.common.saving import save_png
from nanoip2p.editing.recipes import read_recipe
from nanoip2p.images import fit, fit_size, open_image
from nanoip2p.masks import fit_mask

SECONDS = 60  # this machine may be busy
GIVEN = {"cfg_text": 3.0, "cfg_image": 1.2, "sampler": "euler_ancestral", "low_memory": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_editor(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def editor(folder):
    return Editor.load(folder, "cpu")


def drawing(width, height):
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), fill="red")
    return image


@pytest.mark.parametrize("steps, low_memory", [
    (1, False), (2, True), (3, False), (4, True), (5, False), (7, True), (20, False)])
def test_a_watched_edit_is_an_edit(editor, steps, low_memory):
    given = GIVEN | {"images": drawing(48, 40), "instructions": "make it night", "steps": steps,
                     "seed": [3, 9], "batch": 2, "low_memory": low_memory}
    items = list(watched(editor, threading.Event(), **given))
    assert [step for step, _, _ in items] == [*range(1, steps + 1), steps]
    shown = [step for step, previews, _ in items if previews]
    quarters = [next(step for step in range(1, steps + 1) if step * 4 >= steps * part) for part in (1, 2, 3)]
    assert shown == sorted({step for step in quarters if step < steps})
    assert all(len(previews) in (0, 2) for _, previews, _ in items)
    assert [results is None for *_, results in items] == [True] * steps + [False]
    wanted = editor.edit(**given)
    assert [image.tobytes() for image in items[-1][2]] == [image.tobytes() for image in wanted]


def test_stop_ends_an_edit_within_a_step(editor, monkeypatch):
    stop, calls = threading.Event(), []
    monkeypatch.setattr(editor.unet, "forward", lambda *args, forward=editor.unet.forward, **kw: (
        calls.append(stop.is_set()), forward(*args, **kw))[1])
    given = GIVEN | {"images": drawing(48, 48), "instructions": "a", "steps": 400, "seed": 0}
    with pytest.raises(Stopped):
        for step, *_ in watched(editor, stop, **given):
            if step == 5:
                stop.set()
    assert calls.count(True) <= 3 and len(calls) < 400  # the three branches of the step that ran


@pytest.mark.parametrize("shown", [1, 3, 5])
def test_stop_counts_even_if_the_edit_is_over_before_its_steps_are_shown(editor, shown):
    """A slow browser shows them later than they are made."""
    given = GIVEN | {"images": drawing(48, 48), "instructions": "a", "steps": 5, "seed": 0}
    stop, seen = threading.Event(), []
    run = watched(editor, stop, **given)
    seen += [next(run) for _ in range(shown)]
    work.ONE_AT_A_TIME.submit(lambda: None).result()  # its one thread has ended the edit
    stop.set()
    with pytest.raises(Stopped):
        seen += run
    assert len(seen) == shown


def test_who_leaves_stops_the_edit(editor, monkeypatch):
    calls = []
    monkeypatch.setattr(editor.unet, "forward", lambda *args, forward=editor.unet.forward, **kw: (
        calls.append(1), forward(*args, **kw))[1])
    stop = threading.Event()
    run = watched(editor, stop,
                  **GIVEN | {"images": drawing(48, 48), "instructions": "a", "steps": 400, "seed": 0})
    next(run)
    run.close()
    made = len(calls)
    assert made < 100
    assert work.ONE_AT_A_TIME.submit(lambda: len(calls)).result(SECONDS) == made  # the edit is over
    assert not stop.is_set()  # the next edit of a sweep has the same event


def test_two_edits_take_turns(editor, monkeypatch):
    inside, most = [], []
    monkeypatch.setattr(editor, "edit", lambda edit=editor.edit, **kw: (
        inside.append(1), most.append(len(inside)), edit(**kw), inside.pop())[2])
    given = GIVEN | {"images": drawing(48, 48), "instructions": "a", "steps": 10, "seed": 0}
    threads = [threading.Thread(target=lambda: list(watched(editor, threading.Event(), **given)))
               for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def test_errors_of_an_edit_arrive(editor):
    with pytest.raises(ValueError, match="unknown sampler"):
        list(watched(editor, threading.Event(), **GIVEN | {
            "images": drawing(48, 48), "instructions": "a", "steps": 2, "seed": 0, "sampler": "heun"}))


def layer(size, box, alpha=255):
    image = Image.new("RGBA", size)
    ImageDraw.Draw(image).rectangle(box, fill=(255, 0, 170, alpha))
    return image


def test_paint_is_a_mask():
    size = (64, 48)
    assert mask_of(None) is None and mask_of({"layers": []}) is None
    assert mask_of({"layers": [Image.new("RGBA", size, (255, 255, 255, 0))]}) is None
    assert mask_of({"layers": [layer(size, (0, 0, 9, 9), alpha=127)]}) is None
    one = mask_of({"layers": [layer(size, (10, 10, 19, 14))]})
    assert one.mode == "L" and one.size == size and one.getbbox() == (10, 10, 20, 15)
    assert [value for _, value in one.getcolors()] == [0, 255]
    both = mask_of({"layers": [layer(size, (10, 10, 19, 14)), layer(size, (40, 30, 49, 39), alpha=128)]})
    assert both.getbbox() == (10, 10, 50, 40) and both.getpixel((30, 20)) == 0


@pytest.mark.parametrize("painted", [False, True])
def test_sample_py_makes_a_result_again(editor, folder, tmp_path, painted, monkeypatch, capsys):
    """The recipe in a result, with the input and the mask, makes the same pixels on the command line."""
    drawing(70, 50).save(tmp_path / "house.png")
    picture = open_image(tmp_path / "house.png")
    size = fit_size(*picture.size, DEFAULTS["resolution"], editor.multiple)
    mask = mask_of({"layers": [layer((512, 366), (100, 100, 400, 300))]}) if painted else None
    given = GIVEN | {"steps": 6, "seed": 11}
    *_, (_, _, result) = watched(
        editor, threading.Event(), **given | {
            "images": fit(picture, size), "instructions": "make it night", "mask_blur": work.MASK_BLUR,
            "masks": fit_mask(mask, picture, size)})
    recipe = {key: value for key, value in given.items() if key != "low_memory"}
    recipe |= {"edit": ["make it night"], "negative": "", "weights": str(folder), "input": ["house.png"]}
    file, *masks = map(str, write_result(result, mask, tmp_path, recipe))
    monkeypatch.chdir(tmp_path)
    words = ["--recipe", file, "--weights", str(folder), "--output", "again.png", "--device", "cpu"]
    assert sample.main([*words, *(["--mask", *masks] if painted else [])]) == 0, capsys.readouterr().err
    recipe = read_recipe(file)
    assert recipe.get("mask_blur", 4) == work.MASK_BLUR == sample.Settings.mask_blur
    assert ("mask_blur" in recipe) == painted
    assert "other content" not in capsys.readouterr().err
    assert open_image("again.png").tobytes() == result.tobytes()


def test_results_do_not_overwrite_each_other(tmp_path):
    recipe = {"input": ["a" * 300 + ".png"], "edit": ["b"], "negative": "", "weights": "w", "steps": 1,
              "seed": 0, "sampler": "ddim", "cfg_text": 1.0, "cfg_image": 1.0}
    painted = Image.new("L", (8, 8), 255)
    files = [write_result(drawing(8, 8), painted, tmp_path, dict(recipe)) for _ in range(3)]
    files[0][0].unlink()  # gradio deletes old files
    files += [write_result(drawing(8, 8), painted, tmp_path, dict(recipe)) for _ in range(2)]
    assert len({path for paths in files[1:] for path in paths}) == 8
    assert all(path.parent == tmp_path and open_image(path).size == (8, 8) for path in sum(files[1:], []))


@pytest.mark.parametrize("name", ["../../x.png", "/etc/passwd", "..", "a\0b.png", "~", "", "-", "con.png"])
def test_the_name_of_an_upload_stays_a_name(tmp_path, name):
    recipe = {"input": [name], "edit": ["b"], "negative": "", "weights": "w", "steps": 1, "seed": 0,
              "sampler": "ddim", "cfg_text": 1.0, "cfg_image": 1.0}
    [path] = write_result(drawing(8, 8), None, tmp_path, recipe)
    assert path.parent == tmp_path and path.name.endswith("-edited.png") and path.exists()


def test_each_tab_has_its_own_visit():
    """gradio copies the first visit, also for a tab that is older than the server."""
    first = work.Visit()
    first.turns.append("a result")
    second = copy.deepcopy(first)
    assert second.turns == [] and second.stop is not first.stop


# What the page shows of a recipe
EDIT = {"edit": ["a"], "sampler": "ddim", "cfg_text": 2.0, "cfg_image": 1.5, "steps": 7, "seed": 5}


def test_settings_come_back(tmp_path):
    recipe = {"cfg_text": 2, "cfg_image": 1.5, "steps": 7, "sampler": "ddim", "seed": 5, "edit": ["a", "b"],
              "input": ["/etc/passwd"], "weights": "somewhere/else", "negative": ""}
    save_png(drawing(8, 8), tmp_path / "a.png", recipe)
    assert read_settings(tmp_path / "a.png") == ({
        "cfg_text": 2.0, "cfg_image": 1.5, "steps": 7, "sampler": "ddim", "seed": 5, "edit": "a"},
        ["further instructions"])
    recipe |= {"edit": ["a"], "lora": [], "n": 12, "grid": True}
    for key in ("negative", "mask", "lora", "embedding", "vae"):
        save_png(drawing(8, 8), tmp_path / "a.png", recipe | {key: ["x"]})
        assert read_settings(tmp_path / "a.png")[1] == [key]


@pytest.mark.parametrize("key, value", [
    (key, value) for key, (_, least, most) in LIMITS.items() if key != "n"
    for value in (least - 1, most + 1, "1", None, True, [1], float("inf"), {} if key[0] == "c" else 0.5)
] + [("sampler", "heun"), ("sampler", 3), ("sampler", ["ddim"]), ("edit", "a"), ("edit", [3]),
     ("edit", ["a" * 20_000])])
def test_strange_settings_are_one_line(tmp_path, key, value):
    save_png(drawing(8, 8), tmp_path / "x.png", EDIT | {key: value})
    with pytest.raises(ValueError, match=rf"^x\.png: (the )?{key}") as error:
        read_settings(tmp_path / "x.png")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("recipe, lacking", [
    ({}, list(EDIT)),  # grids of weights/*.py and make_dataset.py
    ({"step": 600}, list(EDIT)),  # a sample sheet of train.py
    *(({key: value for key, value in EDIT.items() if key != gone}, [gone]) for gone in EDIT),  # MagicBrush
    (EDIT | {"edit": []}, ["edit"]),
])
def test_a_recipe_without_an_edit_is_no_recipe(tmp_path, recipe, lacking):
    """Else the page would take its own defaults for the missing settings, and lock the seed."""
    save_png(drawing(8, 8), tmp_path / "x.png", recipe)
    named = "; only results of " if "edit" in lacking else f": {lacking[0]} missing$"
    with pytest.raises(ValueError, match=rf"x\.png has no recipe of an edit{named}"):
        read_settings(tmp_path / "x.png")


SHIPPED = Path(__file__).resolve().parents[2] / "weights"
PICTURES = [path for ending in ("*.png", "*.webp") for path in sorted(SHIPPED.rglob(ending))]


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_of_the_shipped_pictures_edits_open(path):
    """Those that sample.py made open with all settings. All others have no recipe."""
    if path.name in ("sweep.webp", "masks.png"):
        found, _ = read_settings(path)
        assert found.keys() == EDIT.keys() and found["edit"]
    else:
        with pytest.raises(ValueError, match="has no recipe of an edit"):
            read_settings(path)
    assert {"demo.png", "sweep.webp", "first-editor.png"} <= {path.name for path in PICTURES}


def test_the_first_version_of_a_recipe_opens(tmp_path):
    """sample.py of commit 72eeaf8."""
    recipe = EDIT | {"input": "a.png", "turns": False, "n": 1, "resolution": 64, "negative": "", "batch": 8,
                     "weights": "weights/nano-ip2p", "dtype": "fp32", "device": "cpu", "keep_size": False,
                     "grid": False, "place": None, "low_memory": False, "version": "0.1.0", "torch": "2.9"}
    save_png(drawing(8, 8), tmp_path / "a.png", recipe)
    assert read_settings(tmp_path / "a.png") == (EDIT | {"edit": EDIT["edit"][0]}, [])


def test_previews_do_not_change_the_generators(editor):
    """Decoding on the way draws no random numbers."""
    state = torch.random.get_rng_state()
    list(watched(editor, threading.Event(), **GIVEN | {
        "images": drawing(48, 48), "instructions": "a", "steps": 4, "seed": 0}))
    assert torch.equal(torch.random.get_rng_state(), state)
