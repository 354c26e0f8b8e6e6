"""Picture + instruction -> picture: all of inference on one page.

    from nanoip2p.editor import Editor
    editor = Editor.load("weights/nano-ip2p")
    edited = editor.edit([image], ["make it night"])[0]
"""

import hashlib
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from nanoip2p.checkpoint import Checkpoint, load_parts
from nanoip2p.clip import TextEncoder
from nanoip2p.diffusion import NoiseSchedule, Plan, plan
from nanoip2p.guidance import guided_denoiser
from nanoip2p.images import fit, fit_size, to_pil, to_tensor
from nanoip2p.network import fingerprint
from nanoip2p.samplers import SAMPLERS, Denoise, draw_noise
from nanoip2p.tokenizer import Tokenizer
from nanoip2p.unet import UNet
from nanoip2p.vae import VAE

KEPT = 64  # encoded pictures, and texts, that may come again


class Model:
    """What Editor and TextToImage share: networks, tokenizer, schedule, the settings they are made for."""

    edits = True  # whether its UNet is shown a picture

    def __init__(self, unet: UNet, vae: VAE, text_encoder: TextEncoder, tokenizer: Tokenizer,
                 schedule: NoiseSchedule, defaults: dict):
        """All networks on one device and in one dtype. defaults: the keys of checkpoint.PAPER_DEFAULTS."""
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.schedule, self.defaults = schedule, defaults
        self.device = unet.conv_in.weight.device  # where they work; with low_memory, they wait on the CPU
        self.kept_texts: dict[str, Tensor] = {}  # see encode_texts
        self.kept_pictures: dict[bytes, Tensor] = {}  # digest of the pixels -> z_image (C, h, w)

    @classmethod
    def load(cls, weights: str | Path | Checkpoint, device: str | torch.device | None = None,
             dtype: torch.dtype = torch.float32, low_memory: bool = False) -> "Model":
        """weights: see checkpoint.open_checkpoint. device None: see pick_device. ValueError if bad.

        low_memory: an Editor's networks wait on the CPU for `edit` with low_memory.
        """
        device = pick_device(device)
        parts = load_parts(weights, dtype, cls.edits)
        networks = (network.to("cpu" if low_memory else device)
                    for network in (parts.unet, parts.vae, parts.text_encoder))
        model = cls(*networks, parts.tokenizer, parts.schedule, parts.defaults)
        model.device = device
        return model

    @property
    def multiple(self) -> int:
        """Both sides of a picture are multiples of this: 64 in SD 1.5, 8 for the VAE times 8 for the UNet."""
        return self.vae.downsampling * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def fingerprint(self) -> str:
        """What tells whether other weights lie at the same path now."""
        return fingerprint(self.unet, self.vae, self.text_encoder)

    @property
    def side(self) -> int:
        """Of a square picture in the resolution of the weights."""
        resolution = self.defaults["resolution"]
        return fit_size(resolution, resolution, resolution, self.multiple)[0]

    def complete(self, settings: dict) -> dict:
        """`settings` with those of the weights where a value is None. ValueError for an unknown sampler."""
        settings = {key: self.defaults[key] if value is None else value for key, value in settings.items()}
        if settings["sampler"] not in SAMPLERS:
            raise ValueError(f"no sampler {settings['sampler']!r}; there are {', '.join(SAMPLERS)}")
        return settings


