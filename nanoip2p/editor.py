"""Picture + instruction -> picture: all of inference on one page.

    from nanoip2p.editor import Editor
    editor = Editor.load("weights/nano-ip2p")
    edited = editor.edit([image], ["make it night"])[0]
"""

import hashlib
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from nanoip2p.diffusion import Plan, plan
from nanoip2p.guidance import guided_denoiser
from nanoip2p.images import fit, fit_size, to_pil, to_tensor
from nanoip2p.pipeline import Model, counted, encode_texts, keep, same_size
from nanoip2p.samplers import SAMPLERS, draw_noise


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
                null_text.expand_as(context), settings["cfg_text"], settings["cfg_image"], low_memory)
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


