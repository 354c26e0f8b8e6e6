"""Edit success and preservation on rendered scenes, for which the correct result is known.

Training never uses these scenes. --combinations held-out selects combinations of things, colours and edits
that no training pair shows (but weights/nano-ip2p, which is older than this rule, was trained on them).
--wordings selects the instructions. held-out: two phrasings of each kind, which no training pair has. plain,
polite: one of these two; the text encoder was trained on plain, but not on polite. seen: the other ten.
reworded: these ten, with synonyms, misspellings, missing articles.

Success: among the renders of the scene and of all its single edits, the correct render has the smallest mean
absolute difference to the edited picture. Preservation: PSNR over the pixels that the edit must not change.
"""

import argparse
import random
from itertools import count

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from nanoip2p.common.grids import grid
from nanoip2p.common.saving import save_png
from nanoip2p.dataset.rendered import pick
from nanoip2p.editor import Editor
from nanoip2p.images import to_pil, to_tensor
from nanoip2p.world.scenes import EDIT_KINDS, Edit, Scene, held_out, random_scene
from nanoip2p.world.wordings import reword

BATCH = 35  # edits that share a forward pass
TURNS = {"held-out": (-1, -2), "plain": (-1,), "polite": (-2,)}  # indices into Edit.instructions


def choose_edits(n: int, combinations: str = "seen") -> list[tuple[Scene, Edit]]:
    """`n` distinct scenes with one edit each, the same on every machine. The kinds of edits alternate.

    combinations: "held-out" selects edits for which `held_out` is True, "seen" selects all other edits.
    """
    generator, chosen, held = torch.Generator().manual_seed(0), [], combinations == "held-out"
    for index in count():
        if len(chosen) == n:
            return chosen
        scene, kind = random_scene("test", index), EDIT_KINDS[len(chosen) % len(EDIT_KINDS)]
        if edits := [edit for edit in scene.edits(kind) if held_out(scene, edit) == held]:
            chosen.append((scene, pick(edits, generator)))


def instruct(edits: list[Edit], wordings: str = "held-out") -> list[str]:
    """One instruction for each edit, equal on every machine. Held-out phrasings take turns."""
    if turns := TURNS.get(wordings):
        return [edit.instructions[turns[i // len(EDIT_KINDS) % len(turns)]] for i, edit in enumerate(edits)]
    rng = random.Random("nanoip2p wordings")
    texts = [edit.seen_instructions[int(rng.random() * len(edit.seen_instructions))] for edit in edits]
    return [reword(text, rng) for text in texts] if wordings == "reworded" else texts


def nearest_edit(picture: Image.Image, scene: Scene) -> Scene:
    """The scene (this one or after one edit) whose render has the smallest mean absolute difference."""
    pixels = np.asarray(picture, np.int16)
    return min([scene, *(edit.scene for edit in scene.edits())],
               key=lambda one: np.abs(np.asarray(one.render(picture.width)) - pixels).mean())


def unchanged_psnr(picture: Image.Image, before: Image.Image, after: Image.Image) -> float | None:
    """PSNR in dB (peak 255) of `picture` against `after`, over the pixels where `before` and `after` agree.

    None if they agree on less than 5% of the picture.
    """
    picture, before, after = (np.asarray(image, np.float64) for image in (picture, before, after))
    same = (before == after).all(-1)
    if same.mean() < 0.05:
        return None
    return float(10 * np.log10(255**2 / max(((picture - after)[same] ** 2).mean(), 1e-3)))


@torch.inference_mode()
def round_trip(editor: Editor, picture: Image.Image) -> Image.Image:
    """Encode and decode a picture with the autoencoder, without an edit."""
    mean, _ = editor.vae.encode(to_tensor(picture)[None].to(editor.unet.conv_in.weight))
    return to_pil(editor.vae.decode(mean)[0])


def score_scenes(editor: Editor, chosen: list[tuple[Scene, Edit]], settings: dict,
                 wordings: str = "held-out") -> list[dict]:
    """Make and score every edit. settings: for Editor.edit; a value None means the default.

    Returns rows of kind, instruction, success, psnr, ceiling, pictures: (before, edited, correct render).
    ceiling: the PSNR of the correct render after the autoencoder alone, about the best an edit can reach.
    """
    texts, rows = instruct([edit for _, edit in chosen], wordings), []
    for i in tqdm(range(0, len(chosen), BATCH), desc=f"editing, {BATCH} at a time"):
        part = chosen[i : i + BATCH]
        inputs = [scene.render(editor.side) for scene, _ in part]
        pictures = editor.edit(inputs, texts[i : i + BATCH], seed=i, batch=BATCH, **settings)
        for (scene, edit), text, before, picture in zip(part, texts[i:], inputs, pictures):
            after = edit.scene.render(editor.side)
            rows.append({"kind": edit.kind, "instruction": text, "pictures": (before, picture, after),
                         "success": nearest_edit(picture, scene) == edit.scene,
                         "psnr": unchanged_psnr(picture, before, after),
                         "ceiling": unchanged_psnr(round_trip(editor, after), before, after)})
    return rows


def table(rows: list[dict]) -> tuple[str, dict]:
    """Success rate and preservation, by kind and overall: as text with standard errors, and as numbers."""
    lines = [f"{'edit':<10} {'n':>5} {'success':>15} {'unchanged PSNR':>16} {'VAE ceiling':>12}"]
    numbers = {}
    for kind in (*EDIT_KINDS, "all"):
        if chosen := [row for row in rows if kind in (row["kind"], "all")]:
            share, error = rate([row["success"] for row in chosen])
            measured = [row for row in chosen if row["psnr"] is not None]
            means = {key: float(np.mean([row[key] for row in measured])) if measured else None
                     for key in ("psnr", "ceiling")}
            psnr, ceiling = (f"{mean:.1f} dB" if measured else "-" for mean in means.values())
            lines.append(
                f"{kind:<10} {len(chosen):>5} {share:>8.1%} ± {error:<4.1%} {psnr:>16} {ceiling:>12}")
            numbers[kind] = {"n": len(chosen), "success": share, **means}
    return "\n".join(lines), numbers


def rate(hits: list[bool]) -> tuple[float, float]:
    """The fraction of hits, and its standard error by Laplace's rule, which is positive even for 70 of 70."""
    likely = (sum(hits) + 1) / (len(hits) + 2)
    return sum(hits) / len(hits), (likely * (1 - likely) / len(hits)) ** 0.5


def run(args: argparse.Namespace) -> tuple[str, dict]:
    """Return scores as text and as numbers. Draw some failures to <out>/failed.png. args: see __main__.py."""
    settings = {key: vars(args)[key] for key in ("steps", "cfg_text", "cfg_image", "sampler", "deep_every")}
    editor = Editor.load(args.weights, args.device)
    rows = score_scenes(editor, choose_edits(args.n, args.combinations), settings, args.wordings)
    failed = [row for row in rows if not row["success"]][:16]
    if args.out and failed:
        labels = [["input", row["instruction"], "correct render"] for row in failed]
        save_png(grid([list(row["pictures"]) for row in failed], labels), args.out / "failed.png", {})
    return table(rows)
