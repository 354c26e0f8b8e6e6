"""Training pairs and captions from the nano world, rendered on the fly."""

import hashlib
import json
from itertools import count
from pathlib import Path

import torch

from nanoip2p.common.files import replacing
from nanoip2p.dataset.layouts import Pair
from nanoip2p.world.scenes import EDIT_KINDS, Edit, random_scene, training_edits

EDITS_PER_SCENE = 4
EQUAL_ODDS = (1.0,) * len(EDIT_KINDS)


def pick(options: list, generator: torch.Generator):
    """One of the options, drawn uniformly."""
    return options[int(torch.randint(len(options), (), generator=generator))]


def draw_edit(edits: list[Edit], generator: torch.Generator) -> Edit:
    """Draw a kind of edit, then an edit of this kind. Otherwise, most edits would be of the kind "add"."""
    kind = pick(sorted({edit.kind for edit in edits}), generator)
    return pick([edit for edit in edits if edit.kind == kind], generator)


def draw_scenes(n: int, seed: int) -> list[dict]:
    """`n` distinct triplets of the nano world, from edits that editors may train on. The seed fixes them."""
    generator, rows = torch.Generator().manual_seed(seed), {}
    while len(rows) < n:
        scene = random_scene("train", int(torch.randint(2**31, (), generator=generator)))
        if edits := training_edits(scene):
            edit = draw_edit(edits, generator)
            rows[scene.caption(), pick(edit.seen_instructions, generator), edit.caption] = None
    return [dict(zip(("input", "edit", "output"), row)) for row in rows]


def write_scenes(out: Path, n: int, seed: int) -> None:
    """Write the triplets of `draw_scenes`. ValueError if `out` holds anything but their first lines."""
    text = "".join(json.dumps(row) + "\n" for row in draw_scenes(n, seed)).encode()
    if out.exists() and (out.stat().st_size > len(text) or not text.startswith(out.read_bytes())):
        raise ValueError(f"{out} holds more or other captions than these {n} of --seed {seed}; name another "
                         "--out")
    with replacing(out) as temporary:
        temporary.write_bytes(text)


def scene_pairs(n: int, split: str = "train", weights: tuple[float, ...] = EQUAL_ODDS) -> list[Pair]:
    """`n` rendered pairs, EDITS_PER_SCENE per scene, from edits and instructions that editors may train on.

    weights: frequency of each of EDIT_KINDS. Draws the kind before the edit, as `draw_edit` does.
    """
    seed = int.from_bytes(hashlib.sha256(split.encode()).digest()[:6], "big")
    generator, pairs = torch.Generator().manual_seed(seed), []
    for index in count():
        if len(pairs) >= n:
            return pairs[:n]
        scene = random_scene(split, index)
        edits = training_edits(scene)
        odds = torch.tensor([weight * any(edit.kind == kind for edit in edits)
                             for kind, weight in zip(EDIT_KINDS, weights)])
        for kind in torch.multinomial(odds, EDITS_PER_SCENE, True, generator=generator) if odds.any() else ():
            edit = pick([edit for edit in edits if edit.kind == EDIT_KINDS[kind]], generator)
            texts = pick(edit.seen_instructions, generator), edit.scene, (scene.caption(), edit.caption)
            pairs.append(Pair(scene, *texts))


def captioned_scenes(n: int, split: str = "train") -> list[Pair]:
    """`n` rendered pictures with captions, to train a text-to-image model, which ignores a Pair's `before`.

    Every second scene has an edit applied, because only an edit can remove all things.
    """
    scenes = []
    for index in range(n):
        scene, generator = random_scene(split, index), torch.Generator().manual_seed(index)
        scenes.append(draw_edit(scene.edits(), generator).scene if index % 2 else scene)
    return [Pair(scene, scene.caption(), scene) for scene in scenes]
