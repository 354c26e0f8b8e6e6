"""Two captions -> two pictures that differ only by the edit: Prompt-to-Prompt, without attention maps.

    python -m nanoip2p.prompt_to_prompt "a cat on a sofa" "a dog on a sofa" --weights <Stable Diffusion 1.x>

Both captions are painted in one batch, from the same noise. In the first share p of the steps the edited
picture does not attend by itself but takes over the source's attention maps A = softmax(q k^T / sqrt(d))
(Hertz et al. 2208.01626, section 3.1). All they do to A can be done to q, k or v, on either side of the
ordinary fused attention A(q, k) v, so that no map is ever formed:

    self-attention (algorithm 1)    A_src v_edit = A(q_src, k_src) v_edit: the edit needs no q and no k, and
                                    with v = [v_src | v_edit] the source's own A serves both
    replace, word swap (3.2)        (A_src M) v_edit = A_src (M v_edit), with M (77, 77) from alignment.py
    refine, added words (3.2)       a_j says whether token j takes over a map, and A* = A_src M diag(a) +
                                    A_edit diag(1 - a); A* v = A_src (M diag(a) v) + A_edit (diag(1 - a) v)
    reweight by c (3.2)             (A* diag(c)) v = A* (diag(c) v)
    windows of time (3.2)           a is 0 for a word outside its window
    local blend (3.2, "local")      how much a word w is attended to is A 1_w: one more column of values

Modes: "self" takes over self-attention in every layer and in both halves of guidance, which is what
InstructPix2Pix's own code does (section 3.1.2 of its paper, with p drawn anew for each picture); "cross"
takes over text attention where there is a caption, and "both" is Hertz et al.'s whole method, which adds
self-attention in layers of at most 16 x 16 positions (of 64 x 64 latents). "none": two plain runs.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nanoip2p.alignment import find_words, token_map
from nanoip2p.diffusion import plan
from nanoip2p.injection import Injection
from nanoip2p.pipeline import encode_texts
from nanoip2p.samplers import SAMPLERS, draw_noise
from nanoip2p.text_to_image import TextToImage
from nanoip2p.unet import DOWN_TYPES, UNetConfig

MODES = ("self", "cross", "both", "none")
BLEND_THRESHOLD, BLEND_FROM = 0.3, 0.2  # of the hottest spot; share of the steps: the authors' values


class PairPainter:
    """Paints pairs for one source caption and one edited caption."""

    def __init__(
        self, painter: TextToImage, source: str, edit: str, inject: str = "self", steps: int | None = None,
        sampler: str | None = None, resolution: int | None = None, negative: str = "",
        reweight: dict[str, float] | None = None, windows: dict[str, tuple[float, float]] | None = None,
        blend: tuple[str, str] | None = None,
    ):
        """Encode the texts, once. inject: one of MODES. None takes the default of the weights.

        For "cross" and "both", reweight {word of `edit`: factor} strengthens words, and windows {word of
        `edit`: (from, to)}, in shares of the steps, say when a word takes over maps instead of until p.
        blend (word of `source`, word of `edit`): change the picture only where these are seen. Raises
        ValueError for words that do not occur and settings that cannot be used.
        """
        if inject not in MODES:
            raise ValueError(f"no way to inject {inject!r}; there are {', '.join(MODES)}")
        if (reweight or windows) and inject not in ("cross", "both"):
            raise ValueError(f"reweighting and windows need injection of cross or both, not {inject}")
        self.painter, self.inject = painter, inject
        self.settings = painter.complete({"steps": steps, "sampler": sampler, "resolution": resolution})
        self.plan = plan(painter.schedule, self.settings["sampler"], self.settings["steps"])
        if blend and (inject == "none" or self.settings["sampler"] not in ("euler", "euler_ancestral")):
            raise ValueError("a local blend needs injection, and the sampler euler or euler_ancestral")
        with torch.inference_mode():
            states = encode_texts(painter.text_encoder, painter.tokenizer, [source, edit, negative])
        self.captions, self.negative = (source, edit), negative
        self.source, self.edit, self.null = (states[text] for text in (source, edit, negative))  # (T, D)
        rows = painter.tokenizer([source, edit]).tolist()
        self.mapping, self.taken = token_map(*rows, painter.tokenizer.end)      # (T, T), (T,)
        self.weights = torch.ones(len(self.taken))                              # (T,)
        for word, factor in (reweight or {}).items():
            self.weights[find_words(painter.tokenizer, edit, word)] = factor
        self.windows = [(find_words(painter.tokenizer, edit, word), *window)
                        for word, window in (windows or {}).items()]
        self.blend = blend and self._columns([find_words(painter.tokenizer, text, word)]
                                             for text, word in zip((source, edit), blend))
        config = painter.unet.config
        # Until they meet the text, rows differ by it only where "both" injects in what has a caption
        self.alike = inject != "both" or any(
            DOWN_TYPES[name] for name in config.down_block_types[: coarse_level(config)])
        _, *size = painter.latent_shape(self.settings["resolution"])
        factor = 2 ** coarse_level(config)
        self.coarse = [-(-side // factor) for side in size]  # 16 x 16 for 64 x 64 latents in SD 1.x

    def _columns(self, places) -> list[Tensor]:
        """For source and edit, lists of token places -> a column of ones at each: (T, W) each."""
        columns = []
        for lists in places:
            columns.append(torch.zeros(len(self.taken), len(lists)))
            for column, tokens in enumerate(lists):
                columns[-1][tokens, column] = 1
        return columns

    @torch.inference_mode()
    def paint(self, seeds: list[int], shares: list[float], cfg_text: list[float],
              bar: tqdm | None = None) -> list[tuple[Image.Image, Image.Image]]:
        """A pair (source, edited) of pictures for each seed, all in one batch.

        shares: p of each pair; injection lasts while step / (steps - 1) < p. bar moves on at each step.
        """
        if self.inject == "none":
            source, edit = (self.painter.generate(
                [caption] * len(seeds), cfg_text=cfg_text, seed=seeds, negative=self.negative,
                batch=len(seeds), **self.settings) for caption in self.captions)
            return list(zip(source, edit))
        latents, _ = self.sample(seeds, shares, cfg_text, self.blend, bar)
        edit, source = (self.painter.decode(half) for half in latents.chunk(2))
        return list(zip(source, edit))

    @torch.inference_mode()
    def sample(self, seeds: list[int], shares: list[float], cfg_text: list[float],
               words: list[Tensor] | None = None, bar: tqdm | None = None,
               reuse: bool = True) -> tuple[Tensor, Tensor | None]:
        """Latents (2 B, C, h, w) of B pairs, [edits | sources], and how much `words` were attended to.

        words: columns (T, W) for the source and the edited caption; their heat (2 B, W, h', w') is a sum over
        steps and over the layers of the coarse level. B = len(seeds), in the order of seeds. Without reuse,
        every row and step computes all of its own, to the same result.
        """
        device, pairs = self.null.device, len(seeds)
        order = sorted(range(pairs), key=lambda j: -shares[j])  # those that inject longest come first
        seeds, shares, cfg_text = ([given[j] for j in order] for given in (seeds, shares, cfg_text))
        # Rows of the batch: edit or source, pair, with caption or without; of what injects, the first ones
        axis, layout = (2, (2, pairs, 2)) if self.inject == "self" else (1, (2, 2, pairs))
        text = torch.stack([self.edit, self.null, self.source, self.null]).unflatten(0, (2, 2))
        text = text.unsqueeze(3 - axis).expand(*layout, -1, -1).flatten(0, 2)     # (4 B, T, D)
        z_rows = torch.arange(2 * pairs, device=device).view(2, pairs)
        z_rows = z_rows.unsqueeze(axis).expand(layout).flatten()                  # (4 B,)
        alike = reuse and self.alike
        told, heat = self.plan.timestep_of(device), []
        step_of = {sigma: step for step, sigma in enumerate(told)}
        if reuse:
            text = self.painter.unet.project_context(text, z_rows if alike else None)
            told = self.painter.unet.project_timesteps(told)
        guidance = torch.tensor(cfg_text * 2, device=device)[:, None, None, None]
        columns = words and torch.stack(words[::-1]).repeat_interleave(2 * pairs, dim=0).to(device)

        @cache
        def injection_at(*stage) -> Injection | None:
            injection = self.injection(pairs, *stage)
            if columns is None and not injection.self_rows and not injection.cross_rows:
                return None  # an ordinary step, which speed.py can compile
            if reuse:
                injection.values = {layer: injection.edit_values(v) for layer, (_, v) in text.layers.items()}
            return injection

        def denoise(x: Tensor, sigma: float) -> Tensor:
            z = (x / math.sqrt(sigma**2 + 1)).to(self.null.dtype)
            injection = injection_at(*self.stage(step_of[sigma], shares))
            if columns is not None:
                injection.words, injection.word_tokens, injection.heat = columns, math.prod(self.coarse), []
            eps = self.painter.unet(z if alike else z[z_rows], told[sigma], text, injection).float()
            captioned, empty = (e.flatten(0, 1) for e in eps.unflatten(0, layout).unbind(axis))
            if columns is not None:
                heat.append(sum(injection.heat).unflatten(0, layout).select(axis, 0).flatten(0, 1))
            if bar is not None:
                bar.update()
            return x - sigma * (empty + guidance * (captioned - empty))

        generators = [torch.Generator().manual_seed(seed) for seed in seeds * 2]  # both of a pair draw alike
        shape = self.painter.latent_shape(self.settings["resolution"])
        x = self.plan.start_scale * draw_noise((2 * pairs, *shape), generators).to(device)
        sampler = SAMPLERS[self.settings["sampler"]]
        for sigmas in self.plan.sigmas.split(1) if self.blend else [self.plan.sigmas]:
            x = sampler(denoise, x, sigmas, generators)
            if self.blend and len(heat) > BLEND_FROM * len(told):
                x = blend_locally(x, self._as_maps(heat)[:, -1:])
        place = torch.tensor([order.index(j) for j in range(pairs)], device=device)
        place = torch.cat([place, pairs + place])
        return x[place], self._as_maps(heat)[place] if heat else None

    def _as_maps(self, heat: list[Tensor]) -> Tensor:
        return sum(heat).transpose(1, 2).unflatten(2, self.coarse)               # (2 B, W, h', w')

    def stage(self, step: int, shares: list[float]) -> tuple[int, tuple[bool, ...]]:
        """All that changes over the steps: how many pairs inject, and which words' windows are open."""
        progress = step / max(1, self.settings["steps"] - 1)
        open_ = tuple(begin <= progress < end for _, begin, end in self.windows)
        return sum(share > progress for share in shares), open_

    def injection(self, pairs: int, active: int, open_: tuple[bool, ...]) -> Injection:
        """What is injected at a stage; the first `active` of the pairs do so."""
        if self.inject == "self":
            return Injection(4 * pairs, self_rows=2 * active)
        now = torch.zeros(pairs, len(self.taken))                                # (B, T): 1 in a word's time
        now[:active] = 1
        for (tokens, *_), is_open in zip(self.windows, open_):
            now[:, tokens] = float(is_open)
        n = int(now.any(1).sum())
        now, device = now[:n], self.null.device
        from_source = self.mapping * (now * self.taken * self.weights)[:, None]  # (n, T, T)
        own = now * (1 - self.taken) * self.weights + 1 - now                    # (n, T)
        return Injection(
            4 * pairs, active if self.inject == "both" else 0, self_tokens=math.prod(self.coarse),
            cross_rows=n, from_source=from_source.to(device), own=own.to(device) if own.any() else None)


def coarse_level(config: UNetConfig) -> int:
    """The level whose text attention shows where words are: 16 x 16 of 64 x 64, the second from below."""
    last = len(config.block_out_channels) - 1
    return last - 1 if last and DOWN_TYPES[config.down_block_types[last - 1]] else last


def blend_locally(x: Tensor, heat: Tensor) -> Tensor:
    """Latents x (2 B, C, h, w), [edits | sources]: the edits as their sources but where either is hot.

    heat (2 B, 1, h', w'): of the words that the edit is about. As the authors: spread by one position, and
    cut at BLEND_THRESHOLD of the maximum.
    """
    heat = F.interpolate(F.max_pool2d(heat, 3, stride=1, padding=1), size=x.shape[2:])
    hot_edit, hot_source = (heat > BLEND_THRESHOLD * heat.amax((2, 3), keepdim=True)).chunk(2)
    edit, source = x.chunk(2)
    return torch.cat([torch.where(hot_edit | hot_source, edit, source), source])
