"""Picture + instruction -> edited picture: the whole of inference.

    from nanoip2p import Editor
    editor = Editor.load("weights/nano-ip2p")
    edited = editor.edit("house.png", "make it night", seed=0)
"""

from contextlib import contextmanager

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from nanoip2p.diffusion import plan
from nanoip2p.guidance import guided_denoiser
from nanoip2p.images import fit, fit_size, to_tensor
from nanoip2p.pipeline import Callback, Model, as_image, encode_texts, reporting, same_size
from nanoip2p.samplers import SAMPLERS, draw_noise


class Editor(Model):
    """An InstructPix2Pix model. Use `edit`."""

    @torch.inference_mode()
    def edit(
        self, images, instructions: str | list[str], steps: int | None = None, cfg_text: float | None = None,
        cfg_image: float | None = None, seed: int | list[int] | None = None, sampler: str | None = None,
        resolution: int | None = None, negative: str = "", low_memory: bool = False, progress: bool = False,
        batch: int = 8, callback: Callback | None = None, deep_every: int = 1,
    ) -> Image.Image | list[Image.Image]:
        """Edit pictures by instruction. Returns a list of RGB pictures, or one if no argument is a list.

        images: one picture or a list. A picture is a path, a PIL image, an array (H, W, 3) or a tensor
        (3, H, W), of uint8 or of floats in [0, 1]. `images.fit_size` computes the size of the result.
        instructions: one for all pictures, or a list with one for each picture.
        seed: a list with one for each picture, or one number (picture i then uses seed + i), or None for a
        random seed. `last_seed` keeps the seed. Device and batch do not change the noise of a picture.

        steps, cfg_text and cfg_image (s_T and s_I of the paper's equation 3), sampler and resolution (the
        approximate longer side, in pixels): None takes the default of the weights.
        negative: the negative prompt. batch: maximum number of pictures, of one size, in a forward pass.
        low_memory: compute the guidance branches one by one, keep one network on the device at a time, and
        encode and decode large pictures in tiles.
        callback(step, latents): called at each step of a batch; step restarts at 0 for each batch. latents
        (B, C, h, w) are the current estimate of the edited pictures; `decode` turns them into pictures.
        deep_every: see make_denoiser. Raises ValueError for settings, pictures or types that cannot be used.
        """
        settings = self.fill_defaults({"steps": steps, "cfg_text": cfg_text, "cfg_image": cfg_image,
                                       "sampler": sampler, "resolution": resolution})
        levels = plan(self.schedule, settings["sampler"], settings["steps"])
        single, (images, instructions, seeds) = self._requests(seed, images=images, instructions=instructions)
        keys, pixels = [id(image) for image in images], {}  # encode each picture only once
        for key, image in dict(zip(keys, images)).items():
            image = as_image(image)
            size = fit_size(*image.size, settings["resolution"], self.multiple)
            pixels[key] = to_tensor(fit(image, size))                                   # (3, H, W)
        for network in (self.unet, self.vae) if low_memory else ():
            network.to("cpu")
        with self._on_device(self.text_encoder, low_memory):
            text_states = encode_texts(self.text_encoder, self.tokenizer, [negative, *instructions])
        groups, z_images, edited = same_size([pixels[key].shape for key in keys], batch), {}, {}
        with tqdm(total=settings["steps"] * len(groups), disable=not progress, unit="step") as bar:
            for group in groups:
                new = [key for key in dict.fromkeys(keys[i] for i in group) if key not in z_images]
                if new:
                    x = torch.stack([pixels[key] for key in new]).to(self.unet.conv_in.weight.dtype)
                    x = x.to(self.device)                                               # (N, 3, H, W)
                    with self._on_device(self.vae, low_memory):  # the mode of the VAE's posterior, unscaled
                        mode = self.vae.encode_low_memory(x) if low_memory else self.vae.encode(x)[0]
                    z_images |= zip(new, mode)
                z_image = torch.stack([z_images[keys[i]] for i in group])               # (B, C, h, w)
                context = torch.stack([text_states[instructions[i]] for i in group])    # (B, T, D)
                generators = [torch.Generator().manual_seed(seeds[i]) for i in group]
                noise = draw_noise(z_image.shape, generators).to(self.device)
                with self._on_device(self.unet, low_memory):
                    denoise = guided_denoiser(
                        self.unet, levels, z_image, context, text_states[negative].expand_as(context),
                        settings["cfg_text"], settings["cfg_image"], low_memory, deep_every)
                    z = SAMPLERS[settings["sampler"]](
                        reporting(denoise, bar, callback), levels.start_scale * noise, levels.sigmas,
                        generators)
                with self._on_device(self.vae, low_memory):
                    edited |= zip(group, self.decode(z, low_memory))
        return edited[0] if single else [edited[i] for i in range(len(images))]

    @contextmanager
    def _on_device(self, network: nn.Module, low_memory: bool):
        """Move the network to the device for a `with` block. low_memory: then move it back to the CPU."""
        if next(network.parameters()).device != self.device:  # `to` takes milliseconds: it visits each weight
            network.to(self.device)
        try:
            yield
        finally:
            if low_memory:
                network.to("cpu")
