"""The CLIP filter (section 3.1.2): it keeps the generated pairs that show the edit of their captions.

Four cosines of CLIP features score a pair: each caption with its picture, the two pictures with each
other, and the change between the pictures with the change between the captions. The last is the directional
similarity of StyleGAN-NADA (Gal et al. 2108.00946, equation 4):

    cos(E_I(after) - E_I(before), E_T(caption after) - E_T(caption before))

Names, thresholds and preprocessing follow the paper's code (metrics/clip_similarity.py and
dataset_creation/generate_img_dataset.py); the paper's text sets the picture threshold to 0.75. Our CLIP gets
8-bit pictures before JPEG compression and runs in float32; the paper's code scores float pictures in float16.
"""

from dataclasses import dataclass
from html import unescape
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nanoip2p.clip import CLIP
from nanoip2p.common.files import read_json
from nanoip2p.common.schema import checked
from nanoip2p.images import to_tensor
from nanoip2p.tokenizer import Tokenizer, check_fits, clean, load_tokenizer

SIMILARITIES = ("clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image")  # as metadata.jsonl names them


@dataclass(frozen=True)
class Thresholds:
    """The minimum similarities, in [-1, 1]: of both pictures, directional, of each caption and its picture.

    leakage: the maximum of "leakage" (see dataset/changes.py), or None. The paper has no such threshold.
    """

    image: float = 0.7
    direction: float = 0.2
    caption: float = 0.2
    leakage: float | None = None

    def reasons(self, scores: dict[str, float]) -> list[str]:
        """Names of the scores beyond their threshold: [] if the pair passes. NaN does not pass."""
        thresholds = zip(SIMILARITIES, (self.caption, self.caption, self.direction, self.image))
        leaks = None not in (self.leakage, scores.get("leakage")) and not scores["leakage"] <= self.leakage
        return [name for name, least in thresholds if not scores[name] >= least] + ["leakage"] * leaks


def best(candidates: list, most: int) -> list:
    """The `most` candidates (scores, ...) with the highest clip_sim_dir. Ties go to the highest seed."""
    return sorted(candidates, key=lambda it: (it[0]["clip_sim_dir"], it[0]["seed"]), reverse=True)[:most]


def similarities(before: Tensor, after: Tensor, text_before: Tensor, text_after: Tensor) -> Tensor:
    """Features of pictures (B, P) and captions (B, P) or (1, P) -> cosines (B, 4), ordered as SIMILARITIES.

    The directional similarity is 0 if the pictures or the captions are equal.
    """
    return torch.stack([
        F.cosine_similarity(before, text_before), F.cosine_similarity(after, text_after),
        F.cosine_similarity(after - before, text_after - text_before), F.cosine_similarity(before, after),
    ], dim=1)


def clean_twice(text: str) -> str:
    """Call `clean`, then unescape HTML twice, as OpenAI's `tokenize` does. Unlike `clean` alone, this
    replaces "&lt" without its ";", and entities in a text with "<"."""
    return unescape(unescape(clean(text)))


class Judge:
    """CLIP with its tokenizer and its picture preprocessing."""

    def __init__(self, clip: CLIP, tokenizer: Tokenizer, mean: list[float], std: list[float]):
        """mean, std: of pixels in [0, 1], three numbers each, from preprocessor_config.json."""
        self.clip, self.tokenizer = clip, tokenizer
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device = "cpu") -> "Judge":
        """Load from `name`: a folder that transformers saved for a CLIPModel, or a Hub name. Runs in float32.

        Raises ValueError, in one line, for a missing or broken file.
        """
        from nanoip2p.checkpoint.folder import load_network
        from nanoip2p.checkpoint.hub import fetch_clip

        folder = Path(name) if Path(name).exists() else fetch_clip(str(name))
        clip, tokenizer = load_network(CLIP, folder), load_tokenizer(folder)
        check_fits(tokenizer, clip.config.text_config, folder)
        tokenizer.clean = clean_twice
        path = folder / "preprocessor_config.json"
        settings = read_json(path)
        mean, std = (checked(settings.get(key), list[float], f"{path}: {key}", least, 1000)
                     for key, least in (("image_mean", -1000), ("image_std", 0.001)))
        if not len(mean) == len(std) == 3:
            raise ValueError(f"{path}: image_mean and image_std need three colours")
        return cls(clip.to(device), tokenizer, mean, std)

    @torch.inference_mode()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Captions -> unit vectors (B, P).

        The paper's code used OpenAI's tokenizer, which pads with 0; ours pads with the end-of-text token. The
        features are equal: CLIP takes them at the first end-of-text token, which never attends to padding.
        """
        return self.clip.encode_text(self.tokenizer(texts).to(self.clip.logit_scale.device))

    @torch.inference_mode()
    def encode_pictures(self, pictures: list[Image.Image]) -> Tensor:
        """RGB pictures of one size -> unit vectors (B, P), in one forward pass."""
        return self.clip.encode_image(self.prepare(pictures).to(self.clip.logit_scale.device))

    def prepare(self, pictures: list[Image.Image]) -> Tensor:
        """RGB pictures of one size -> CLIP's input (B, 3, S, S), with S from its configuration."""
        pixels = torch.stack([to_tensor(picture) for picture in pictures]) / 2 + 0.5      # (B, 3, H, W)
        size = self.clip.config.vision_config.image_size
        # No antialiasing, unlike OpenAI's preprocessing: the paper's thresholds were chosen without it
        pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False)         # (B, 3, S, S)
        return (pixels - self.mean) / self.std

    def score(self, before: list[Image.Image], after: list[Image.Image], captions: Tensor) -> list[dict]:
        """Score B pairs: a dict of SIMILARITIES for each. captions (2, P): encode_texts of both captions."""
        features = self.encode_pictures([*before, *after]).chunk(2)                       # (B, P) each
        rows = similarities(*features, captions[:1], captions[1:])
        return [dict(zip(SIMILARITIES, row)) for row in rows.tolist()]
