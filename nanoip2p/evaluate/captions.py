"""How often CLIP finds the caption of a painted picture among 32 captions; the same for true renders."""

from PIL import Image
from tqdm import tqdm

from nanoip2p.clip_filter import Judge
from nanoip2p.evaluate.scenes import rate
from nanoip2p.text_to_image import TextToImage
from nanoip2p.world.scenes import Scene, random_scene

GROUP = 32  # captions among which CLIP looks for the right one


def captioned(n: int, split: str = "test") -> list[Scene]:
    """`n` scenes of a split whose captions all differ; `n` is rounded up to a multiple of GROUP."""
    scenes, index = {}, 0
    while len(scenes) < -(-n // GROUP) * GROUP:
        scene, index = random_scene(split, index), index + 1
        scenes.setdefault(scene.caption(), scene)
    return list(scenes.values())


def ranked_first(judge: Judge, pictures: list[Image.Image], captions: list[str]) -> list[bool]:
    """For each picture: has its own caption the largest CLIP cosine of the GROUP captions of its group?"""
    hits = []
    for i in range(0, len(pictures), GROUP):
        images = judge.encode_pictures(pictures[i : i + GROUP])                  # (32, P)
        texts = judge.encode_texts(captions[i : i + GROUP])                      # (32, P)
        nearest = (images @ texts.T).argmax(1).tolist()
        hits += [caption == picture for picture, caption in enumerate(nearest)]
    return hits


def score_captions(painter: TextToImage, judge: Judge, scenes: list[Scene],
                   settings: dict) -> tuple[str, dict]:
    """Shares of hits for painted pictures and true renders, with standard errors: as text and as numbers.

    settings: of TextToImage.generate (None: the default).
    """
    captions, painted = [scene.caption() for scene in scenes], []
    for i in tqdm(range(0, len(scenes), GROUP), desc=f"painting, {GROUP} at a time"):
        painted += painter.generate(captions[i : i + GROUP], seed=i, batch=GROUP, **settings)
    renders = [scene.render(painter.defaults["resolution"]) for scene in scenes]
    numbers = {"n": len(scenes)}
    lines = [f"the true caption comes first of {GROUP}, of {len(scenes)} pictures"]
    for kind, pictures in (("painted", painted), ("true renders", renders)):
        numbers[kind], error = rate(ranked_first(judge, pictures, captions))
        lines.append(f"  {kind:<14}{numbers[kind]:>6.1%} ± {error:.1%}")
    return "\n".join(lines), numbers
