"""The page gives gradio files, because gradio writes equal pictures to one file while a browser loads it."""

import pytest
from PIL import Image
from tiny_editor import write_tiny_editor

from nanoip2p import Editor
from nanoip2p.app.work import LIMITS, Visit

pytest.importorskip("gradio", reason="the page needs pip install -e '.[app]'")


def found(value, kind):
    """All instances of a type in nested dicts, lists and tuples."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [one for part in value for one in found(part, kind)]
    return [value] if isinstance(value, kind) else []


def test_every_picture_is_a_file(tmp_path):
    from nanoip2p.app.page import Page
    page = Page(Editor.load(write_tiny_editor(tmp_path / "tiny"), "cpu"), "tiny", tmp_path, low_memory=False)
    Image.linear_gradient("L").resize((48, 40)).save(tmp_path / "a.png")
    visit, values = Visit(), {key: least for key, (_, least, _) in LIMITS.items()} | {"steps": 4, "n": 2}
    values["sampler"] = "euler"
    asked = visit, None, "make it night", True, *[values[key] for key in page.settings]
    news = [page.take(visit, {"path": str(tmp_path / "a.png"), "orig_name": "a.png"})]
    news += [*page.edit(*asked), *page.edit(*asked), *page.sweep(*asked)]
    news += [page.go_on(visit), page.unpainted(visit), page.go_back(visit)]
    assert not found(news, Image.Image)
    files = found(news, type(tmp_path))
    assert all(Image.open(path).size and path.is_relative_to(tmp_path) for path in files)
    page.visit.delete_callback(visit)  # the tab was closed
    assert visit.stop.is_set() and {path for path in files if path.exists()} == {tmp_path / "a.png"}


def test_stop_writes_its_words_after_the_last_step(tmp_path):
    """A step that is on its way overwrites the answer to the click. A call in the queue comes after it."""
    from nanoip2p.app.page import Page
    page = Page(Editor.load(write_tiny_editor(tmp_path / "tiny"), "cpu"), "tiny", tmp_path, low_memory=False)
    calls = page.blocks.fns.values()
    click = next(call for call in calls if (page.stop._id, "click") in call.targets)
    last = next(call for call in calls if call.trigger_after == click._id)
    assert last.queue is not False
    shown = dict(zip(last.outputs, last.fn(Visit())))
    assert shown[page.status] == shown[page.sweep_status] == "Stopped."
    assert page.result in shown  # without the preview
