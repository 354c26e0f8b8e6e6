"""Success over network calls: which points are measured, kept, counted and drawn."""

from types import SimpleNamespace

import pytest
from PIL import Image
from tiny_editor import write_tiny_editor

from nanoip2p.checkpoint.load import load_model
from nanoip2p.common.files import read_rows
from nanoip2p.editor import Editor
from nanoip2p.evaluate import __main__ as evaluate
from nanoip2p.evaluate import calls


@pytest.fixture(scope="module")
def editors(tmp_path_factory):
    """Tiny editors with three branches, and with one."""
    folder = tmp_path_factory.mktemp("weights")
    return [str(write_tiny_editor(folder / "teacher")), student(folder / "student")]


def student(folder):
    write_tiny_editor(folder, seed=1)
    (folder / "defaults.json").write_text('{"resolution": 32, "steps": 4, "cfg_text": 1.0, "cfg_image": 1.0, '
                                          '"sampler": "lcm"}')
    return str(folder)


def measured(editors, out, *flags) -> str:
    argv = ["calls", "--weights", *editors, "--n", 2, "--out", out, *flags]
    args = evaluate.make_parser().parse_args(list(map(str, argv)))
    args.out.mkdir(parents=True, exist_ok=True)
    return calls.run(args)[0]


@pytest.mark.parametrize("cfg_text, cfg_image", [(7.5, 1.5), (2, 1), (3, 3), (1, 1), (0, 0), (0, 1.5)])
def test_calls_are_what_the_unet_computes(editors, cfg_text, cfg_image):
    """Rows of the last convolution, one picture in one step."""
    editor, rows = load_model(editors[0]), []
    editor.unet.conv_out.register_forward_hook(lambda layer, given, out: rows.append(len(out)))
    editor.edit(Image.new("RGB", (32, 32)), "make it night", seed=0, steps=1, cfg_text=cfg_text,
                cfg_image=cfg_image)
    assert sum(rows) == calls.branches(cfg_text, cfg_image)


def test_points_have_as_many_calls_as_fit_and_are_not_measured_again(editors, tmp_path, monkeypatch):
    monkeypatch.setattr(calls, "LCM_STEPS", 8)
    text = measured(editors, tmp_path, "--calls", 2, 7, 9)
    rows = [row for _, row in read_rows(tmp_path / "calls.jsonl")]
    found = [(row["weights"], row["sampler"], row["calls"]) for row in rows]
    teacher = [(editors[0], sampler, count) for sampler in calls.SAMPLERS for count in (6, 9)]
    pupil = [(editors[1], sampler, count) for sampler in calls.SAMPLERS for count in (2, 7, 9)]
    assert found == teacher + [point for point in pupil if point[1:] != ("lcm", 9)]
    assert all(0 <= row["success"] <= 1 and 0 < row["error"] < 1 for row in rows)
    assert len({row["psnr"] for row in rows}) == len(rows)
    assert Image.open(tmp_path / "calls.png").size[0] > 500
    monkeypatch.setattr(Editor, "edit", lambda *_, **__: pytest.fail("made again"))
    assert measured(editors, tmp_path, "--calls", 2, 7, 9) == text
    with pytest.raises(pytest.fail.Exception, match="made again"):
        measured(editors[:1], tmp_path, "--calls", 12)


@pytest.mark.parametrize("asked", [(2, 3), (6, 7, 8), (9, 3, 3, 5, 11), (4, 4)], ids=str)
def test_a_point_is_shown_once(editors, tmp_path, monkeypatch, asked):
    """Numbers of calls that mean the same steps, and weights that are given twice."""
    drawn = []
    monkeypatch.setattr(calls, "draw", lambda points, axes: drawn.extend(points))
    text = measured([*editors, editors[0]], tmp_path, "--calls", *asked)
    rows = [row for _, row in read_rows(tmp_path / "calls.jsonl")]
    steps = [dict.fromkeys(count // branches for count in asked if count >= branches) for branches in (3, 1)]
    counts = [count * branches for counts, branches in zip(steps, (3, 1)) for _ in calls.SAMPLERS
              for count in counts]
    assert [row["calls"] for row in rows] == counts
    assert drawn == rows and len(text.splitlines()) == len(rows) + 2


def test_each_weights_and_sampler_has_a_curve(editors, tmp_path):
    drawn = []
    axes = SimpleNamespace(errorbar=lambda x, *_, label, **__: drawn.append((label, x)),
                           set_xscale=lambda *_, **__: None,
                           xaxis=SimpleNamespace(set_major_formatter=str))
    points = [{"weights": weights, "sampler": sampler, "calls": n, "success": 0.5, "error": 0.1}
              for weights in ("a/one", "b/$two") for sampler in ("lcm", "euler") for n in (2, 4)]
    calls.draw(points, axes)
    assert drawn == [(f"{name}, {sampler}", (2, 4)) for name in ("one", r"\$two")
                     for sampler in ("lcm", "euler")]
