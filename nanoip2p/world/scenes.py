"""The nano world: rendered scenes in which every edit has a known correct result.

A `Scene` has a time, a weather, a ground and up to three things. It renders at any size, and it lists all its
edits with instructions, edited caption and edited scene. So the nano models never run out of training data,
and evaluate/scenes.py can compare an edit with the correct picture.
"""

import random
import re
from dataclasses import dataclass, replace
from itertools import product

from PIL import Image

from nanoip2p.world.painting import COLOURS, paint
from nanoip2p.world.wordings import HELD_OUT, MISSPELLINGS, PHRASINGS, SYNONYMS

TIMES = ("day", "sunset", "night")
WEATHERS = ("clear", "cloudy", "rainy", "foggy")
GROUNDS = ("grass", "sand", "snow", "dirt")
SLOTS = ("on the left", "in the middle", "on the right")
SIZES = ("small", "medium", "large")

KINDS = ("house", "tree", "car", "tent", "mushroom", "flower", "rocket", "balloon")

EDIT_KINDS = tuple(PHRASINGS)

# Combinations that `training_edits` leaves out. Editors still see each part, in other combinations. nano-clip
# and nano-sd train on all combinations, because CLIP and Stable Diffusion have seen nearly everything.
HELD_OUT_THINGS = {("house", "purple"), ("tree", "white"), ("car", "pink"), ("tent", "orange"),
                   ("mushroom", "blue"), ("flower", "green"), ("rocket", "red"), ("balloon", "yellow")}
HELD_OUT_EDITS = {("recolour", "flower"), ("replace", "tent"), ("add", "rocket"), ("remove", "mushroom")}


@dataclass(frozen=True)
class Thing:
    """One object. `dx` and `dy` shift it from the default place in its slot, in fractions of the picture."""

    kind: str
    colour: str
    size: str = "medium"
    slot: int = 1  # index into SLOTS
    dx: float = 0.0
    dy: float = 0.0

    @property
    def name(self) -> str:
        """The thing's name in captions: "a red house"."""
        article = "an" if self.colour == "orange" else "a"
        return f"{article} {self.colour} {self.kind}"


@dataclass(frozen=True)
class Edit:
    """One edit of a scene."""

    kind: str
    thing: str  # kind of the thing that is recoloured, replaced, added or removed; "" for other edits
    words: dict[str, str]  # what the instructions name: old, new, where
    scene: "Scene"

    @property
    def instructions(self) -> tuple[str, ...]:
        """All phrasings of the edit, which mean the same. No training pair has one of the last HELD_OUT."""
        return tuple(phrase.format(**self.words) for phrase in PHRASINGS[self.kind])

    @property
    def seen_instructions(self) -> tuple[str, ...]:
        """The phrasings that training pairs may have."""
        return self.instructions[:-HELD_OUT]

    @property
    def caption(self) -> str:
        """The caption of the edited picture."""
        return self.scene.caption()


@dataclass(frozen=True)
class Scene:
    """The content of a picture. No two things share a kind or a slot, so "the house" is never ambiguous."""

    time: str
    weather: str
    ground: str
    things: tuple[Thing, ...]  # from left to right
    landscape: int  # 0 ... 9999: the shape of the hills

    def __post_init__(self):
        # Sort the things, so that scenes with the same picture compare equal
        object.__setattr__(self, "things", tuple(sorted(self.things, key=lambda thing: thing.slot)))

    def caption(self) -> str:
        """The caption of the picture, which names the things from left to right."""
        things = [f"{thing.name} {SLOTS[thing.slot]}" for thing in self.things]
        listed = " and ".join(things) or "an empty place"
        return f"{listed}, on {self.ground}, {self.weather} {self.time}"

    def edits(self, only: str | None = None) -> list[Edit]:
        """All edits of this scene, in a fixed order. only: one of EDIT_KINDS, to get no other edits."""
        found = []

        def add(kind: str, scene: Scene, thing: str = "", **words: str) -> None:
            found.append(Edit(kind, thing, words, scene))

        kinds = {thing.kind for thing in self.things}
        for thing in self.things:
            others = tuple(other for other in self.things if other is not thing)
            for kind, field, options in (("recolour", "colour", COLOURS), ("replace", "kind", KINDS)):
                for new in options:
                    if new != thing.colour and new not in kinds:  # no two things may share a kind
                        changed = replace(self, things=others + (replace(thing, **{field: new}),))
                        add(kind, changed, thing.kind, old=thing.kind, new=new)
            add("remove", replace(self, things=others), thing.kind, old=thing.kind)
        free = sorted(set(range(len(SLOTS))) - {thing.slot for thing in self.things})
        for slot, kind, colour in product(free, [kind for kind in KINDS if kind not in kinds], COLOURS):
            new = Thing(kind, colour, slot=slot)
            add("add", replace(self, things=self.things + (new,)), kind, new=new.name, where=SLOTS[slot])
        for kind, options in (("time", TIMES), ("weather", WEATHERS), ("ground", GROUNDS)):
            old = getattr(self, kind)
            for new in options:
                if new != old:
                    add(kind, replace(self, **{kind: new}), old=old, new=new)
        return [edit for edit in found if only in (None, edit.kind)]

    def render(self, size: int = 64) -> Image.Image:
        """Draw the scene as an RGB picture of size x size pixels."""
        return paint(self, 4 * size).reduce(4)


def unknown_words(text: str) -> list[str]:
    """The distinct words of `text` that are in no caption or wording of the nano world."""
    blank = dict.fromkeys(("old", "new", "where"), "")
    said = [phrase.format(**blank) for phrases in PHRASINGS.values() for phrase in phrases]
    said += [word for table in (SYNONYMS, MISSPELLINGS) for words in table.values() for word in words]
    said += [*KINDS, *COLOURS, *TIMES, *WEATHERS, *GROUNDS, *SLOTS, "a an empty place on and"]
    known = set(re.findall(r"\w+", " ".join(said).lower()))
    return [word for word in dict.fromkeys(re.findall(r"\w+", text.lower())) if word not in known]


def held_out(scene: Scene, edit: Edit) -> bool:
    """Whether an edit, or a thing before or after the edit, is a held-out combination."""
    shown = {(thing.kind, thing.colour) for thing in scene.things + edit.scene.things}
    return not shown.isdisjoint(HELD_OUT_THINGS) or (edit.kind, edit.thing) in HELD_OUT_EDITS


def training_edits(scene: Scene) -> list[Edit]:
    """The edits that editors train on. A scene that shows a held-out thing has none."""
    return [edit for edit in scene.edits() if not held_out(scene, edit)]


def random_scene(split: str, index: int) -> Scene:
    """Scene number `index` of a split ("train", "test", any word), with one to three things.

    The scene is the same on every machine: Python guarantees which numbers `random.Random.random` returns.
    """
    rng = random.Random(f"nanoip2p {split} {index}")

    def choose(options):
        return options[int(rng.random() * len(options))]

    slots, kinds = list(range(len(SLOTS))), list(KINDS)
    things = []
    for _ in range(choose((1, 2, 2, 3))):
        slot, kind = choose(slots), choose(kinds)
        slots.remove(slot)
        kinds.remove(kind)
        dx, dy = (rng.random() - 0.5) * 0.06, (rng.random() - 0.5) * 0.06
        things.append(Thing(kind, choose(tuple(COLOURS)), choose(SIZES), slot, round(dx, 3), round(dy, 3)))
    return Scene(choose(TIMES), choose(WEATHERS), choose(GROUNDS), tuple(things), int(rng.random() * 10_000))
