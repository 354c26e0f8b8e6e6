"""Caption -> picture: Stable Diffusion (Rombach et al. 2112.10752) with ordinary guidance.

    from nanoip2p import TextToImage
    painter = TextToImage.load("weights/nano-sd")
    picture = painter.generate("a red house in the middle, on grass, clear day", seed=0)

With `images` and `strength` it is SDEdit (Meng et al. 2108.01073), the paper's baseline: the input gets part
of the noise and is denoised with the caption of the wanted picture.
"""

import torch
from PIL import Image
from tqdm import tqdm

from nanoip2p.diffusion import plan
from nanoip2p.guidance import text_guided_denoiser
from nanoip2p.images import fit, to_tensor
from nanoip2p.pipeline import Callback, Model, as_image, encode_texts, reporting
from nanoip2p.samplers import SAMPLERS, draw_noise


class TextToImage(Model):
    """A Stable Diffusion model: `generate` does the work."""

    edits = False
    default_weights = "weights/nano-sd"

    def complete(self, settings: dict) -> dict:
        """As Model.complete. ValueError also for steps and a resolution that cannot be used."""
        settings = super().complete(settings)
        if settings["resolution"] < 1 or settings["resolution"] % self.multiple:
            raise ValueError(f"resolution {settings['resolution']} is no multiple of {self.multiple}")
        plan(self.schedule, settings["sampler"], settings["steps"])
        return settings

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of a square picture's latents."""
        side = resolution // self.vae.downsampling
        return self.unet.config.out_channels, side, side

    @torch.inference_mode()
    def generate(
        self, captions: str | list[str], steps: int | None = None,
        cfg_text: float | list[float] | None = None, seed: int | list[int] | None = None,
        sampler: str | None = None, resolution: int | None = None, negative: str = "", progress: bool = False,
        batch: int = 8, images=None, strength: float | None = None, callback: Callback | None = None,
    ) -> Image.Image | list[Image.Image]:
        """Paint each caption as a square RGB picture. Single values give one picture, a list gives a list.

        captions, cfg_text (s_T; 1 is no guidance), images: one for all pictures, or a list. Up to `batch`
        pictures share a forward. images (see pipeline.as_image) and strength, the share of the steps to take,
        in (0, 1], are for SDEdit; z_0 is the mode of the VAE's posterior, where diffusers draws a sample.
        See Editor.edit for the other arguments. ValueError for settings that cannot be used.
        """
        settings = self.complete({"steps": steps, "cfg_text": cfg_text, "sampler": sampler,
                                  "resolution": resolution})
        if (images is None) != (strength is None):
            raise ValueError("SDEdit needs both images and strength; to paint from captions give neither")
        single, (captions, scales, images, seeds) = self._requests(
            seed, captions=captions, cfg_text=settings["cfg_text"], images=images)
        levels = plan(self.schedule, settings["sampler"], settings["steps"])
        sigmas = levels.sigmas[-steps_taken(settings["steps"], 1 if strength is None else strength):]
        text_states = encode_texts(self.text_encoder, self.tokenizer, [negative, *captions])
        parts = [range(len(captions))[i : i + batch] for i in range(0, len(captions), batch)]
        pictures = []
        with tqdm(total=len(sigmas) * len(parts), disable=not progress, unit="step") as bar:
            for part in parts:
                context = torch.stack([text_states[captions[i]] for i in part])        # (B, T, D)
                generators = [torch.Generator().manual_seed(seeds[i]) for i in part]
                denoise = text_guided_denoiser(
                    self.unet, levels.timestep_of(context.device), context,
                    text_states[negative].expand_as(context), torch.tensor([float(scales[i]) for i in part]))
                noise = draw_noise((len(part), *self.latent_shape(settings["resolution"])), generators)
                x = levels.start_scale * noise.to(context.device)                      # (B, C, h, w)
                if strength is not None:
                    square = (settings["resolution"], settings["resolution"])
                    pixels = torch.stack([to_tensor(fit(as_image(images[i]), square)) for i in part])
                    z = self.vae.encode(pixels.to(self.unet.conv_in.weight))[0] * self.vae.scaling_factor
                    x = z.float() + sigmas[0, 0] * noise.to(context.device)
                pictures += self.decode(SAMPLERS[settings["sampler"]](
                    reporting(denoise, bar, callback), x, sigmas, generators))
        return pictures[0] if single else pictures


def steps_taken(steps: int, strength: float) -> int:
    """The number of steps that SDEdit takes, as in diffusers. ValueError for none, or more than all."""
    taken = int(steps * strength)
    if taken < 1 or strength > 1:
        raise ValueError(f"strength {strength} of {steps} steps: take at least one step and at most all")
    return taken
