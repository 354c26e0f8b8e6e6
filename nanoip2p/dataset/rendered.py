"""Training pairs and captions from the nano world, rendered on the spot."""

import hashlib
import json
from itertools import count
from pathlib import Path

import torch

from nanoip2p.common.files import replacing
from nanoip2p.dataset.layouts import Pair
from nanoip2p.world.scenes import EDIT_KINDS, pick, random_scene, seen_edits


def draw_scenes(n: int, seed: int) -> list[dict]:
    """`n` distinct triplets of the nano world, a function of the seed: such as training may see."""
    generator, rows = torch.Generator().manual_seed(seed), {}
    while len(rows) < n:
        scene = random_scene("train", int(torch.randint(2**31, (), generator=generator)))
        edits = seen_edits(scene)
        if not edits:
            continue
        kind = pick(sorted({edit.kind for edit in edits}), generator)  # there are many more ways to add
        edit = pick([edit for edit in edits if edit.kind == kind], generator)
        row = (scene.caption(), pick(edit.instructions[:-1], generator), edit.caption)
        rows.setdefault(row, dict(zip(("input", "edit", "output"), row)))
    return list(rows.values())


def write_scenes(out: Path, n: int, seed: int) -> None:
    """Write `draw_scenes`; a file that holds the first of them grows, more or others: ValueError."""
    text = "".join(json.dumps(row) + "\n" for row in draw_scenes(n, seed)).encode()
    there = out.read_bytes() if out.exists() else b""
    if not text.startswith(there):
        holds = "more captions" if there.startswith(text) else "other captions"
        raise ValueError(f"{out} holds {holds} than these {n} of --seed {seed}; name another --out")
    with replacing(out) as temporary:
        temporary.write_bytes(text)


EDITS_PER_SCENE = 4


EQUAL_ODDS = (1.0,) * len(EDIT_KINDS)


def scene_pairs(n: int, split: str = "train", weights: tuple[float, ...] = EQUAL_ODDS) -> list[Pair]:
    """`n` rendered pairs, four edits of each scene, in what wordings and edits training may see.

    `weights` are the odds of each of EDIT_KINDS. The kind is drawn first, because there are many more ways to
    add a thing than to remove one.
    """
    seed = int.from_bytes(hashlib.sha256(split.encode()).digest()[:6], "big")
    generator, pairs = torch.Generator().manual_seed(seed), []
    for index in count():
        if len(pairs) >= n:
            return pairs[:n]
        scene = random_scene(split, index)
        edits = seen_edits(scene)
        possible = {edit.kind for edit in edits}
        odds = torch.tensor([weight * (kind in possible) for kind, weight in zip(EDIT_KINDS, weights)])
        for kind in torch.multinomial(odds, EDITS_PER_SCENE, True, generator=generator) if odds.any() else ():
            edit = pick([edit for edit in edits if edit.kind == EDIT_KINDS[kind]], generator)
            texts = pick(edit.instructions[:-1], generator), edit.scene, (scene.caption(), edit.caption)
            pairs.append(Pair(scene, *texts))


def captioned_scenes(n: int, split: str = "train") -> list[Pair]:
    """`n` rendered pictures and their captions, for a text-to-picture model: the input is not looked at.

    Every second one is an edited scene, so that all is seen that edits can lead to, an empty place as well.
    """
    scenes = []
    for index in range(n):
        scene, generator = random_scene(split, index), torch.Generator().manual_seed(index)
        kind = pick(sorted({edit.kind for edit in scene.edits()}), generator)
        scenes.append(pick(scene.edits(kind), generator).scene if index % 2 else scene)
    return [Pair(scene, scene.caption(), scene) for scene in scenes]
