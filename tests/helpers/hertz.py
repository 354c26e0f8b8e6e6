"""Prompt-to-Prompt with its attention maps in memory, as Hertz et al. (2208.01626) describe it; for tests.

Only the changes to the maps are written here; the networks are those of diffusers and transformers. A pair
runs as in the authors' code, four rows a forward: [source without text, edit without text, source, edit].
Nothing is imported from nanoip2p, which must give the same results without ever forming a map.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor

SCHEDULERS = {
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "ddim": diffusers.DDIMScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
}
MapEdit = Callable[[Tensor, Tensor], Tensor]  # maps (..., T) of source and edit -> the edit's


def tokens_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text).input_ids  # start and end included, no padding


def places(tokenizer, text: str, word: str) -> list[int]:
    """Where the tokens of a word stand in a text, counted word by word as the authors do."""
    found, place = [], 1
    for candidate in text.split(" "):
        count = len(tokens_of(tokenizer, candidate)) - 2
        found += range(place, place + count) if candidate == word else []
        place += count
    return found


def replacement_mapper(tokenizer, source: str, edit: str) -> Tensor:
    """M (T, T) of a word swap: word i of one caption stands for word i of the other.

    It deviates from the authors' code after a swap that changes the number of tokens: theirs goes on along
    the diagonal, here each later word takes the map of the same word. A token that is padding only in the
    edited caption has an empty column, and keeps its own map.
    """
    length = tokenizer.model_max_length
    mapper = torch.zeros(length, length)
    mapper[0, 0] = 1
    i = j = 1
    pairs = list(zip(source.split(" "), edit.split(" "), strict=True))
    for n, m in [[len(tokens_of(tokenizer, word)) - 2 for word in pair] for pair in pairs] + [[1, 1]]:
        mapper[i : i + n, j : j + m] = torch.eye(n) if n == m else torch.full((n, m), 1 / m)
        i, j = i + n, j + m
    for padding in range(max(i, j), length):
        mapper[padding, padding] = 1
    return mapper


def refinement_mapper(tokenizer, source: str, edit: str) -> tuple[Tensor, Tensor]:
    """The authors' mapper (T,): the source token whose map each token takes; and (T,) alpha, 1 if it does.

    A global alignment (Needleman-Wunsch): 1 for a match, -1 for a mismatch, 0 for a gap, traced from the end.
    Every padding token takes the map at its own position, even if the source has a word there.
    """
    x, y = tokens_of(tokenizer, source), tokens_of(tokenizer, edit)
    length = tokenizer.model_max_length
    score = torch.zeros(len(x) + 1, len(y) + 1)
    for i, a in enumerate(x, 1):
        for j, b in enumerate(y, 1):
            score[i, j] = max(score[i, j - 1], score[i - 1, j], score[i - 1, j - 1] + (1 if a == b else -1))
    mapper, alpha = torch.arange(length), torch.ones(length)
    alpha[: len(y)], i, j = 0, len(x), len(y)
    while i and j:
        if score[i, j] == score[i, j - 1]:
            j -= 1
        elif score[i, j] == score[i - 1, j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            mapper[j], alpha[j] = i, 1
    return mapper, alpha


def replace(tokenizer, source: str, edit: str) -> MapEdit:
    """Section 3.2, word swap."""
    mapper = replacement_mapper(tokenizer, source, edit)
    return lambda base, own: torch.where(mapper.to(base).any(0), torch.einsum(
        "hpw,wn->hpn", base, mapper.to(base)), own)


def refine(tokenizer, source: str, edit: str) -> MapEdit:
    """Section 3.2, adding a phrase. A deviation: padding keeps its own map if the source has a word there."""
    mapper, alpha = refinement_mapper(tokenizer, source, edit)
    alpha[len(tokens_of(tokenizer, edit)) : len(tokens_of(tokenizer, source))] = 0
    return lambda base, own: torch.where(alpha.to(base) > 0, base[..., mapper.to(base.device)], own)


@dataclass
class Control:
    """What happens to the maps of one pair, and the maps of words noted down."""

    mode: str                           # "self", "cross", "both", or "none"
    p: float                            # the share of the steps in which it happens
    steps: int
    coarse: int                         # positions of the 16 x 16 layers (of 64 x 64 latents)
    edit_text: MapEdit | None = None
    equalizer: Tensor | None = None     # (T,)
    windows: list[tuple[list[int], float, float]] = field(default_factory=list)
    blend: tuple[list[int], list[int]] | None = None    # tokens of the source's word and of the edit's
    threshold: float = 0.3              # of the hottest spot
    step: int = 0
    maps: Tensor | float = 0            # (2, positions, T) of source and edit, summed over steps and layers

    def alpha_words(self, length: int) -> Tensor:
        """(T,): 1 for the tokens that take over a map at this step."""
        share = self.step / max(1, self.steps - 1)
        alpha = torch.full((length,), float(share < self.p))
        for tokens, begin, end in self.windows:
            alpha[tokens] = 1.0 if begin <= share < end else 0.0
        return alpha

    def __call__(self, maps: Tensor, is_text: bool) -> Tensor:
        """Maps (4, heads, positions, keys), edited in place."""
        positions, keys = maps.shape[2:]
        if not is_text:
            if self.step / max(1, self.steps - 1) < self.p:
                if self.mode == "self":
                    maps[1], maps[3] = maps[0], maps[2]
                elif self.mode == "both" and positions <= self.coarse:
                    maps[3] = maps[2]
            return maps
        if self.mode in ("cross", "both"):
            base, own = maps[2], maps[3]
            new = self.edit_text(base, own)
            if self.equalizer is not None:
                new = new * self.equalizer.to(new)
            alpha = self.alpha_words(keys).to(new)
            maps[3] = new * alpha + own * (1 - alpha)
        if positions == self.coarse:
            self.maps = self.maps + maps[2:].mean(1)
        return maps

    def after_step(self, latents: Tensor) -> Tensor:
        """Local blend of latents (2, C, h, w), [source, edit]."""
        self.step += 1
        if self.blend is None or self.step <= int(0.2 * self.steps):
            return latents
        side = round(self.coarse**0.5)
        heat = torch.stack([maps[:, tokens].sum(1) for maps, tokens in zip(self.maps, self.blend)])
        heat = F.max_pool2d(heat.reshape(2, 1, side, side), kernel_size=3, stride=1, padding=1)
        heat = F.interpolate(heat, size=latents.shape[2:])
        mask = heat / heat.amax(dim=(2, 3), keepdim=True) > self.threshold
        mask = (mask[:1] | mask[1:]).to(latents)
        return latents[:1] + mask * (latents - latents[:1])


class Processor:
    """diffusers' attention, spelled out, with its map handed to a Control."""

    def __init__(self, control: Control):
        self.control = control

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (projection.unflatten(2, (attn.heads, -1)).transpose(1, 2) for projection in (
            attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        maps = (torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5).softmax(dim=-1)
        maps = self.control(maps, is_text=encoder_hidden_states is not None)
        return attn.to_out[0]((maps @ v).transpose(1, 2).flatten(2))


def open_scheduler(folder, sampler: str):
    """Another scheduler than that of the folder, with its settings."""
    saved = diffusers.EulerAncestralDiscreteScheduler.from_pretrained(folder / "scheduler")
    return SCHEDULERS[sampler].from_config(saved.config)


def open_peer(folder, sampler: str) -> diffusers.StableDiffusionPipeline:
    peer = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    peer.scheduler = open_scheduler(folder, sampler)
    peer.set_progress_bar_config(disable=True)
    return peer


def text_states(peer, texts: list[str]) -> Tensor:
    ids = peer.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return peer.text_encoder(ids.to(peer.device))[0]


@torch.no_grad()
def sample(peer, source: str, edit: str, seed: int, cfg_text: float, resolution: int, control: Control,
           negative: str = "") -> Tensor:
    """Latents (2, C, h, w), [source, edit], of one pair."""
    peer.unet.set_attn_processor(Processor(control))
    context = text_states(peer, [negative, negative, source, edit])
    scheduler, side = peer.scheduler, resolution // peer.vae_scale_factor
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]  # the two draw the same noise
    noise = [torch.randn(1, peer.unet.config.in_channels, side, side, generator=g) for g in generators]
    scheduler.set_timesteps(control.steps, device=peer.device)
    latents = torch.cat(noise).to(peer.device) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        four = scheduler.scale_model_input(torch.cat([latents, latents]), t)
        without, with_text = peer.unet(four, t, encoder_hidden_states=context).sample.chunk(2)
        eps = without + cfg_text * (with_text - without)
        latents = control.after_step(scheduler.step(eps, t, latents, generator=generators).prev_sample)
    return latents


def pictures(peer, latents: Tensor) -> list:
    with torch.no_grad():
        decoded = peer.vae.decode(latents / peer.vae.config.scaling_factor).sample
    return peer.image_processor.postprocess(decoded, output_type="pil")
