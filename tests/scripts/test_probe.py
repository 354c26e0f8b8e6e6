"""weights/probe.py: what captions say, which mistakes are counted, and what pairs show."""

import json
from dataclasses import replace

import probe
import pytest
import torch
from PIL import Image
from probe import content, kind_of, mistakes

from nanoip2p.images import to_tensor
from nanoip2p.world.painting import COLOURS
from nanoip2p.world.scenes import KINDS, random_scene


@pytest.mark.parametrize("index", range(40))
def test_captions_and_kinds_of_edits(index):
    scene = random_scene("test", index)
    wanted = content(scene.caption())
    things = {thing.slot: (KINDS.index(thing.kind), list(COLOURS).index(thing.colour))
              for thing in scene.things}
    assert list(zip(wanted[:3].tolist(), wanted[3:6].tolist())) == [
        things.get(slot, (probe.NONE, -100)) for slot in range(3)]
    for edit in scene.edits():
        assert kind_of(wanted, content(edit.caption)) == edit.kind
        found = mistakes(content(edit.caption), wanted)
        names = {"recolour": "colour", "replace": "thing", "add": "number", "remove": "number"}
        assert found == {names.get(edit.kind, "scene")}
    assert mistakes(wanted, wanted) == set()
    if len(scene.things) == 1:
        thing, = scene.things
        moved = replace(scene, things=(replace(thing, slot=(thing.slot + 1) % 3),))
        assert mistakes(content(moved.caption()), wanted) == {"place"}
        later = replace(moved, time="day" if scene.time == "night" else "night")
        assert mistakes(content(later.caption()), wanted) == {"place", "scene"}


class Eyes(probe.Probe):
    """Reads what the test says, in order."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def read(self, x):
        found, self.found = self.found[: len(x)], self.found[len(x) :]
        return found


def test_pairs(tmp_path):
    scene = random_scene("test", 3)
    found = []
    for number, kind in enumerate(("recolour", "add", "time")):
        edit, folder = scene.edits(kind)[0], tmp_path / f"{number:07}"
        folder.mkdir()
        (folder / "prompt.json").write_text(json.dumps({"input": scene.caption(), "output": edit.caption}))
        for i in (0, 1):
            Image.new("RGB", (64, 64)).save(folder / f"5_{i}.jpg")
        found += [content(scene.caption()), content(edit.caption)]
    text = probe.read_pairs(Eyes(torch.stack(found)), tmp_path)
    assert text.splitlines()[-1].split() == ["all", "3", "100%", "100%", "100%"]
    found[1] = found[0]                             # the first pair does not show its edit
    found[3] = found[3].clone()
    found[3][6] = (found[3][6] + 1) % 3             # the second changes the time, too
    lines = probe.read_pairs(Eyes(torch.stack(found)), tmp_path).splitlines()[1:]
    assert [line.split() for line in lines] == [
        ["recolour", "1", "0%", "100%", "0%"], ["add", "1", "100%", "0%", "0%"],
        ["time", "1", "100%", "100%", "100%"], ["all", "3", "67%", "67%", "33%"]]


def test_a_probe_learns_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "STEPS", 3)
    first = probe.trained_probe(tmp_path / "a")
    again = probe.trained_probe(tmp_path / "a")
    pictures = torch.stack([to_tensor(random_scene("test", i).render(64)) for i in range(5)])
    assert torch.equal(first.read(pictures), again.read(pictures)) and first.read(pictures).shape == (5, 9)


def test_the_command(tmp_path, monkeypatch, capsys):
    eyes = Eyes(torch.zeros(8, 9, dtype=torch.long))
    monkeypatch.setattr(probe, "trained_probe", lambda folder: eyes)
    assert probe.main(["--n", "4"]) == 0
    head, painted, renders = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["4", "pictures", "number"] and painted.startswith("nano-sd")
    assert renders.startswith("renders") and painted.split()[1:] == renders.split()[2:]
    assert probe.main(["--pairs", str(tmp_path / "none")]) == 2
    (tmp_path / "0000000").mkdir()
    (tmp_path / "0000000/prompt.json").write_text('{"input": "a dog", "output": "a cat"}')
    assert probe.main(["--pairs", str(tmp_path)]) == 2
    assert "captions of the nano world only" in capsys.readouterr().err