class Editor(Model):
    """`edit` does the work."""

    @torch.inference_mode()
    def edit(
        self, images: list[Image.Image], instructions: list[str], steps: int | None = None,
        cfg_text: float | None = None, cfg_image: float | None = None, seed: int | list[int] = 0,
        sampler: str | None = None, resolution: int | None = None, negative: str = "",
        low_memory: bool = False, progress: bool = False, batch: int = 8, reuse: bool = True,
    ) -> list[Image.Image]:
        """Edit images[i] as instructions[i] says; returns one RGB picture for each, in order.

        None takes the default of the weights. cfg_text, cfg_image: s_T and s_I of the paper's equation 3.
        seed: one for each picture, or one number, and picture i has seed + i. One seed makes one picture, on
        any device and whatever else is in the call. resolution: of the longer side, about; the picture comes
        back in the size it was edited at (images.fit_size). negative: what to steer away from, in place of
        no text. Pictures of one size share a forward, up to `batch` of them; low_memory runs the three
        branches of guidance one after another, has one network on the device at a time, and cuts large
        pictures up for the VAE (vae.encode_small). What an earlier call encoded is not encoded again (KEPT).
        reuse: see guidance.guided_denoiser. ValueError for settings or pictures that cannot be used.
        """
        settings = self.complete({"steps": steps, "cfg_text": cfg_text, "cfg_image": cfg_image,
                                  "sampler": sampler, "resolution": resolution})
        seeds = [seed + i for i in range(len(images))] if isinstance(seed, int) else seed
        if not len(images) == len(instructions) == len(seeds):
            raise ValueError(f"{len(images)} images, {len(instructions)} instructions, {len(seeds)} seeds: "
                             "give one instruction (and seed) for each image")

        noise_levels = plan(self.schedule, settings["sampler"], settings["steps"])
        different = {id(image): image for image in images}  # one picture may be edited many times
        pixels = {key: self._to_pixels(image, settings["resolution"]) for key, image in different.items()}
        digests = {key: hashlib.sha256(repr((x.shape, low_memory)).encode() + x.numpy().tobytes()).digest()
                   for key, x in pixels.items()}
        pixels, digests = ([of[id(image)] for image in images] for of in (pixels, digests))  # (3, H, W) each
        for network in (self.unet, self.vae) if low_memory else ():
            network.to("cpu")
        with self._on_device(self.text_encoder, low_memory):
            text_states = encode_texts(
                self.text_encoder, self.tokenizer, [negative, *instructions], self.kept_texts)
        groups, edited = same_size([x.shape for x in pixels], batch), {}
        with tqdm(total=settings["steps"] * len(groups), disable=not progress, unit="step") as bar:
            for group in groups:
                encoded = self._encode({digests[i]: pixels[i] for i in group}, low_memory)
                results = self._edit_same_size(
                    torch.stack([encoded[digests[i]] for i in group]),
                    torch.stack([text_states[instructions[i]] for i in group]), text_states[negative],
                    [torch.Generator().manual_seed(seeds[i]) for i in group], noise_levels, settings,
                    low_memory, reuse, bar)
                edited.update(zip(group, results))
        return [edited[i] for i in range(len(images))]

    def _encode(self, pixels: dict[bytes, Tensor], low_memory: bool) -> dict[bytes, Tensor]:
        """Pixels (3, H, W) in [-1, 1] -> z_image (C, h, w), the posterior's mode, not scaled, by digest."""
        known = {key: self.kept_pictures[key] for key in pixels if key in self.kept_pictures}
        if len(known) < len(pixels):
            new = {key: x for key, x in pixels.items() if key not in known}
            x = torch.stack(list(new.values())).to(self.device, self.unet.conv_in.weight.dtype)
            with self._on_device(self.vae, low_memory):
                known |= zip(new, self.vae.encode_small(x) if low_memory else self.vae.encode(x)[0])
        keep(self.kept_pictures, known)
        return known

    def _edit_same_size(self, z_image: Tensor, context: Tensor, null_text: Tensor,
                        generators: list[torch.Generator], noise_levels: Plan, settings: dict,
                        low_memory: bool, reuse: bool, bar: tqdm) -> list[Image.Image]:
        """z_image (B, C, h, w), context (B, T, D), null_text (T, D), one generator per picture."""
        start = noise_levels.start_scale * draw_noise(z_image.shape, generators).to(self.device)
        with self._on_device(self.unet, low_memory):
            denoise = guided_denoiser(
                self.unet, noise_levels.timestep_of(z_image.device), z_image, context,
                null_text.expand_as(context), settings["cfg_text"], settings["cfg_image"], low_memory, reuse)
            z = SAMPLERS[settings["sampler"]](counted(denoise, bar), start, noise_levels.sigmas, generators)
        with self._on_device(self.vae, low_memory):
            decode = self.vae.decode_small if low_memory else self.vae.decode
            edited = decode((z / self.vae.scaling_factor).to(z_image.dtype))           # (B, 3, H, W)
        return [to_pil(picture) for picture in edited]

    @contextmanager
    def _on_device(self, network: nn.Module, low_memory: bool):
        """With low_memory, it leaves the device again."""
        network.to(self.device)
        try:
            yield
        finally:
            network.to("cpu" if low_memory else self.device)

    def _to_pixels(self, image: Image.Image, resolution: int) -> Tensor:
        """(3, H, W) in [-1, 1], at the size to edit."""
        if image.mode != "RGB":
            raise ValueError(f"a picture in mode {image.mode} is not RGB; open it with images.open_image")
        return to_tensor(fit(image, fit_size(*image.size, resolution, self.multiple)))


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device called `name`, or without one the first of CUDA, MPS and CPU that works here.

    Raises ValueError for a name that torch does not know or this machine does not have.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} does not work here ({reason}); leave it out to pick one") from None


def encode_texts(text_encoder: TextEncoder, tokenizer: Tokenizer, texts: list[str],
                 kept: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Text states (T, D) of each distinct text; the last of them stay in `kept`.

    One forward for each, because the last bits of a sum depend on how many texts share it: the states of a
    text must not depend on its company.
    """
    weight, kept = text_encoder.text_model.final_layer_norm.weight, {} if kept is None else kept
    states = {
        text: kept[text].to(weight) if text in kept else text_encoder(tokenizer([text]).to(weight.device))[0]
        for text in dict.fromkeys(texts)}
    keep(kept, states)
    return states


def keep(kept: dict, used: dict) -> None:
    """Add what was used to what is kept: the KEPT last ones, of those used at once the first ones."""
    for key in reversed(used):
        kept.pop(key, None)
        kept[key] = used[key]
    for key in list(kept)[:-KEPT]:
        del kept[key]


def same_size(sizes: list[tuple[int, ...]], batch: int) -> list[list[int]]:
    """Indices of pictures that can share a forward: of one size, at most `batch` together."""
    by_size = {}
    for i, size in enumerate(sizes):
        by_size.setdefault(size, []).append(i)
    return [group[k : k + batch] for group in by_size.values() for k in range(0, len(group), batch)]


def counted(denoise: Denoise, bar: tqdm) -> Denoise:
    """The same denoiser, moving a progress bar on at each call."""
    def counted(x: Tensor, sigma: float) -> Tensor:
        denoised = denoise(x, sigma)
        bar.update()
        return denoised
    return counted
