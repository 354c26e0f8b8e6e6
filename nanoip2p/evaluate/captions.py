"""How often CLIP finds the caption of a painted picture."""

from PIL import Image
from tqdm import tqdm

from nanoip2p.clip_filter import Judge
from nanoip2p.text_to_image import TextToImage
from nanoip2p.world.scenes import Scene, random_scene

CHOICES = 32  # captions among which CLIP has to find the right one


def captioned(n: int, split: str = "test") -> list[Scene]:
    """`n` scenes of a split whose captions all differ; `n` is rounded up to a multiple of CHOICES."""
    scenes, index = {}, 0
    while len(scenes) < -(-n // CHOICES) * CHOICES:
        scene, index = random_scene(split, index), index + 1
        scenes.setdefault(scene.caption(), scene)
    return list(scenes.values())


def ranked_first(judge: Judge, pictures: list[Image.Image], captions: list[str]) -> list[bool]:
    """For each picture: is its own caption the nearest to it of the CHOICES captions of its group?

    Groups are CHOICES pictures in a row. "Nearest" is the cosine of CLIP's features.
    """
    found = []
    for i in range(0, len(pictures), CHOICES):
        seen = judge.encode_pictures(pictures[i : i + CHOICES])                  # (32, P)
        read = judge.encode_texts(captions[i : i + CHOICES])                     # (32, P)
        nearest = (seen @ read.T).argmax(1).tolist()
        found += [place == own for own, place in enumerate(nearest)]
    return found


def score_captions(painter: TextToImage, judge: Judge, scenes: list[Scene], settings: dict) -> list[dict]:
    """Paint every scene's caption. Rows of caption, success, true_success, pictures: (painted, a render)."""
    captions, painted = [scene.caption() for scene in scenes], []
    for i in tqdm(range(0, len(scenes), CHOICES), desc=f"painting, {CHOICES} at a time"):
        painted += painter.generate(captions[i : i + CHOICES], seed=i, batch=CHOICES, **settings)
    renders = [scene.render(painter.defaults["resolution"]) for scene in scenes]
    columns = (captions, ranked_first(judge, painted, captions), ranked_first(judge, renders, captions),
               zip(painted, renders))
    return [dict(zip(("caption", "success", "true_success", "pictures"), row)) for row in zip(*columns)]
