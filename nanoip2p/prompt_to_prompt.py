"""Prompt-to-Prompt: two captions -> two pictures that differ only by the edit. No attention map is stored.

    pair_painter = PairPainter(TextToImage.load("weights/nano-sd"), "a red house", "a blue house")
    [(source, edited)] = pair_painter.paint(seeds=[0], shares=[0.5], cfg_text=[3.0])

Both pictures are generated in one batch from the same noise. In the first fraction p of the steps, the edited
picture uses the attention maps A = softmax(q k^T / sqrt(d)) of the source (Hertz et al. 2208.01626, section
3.1). We change the values v, or pick rows of q and k, instead of changing A. So A need not be stored:

    self-attention (algorithm 1)    A_src v_edit = A(q_src, k_src) v_edit: `attention` with map_from
    replace, word swap (3.2)        (A_src M) v_edit = A_src (M v_edit), with M (T, T) from `token_map`
    refine, added words (3.2)       A* = A_src M diag(a) + A_edit diag(1 - a), a_j = 1 if M[:, j] is not 0;
                                    A* v = A_src (M diag(a) v) + A_edit (diag(1 - a) v)
    reweight by c (3.2)             (A* diag(c)) v = A* (diag(c) v)
    time windows (3.2)              a_j = 0 and c_j = 1 outside the time window of token j (default: 0 to p)
    local blend (3.2, "local")      attention to a word, in a second call: A v, v = 1 at its tokens, else 0

Modes: "self" injects self-attention in every layer, in both guidance branches, as InstructPix2Pix's own code
does (section 3.1.2). "cross" injects cross-attention in the branch with caption. "both" is the method of
Hertz et al.: "cross", plus self-attention in the branch with caption, only in layers of at most 16 x 16
positions (for latents of 64 x 64). "none" shares only the noise. Hertz et al. published two notebooks. The
limit of 16 x 16 is from the first (the second has 32 x 32), the delay of the local blend from the second.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nanoip2p.diffusion import plan
from nanoip2p.guidance import make_denoiser
from nanoip2p.pipeline import encode_texts
from nanoip2p.samplers import SAMPLERS, draw_noise
from nanoip2p.text_to_image import TextToImage
from nanoip2p.tokenizer import WORD_END, Tokenizer
from nanoip2p.unet import DOWN_TYPES, Attend, Attention, Context, attend, repeat_rows

MODES = ("self", "cross", "both", "none")
# Local blend: threshold, as a fraction of the heat map's maximum; fraction of the steps before it begins
BLEND_THRESHOLD, BLEND_FROM = 0.3, 0.2


class PairPainter:
    """Generates pairs of pictures from one source caption and one edited caption."""

    def __init__(
        self, painter: TextToImage, source: str, edit: str, inject: str = "self", steps: int | None = None,
        sampler: str | None = None, resolution: int | None = None, negative: str = "",
        reweight: dict[str, float] | None = None, windows: dict[str, tuple[float, float]] | None = None,
        blend: tuple | None = None, deep_every: int = 1, blend_most: float = 1.0,
    ):
        """Encode the texts. inject: one of MODES. Settings that are None take the default of the weights.

        reweight {word of `edit`: factor}, for "cross" and "both": scales the attention to a word, in its
        window. windows {word of `edit`: (from, to)}, for "cross" and "both": in step i, a word uses
        the source's maps if from <= i / (steps - 1) < to, instead of 0 to p. blend (word of `source`, word of
        `edit`), or W lists of token positions for each: change the picture only where attention to a word is
        high. blend_most: see `hot_words`. deep_every: see guidance.make_denoiser; `sample` checks it. Raises
        ValueError for unknown words and other unusable settings.
        """
        if inject not in MODES:
            raise ValueError(f"unknown mode {inject!r} of injection; take one of {', '.join(MODES)}")
        if (reweight or windows) and inject not in ("cross", "both"):
            raise ValueError(f"reweighting and windows need the mode cross or both, not {inject}")
        self.painter, self.inject, self.captions, self.negative = painter, inject, (source, edit), negative
        self.deep_every, self.blend_most = deep_every, blend_most
        given = dict(captions=[source, edit], negative=negative, deep_every=deep_every, steps=steps)
        self.settings = painter.fill_defaults(given | dict(sampler=sampler, resolution=resolution))
        self.plan = plan(painter.schedule, self.settings["sampler"], self.settings["steps"])
        if blend and self.settings["sampler"] not in ("euler", "euler_ancestral"):
            raise ValueError("a local blend needs the sampler euler or euler_ancestral")
        with torch.inference_mode():
            states = encode_texts(painter.text_encoder, painter.tokenizer, [source, edit, negative])
        self.source, self.edit, self.null = (states[text] for text in (source, edit, negative))  # (T, D)
        tokenizer, device = painter.tokenizer, self.null.device
        self.mapping = token_map(*tokenizer([source, edit]).tolist(), tokenizer.end).to(device)  # (T, T)
        self.has_source = self.mapping.any(0).float()                                # (T,)
        self.weights = torch.ones_like(self.has_source)                              # (T,): c of each token
        for word, factor in (reweight or {}).items():
            self.weights[find_words(tokenizer, edit, word)] = factor
        self.windows = [(find_words(tokenizer, edit, word), *window)            # token positions, from, to
                        for word, window in (windows or {}).items()]
        self.blend = blend and [
            self.columns([find_words(tokenizer, text, words)] if isinstance(words, str) else words)
            for text, words in zip((source, edit), blend)]                      # (T, W) each
        # Heat maps use the second lowest level of the UNet (16 x 16 for latents of 64 x 64) if it has
        # cross-attention, else the lowest
        has_text = [DOWN_TYPES[name] for name in painter.unet.config.down_block_types]
        level = len(has_text) - (2 if has_text[:-1] and has_text[-2] else 1)
        self.coarse = [-(-side // 2**level) for side in painter.latent_shape(self.settings["resolution"])[1:]]
        # Both guidance branches are equal before the first cross-attention, so the layers before it run once.
        # Exception: mode "both" may inject self-attention into one of these layers, in one branch only
        self.share_prefix = inject != "both" or any(has_text[:level])

    def columns(self, words: list[list[int]]) -> Tensor:
        """Token positions of each of W words -> (T, W): 1 at the tokens of the word, else 0."""
        columns = torch.zeros(len(self.has_source), len(words), device=self.has_source.device)
        for column, tokens in enumerate(words):
            columns[tokens, column] = 1
        return columns

    @torch.inference_mode()
    def paint(self, seeds: list[int], shares: list[float], cfg_text: list[float],
              bar: tqdm | None = None) -> list[tuple[Image.Image, Image.Image]]:
        """Generate a pair (source, edited) for each seed, all in one batch. cfg_text: s_T of each pair.

        shares: p of each pair; step i injects if i / (steps - 1) < p. bar: advances at each step.
        """
        latents, _ = self.sample(seeds, shares, cfg_text, bar=bar)
        edit, source = (self.painter.decode(half) for half in latents.chunk(2))
        return list(zip(source, edit))

    @torch.inference_mode()
    def sample(self, seeds: list[int], shares: list[float], cfg_text: list[float],
               words: list[Tensor] | None = None, bar: tqdm | None = None) -> tuple[Tensor, Tensor | None]:
        """Latents (2 B, C, h, w) of B pairs, [edits | sources], and heat maps (2 B, W, h', w') or None.

        words: `columns` (T, W) of the source and of the edited caption; the maps of `blend` follow theirs. A
        map is the attention to one word, averaged over heads, summed over steps and layers of size `coarse`.
        """
        if self.blend:
            words = [torch.cat(pair, dim=1) for pair in zip(words, self.blend)] if words else self.blend
        unet, device, pairs = self.painter.unet, self.null.device, len(seeds)
        # B rows each of: edits with caption, sources with caption, edits without, sources without
        text = torch.stack([self.edit, self.source, self.null, self.null])
        rows = torch.arange(2 * pairs, device=device).repeat(2) if self.share_prefix else None
        text = unet.project_context(text.repeat_interleave(pairs, dim=0), rows)            # of (4 B, T, D)
        guidance = torch.tensor(cfg_text * 2, device=device)[:, None, None, None]          # (2 B, 1, 1, 1)
        steps, levels = len(self.plan.timesteps), self.plan.sigmas[:, 0].tolist()
        heat = maps = None
        progress_of = {sigma: step / max(1, steps - 1) for step, sigma in enumerate(levels)}
        if words is not None:
            words = torch.stack(words[::-1]).repeat_interleave(pairs, dim=0)               # (2 B, T, W)
            heat = torch.zeros(2 * pairs, math.prod(self.coarse), words.shape[2], device=device)
            maps = heat.transpose(1, 2).unflatten(2, self.coarse)  # the same memory, as (2 B, W, h', w')

        def attend_at(sigma: float) -> Attend:
            progress = progress_of[sigma]
            if words is None and progress >= max(shares) and not any(
                    begin <= progress < end for _, begin, end in self.windows):
                return attend  # ordinary attention
            active = torch.tensor([progress < p for p in shares], device=device)
            return self.injection(progress, active, words, heat)

        def combine(outputs: list[Tensor]) -> Tensor:
            if bar is not None:
                bar.update()
            return outputs[1] + guidance * (outputs[0] - outputs[1])  # with caption, without caption

        denoise = make_denoiser(unet, self.plan, self.null, [(1 if self.share_prefix else 2, None, text)],
                                combine, attend_at, self.deep_every)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds * 2]  # a pair shares its noise
        shape = self.painter.latent_shape(self.settings["resolution"])
        x = self.plan.start_scale * draw_noise((2 * pairs, *shape), generators).to(device)
        sampler = SAMPLERS[self.settings["sampler"]]
        for step, sigmas in enumerate(self.plan.sigmas.split(1 if self.blend else len(self.plan.sigmas)), 1):
            x = sampler(denoise, x, sigmas, generators)
            if self.blend and step > BLEND_FROM * steps:
                x = blend_locally(x, maps[:, -self.blend[0].shape[1] :], self.blend_most)
        return x, maps

    def injection(self, progress: float, active: Tensor, words: Tensor | None = None,
                  heat: Tensor | None = None) -> "Injection":
        """The injection of one step. progress: step / (steps - 1). active (B,) bool: progress < p."""
        pairs, coarse, both = len(active), math.prod(self.coarse), self.inject == "both"
        injection = Injection(pairs, coarse, words, heat, self_limit=coarse if both else math.inf)
        if self.inject in ("self", "both"):
            rows = torch.arange(4 * pairs, device=active.device, dtype=torch.int32).view(2, 2, pairs)
            rows[: 1 if both else 2, 0] += pairs * active                 # [caption or not, edit or source]
            injection.self_from = rows.flatten()
        if self.inject in ("cross", "both"):
            now = active.float()[:, None].repeat(1, len(self.has_source))            # (B, T): 1 if injected
            for tokens, begin, end in self.windows:
                now[:, tokens] = float(begin <= progress < end)
            scale = now * self.has_source * self.weights                        # (B, T)
            injection.source_weights = self.mapping * scale[:, None]            # (B, T, T)
            injection.own_weights = now * (1 - self.has_source) * self.weights + 1 - now     # (B, T)
        return injection


@dataclass
class Injection:
    """The attention of one step with injection: UNet.forward's `attend`. Rows are ordered as in `sample`."""

    pairs: int                          # B
    coarse: int                         # number of positions in the layers that the heat maps sum over
    words: Tensor | None                # (2 B, T, W): from `PairPainter.columns`
    heat: Tensor | None                 # (2 B, positions, W): heat maps, changed in place
    self_from: Tensor | None = None     # (4 B,) int32: for each row, the row whose self-attention map it uses
    self_limit: float = math.inf        # maximum positions of a layer that injects self-attention
    source_weights: Tensor | None = None  # (B, T, T): M diag(a c), factor of the source's map, for the edits
    own_weights: Tensor | None = None   # (B, T): factor of each token's own map, for the edits with caption

    def __call__(self, layer: Attention, x: Tensor, context: Context) -> Tensor:
        """x (4 B, positions, C), or 2 B rows before the first cross-attention if `share_prefix`."""
        if context is x:
            use = self.self_from is not None and x.shape[1] <= self.self_limit
            return layer.attention(layer.to_q(x), *layer.project(x), layer.heads,
                                   map_from=self.self_from[: len(x)] if use else None)
        q, (k, v) = repeat_rows(layer.to_q(x), context), layer.project(context)
        if self.words is not None and x.shape[1] == self.coarse:
            self.add_heat(layer, q[: 2 * self.pairs], k[: 2 * self.pairs])
        return self.to_text(layer, q, k, v)

    def to_text(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Cross-attention A* v. q (N, positions, C), k and v (N, T, C), N = 4 B or 2 B."""
        if self.source_weights is None:
            return layer.attention(q, k, v, layer.heads)
        edits, rows = v[: self.pairs], torch.arange(len(v), device=v.device, dtype=torch.int32)
        for_source = self.source_weights.to(v.dtype) @ edits                    # (B, T, C)
        v = torch.cat([self.own_weights.to(v.dtype)[..., None] * edits, v[self.pairs :], for_source])
        map_from = torch.cat([rows, rows[self.pairs : 2 * self.pairs]])         # (N + B,)
        h, by_source = layer.attention(q, k, v, layer.heads, map_from=map_from).split([len(q), self.pairs])
        h[: self.pairs] += by_source                                            # (B, positions, C)
        return h

    def add_heat(self, layer: Attention, q: Tensor, k: Tensor) -> None:
        """Add the attention to each word to `heat`, averaged over heads: A times the word's 0/1 column."""
        width = q.shape[2] // layer.heads  # of a head: the maximum number of words in one attention call
        for words, heat in zip(self.words.to(q.dtype).split(width, dim=2), self.heat.split(width, dim=2)):
            columns = F.pad(words, (0, width - words.shape[2])).repeat(1, 1, layer.heads)       # (2 B, T, C)
            maps = self.to_text(layer, q, k, columns).unflatten(2, (layer.heads, width))
            heat += maps.float().mean(2)[..., : words.shape[2]]                         # (2 B, positions, W)


def hot_words(heat: Tensor, most: float = 1.0) -> Tensor:
    """Where each of the heat maps (2 B, W, h', w') is hot: bool, of the same shape.

    As in the authors' code, a 3x3 max-pooling first grows the hot regions. Heat above BLEND_THRESHOLD times
    the map's maximum is hot. A map that is hot in more than the fraction `most` counts as hot nowhere.
    """
    heat = F.max_pool2d(heat, 3, stride=1, padding=1)
    hot = heat > BLEND_THRESHOLD * heat.amax((2, 3), keepdim=True)
    return hot & (hot.float().mean((2, 3), keepdim=True) <= most)


def attended(hot: Tensor, size: tuple[int, int]) -> Tensor:
    """`hot_words` of [edits | sources] -> (B, 1, *size) bool: where any word of either caption is hot."""
    return F.interpolate(torch.stack(hot.chunk(2)).any(0).any(1, keepdim=True).float(), size=size) > 0


def blend_locally(x: Tensor, heat: Tensor, most: float = 1.0) -> Tensor:
    """In x (2 B, C, h, w), [edits | sources], replace each edit by its source where no word is hot.

    heat (2 B, W, h', w'): heat maps of the blend words. An edit without any hot word stays whole.
    """
    change, (edit, source) = attended(hot_words(heat, most), x.shape[2:]), x.chunk(2)
    change |= ~change.any(3, keepdim=True).any(2, keepdim=True)
    return torch.cat([torch.where(change, edit, source), source])


def align(source: list[int], edit: list[int]) -> list[tuple[range, range]]:
    """Align two token sequences. Returns blocks (positions in source, positions in edit).

    A token common to both is a block of one position each. The tokens between common tokens form a block that
    was swapped, added (no source positions) or dropped (no edit positions). The alignment is Needleman-Wunsch
    with 1 for a match and 0 for a gap. It never pairs different tokens: such a pair scores -1, two gaps 0.
    """
    n, m = len(source), len(edit)
    common = [[0] * (m + 1) for _ in range(n + 1)]  # longest common subsequence of source[i:] and edit[j:]
    for i in reversed(range(n)):
        for j in reversed(range(m)):
            common[i][j] = max(common[i + 1][j], common[i][j + 1],
                               common[i + 1][j + 1] + 1 if source[i] == edit[j] else 0)
    blocks, i, j, i_from, j_from = [], 0, 0, 0, 0
    while i < n and j < m:
        if source[i] == edit[j]:
            blocks += [(range(i_from, i), range(j_from, j)), (range(i, i + 1), range(j, j + 1))]
            i, j = i_from, j_from = i + 1, j + 1
        elif common[i + 1][j] >= common[i][j + 1]:
            i += 1
        else:
            j += 1
    blocks.append((range(i_from, n), range(j_from, m)))
    return [block for block in blocks if any(block)]


def token_map(source: list[int], edit: list[int], end: int) -> Tensor:
    """M (T, T) float32. source, edit: the T token ids of each caption, with the end token `end` and padding.

    Column j of M weights the source maps that token j of the edited caption uses. A common token uses the map
    of its source token. An added token has a zero column and keeps its own map (refine). In a swapped block
    (replace) of equal lengths, token i uses the map of source token i. With unequal lengths, each token uses
    the sum of the source maps, divided by the number of edited tokens, so that total attention stays equal.

    Hertz et al.'s code differs in two cases. After a swap of unequal lengths, edited token j uses the map of
    source token j. If the edited caption is shorter, its first padding tokens use the maps of source words.
    """
    mapping = torch.zeros(len(edit), len(edit))
    n_source, n_edit = source.index(end) + 1, edit.index(end) + 1
    for rows, columns in align(source[:n_source], edit[:n_edit]):
        if len(rows) == len(columns):
            mapping[list(rows), list(columns)] = 1
        elif rows and columns:
            mapping[rows.start : rows.stop, columns.start : columns.stop] = 1 / len(columns)
    padding = range(max(n_source, n_edit), len(edit))  # positions that are padding in both captions
    mapping[padding, padding] = 1
    return mapping


def find_words(tokenizer: Tokenizer, text: str, phrase: str) -> list[int]:
    """Token positions of every occurrence of a word or phrase. Raises ValueError if there is none."""
    wanted = [word.lower() for word, _ in split_words(tokenizer, phrase)]
    words = split_words(tokenizer, text)
    found = [i for i in range(len(words))
             if wanted and [word.lower() for word, _ in words[i : i + len(wanted)]] == wanted]
    if not found:
        raise ValueError(f"{phrase!r} is not in {text!r}; name a word of it")
    return [j for i in found for _, tokens in words[i : i + len(wanted)] for j in tokens]


def split_words(tokenizer: Tokenizer, text: str) -> list[tuple[str, list[int]]]:
    """Prepare a text. Returns its words with their token positions. The start token has position 0."""
    text, added = tokenizer.prepare(text), tokenizer.backend.get_added_tokens_decoder()
    encoded = tokenizer.backend.encode(text, add_special_tokens=False)
    words, begin = [], 0
    for i, token in enumerate(encoded.tokens[: tokenizer.length - 2]):
        if token.endswith(WORD_END) or encoded.ids[i] in added:
            word = text[encoded.offsets[begin][0] : encoded.offsets[i][1]]
            words.append((word.strip(), list(range(begin + 1, i + 2))))
            begin = i + 1
    return words
