"""Two captions -> two pictures that differ only by the edit: Prompt-to-Prompt, without attention maps.

    pair_painter = PairPainter(TextToImage.load("weights/nano-sd"), "a red house", "a blue house")
    [(source, edited)] = pair_painter.paint(seeds=[0], shares=[0.5], cfg_text=[3.0])

Both captions are painted in one batch, from the same noise. In the first share p of the steps the edited
picture takes the attention maps A = softmax(q k^T / sqrt(d)) of the source (Hertz et al. 2208.01626, section
3.1). Every change of A is made to the values, or to the rows of q and k, so that no map is ever stored:

    self-attention (algorithm 1)    A_src v_edit = A(q_src, k_src) v_edit: `attention` with map_from
    replace, word swap (3.2)        (A_src M) v_edit = A_src (M v_edit), with M (T, T) from `token_map`
    refine, added words (3.2)       A* = A_src M diag(a) + A_edit diag(1 - a), a_j = 1 if token j takes a map;
                                    A* v = A_src (M diag(a) v) + A_edit (diag(1 - a) v)
    reweight by c (3.2)             (A* diag(c)) v = A* (diag(c) v)
    time windows (3.2)              a is 0 for a word outside its window
    local blend (3.2, "local")      the attention to a word w is A 1_w: one more column of values

Modes: "self" injects self-attention in every layer, with and without caption, as InstructPix2Pix's own code
does (section 3.1.2). "cross" injects text attention in the rows with a caption. "both" is Hertz et al.'s
method: "cross", and self-attention of the rows with a caption in layers of at most 16 x 16 positions (of
64 x 64 latents). "none": two separate runs.
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
from nanoip2p.unet import DOWN_TYPES, Attention, Context, repeat_rows

MODES = ("self", "cross", "both", "none")
# The local blend cuts at this share of the maximum, and starts after this share of the steps
BLEND_THRESHOLD, BLEND_FROM = 0.3, 0.2


class PairPainter:
    """Paints pairs for one source caption and one edited caption."""

    def __init__(
        self, painter: TextToImage, source: str, edit: str, inject: str = "self", steps: int | None = None,
        sampler: str | None = None, resolution: int | None = None, negative: str = "",
        reweight: dict[str, float] | None = None, windows: dict[str, tuple[float, float]] | None = None,
        blend: tuple[str, str] | None = None,
    ):
        """Encode the texts. inject: one of MODES. None takes the default of the weights.

        With "cross" and "both", reweight {word of `edit`: factor} scales the attention to words, and windows
        {word of `edit`: (from, to)} gives the shares of the steps between which a word takes maps, instead of
        0 to p. blend (word of `source`, word of `edit`): change the picture only where one of the two is
        attended to. ValueError for words that do not occur and settings that cannot be used.
        """
        if inject not in MODES:
            raise ValueError(f"no way to inject {inject!r}; there are {', '.join(MODES)}")
        if (reweight or windows) and inject not in ("cross", "both"):
            raise ValueError(f"reweighting and windows need injection of cross or both, not {inject}")
        self.painter, self.inject, self.captions, self.negative = painter, inject, (source, edit), negative
        self.settings = painter.complete({"steps": steps, "sampler": sampler, "resolution": resolution})
        self.plan = plan(painter.schedule, self.settings["sampler"], self.settings["steps"])
        if blend and (inject == "none" or self.settings["sampler"] not in ("euler", "euler_ancestral")):
            raise ValueError("a local blend needs injection, and the sampler euler or euler_ancestral")
        with torch.inference_mode():
            states = encode_texts(painter.text_encoder, painter.tokenizer, [source, edit, negative])
        self.source, self.edit, self.null = (states[text] for text in (source, edit, negative))  # (T, D)
        tokenizer, device = painter.tokenizer, self.null.device
        self.mapping = token_map(*tokenizer([source, edit]).tolist(), tokenizer.end).to(device)  # (T, T)
        self.taken = self.mapping.any(0).float()                                # (T,)
        self.weights = torch.ones_like(self.taken)                              # (T,): c of each token
        for word, factor in (reweight or {}).items():
            self.weights[find_words(tokenizer, edit, word)] = factor
        self.windows = [(self.columns([find_words(tokenizer, edit, word)])[:, 0] > 0, *window)
                        for word, window in (windows or {}).items()]            # (T,) bool, from, to
        self.blend = blend and [self.columns([find_words(tokenizer, text, word)])
                                for text, word in zip((source, edit), blend)]   # (T, 1) each
        # The coarse level shows where words are: the second from below, 16 x 16 for 64 x 64 latents
        has_text = [DOWN_TYPES[name] for name in painter.unet.config.down_block_types]
        level = len(has_text) - (2 if has_text[:-1] and has_text[-2] else 1)
        self.coarse = [-(-side // 2**level) for side in painter.latent_shape(self.settings["resolution"])[1:]]
        # Rows that differ only by their text can be one row until the first text attention, unless
        # self-attention before it is injected in the rows with a caption only
        self.share_prefix = inject != "both" or any(has_text[:level])

    def columns(self, words: list[list[int]]) -> Tensor:
        """Token positions of each of W words -> (T, W), with ones at the tokens of a word."""
        columns = torch.zeros(len(self.taken), len(words), device=self.taken.device)
        for column, tokens in enumerate(words):
            columns[tokens, column] = 1
        return columns

    @torch.inference_mode()
    def paint(self, seeds: list[int], shares: list[float], cfg_text: list[float],
              bar: tqdm | None = None) -> list[tuple[Image.Image, Image.Image]]:
        """Paint a pair (source, edited) for each seed, all in one batch.

        shares: p of each pair; injection lasts while step / (steps - 1) < p. bar: advances at each step.
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
               words: list[Tensor] | None = None, bar: tqdm | None = None) -> tuple[Tensor, Tensor | None]:
        """Latents (2 B, C, h, w) of B pairs, [edits | sources], and the heat maps of `words`.

        words: `columns` (T, W) of the source and of the edited caption. Their heat maps (2 B, W, h', w') are
        attention maps, summed over the steps and over the layers of the coarse level, averaged over heads.
        """
        unet, device, pairs = self.painter.unet, self.null.device, len(seeds)
        # Rows: edits with caption, sources with caption, edits without, sources without; B of each
        text = torch.stack([self.edit, self.source, self.null, self.null])
        rows = torch.arange(2 * pairs, device=device).repeat(2) if self.share_prefix else None
        text = unet.project_context(text.repeat_interleave(pairs, dim=0), rows)            # of (4 B, T, D)
        guidance = torch.tensor(cfg_text * 2, device=device)[:, None, None, None]
        steps, timestep_of, heat = len(self.plan.timesteps), self.plan.timestep_of(device), None
        progress_of = {sigma: step / max(1, steps - 1) for step, sigma in enumerate(timestep_of)}
        if words is not None:
            words = torch.stack(words[::-1]).repeat_interleave(pairs, dim=0)               # (2 B, T, W)
            heat = torch.zeros(2 * pairs, math.prod(self.coarse), words.shape[2], device=device)

        def inject(sigma: float) -> Injection | None:
            progress = progress_of[sigma]
            if words is None and progress >= max(shares) and not any(
                    begin <= progress < end for _, begin, end in self.windows):
                return None  # an ordinary step, which speed/fast.py can compile
            active = torch.tensor([progress < p for p in shares], device=device)
            return self.injection(progress, active, words, heat)

        def combine(eps: list[Tensor]) -> Tensor:
            if bar is not None:
                bar.update()
            return eps[1] + guidance * (eps[0] - eps[1])  # with caption, without

        denoise = make_denoiser(unet, timestep_of, self.null.dtype,
                                [(1 if self.share_prefix else 2, None, text)], combine, inject)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds * 2]  # a pair shares its noise
        shape = self.painter.latent_shape(self.settings["resolution"])
        x = self.plan.start_scale * draw_noise((2 * pairs, *shape), generators).to(device)
        sampler = SAMPLERS[self.settings["sampler"]]
        for step, sigmas in enumerate(self.plan.sigmas.split(1 if self.blend else len(self.plan.sigmas)), 1):
            x = sampler(denoise, x, sigmas, generators)
            if self.blend and step > BLEND_FROM * steps:
                x = blend_locally(x, heat.transpose(1, 2).unflatten(2, self.coarse)[:, -1:])
        return x, None if heat is None else heat.transpose(1, 2).unflatten(2, self.coarse)

    def injection(self, progress: float, active: Tensor, words: Tensor | None = None,
                  heat: Tensor | None = None) -> "Injection":
        """The injection after a share `progress` of the steps. active (B,): the pairs with progress < p."""
        pairs, coarse, both = len(active), math.prod(self.coarse), self.inject == "both"
        injection = Injection(pairs, coarse, words, heat, self_limit=coarse if both else math.inf)
        if self.inject in ("self", "both"):
            rows = torch.arange(4 * pairs, device=active.device, dtype=torch.int32).view(2, 2, pairs)
            rows[: 1 if both else 2, 0] += pairs * active                       # [caption or not, edit]
            injection.self_from = rows.flatten()
        if self.inject in ("cross", "both"):
            now = active.float()[:, None].repeat(1, len(self.taken))            # (B, T): 1 if a token takes
            for tokens, begin, end in self.windows:
                now = torch.where(tokens, float(begin <= progress < end), now)
            injection.from_source = self.mapping * (now * self.taken * self.weights)[:, None]  # (B, T, T)
            injection.own = now * (1 - self.taken) * self.weights + 1 - now     # (B, T)
        return injection


