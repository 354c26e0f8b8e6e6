"""Caption -> picture: Stable Diffusion (Rombach et al. 2112.10752) with classifier-free guidance.

    from nanoip2p import TextToImage
    painter = TextToImage.load("weights/nano-sd")
    picture = painter.generate("a red house in the middle, on grass, clear day", seed=0)

An editor is fine-tuned from a text-to-image model, and prompt_to_prompt.py uses one to generate the paper's
training pictures. The same seed gives the same pictures as diffusers' StableDiffusionPipeline.

With `images` and `strength`, `generate` runs SDEdit (Meng et al. 2108.01073), the paper's baseline: it adds
noise to the input, up to an intermediate noise level, and denoises the result with the caption of the wanted
picture. A higher strength follows the caption more and the input less.
"""

import torch
from PIL import Image
from tqdm import tqdm

from nanoip2p.diffusion import plan
from nanoip2p.guidance import text_guided_denoiser
from nanoip2p.images import fit, to_tensor
from nanoip2p.pipeline import ARGUMENTS, Callback, Model, as_image, encode_texts, reporting
from nanoip2p.samplers import SAMPLERS, draw_noise


class TextToImage(Model):
    """A Stable Diffusion model. Use `generate`."""

    edits = False
    arguments = ARGUMENTS | {"cfg_text": (float | list[float],)}
    default_weights = "weights/nano-sd"

    @torch.inference_mode()
    def generate(
        self, captions: str | list[str], steps: int | None = None,
        cfg_text: float | list[float] | None = None, seed: int | list[int] | None = None,
        sampler: str | None = None, resolution: int | None = None, negative: str = "", progress: bool = False,
        batch: int = 8, images=None, strength: float | None = None, callback: Callback | None = None,
        deep_every: int = 1,
    ) -> Image.Image | list[Image.Image]:
        """Generate square RGB pictures. Returns a list, or one picture if no argument is a list.

        captions, cfg_text, images: one for all pictures, or a list with one for each. seed: a list, or one
        number (picture i then uses seed + i), or None for a random seed. `last_seed` keeps the seed.
        steps, cfg_text (s_T; 1 means no guidance), sampler, resolution (in pixels): None takes the default of
        the weights. images (see pipeline.as_image), strength (fraction of the steps to take, in (0, 1]):
        SDEdit, as in StableDiffusionImg2ImgPipeline, but from the mode of the VAE's posterior, not a sample.
        negative: the negative prompt. batch: maximum number of pictures in a forward pass.
        callback(step, latents), deep_every: see Editor.edit. Raises ValueError for unusable settings.
        """
        settings = self.fill_defaults(locals())  # all arguments
        if (images is None) != (strength is None):
            raise ValueError("SDEdit needs both images and strength; to generate from captions give neither")
        single, (captions, scales, images, seeds) = self._requests(
            seed, captions=captions, cfg_text=settings["cfg_text"], images=images)
        levels = plan(self.schedule, settings["sampler"], settings["steps"])
        taken = settings["steps"] * (1 if strength is None else strength)
        if not 1 <= taken <= settings["steps"]:
            raise ValueError(f"a strength of {strength} cannot be used: with {settings['steps']} steps, it "
                             f"must be from 1/{settings['steps']} to 1")
        sigmas = levels.sigmas[-int(taken):]  # as in diffusers
        text_states = encode_texts(self.text_encoder, self.tokenizer, [negative, *captions])
        parts = [range(len(captions))[i : i + batch] for i in range(0, len(captions), batch)]
        pictures, side = [], settings["resolution"]
        with tqdm(total=len(sigmas) * len(parts), disable=not progress, unit="step") as bar:
            for part in parts:
                context = torch.stack([text_states[captions[i]] for i in part])        # (B, T, D)
                generators = [torch.Generator().manual_seed(seeds[i]) for i in part]
                denoise = text_guided_denoiser(
                    self.unet, levels, context, text_states[negative].expand_as(context),
                    torch.tensor([scales[i] for i in part]), deep_every)
                noise = draw_noise((len(part), *self.latent_shape(side)), generators).to(context.device)
                x = levels.start_scale * noise                                         # (B, C, h, w)
                if strength is not None:
                    pixels = torch.stack([to_tensor(fit(as_image(images[i]), (side, side))) for i in part])
                    z = self.vae.encode(pixels.to(self.unet.conv_in.weight))[0] * self.vae.scaling_factor
                    x = z.float() + sigmas[0, 0] * noise
                pictures += self.decode(SAMPLERS[settings["sampler"]](
                    reporting(denoise, bar, callback), x, sigmas, generators))
        return pictures[0] if single else pictures
