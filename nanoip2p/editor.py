"""Picture + instruction -> edited picture: the whole of inference."""

from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from nanoip2p.diffusion import plan
from nanoip2p.guidance import guided_denoiser
from nanoip2p.images import fit, fit_size, to_tensor
from nanoip2p.masks import fit_mask, keep_outside, paste
from nanoip2p.pipeline import Callback, Model, as_image, encode_texts, reporting, same_size
from nanoip2p.samplers import SAMPLERS, draw_noise


class Editor(Model):
    """An InstructPix2Pix model. Use `edit`."""

    @torch.inference_mode()
    def edit(
        self, images, instructions: str | list[str], steps: int | None = None, cfg_text: float | None = None,
        cfg_image: float | None = None, seed: int | list[int] | None = None, sampler: str | None = None,
        resolution: int | None = None, negative: str = "", low_memory: bool = False, progress: bool = False,
        batch: int = 8, callback: Callback | None = None, deep_every: int = 1, masks=None,
        mask_blur: float = 0,
    ) -> Image.Image | list[Image.Image]:
        """Edit pictures by instruction. Returns RGB pictures: a list, or one if no argument is a list.

        images: one or a list, see pipeline.as_image. `images.fit_size` computes the size of the result.
        instructions: one for all pictures, or a list with one for each picture.
        seed: a list with one number for each picture, or one number (picture i then uses seed + i), or None
        for a random seed. `last_seed` keeps the seed. Device and batch do not change the noise of a picture.

        steps, cfg_text and cfg_image (s_T and s_I of the paper's equation 3), sampler and resolution (the
        approximate longer side, in pixels): None takes the default of the weights.
        negative: the negative prompt. batch: maximum number of pictures, of one size, in a forward pass.
        low_memory: compute the guidance branches one by one, keep one network on the device at a time, and
        encode and decode large pictures in tiles.
        callback(step, latents): called at each step of a batch; step restarts at 0 for each batch. latents
        (B, C, h, w) are the current estimate of the edited pictures; `decode` turns them into pictures.
        deep_every, mask_blur: see make_denoiser and paste. masks: where to edit, one or a list; see fit_mask.
        Raises ValueError for settings, pictures or types that cannot be used.
        """
        settings = self.fill_defaults(locals())  # all arguments
        levels = plan(self.schedule, settings["sampler"], settings["steps"])
        single, (images, instructions, masks, seeds) = self._requests(
            seed, images=images, instructions=instructions, masks=masks)
        keys = [id(image) for image in images]  # open and encode each picture only once
        opened = {key: as_image(image) for key, image in dict(zip(keys, images)).items()}
        fitted = {key: fit(image, fit_size(*image.size, settings["resolution"], self.multiple))
                  for key, image in opened.items()}                                     # size (W, H)
        masks = [fit_mask(mask, opened[key], fitted[key].size) for key, mask in zip(keys, masks)]
        for network in (self.unet, self.vae) if low_memory else ():
            network.to("cpu")
        with self.on_device(self.text_encoder, low_memory):
            text_states = encode_texts(self.text_encoder, self.tokenizer, [negative, *instructions])
        groups, z_images, edited = same_size([fitted[key].size for key in keys], batch), {}, {}
        with tqdm(total=settings["steps"] * len(groups), disable=not progress, unit="step") as bar:
            for group in groups:
                z_image = self.encode([keys[i] for i in group], fitted, z_images, low_memory)
                context = torch.stack([text_states[instructions[i]] for i in group])    # (B, T, D)
                generators = [torch.Generator().manual_seed(seeds[i]) for i in group]
                x = levels.start_scale * draw_noise(z_image.shape, generators).to(self.device)
                with self.on_device(self.unet, low_memory):
                    denoise = guided_denoiser(
                        self.unet, levels, z_image, context, text_states[negative].expand_as(context),
                        settings["cfg_text"], settings["cfg_image"], low_memory, deep_every)
                    z_kept = z_image * self.vae.scaling_factor
                    denoise, x = keep_outside(denoise, x, z_kept, [masks[i] for i in group])
                    sampler = SAMPLERS[settings["sampler"]]
                    z = sampler(reporting(denoise, bar, callback), x, levels.sigmas, generators)
                with self.on_device(self.vae, low_memory):
                    edited |= zip(group, self.decode(z, low_memory))
        edited = [paste(edited[i], fitted[key], mask, mask_blur) if mask else edited[i]
                  for i, (key, mask) in enumerate(zip(keys, masks))]
        return edited[0] if single else edited

    def encode(self, keys: list[int], images: dict, known: dict, low_memory: bool) -> Tensor:
        """VAE posterior modes of images[key], (B, C, h, w), unscaled. Encodes the keys that `known` lacks."""
        if new := [key for key in dict.fromkeys(keys) if key not in known]:
            x = torch.stack([to_tensor(images[key]) for key in new]).to(self.unet.conv_in.weight.dtype)
            with self.on_device(self.vae, low_memory):
                encode = self.vae.encode_low_memory if low_memory else lambda x: self.vae.encode(x)[0]
                known |= zip(new, encode(x.to(self.device)))                            # (C, h, w) each
        return torch.stack([known[key] for key in keys])

    @contextmanager
    def on_device(self, network: nn.Module, low_memory: bool):
        """Move the network to the device for a `with` block. low_memory: then move it back to the CPU."""
        if next(network.parameters()).device != self.device:  # `to` takes milliseconds: it visits each weight
            network.to(self.device)
        try:
            yield
        finally:
            if low_memory:
                network.to("cpu")
