"""The CLIP filter (section 3.1.2): of many generated pairs, which show the edit that their captions describe?

Four cosines of CLIP's features judge a pair: each caption against its picture, the two pictures against each
other, and the directional similarity of StyleGAN-NADA (Gal et al. 2108.00946, equation 4),

    cos(E_I(after) - E_I(before), E_T(caption after) - E_T(caption before))

Names, thresholds and preprocessing are those of the paper's code (metrics/clip_similarity.py and
dataset_creation/generate_img_dataset.py there); the paper's text has 0.75 for pictures.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nanoip2p.clip import CLIP
from nanoip2p.common.files import read_json
from nanoip2p.images import to_tensor
from nanoip2p.tokenizer import Tokenizer, check_fits, load_tokenizer

SIMILARITIES = ("clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image")  # as metadata.jsonl names them


@dataclass(frozen=True)
class Thresholds:
    """The lowest similarities that pass, in [-1, 1]: of pictures, of direction, of each caption."""

    image: float = 0.7
    direction: float = 0.2
    caption: float = 0.2

    def reasons(self, scores: dict[str, float]) -> list[str]:
        """The names of the SIMILARITIES that are too low; none for a pair that passes. NaN is too low."""
        least = zip(SIMILARITIES, (self.caption, self.caption, self.direction, self.image))
        return [name for name, threshold in least if not scores[name] >= threshold]


def best(candidates: list, most: int) -> list:
    """At most `most` of the (row, ...) tuples, by falling direction; at equal direction, by falling seed."""
    return sorted(candidates, key=lambda one: (one[0]["clip_sim_dir"], one[0]["seed"]), reverse=True)[:most]


def similarities(before: Tensor, after: Tensor, text_before: Tensor, text_after: Tensor) -> Tensor:
    """Features of pictures (B, P), of captions (B, P) or (1, P) -> cosines (B, 4), as SIMILARITIES.

    A change of nothing has no direction; its similarity is 0.
    """
    return torch.stack([
        F.cosine_similarity(before, text_before), F.cosine_similarity(after, text_after),
        F.cosine_similarity(after - before, text_after - text_before), F.cosine_similarity(before, after),
    ], dim=1)


class Judge:
    """CLIP with its tokenizer and the preprocessing of its pictures."""

    def __init__(self, clip: CLIP, tokenizer: Tokenizer, mean: list[float], std: list[float]):
        """mean, std: of the three colours of pixels in [0, 1], as preprocessor_config.json has them."""
        self.clip, self.tokenizer = clip, tokenizer
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device = "cpu") -> "Judge":
        """name: a folder that transformers wrote for a CLIPModel, or a name on the Hub. Computes in float32.

        ValueError, in one line, for anything that is missing or broken.
        """
        from nanoip2p.checkpoint.folder import load_network
        from nanoip2p.checkpoint.hub import fetch_clip

        folder = Path(name) if Path(name).exists() else fetch_clip(str(name))
        clip, tokenizer = load_network(CLIP, folder).to(device), load_tokenizer(folder)
        check_fits(tokenizer, clip.config.text_config, folder)
        path = folder / "preprocessor_config.json"
        settings = read_json(path)
        try:
            return cls(clip, tokenizer, settings["image_mean"], settings["image_std"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: image_mean and image_std should be three numbers ({error})") from None

    @torch.inference_mode()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Captions -> unit vectors (B, P). OpenAI's tokenizer pads in another way, with the same result."""
        return self.clip.encode_text(self.tokenizer(texts).to(self.clip.logit_scale.device))

    @torch.inference_mode()
    def encode_pictures(self, pictures: list[Image.Image]) -> Tensor:
        """RGB pictures of one size -> unit vectors (B, P), in one forward."""
        return self.clip.encode_image(self.prepare(pictures).to(self.clip.logit_scale.device))

    def prepare(self, pictures: list[Image.Image]) -> Tensor:
        """RGB pictures of one size -> CLIP's input (B, 3, S, S), with S from its configuration."""
        pixels = torch.stack([to_tensor(picture) for picture in pictures]) / 2 + 0.5      # (B, 3, H, W)
        size = self.clip.vision_model.embeddings.size
        # No antialias, unlike CLIP's own preprocessing: the paper's thresholds were chosen on such pictures
        pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False)         # (B, 3, S, S)
        return (pixels - self.mean) / self.std

    def score(self, before: list[Image.Image], after: list[Image.Image], captions: Tensor) -> list[dict]:
        """B pictures, B edited ones, encode_texts([before, after]) (2, P) -> SIMILARITIES of each pair."""
        features = self.encode_pictures([*before, *after]).chunk(2)                       # (B, P) each
        rows = similarities(*features, captions[:1], captions[1:])
        return [dict(zip(SIMILARITIES, row)) for row in rows.tolist()]
