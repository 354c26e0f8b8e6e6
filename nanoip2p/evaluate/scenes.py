"""Score an editor, or a text-to-picture model, where the right answer is known.

    python -m nanoip2p.evaluate scenes --weights weights/nano-ip2p --n 500
    python -m nanoip2p.evaluate captions --weights weights/nano-sd --n 320
    python -m nanoip2p.evaluate curve --sdedit weights/nano-sd    # figure 8 of the paper: curve.py
    python -m nanoip2p.evaluate ablate --seeds 2                  # what each part of the recipe is worth
    python -m nanoip2p.evaluate magicbrush --data MagicBrush/dev --out runs/dev            # magicbrush.py

`captions` asks how often CLIP, shown a picture painted for a caption, ranks that caption first among 32, next
to the same for true renders.

Of `scenes`, the scenes and, unless --phrasings seen, the wordings are ones that training never used; with
--combinations held-out, editors are not trained on such a thing in that colour, nor on doing that to such a
thing (nano-sd, from which they start, has painted all of them). An edit succeeds when, among the renders of
all single edits of the scene and of the scene itself, the true one is nearest to the editor's picture in mean
absolute distance. What should not change is measured as PSNR over the pixels that the two renders have in
common, next to what the autoencoder alone makes of the true one: the ceiling. A change of the time of day
leaves too few such pixels.
"""

from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from nanoip2p.editor import Editor
from nanoip2p.images import to_pil, to_tensor
from nanoip2p.world.scenes import EDIT_KINDS, Edit, Scene, held_out, pick, random_scene

LEAST_UNCHANGED = 0.05  # a smaller share of common pixels says nothing about preservation


@dataclass(frozen=True)
class Question:
    """A scene, one edit of it, and the wording the editor is given."""

    scene: Scene
    edit: Edit
    instruction: str


def questions(n: int, phrasings: str = "held-out", combinations: str = "seen",
              split: str = "test") -> list[Question]:
    """`n` questions, the kinds of edit in turn, each about a scene of its own. The same on every machine.

    phrasings: "held-out" (the wording that training never sees) or "seen" (the first one). combinations: the
    edits are "held-out" or "seen" as scenes.held_out has it.
    """
    generator, asked = torch.Generator().manual_seed(0), []
    for index in count():
        if len(asked) == n:
            return asked
        scene, kind = random_scene(split, index), EDIT_KINDS[len(asked) % len(EDIT_KINDS)]
        unseen = combinations == "held-out"
        fitting = [edit for edit in scene.edits(kind) if held_out(scene, edit) == unseen]
        if fitting:
            edit = pick(fitting, generator)
            asked.append(Question(scene, edit, edit.instructions[-1 if phrasings == "held-out" else 0]))


def nearest_edit(picture: Image.Image, scene: Scene) -> Scene:
    """Of the scene and all its single edits, the one whose render is nearest in mean absolute distance."""
    candidates = [scene, *(edit.scene for edit in scene.edits())]
    renders = np.stack([np.asarray(candidate.render(picture.width), np.int16) for candidate in candidates])
    distances = np.abs(renders - np.asarray(picture, np.int16)).mean((1, 2, 3))
    return candidates[int(distances.argmin())]


def unchanged_psnr(picture: Image.Image, before: Image.Image, after: Image.Image) -> float | None:
    """PSNR in dB (peak 255) of `picture` against `after`, over the pixels where `before` and `after` agree.

    None where those are less than 5% of the picture.
    """
    picture, before, after = (np.asarray(image, np.float64) for image in (picture, before, after))
    same = (before == after).all(-1)
    if same.mean() < LEAST_UNCHANGED:
        return None
    return float(10 * np.log10(255**2 / max(((picture - after)[same] ** 2).mean(), 1e-3)))


@torch.inference_mode()
def round_trip(editor: Editor, image: Image.Image) -> Image.Image:
    """What the autoencoder alone makes of a picture."""
    weight = editor.unet.conv_in.weight
    mean, _ = editor.vae.encode(to_tensor(image)[None].to(weight.device, weight.dtype))
    return to_pil(editor.vae.decode(mean)[0])


def score_scenes(editor: Editor, asked: list[Question], settings: dict, batch: int = 35) -> list[dict]:
    """Let the editor answer every question, with `settings` for `Editor.edit` (None: the weights' defaults).

    Returns rows of kind, instruction, success, psnr, ceiling, and pictures: (before, edited, true answer).
    """
    size, rows = editor.side, []
    for i in tqdm(range(0, len(asked), batch), desc=f"editing, {batch} at a time"):
        part = asked[i : i + batch]
        inputs = [question.scene.render(size) for question in part]
        seeds = list(range(i, i + len(part)))
        texts = [question.instruction for question in part]
        pictures = editor.edit(inputs, texts, seed=seeds, batch=batch, **settings)
        for question, before, picture in zip(part, inputs, pictures):
            after = question.edit.scene.render(size)
            rows.append({
                "kind": question.edit.kind, "instruction": question.instruction,
                "success": nearest_edit(picture, question.scene) == question.edit.scene,
                "psnr": unchanged_psnr(picture, before, after),
                "ceiling": unchanged_psnr(round_trip(editor, after), before, after),
                "pictures": (before, picture, after),
            })
    return rows


def table(rows: list[dict]) -> tuple[str, dict]:
    """Success rate with its standard error, and preservation, by kind and overall: as text and as numbers."""
    lines = [f"{'edit':<10} {'n':>5} {'success':>15} {'unchanged PSNR':>16} {'VAE ceiling':>12}"]
    numbers = {}
    for kind in (*EDIT_KINDS, "all"):
        chosen = [row for row in rows if kind in (row["kind"], "all")]
        if not chosen:
            continue
        share, error = rate([row["success"] for row in chosen])
        measured = [row for row in chosen if row["psnr"] is not None]
        means = {key: float(np.mean([row[key] for row in measured])) if measured else None
                 for key in ("psnr", "ceiling")}
        psnr, ceiling = (f"{mean:.1f} dB" if measured else "-" for mean in means.values())
        lines.append(f"{kind:<10} {len(chosen):>5} {share:>8.1%} ± {error:<4.1%} {psnr:>16} {ceiling:>12}")
        numbers[kind] = {"n": len(chosen), "success": share, **means}
    return "\n".join(lines), numbers


def rate(hits: list[bool]) -> tuple[float, float]:
    """Share of hits, and its standard error (Laplace's, because 71 of 71 is no certainty)."""
    likely = (sum(hits) + 1) / (len(hits) + 2)
    return sum(hits) / len(hits), (likely * (1 - likely) / len(hits)) ** 0.5

