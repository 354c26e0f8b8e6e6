"""Caption -> picture: Stable Diffusion (Rombach et al. 2112.10752) with ordinary guidance.

    from nanoip2p.text_to_image import TextToImage
    painter = TextToImage.load("weights/nano-sd")
    picture = painter.generate(["a red house in the middle, on grass, clear day"])[0]

This is what editors are trained from, and what the paper's training pictures are made with
(prompt_to_prompt.py). At equal seed its pictures are those of diffusers' StableDiffusionPipeline.
"""

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nanoip2p.diffusion import plan
from nanoip2p.guidance import text_guided_denoiser
from nanoip2p.images import to_pil
from nanoip2p.pipeline import Model, counted, encode_texts
from nanoip2p.samplers import SAMPLERS, draw_noise


class TextToImage(Model):
    """`generate` does the work."""

    edits = False

    def complete(self, settings: dict) -> dict:
        """As Model's, and ValueError for steps and a resolution that cannot be used."""
        settings = super().complete(settings)
        if settings["resolution"] < 1 or settings["resolution"] % self.multiple:
            raise ValueError(f"a resolution of {settings['resolution']} does not suit these weights; take a "
                             f"multiple of {self.multiple}")
        plan(self.schedule, settings["sampler"], settings["steps"])
        return settings

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of a square picture's latents."""
        side = resolution // self.vae.downsampling
        return self.unet.config.out_channels, side, side

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Scaled latents (B, C, h, w) -> B pictures."""
        pixels = self.vae.decode((latents / self.vae.scaling_factor).to(self.unet.conv_in.weight.dtype))
        return [to_pil(picture) for picture in pixels]

    @torch.inference_mode()
    def generate(
        self, captions: list[str], steps: int | None = None, cfg_text: float | list[float] | None = None,
        seed: int | list[int] = 0, sampler: str | None = None, resolution: int | None = None,
        negative: str = "", progress: bool = False, batch: int = 8, reuse: bool = True,
    ) -> list[Image.Image]:
        """Paint each caption as a square RGB picture of `resolution` pixels.

        None takes the default of the weights. cfg_text: s_T, 1 for no guidance; one number, or one for each
        picture. seed: one for each picture, or one number, and picture i has seed + i. negative: what to
        steer away from, in place of no text. Up to `batch` pictures share a forward. reuse: see guidance.py.
        ValueError for settings that cannot be used.
        """
        settings = self.complete({"steps": steps, "cfg_text": cfg_text, "sampler": sampler,
                                  "resolution": resolution})
        seeds = [seed + i for i in range(len(captions))] if isinstance(seed, int) else seed
        cfgs = settings["cfg_text"]
        cfgs = cfgs if isinstance(cfgs, list) else [cfgs] * len(captions)
        if not len(captions) == len(seeds) == len(cfgs):
            raise ValueError(f"{len(captions)} captions, {len(seeds)} seeds, {len(cfgs)} values of cfg_text: "
                             "give one seed (and cfg_text) for each caption")
        noise_levels = plan(self.schedule, settings["sampler"], settings["steps"])
        text_states = encode_texts(
            self.text_encoder, self.tokenizer, [negative, *captions], self.kept_texts)
        parts = [range(len(captions))[i : i + batch] for i in range(0, len(captions), batch)]
        pictures = []
        with tqdm(total=settings["steps"] * len(parts), disable=not progress, unit="step") as bar:
            for part in parts:
                context = torch.stack([text_states[captions[i]] for i in part])        # (B, T, D)
                generators = [torch.Generator().manual_seed(seeds[i]) for i in part]
                denoise = text_guided_denoiser(
                    self.unet, noise_levels.timestep_of(context.device), context,
                    text_states[negative].expand_as(context), torch.tensor([cfgs[i] for i in part]))
                noise = draw_noise((len(part), *self.latent_shape(settings["resolution"])), generators)
                z = SAMPLERS[settings["sampler"]](
                    counted(denoise, bar), noise_levels.start_scale * noise.to(context.device),
                    noise_levels.sigmas, generators)
                pictures += self.decode(z)
        return pictures
