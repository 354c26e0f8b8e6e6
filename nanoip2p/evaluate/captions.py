"""CLIP retrieval: how often CLIP ranks a picture's caption first of 32, for generated and true pictures."""

import argparse

from PIL import Image
from tqdm import tqdm

from nanoip2p.clip_filter import Judge
from nanoip2p.evaluate.scenes import rate
from nanoip2p.text_to_image import TextToImage
from nanoip2p.world.scenes import Scene, random_scene

GROUP = 32  # number of captions from which CLIP chooses


def distinct_scenes(n: int) -> list[Scene]:
    """`n` test scenes, rounded up to a multiple of GROUP, with distinct captions."""
    scenes, index = {}, 0
    while len(scenes) < -(-n // GROUP) * GROUP:
        scene, index = random_scene("test", index), index + 1
        scenes.setdefault(scene.caption(), scene)
    return list(scenes.values())


def ranked_first(judge: Judge, pictures: list[Image.Image], captions: list[str]) -> list[bool]:
    """For each picture: whether CLIP ranks its own caption first of the GROUP captions in its batch."""
    hits = []
    for i in range(0, len(pictures), GROUP):
        images = judge.encode_pictures(pictures[i : i + GROUP])                  # (32, P)
        texts = judge.encode_texts(captions[i : i + GROUP])                      # (32, P)
        nearest = (images @ texts.T).argmax(1).tolist()
        hits += [caption == picture for picture, caption in enumerate(nearest)]
    return hits


def run(args: argparse.Namespace) -> tuple[str, dict]:
    """Return the accuracies, as text with standard errors, and as numbers without. args: see __main__.py."""
    painter = TextToImage.load(args.weights, args.device)
    judge, scenes = Judge.load(args.clip, painter.device), distinct_scenes(args.n)
    captions, painted = [scene.caption() for scene in scenes], []
    for i in tqdm(range(0, len(scenes), GROUP), desc=f"painting, {GROUP} at a time"):
        painted += painter.generate(captions[i : i + GROUP], seed=i, batch=GROUP, steps=args.steps,
                                    cfg_text=args.cfg_text, sampler=args.sampler)
    renders = [scene.render(painter.defaults["resolution"]) for scene in scenes]
    numbers = {"n": len(scenes)}
    lines = [f"{len(scenes)} pictures; the true caption comes first of {GROUP} captions for:"]
    for kind, pictures in (("generated", painted), ("true renders", renders)):
        numbers[kind], error = rate(ranked_first(judge, pictures, captions))
        lines.append(f"  {kind:<14}{numbers[kind]:>6.1%} ± {error:.1%}")
    return "\n".join(lines), numbers
