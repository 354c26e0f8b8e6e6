"""Edit success and preservation on rendered scenes, where the right answer is known.

    python -m nanoip2p.evaluate scenes --weights weights/nano-ip2p --n 500

Training never uses these scenes nor, unless --phrasings seen, these phrasings of the instructions. With
--combinations held-out, the edits show combinations of things, colours and edits on which editors are not
trained (nano-sd, from which they start, was trained on all of them).

Success: among the renders of the scene and of all its single edits, the right one is nearest to the edited
picture in mean absolute distance. Preservation: PSNR over the pixels that are equal in the two renders.
"Ceiling" is the PSNR of the right render after the autoencoder alone. Edits of the time of day leave too few
equal pixels.
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

LEAST_UNCHANGED = 0.05  # smallest share of equal pixels for which PSNR is measured


@dataclass(frozen=True)
class Question:
    """A scene, one edit of it, and the instruction for the editor."""

    scene: Scene
    edit: Edit
    instruction: str


def questions(n: int, phrasings: str = "held-out", combinations: str = "seen",
              split: str = "test") -> list[Question]:
    """`n` questions, each about another scene; the kinds of edit take turns. The same on every machine.

    phrasings: "held-out" (the phrasing that training never uses) or "seen" (the first one). combinations:
    edits for which scenes.held_out is true ("held-out") or false ("seen").
    """
    generator, chosen = torch.Generator().manual_seed(0), []
    for index in count():
        if len(chosen) == n:
            return chosen
        scene, kind = random_scene(split, index), EDIT_KINDS[len(chosen) % len(EDIT_KINDS)]
        edits = [edit for edit in scene.edits(kind) if held_out(scene, edit) == (combinations == "held-out")]
        if edits:
            edit = pick(edits, generator)
            chosen.append(Question(scene, edit, edit.instructions[-1 if phrasings == "held-out" else 0]))


def nearest_edit(picture: Image.Image, scene: Scene) -> Scene:
    """Of the scene and all its single edits, the one whose render is nearest in mean absolute distance."""
    candidates = [scene, *(edit.scene for edit in scene.edits())]
    renders = np.stack([np.asarray(candidate.render(picture.width), np.int16) for candidate in candidates])
    distances = np.abs(renders - np.asarray(picture, np.int16)).mean((1, 2, 3))
    return candidates[int(distances.argmin())]


def unchanged_psnr(picture: Image.Image, before: Image.Image, after: Image.Image) -> float | None:
    """PSNR in dB (peak 255) of `picture` against `after`, over the pixels where `before` and `after` agree.

    None if they agree on less than 5% of the picture.
    """
    picture, before, after = (np.asarray(image, np.float64) for image in (picture, before, after))
    same = (before == after).all(-1)
    if same.mean() < LEAST_UNCHANGED:
        return None
    return float(10 * np.log10(255**2 / max(((picture - after)[same] ** 2).mean(), 1e-3)))


@torch.inference_mode()
def round_trip(editor: Editor, image: Image.Image) -> Image.Image:
    """A picture after the autoencoder alone."""
    weight = editor.unet.conv_in.weight
    mean, _ = editor.vae.encode(to_tensor(image)[None].to(weight.device, weight.dtype))
    return to_pil(editor.vae.decode(mean)[0])


def score_scenes(editor: Editor, asked: list[Question], settings: dict, batch: int = 35) -> list[dict]:
    """Let the editor answer every question, with `settings` for Editor.edit (None: the default).

    Returns rows of kind, instruction, success, psnr, ceiling, pictures: (before, edited, right answer).
    """
    rows = []
    for i in tqdm(range(0, len(asked), batch), desc=f"editing, {batch} at a time"):
        part = asked[i : i + batch]
        inputs = [question.scene.render(editor.side) for question in part]
        pictures = editor.edit(inputs, [question.instruction for question in part],
                               seed=list(range(i, i + len(part))), batch=batch, **settings)
        for question, before, picture in zip(part, inputs, pictures):
            after = question.edit.scene.render(editor.side)
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
        if chosen:
            share, error = rate([row["success"] for row in chosen])
            measured = [row for row in chosen if row["psnr"] is not None]
            means = {key: float(np.mean([row[key] for row in measured])) if measured else None
                     for key in ("psnr", "ceiling")}
            psnr, ceiling = (f"{mean:.1f} dB" if measured else "-" for mean in means.values())
            rate_text = f"{share:>8.1%} ± {error:<4.1%}"
            lines.append(f"{kind:<10} {len(chosen):>5} {rate_text} {psnr:>16} {ceiling:>12}")
            numbers[kind] = {"n": len(chosen), "success": share, **means}
    return "\n".join(lines), numbers


def rate(hits: list[bool]) -> tuple[float, float]:
    """Share of hits, and its standard error by Laplace's estimate, which is above 0 for 71 hits of 71."""
    likely = (sum(hits) + 1) / (len(hits) + 2)
    return sum(hits) / len(hits), (likely * (1 - likely) / len(hits)) ** 0.5
