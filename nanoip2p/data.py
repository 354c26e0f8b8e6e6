"""Training pairs: from a folder of pictures, or rendered on the spot, to stored latents and text embeddings.

The autoencoder and the text encoder are frozen, so every picture and every sentence is encoded once, before
training, and the loop only gathers rows of tensors. What is stored of a picture is its whole posterior (mean
and log-variance), so the target can still be sampled anew at every visit.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from nanoip2p.clip import TextEncoder
from nanoip2p.files import replacing
from nanoip2p.images import fit, open_image, to_tensor
from nanoip2p.scenes import EDIT_KINDS, Scene, pick, random_scene
from nanoip2p.tokenizer import Tokenizer
from nanoip2p.vae import VAE

SPLITS = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}  # as the original, contiguous
EDITS_PER_SCENE = 4
EQUAL_ODDS = (1.0,) * len(EDIT_KINDS)
Picture = Path | Scene


@dataclass(frozen=True)
class Pair:
    """One example: a picture, an instruction, the edited picture. A picture is a file or a `Scene`."""

    before: Path | Scene
    edit: str
    after: Path | Scene


def scene_pairs(count: int, split: str = "train", weights: tuple[float, ...] = EQUAL_ODDS) -> list[Pair]:
    """`count` rendered pairs, four edits of each scene in a phrasing that training may see.

    `weights` are the odds of each of EDIT_KINDS. The kind is drawn first, because there are many more ways to
    add a thing than to remove one.
    """
    seed = int.from_bytes(hashlib.sha256(split.encode()).digest()[:6], "big")
    generator, pairs = torch.Generator().manual_seed(seed), []
    for index in range(-(-count // EDITS_PER_SCENE)):
        scene = random_scene(split, index)
        edits = scene.edits()
        possible = {edit.kind for edit in edits}
        odds = torch.tensor([weight * (kind in possible) for kind, weight in zip(EDIT_KINDS, weights)])
        for kind in torch.multinomial(odds, EDITS_PER_SCENE, replacement=True, generator=generator).tolist():
            edit = pick([edit for edit in edits if edit.kind == EDIT_KINDS[kind]], generator)
            pairs.append(Pair(scene, pick(edit.instructions[:-1], generator), edit.scene))
    return pairs[:count]


def captioned_scenes(count: int, split: str = "train") -> list[Pair]:
    """`count` rendered pictures and their captions, for a text-to-picture model: the input is not looked at.

    Every second one is an edited scene, so that all is seen that edits can lead to, an empty place as well.
    """
    scenes = []
    for index in range(count):
        scene, generator = random_scene(split, index), torch.Generator().manual_seed(index)
        kind = pick(sorted({edit.kind for edit in scene.edits()}), generator)
        scenes.append(pick(scene.edits(kind), generator).scene if index % 2 else scene)
    return [Pair(scene, scene.caption(), scene) for scene in scenes]


def folder_pairs(root: Path, split: str = "train", may_be_empty: bool = False) -> list[Pair]:
    """Read the original's layout: seeds.json, and a folder for each prompt with prompt.json and pictures.

    A prompt without surviving pictures has no seeds and is skipped. Raises ValueError naming the missing or
    broken file, or when the split is empty.
    """
    root = Path(root)
    try:
        prompts = json.loads((root / "seeds.json").read_text())
        begin, end = (int(share * len(prompts)) for share in SPLITS[split])
        pairs = []
        for name, seeds in prompts[begin:end]:
            folder = root / name
            edit = json.loads((folder / "prompt.json").read_text())["edit"]
            pairs += [Pair(folder / f"{seed}_0.jpg", edit, folder / f"{seed}_1.jpg") for seed in seeds]
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename}: not found; the original's layout has it") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{root}: seeds.json or a prompt.json is broken ({error!r})") from None
    if not pairs and not may_be_empty:
        raise ValueError(f"{root}: no pairs in its {split} split ({len(prompts)} prompts in all)")
    return pairs


def load_picture(picture: Picture, resolution: int, flip: bool = False) -> Image.Image:
    """A square RGB picture: the short side resized to `resolution` (LANCZOS), the middle kept."""
    if isinstance(picture, Scene):
        image = picture.render(resolution)
    else:
        image = fit(open_image(picture), (resolution, resolution))
    return ImageOps.mirror(image) if flip else image


def stamp(picture: Picture) -> tuple:
    """Tells whether a picture is still the same."""
    if isinstance(picture, Scene):
        return ()
    status = picture.stat()
    return status.st_size, status.st_mtime_ns


@torch.no_grad()
def encode_pairs(
    pairs: list[Pair], vae: VAE, text_encoder: TextEncoder, tokenizer: Tokenizer, resolution: int,
    batch: int = 64,
) -> dict:
    """Encode every distinct picture and sentence once.

    Returns CPU tensors: `moments` (pictures, 2C, h, w) float16, mean and log-variance, unscaled;
    `texts` (sentences, 77, D) float16, the first being the empty text; `rows` (pairs, 3) int64, the numbers
    of each pair's picture before, picture after, and sentence.
    """
    device = vae.quant_conv.weight.device
    pictures, sentences = {}, {"": 0}
    rows = [(pictures.setdefault(pair.before, len(pictures)), pictures.setdefault(pair.after, len(pictures)),
             sentences.setdefault(pair.edit, len(sentences))) for pair in pairs]
    pictures, sentences = list(pictures), list(sentences)
    moments, texts = [], []
    for i in tqdm(range(0, len(pictures), batch), desc="encoding pictures", unit_scale=batch, unit="picture"):
        loaded = [load_picture(picture, resolution) for picture in pictures[i : i + batch]]
        mean, logvar = vae.encode(torch.stack([to_tensor(image) for image in loaded]).to(device))
        moments.append(torch.cat([mean, logvar], 1).half().cpu())                 # (B, 2C, h, w)
    for i in range(0, len(sentences), batch):
        texts.append(text_encoder(tokenizer(sentences[i : i + batch]).to(device)).half().cpu())
    return {"moments": torch.cat(moments), "texts": torch.cat(texts), "rows": torch.tensor(rows)}


def encoded_pairs(
    pairs: list[Pair], cache: Path, vae: VAE, text_encoder: TextEncoder, tokenizer: Tokenizer, resolution: int
) -> dict:
    """`encode_pairs`, kept in <cache>-<digest>.safetensors and used again for the same pairs and encoders.

    Files count as the same while their size and time of change are, scenes while the first looks the same.
    """
    files = {path for pair in pairs for path in (pair.before, pair.after) if isinstance(path, Path)}
    stamps = [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    digest = hashlib.sha256(repr((pairs, resolution, stamps)).encode())
    digest.update(load_picture(pairs[0].before, resolution).tobytes())
    digest.update(tokenizer([pair.edit for pair in pairs[:64]]).numpy().tobytes())
    for network in (vae, text_encoder):
        for tensor in network.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    name = cache.with_name(f"{cache.stem}-{digest.hexdigest()[:12]}.safetensors")
    if not name.exists():
        encoded = encode_pairs(pairs, vae, text_encoder, tokenizer, resolution)
        with replacing(name) as temporary:
            save_file(encoded, temporary)
    return load_file(name)


def order(seed: int, epoch: int, count: int) -> Tensor:
    """The order of an epoch, a function of (seed, epoch) alone, so that resuming changes nothing."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batch_rows(seed: int, step: int, batch: int, count: int) -> Tensor:
    """Which pairs the batch of this step holds: (batch,) int64. Batches run on across the ends of epochs."""
    places = range(step * batch, (step + 1) * batch)
    orders = {epoch: order(seed, epoch, count) for epoch in {place // count for place in places}}
    return torch.stack([orders[place // count][place % count] for place in places])