@dataclass
class Injection:
    """Attention in one step with injection: UNet.forward's `inject`. The rows are those of `sample`."""

    pairs: int                          # B
    coarse: int                         # positions of the layers whose attention to words is added to heat
    words: Tensor | None                # (2 B, T, W): these words
    heat: Tensor | None                 # (2 B, positions, W), changed in place
    self_from: Tensor | None = None     # (4 B,) int32: the row whose self-attention map each row takes
    self_limit: float = math.inf        # in layers of at most so many positions
    from_source: Tensor | None = None   # (B, T, T): M diag(a c), for the edits with caption
    own: Tensor | None = None           # (B, T): how much of its own map each of their tokens keeps

    def __call__(self, layer: Attention, x: Tensor, context: Context) -> Tensor:
        """x (4 B, positions, C); 2 B rows before the first text attention, if the rows share a prefix."""
        if context is x:
            use = self.self_from is not None and x.shape[1] <= self.self_limit
            return layer.attention(layer.to_q(x), *layer.project(x), layer.heads,
                                   map_from=self.self_from[: len(x)] if use else None)
        q, (k, v) = repeat_rows(layer.to_q(x), context), layer.project(context)
        if self.words is not None and x.shape[1] == self.coarse:
            self.add_heat(layer, q[: 2 * self.pairs], k[: 2 * self.pairs])
        return self.to_text(layer, q, k, v)

    def to_text(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A* v, with q (N, positions, C), k and v (N, T, C), N = 4 B or 2 B."""
        if self.from_source is None:
            return layer.attention(q, k, v, layer.heads)
        edits, rows = v[: self.pairs], torch.arange(len(v), device=v.device, dtype=torch.int32)
        from_source = self.from_source.to(v.dtype) @ edits                      # (B, T, C)
        v = torch.cat([self.own.to(v.dtype)[..., None] * edits, v[self.pairs :], from_source])
        map_from = torch.cat([rows, rows[self.pairs : 2 * self.pairs]])         # (N + B,)
        h, taken = layer.attention(q, k, v, layer.heads, map_from=map_from).split([len(q), self.pairs])
        h[: self.pairs] += taken
        return h

    def add_heat(self, layer: Attention, q: Tensor, k: Tensor) -> None:
        """Add the attention to each word, a mean over heads: A times the word's column, in every head."""
        width = q.shape[2] // layer.heads  # so many columns fit into a head
        for words, heat in zip(self.words.to(q.dtype).split(width, dim=2), self.heat.split(width, dim=2)):
            columns = F.pad(words, (0, width - words.shape[2])).repeat(1, 1, layer.heads)
            maps = self.to_text(layer, q, k, columns).unflatten(2, (layer.heads, width))
            heat += maps.float().mean(2)[..., : words.shape[2]]


def blend_locally(x: Tensor, heat: Tensor) -> Tensor:
    """Latents x (2 B, C, h, w), [edits | sources]: each edit becomes its source where neither is hot.

    heat (2 B, 1, h', w'): of the words that the edit is about. As in the authors' code, the hot region grows
    by one position in each direction, and ends at BLEND_THRESHOLD of the maximum.
    """
    heat = F.interpolate(F.max_pool2d(heat, 3, stride=1, padding=1), size=x.shape[2:])
    hot_edit, hot_source = (heat > BLEND_THRESHOLD * heat.amax((2, 3), keepdim=True)).chunk(2)
    edit, source = x.chunk(2)
    return torch.cat([torch.where(hot_edit | hot_source, edit, source), source])


def align(source: list[int], edit: list[int]) -> list[tuple[range, range]]:
    """Cut two token sequences into blocks that belong together: (positions in source, positions in edit).

    A common token is a block of one position each. Between common tokens lies a block that was swapped, added
    or dropped; one of its sides may be empty. The alignment is that of Needleman & Wunsch with 1 for a match
    and 0 for a gap. Two different tokens never match: Hertz et al. give them -1, less than two gaps.
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
    """M (T, T), float32, from the T token ids of each caption, `end` and padding included.

    Column j of M holds the source tokens whose maps token j of the edited caption takes. It is zero for an
    added token, which keeps its own map (refine). A common token takes its source's map. In a swapped block
    (replace), equally many tokens take maps one by one; otherwise each takes an equal share of all, so that
    the attention to the block stays the same.

    The authors' code differs twice: after a swap of unequally many tokens its mapper goes on along the
    diagonal, and in a shorter edited caption the first padding tokens take the maps of source words.
    """
    mapping = torch.zeros(len(edit), len(edit))
    n_source, n_edit = source.index(end) + 1, edit.index(end) + 1
    for rows, columns in align(source[:n_source], edit[:n_edit]):
        if len(rows) == len(columns):
            mapping[list(rows), list(columns)] = 1
        elif rows and columns:
            mapping[rows.start : rows.stop, columns.start : columns.stop] = 1 / len(columns)
    padding = range(max(n_source, n_edit), len(edit))  # in both captions
    mapping[padding, padding] = 1
    return mapping


def find_words(tokenizer: Tokenizer, text: str, phrase: str) -> list[int]:
    """Positions of the tokens of a word or phrase, at every occurrence. ValueError if it does not occur."""
    wanted = [word.lower() for word, _ in split_words(tokenizer, phrase)]
    words = split_words(tokenizer, text)
    found = [i for i in range(len(words))
             if wanted and [word.lower() for word, _ in words[i : i + len(wanted)]] == wanted]
    if not found:
        raise ValueError(f"{phrase!r} is not in {text!r}; name a word of it")
    return [j for i in found for _, tokens in words[i : i + len(wanted)] for j in tokens]


def split_words(tokenizer: Tokenizer, text: str) -> list[tuple[str, list[int]]]:
    """The words of a text, each with the positions of its tokens; the start token is at 0."""
    encoded = tokenizer.backend.encode(text, add_special_tokens=False)
    words, begin = [], 0
    for i, token in enumerate(encoded.tokens[: tokenizer.length - 2]):
        if token.endswith(WORD_END):
            word = text[encoded.offsets[begin][0] : encoded.offsets[i][1]]
            words.append((word.strip(), list(range(begin + 1, i + 2))))
            begin = i + 1
    return words
