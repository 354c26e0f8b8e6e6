"""Picture + instruction -> picture: all of inference on one page.

    from nanoip2p import Editor
    editor = Editor.load("weights/nano-ip2p")
    edited = editor.edit("house.png", "make it night", seed=0)
"""

from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from nanoip2p.diffusion import Plan, plan
from nanoip2p.guidance import guided_denoiser
from nanoip2p.images import fit, fit_size, to_tensor
from nanoip2p.pipeline import Callback, Model, as_image, encode_texts, reporting, same_size
from nanoip2p.samplers import SAMPLERS, draw_noise


class Editor(Model):
    """An InstructPix2Pix model: `edit` does the work."""

    @torch.inference_mode()
    def edit(
        self, images, instructions: str | list[str], steps: int | None = None, cfg_text: float | None = None,
        cfg_image: float | None = None, seed: int | list[int] | None = None, sampler: str | None = None,
        resolution: int | None = None, negative: str = "", low_memory: bool = False, progress: bool = False,
        batch: int = 8, callback: Callback | None = None,
    ) -> Image.Image | list[Image.Image]:
        """Edit pictures as the instructions say. Single values give one RGB picture, a list gives a list.

        images: one or a list. A picture is a path, an image of PIL, an array (H, W, 3) or a tensor
        (3, H, W) of uint8 or of floats in [0, 1]. The result has the size it was edited at (images.fit_size).
        instructions: one for all pictures, or a list of as many.
        seed: a list has one for each picture; with a number, picture i has seed + i; None draws a random one,
        which `last_seed` keeps. The device and the other pictures of a call do not change a picture.

        None takes the default of the weights for steps, cfg_text and cfg_image (s_T and s_I of the paper's
        equation 3), sampler and resolution (about the longer side, in pixels).
        negative: what to steer away from, instead of the empty text. batch: how many pictures of one size
        share a forward. low_memory: compute the branches of guidance one by one, keep one network on the
        device at a time, and encode and decode large pictures in tiles.
        callback(step, latents) is called at each step of each batch. step counts from 0; latents (B, C, h, w)
        are the current estimate of the edited pictures, which `decode` makes visible.
        ValueError for settings, pictures and types that cannot be used.
        """
        settings = self.complete({"steps": steps, "cfg_text": cfg_text, "cfg_image": cfg_image,
                                  "sampler": sampler, "resolution": resolution})
        noise_levels = plan(self.schedule, settings["sampler"], settings["steps"])
        single, (images, instructions, seeds) = self._requests(seed, images=images, instructions=instructions)
        keys = [id(image) for image in images]  # a picture that is edited many times is encoded once
        pixels = {key: self._to_pixels(image, settings["resolution"])
                  for key, image in dict(zip(keys, images)).items()}                    # (3, H, W) each
        for network in (self.unet, self.vae) if low_memory else ():
            network.to("cpu")
        with self._on_device(self.text_encoder, low_memory):
            text_states = encode_texts(self.text_encoder, self.tokenizer, [negative, *instructions])
        groups, z_images, edited = same_size([pixels[key].shape for key in keys], batch), {}, {}
        with tqdm(total=settings["steps"] * len(groups), disable=not progress, unit="step") as bar:
            for group in groups:
                new = [key for key in dict.fromkeys(keys[i] for i in group) if key not in z_images]
                if new:
                    z_images |= zip(new, self._encode(torch.stack([pixels[key] for key in new]), low_memory))
                z = self._denoise(
                    torch.stack([z_images[keys[i]] for i in group]),
                    torch.stack([text_states[instructions[i]] for i in group]), text_states[negative],
                    [torch.Generator().manual_seed(seeds[i]) for i in group], noise_levels, settings,
                    low_memory, bar, callback)
                with self._on_device(self.vae, low_memory):
                    edited |= zip(group, self.decode(z, low_memory))
        return edited[0] if single else [edited[i] for i in range(len(images))]

    def _to_pixels(self, image, resolution: int) -> Tensor:
        """A picture -> (3, H, W) in [-1, 1], at the size to edit."""
        image = as_image(image)
        return to_tensor(fit(image, fit_size(*image.size, resolution, self.multiple)))

    def _encode(self, pixels: Tensor, low_memory: bool) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> z_image (B, C, h, w): the posterior's mode, not scaled."""
        x = pixels.to(self.device, self.unet.conv_in.weight.dtype)
        with self._on_device(self.vae, low_memory):
            return self.vae.encode_small(x) if low_memory else self.vae.encode(x)[0]

    def _denoise(self, z_image: Tensor, context: Tensor, null_text: Tensor, generators: list[torch.Generator],
                 noise_levels: Plan, settings: dict, low_memory: bool, bar: tqdm,
                 callback: Callback | None) -> Tensor:
        """z_image (B, C, h, w), context (B, T, D), null_text (T, D) -> scaled latents (B, C, h, w)."""
        start = noise_levels.start_scale * draw_noise(z_image.shape, generators).to(self.device)
        with self._on_device(self.unet, low_memory):
            denoise = guided_denoiser(
                self.unet, noise_levels.timestep_of(z_image.device), z_image, context,
                null_text.expand_as(context), settings["cfg_text"], settings["cfg_image"], low_memory)
            return SAMPLERS[settings["sampler"]](
                reporting(denoise, bar, callback), start, noise_levels.sigmas, generators)

    @contextmanager
    def _on_device(self, network: nn.Module, low_memory: bool):
        """Have the network on the device in this block; with low_memory, it goes back to the CPU after it."""
        network.to(self.device)
        try:
            yield
        finally:
            network.to("cpu" if low_memory else self.device)
