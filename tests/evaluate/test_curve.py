"""Figure 8: the captions and pictures that are compared, the stored points, and the similarities."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_editor import write_tiny_clip, write_tiny_editor, write_tiny_painter

from nanoip2p.clip_filter import Judge
from nanoip2p.common.files import read_rows
from nanoip2p.dataset.layouts import Pair, load_picture
from nanoip2p.dataset.rendered import scene_pairs
from nanoip2p.editor import Editor
from nanoip2p.evaluate import __main__ as evaluate
from nanoip2p.evaluate import curve


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return SimpleNamespace(editor=write_tiny_editor(folder / "editor"), clip=write_tiny_clip(folder / "clip"),
                           painter=write_tiny_painter(folder / "painter"))


def measured(weights, out, *flags) -> str:
    flags = ["--weights", weights.editor, "--clip", weights.clip, "--steps", 2, "--n", 3, "--out", out,
             *flags]
    args = evaluate.make_parser().parse_args(["curve", *map(str, flags)])
    args.out.mkdir(parents=True, exist_ok=True)
    return curve.run(args)[0]


def test_a_point_is_the_mean_of_the_cosines(weights):
    """By hand: pixels in [0, 1] less the mean over the deviation, features, differences, cosines."""
    judge, pairs = Judge.load(weights.clip), scene_pairs(5, "test")
    editor = lambda before, part, seed: [load_picture(pair.after, 32) for pair in part]  # noqa: E731
    row = curve.measure(pairs, judge, 32, 2, 0, editor)

    def seen(scene):
        pixels = torch.from_numpy(np.array(scene.render(32))).permute(2, 0, 1).float() / 255
        return judge.clip.encode_image(((pixels - judge.mean) / judge.std)[None])[0]

    def cosine(a, b):
        return (a @ b / a.norm() / b.norm()).item()

    with torch.no_grad():
        images, directions = [], []
        for pair in pairs:
            before, after = seen(pair.before), seen(pair.after)
            text = judge.encode_texts(list(pair.captions))
            images.append(cosine(before, after))
            directions.append(cosine(after - before, text[1] - text[0]))
    for key, values in (("image", images), ("direction", directions)):
        assert row[key] == pytest.approx(np.mean(values), abs=1e-5)
        assert row[f"{key}_error"] == pytest.approx(np.std(values, ddof=1) / 5**0.5, abs=1e-5)
    assert np.std(images) > 1e-3


def test_points_are_kept_and_not_made_again(weights, tmp_path, monkeypatch):
    flags = ["--cfg-images", 1, 1.5, "--sdedit", weights.painter, "--strengths", 0.5]
    table = measured(weights, tmp_path, *flags)
    rows = [row for _, row in read_rows(tmp_path / "curve.jsonl")]
    assert [row["method"] for row in rows] == ["editor", "editor", "SDEdit"]
    assert rows[0]["image"] != rows[1]["image"] and all(-1 <= row["direction"] <= 1 for row in rows)
    assert all(row["n"] == 3 and row["image_error"] > 0 for row in rows)
    assert Image.open(tmp_path / "curve.png").size[0] > 500
    monkeypatch.setattr(Editor, "edit", lambda *_, **__: pytest.fail("made again"))
    assert measured(weights, tmp_path, *flags) == table
    with pytest.raises(pytest.fail.Exception, match="made again"):
        measured(weights, tmp_path, "--cfg-images", 1, "--cfg-text", 9)


@pytest.mark.parametrize("resolution, usual", [(128, curve.NANO), (256, curve.PAPER)])
def test_large_editors_have_the_settings_of_the_paper(weights, tmp_path, monkeypatch, resolution, usual):
    editor, judges = Editor.load(weights.editor, "cpu"), []
    editor.defaults["resolution"] = resolution
    monkeypatch.setattr(curve.Editor, "load", lambda *_: editor)
    monkeypatch.setattr(curve.Judge, "load", lambda clip, device: judges.append(clip))
    monkeypatch.setattr(curve, "measure", lambda *_: dict.fromkeys(curve.MEASURED, 0.5))
    assert evaluate.main(["curve", "--n", "2", "--out", str(tmp_path)]) == 0 and judges == [usual["clip"]]
    assert [(row["cfg_text"], row["cfg_image"]) for row in curve.read_points(tmp_path / "curve.jsonl")] == [
        (usual["cfg_text"], cfg) for cfg in usual["cfg_images"]]


def test_seed_and_sampler_reach_both_methods(weights, tmp_path):
    flags = ["--cfg-images", 1, "--sdedit", weights.painter, "--strengths", 1, "--out", tmp_path]
    for extra in ([], ["--seed", 1], ["--sampler", "euler"]):
        measured(weights, tmp_path, *flags, *extra)
    rows = [row for _, row in read_rows(tmp_path / "curve.jsonl")]
    assert len(rows) == 6
    for method in ("editor", "SDEdit"):
        assert len({row["image"] for row in rows if row["method"] == method}) == 3


def test_another_judge_measures_anew(weights, tmp_path):
    """Similarities by two CLIPs are not comparable: neither kept for one another nor drawn together."""
    other = SimpleNamespace(editor=weights.editor, clip=write_tiny_clip(tmp_path / "clip", seed=1))
    runs = [(weights, "out"), (other, "out"), (other, "fresh")]
    points = [measured(which, tmp_path / out, "--cfg-images", 1).splitlines()[1] for which, out in runs]
    assert points[0] != points[1] == points[2]


def test_other_weights_at_the_same_place_are_measured_anew(weights, tmp_path):
    place = tmp_path / "editor"
    for seed in (0, 1):
        write_tiny_editor(place, seed=seed)
        measured(SimpleNamespace(editor=place, clip=weights.clip), tmp_path / "out", "--cfg-images", 1, 1.5)
    rows = [row for _, row in read_rows(tmp_path / "out/curve.jsonl")]
    assert len({row["image"] for row in rows}) == len(rows) == 4
    curves = []
    axes = SimpleNamespace(errorbar=lambda x, *_, **__: curves.append(len(x)), annotate=lambda *_, **__: None)
    curve.draw(rows, axes)
    assert curves == [2, 2]


def test_a_resolution_that_does_not_fit_is_rounded(weights, tmp_path):
    editor = write_tiny_editor(tmp_path / "editor")
    defaults = json.loads((editor / "defaults.json").read_text())
    (editor / "defaults.json").write_text(json.dumps(defaults | {"resolution": 50}))
    assert Editor.load(editor).side == 48
    measured(SimpleNamespace(editor=editor, clip=weights.clip), tmp_path / "out", "--cfg-images", 1)


def test_sdedit_paints_in_the_size_of_the_editor(weights, tmp_path):
    painter = write_tiny_painter(tmp_path / "painter")
    defaults = painter / "defaults.json"
    defaults.write_text(json.dumps(json.loads(defaults.read_text()) | {"resolution": 96}))  # the editor: 48
    measured(weights, tmp_path / "out", "--cfg-images", 1, "--sdedit", painter, "--strengths", 1)
    assert (tmp_path / "out/curve.jsonl").read_text().count("SDEdit") == 1


@pytest.mark.parametrize("strength", [0, 0.4, 1.5])
def test_a_bad_strength_is_an_error(weights, tmp_path, strength):
    with pytest.raises(ValueError, match=f"strength of {strength}.* with 2 steps"):
        measured(weights, tmp_path, "--sdedit", weights.painter, "--strengths", strength, "--cfg-images", 1)


def test_every_network_has_its_curve_in_the_order_of_its_setting(weights, tmp_path, monkeypatch):
    drawn = []
    axes = SimpleNamespace(errorbar=lambda x, *_, label, **__: drawn.append((label, x)),
                           annotate=lambda *_, **__: None)
    monkeypatch.setattr(curve, "plot", lambda path, draw, *_, **__: draw(axes) or True)
    measured(weights, tmp_path, "--cfg-images", 2, 1)
    other = weights.editor.rename(weights.editor.with_name("other"))
    drawn.clear()
    measured(SimpleNamespace(editor=other, clip=weights.clip), tmp_path, "--cfg-images", 1)
    other.rename(weights.editor)
    rows = [row for _, row in read_rows(tmp_path / "curve.jsonl")]
    rows = {(row["weights"], row["cfg_image"]): row["direction"] for row in rows}
    first = [rows[str(weights.editor), cfg] for cfg in (1, 2)]
    assert drawn == [("editor, editor, cfg_text 2, by cfg_image", tuple(first)),
                     ("editor, other, cfg_text 2, by cfg_image", (rows[str(other), 1],))]
    drawn.clear()
    measured(weights, tmp_path, "--cfg-images", 1, "--cfg-text", 3)
    assert [(label, len(points)) for label, points in drawn] == [
        ("editor, editor, cfg_text 2, by cfg_image", 2), ("editor, other, cfg_text 2, by cfg_image", 1),
        ("editor, editor, cfg_text 3, by cfg_image", 1)]


def test_both_ends_of_a_curve_show_their_setting():
    labels = []
    axes = SimpleNamespace(errorbar=lambda *_, **__: None,
                           annotate=lambda *args, **_: labels.append(args[:2]))
    row = {"method": "editor", "weights": "x", "networks": "y", "cfg_text": 2,
           "image_error": 0, "direction_error": 0}
    curve.draw([row | {"cfg_image": k, "direction": k / 10, "image": 0.5} for k in (2, 0, 1)], axes)
    assert sorted(labels) == [("0", (0, 0.5)), ("2", (0.2, 0.5))]
    labels.clear()
    curve.draw([row | {"cfg_image": 1, "direction": 0.1, "image": 0.5}], axes)
    assert labels == [("1", (0.1, 0.5))]


def test_examples_have_captions(tmp_path):
    pairs = curve.examples("scenes", "test", 4)
    assert len({pair.before for pair in pairs}) == 4  # each of a scene of its own
    assert all(pair.captions[0] == pair.before.caption() for pair in pairs)
    picture = tmp_path / "a.png"
    Image.new("RGB", (32, 32)).save(picture)
    lines = [{"input": "a.png", "edit": "x", "output": "a.png"} for _ in range(30)]
    for line in (lines[28], lines[29]):
        line |= {"input_caption": "one", "output_caption": "two"}
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert curve.examples(str(tmp_path), "test", 9) == [Pair(picture, "x", picture, ("one", "two"))] * 2
    with pytest.raises(ValueError, match="train split of .* needs two pairs"):
        curve.examples(str(tmp_path), "train", 9)
    with pytest.raises(ValueError, match="test split of scenes needs two pairs"):
        curve.examples("scenes", "test", 1)


POINT = {"method": "editor", "weights": "w", "networks": "n", "cfg_text": 2.0, "cfg_image": 1.0,
         "direction": 0.1, "image": 0.9, "direction_error": 0.01, "image_error": 0.01}


@pytest.mark.parametrize("key", POINT)
def test_a_point_that_is_not_ours_is_named(key, tmp_path):
    path = tmp_path / "curve.jsonl"
    for value in (None, {}, ["x"], 10**400, float("nan"), "x" * 20_000):
        path.write_text("".join(json.dumps(row) + "\n" for row in (POINT, POINT | {key: value})))
        with pytest.raises(ValueError, match=f"curve.jsonl, row 2: {key} "):
            curve.read_points(path)
    path.write_text(json.dumps(POINT | {"method": "magic"}))
    with pytest.raises(ValueError, match="method should be editor or SDEdit"):
        curve.read_points(path)


@pytest.mark.parametrize("name", ["a$b$c", "$\\frac$", "\ud800", "x" * 9000, "a\nb\x1b"])
def test_any_name_of_weights_is_a_label(name, tmp_path):
    (tmp_path / "curve.jsonl").write_text(json.dumps(POINT | {"weights": name, "cfg_image": 1e300}))
    rows = curve.read_points(tmp_path / "curve.jsonl")
    assert curve.plot(tmp_path / "curve.png", lambda axes: curve.draw(rows, axes))
    assert Image.open(tmp_path / "curve.png").width == 960
