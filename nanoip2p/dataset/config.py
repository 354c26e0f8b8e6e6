"""The settings of `captions` and `pairs`: flags of make_dataset.py with their defaults, help and ranges."""

from dataclasses import dataclass

from nanoip2p.checkpoint import hub
from nanoip2p.common.cli import MODES, SAMPLERS, at_least, between, finite, flag, pixels
from nanoip2p.common.schema import checked


@dataclass(frozen=True)
class Settings:
    """How to ask a language model."""

    model: str = flag("model to ask; ft:... is a model that `finetune` made", "gpt-4o-mini",
                      group="asking a language model")
    temperature: float = flag("sampling temperature", 0.7, type=finite)
    concurrency: int = flag("number of concurrent requests", 8, type=at_least(1))
    moderate: bool = flag("apply OpenAI's moderation to captions and answers, as the original does", False)
    max_tokens: int | None = flag("limit on the input plus output tokens of this run", type=at_least(0))
    timeout: int = flag("seconds to wait for a complete answer of the server", 120, type=at_least(1))


@dataclass(frozen=True)
class PairSettings:
    """How to make and choose pairs, as in the original's generate_img_dataset.py. ValueError if invalid."""

    n_samples: int = flag("number of candidates", 100, type=at_least(1), group="candidates of each prompt")
    early_stop: int = flag("stop after N passing candidates; 0: never", 0, type=at_least(0), metavar="N")
    inject: str = flag("attention maps that the edited picture takes from the source", "self", choices=MODES)
    blend: str = flag("auto: change pixels only where the attention to the differing words is high",
                      "none", choices=("none", "auto"))
    min_p2p: float = flag("minimum of p, the share of the steps with injection", 0.1, type=finite)
    max_p2p: float = flag("maximum of p", 0.9, type=finite)
    min_cfg: float = flag("minimum scale of the text guidance", 7.5, type=finite)
    max_cfg: float = flag("maximum scale of the text guidance", 15.0, type=finite)
    steps: int | None = flag("denoising steps (default: from the weights)", type=at_least(1))
    sampler: str | None = flag("sampler (default: from the weights)", choices=SAMPLERS)
    resolution: int | None = flag("width and height in pixels (default: from the weights)", type=pixels)
    deep_every: int = flag("compute the whole UNet only every N-th step", 1, type=at_least(1), metavar="N")
    seed: int = flag("seed of all random numbers", 0, type=at_least(0))
    clip_threshold: float = flag("minimum similarity of each caption and its picture", 0.2, type=finite,
                                 group="the CLIP filter")
    clip_dir_threshold: float = flag("minimum directional similarity", 0.2, type=finite)
    clip_img_threshold: float = flag("minimum similarity of the two pictures", 0.7, type=finite)
    leakage_threshold: float | None = flag("maximum leakage: change outside the region of the differing "
                                           "words / change inside (default: no limit)", type=between(0))
    max_out_samples: int = flag("maximum number of pairs to keep per prompt", 4, type=at_least(1))
    clip: str = flag("folder of the CLIP model, or its name on the Hub", hub.CLIP)
    batch: int = flag("candidates in one batch", 8, type=at_least(1), group="running")

    def __post_init__(self):
        for key in ("n_samples", "max_out_samples", "batch", "steps", "resolution", "deep_every"):
            checked(getattr(self, key), int | None, key, 1)
        for key in ("early_stop", "seed"):
            checked(getattr(self, key), int, key, 0)
        checked(self.leakage_threshold, float | None, "leakage_threshold", 0)
        for key, known in (("inject", MODES), ("blend", ("none", "auto")), ("sampler", SAMPLERS)):
            if getattr(self, key) not in (None, *known):
                raise ValueError(f"{key} = {getattr(self, key)} should be one of {', '.join(known)}")
        if self.blend == "auto" and self.sampler not in (None, "euler", "euler_ancestral"):
            raise ValueError(f"sampler = {self.sampler}: --blend auto needs euler or euler_ancestral; or use "
                             "--blend none")
        if not 0 <= self.min_p2p <= self.max_p2p <= 1:
            raise ValueError(f"min_p2p = {self.min_p2p}, max_p2p = {self.max_p2p}: 0 <= min_p2p <= max_p2p "
                             "<= 1 is needed")
        if self.min_cfg > self.max_cfg:
            raise ValueError(f"min_cfg = {self.min_cfg} is more than max_cfg = {self.max_cfg}")
