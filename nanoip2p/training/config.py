"""The settings of a training run: the flags of train.py with their defaults, help texts and ranges."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanoip2p.common.cli import SWITCH, at_least, between, finite, flag, pixels
from nanoip2p.common.schema import checked
from nanoip2p.world.scenes import EDIT_KINDS

DROP = (0.05, 0.05, 0.05)  # probabilities of dropping only the text, both text and image, only the image
PAPER_BATCH = 1024  # samples per optimizer step
PAPER_VISITS = 10_000 * PAPER_BATCH / (0.9 * 313_010)  # steps x batch / training prompts: 36 epochs
# Presets for GPUs set the micro-batch; a step accumulates 1024 samples. "nano": a short, small run
PRESETS = {
    "paper": {"batch_size": 32, "clip": 0.0},  # 8 GPUs with batch size 32 each
    "48gb": {"batch_size": 64},
    "24gb": {"batch_size": 16, "recompute": True, "ema_device": "cpu"},
    "nano": {"resolution": 64, "batch_size": 32, "accumulate": 1, "steps": 600, "lr": 1e-3, "warmup": 50,
             "cooldown": 0.4, "snr_gamma": 1.0, "ema_decay": 0.98, "pairs": 4000, "save_every": 200,
             "sample_every": 200, "validate_every": 50, "log_every": 25},
}
# --distill: the averaged weights compute the target, so they have to follow the student closely
DISTILL = {"ema_decay": 0.95, "ema_device": "same", "lr": 1e-4, "snr_gamma": 0.0}
# Patterns of the names of layers that get a LoRA: attention only, as in diffusers' scripts, or all layers
LAYERS = {"attention": re.compile(r"\.(to_[qkv]|to_out\.0)$"), "all": re.compile("")}
# Settings that may change when a run is resumed
MAY_CHANGE = {
    "steps", "lr", "batch_size", "accumulate", "recompute", "compile", "device", "ema_device", "workers",
    "cache", "skip_bad", "save_every", "keep", "sample_every", "validate_every", "log_every", "tensorboard",
    "out", "resume", "check", "timeout"}
# Not stored: `accumulate` follows from "batch" in state.json; --resume names the folder `out`
NOT_STORED = {"accumulate", "preset", "resume", "check", "out"}
# Limits against absurd values in files. A rendered pair takes 1 kB of memory
MOST_PAIRS, MOST_SAMPLES, MOST_WORKERS, MOST_RANK = 10**7, 2**16, 1000, 1024
NUMBER = re.compile(r"[+-]?\d{1,99}")  # a value of --lora that is a rank; any other value is a file


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. Raises ValueError for incompatible settings."""

    weights: str | None = flag("model to train: a folder, file or name on the Hub", group="data and output")
    vae: str | None = flag("use this autoencoder instead of the checkpoint's: a file or folder")
    tokenizer: str | None = flag("tokenizer of a single-file checkpoint: a folder or Hub name")
    raw_weights: bool | None = flag("use raw weights, not averaged (EMA) ones", action=SWITCH)
    lora: Sequence[str] | None = flag("train a LoRA of this rank instead of all weights; or add this LoRA "
                                      "file to the weights before training (may be repeated)",
                                      action="append", metavar="RANK|FILE[:WEIGHT]")
    lora_layers: str = flag("layers that get the LoRA", "attention", choices=LAYERS)
    data: str | None = flag("pairs: a folder, .jsonl, .csv, .parquet or .tar file; 'scenes' renders pairs")
    pairs: int = flag("number of pairs that --data scenes renders", 20_000, type=at_least(1, MOST_PAIRS))
    kind_weights: Sequence[float] = flag(f"frequencies of edits in --data scenes: {', '.join(EDIT_KINDS)}",
                                        (1.0,) * len(EDIT_KINDS), type=between(0), nargs=len(EDIT_KINDS))
    text_to_image: bool = flag("train a text-to-image model on the captions of --data scenes", False)
    cache: Path | None = flag("encode all pictures and texts once, into this folder", type=Path)
    columns: Sequence[str] | None = flag("column names of --data; not needed for known datasets", nargs=3,
                                         metavar=("INPUT", "EDIT", "OUTPUT"))
    skip_bad: bool = flag("leave out pairs that are missing, broken or unreadable", False)
    out: Path | None = flag("folder of this run", type=Path)
    distill: str | None = flag("instead of --weights: train a student of this editor, for four network calls")
    resume: Path | None = flag("continue the run in this folder, with its settings", type=Path)
    check: bool = flag("only open the data and print the plan", False)

    preset: str | None = flag("a set of defaults for other flags", choices=PRESETS, group="recipe")
    steps: int = flag("number of optimizer steps", 10_000, type=at_least(1))
    batch_size: int = flag("samples per micro-batch on each device", 16, type=at_least(1, MOST_SAMPLES))
    accumulate: int | None = flag("micro-batches per step (default: 1024 samples per step)", type=at_least(1))
    lr: float = flag("learning rate", 1e-4, type=between(0))
    warmup: int = flag("number of warm-up steps of the learning rate", 0, type=at_least(0))
    cooldown: float = flag("last fraction of the steps, where lr falls to 0", 0.0, type=between(0, 1))
    clip: float = flag("clip the gradient to this norm; 0: off, as in the original", 1.0, type=between(0))
    snr_gamma: float = flag("min-SNR weighting of the loss, often 5; 0: off", 0.0, type=between(0))
    drop: Sequence[float] = flag("fractions of samples that lose only the text, both, only the picture",
                                DROP, type=between(0, 1), nargs=3, metavar=("TEXT", "BOTH", "IMAGE"))
    cfg_text: Sequence[float] | None = flag("--distill: range of the teacher's scale s_T (default: from the "
                                            "teacher)", type=finite, nargs=2, metavar=("MIN", "MAX"))
    cfg_image: Sequence[float] | None = flag("--distill: range of the teacher's scale s_I (default: from the "
                                             "teacher)", type=finite, nargs=2, metavar=("MIN", "MAX"))
    ema_decay: float = flag("largest decay of the averaged (EMA) weights", 0.9999, type=between(0, 1))
    resolution: int = flag("width and height in pixels", 256, type=pixels)
    flip: bool | None = flag("mirror half of the pairs (default: on, except for scenes)", action=SWITCH)
    seed: int = flag("seed of all random numbers", 0, type=at_least(0))
    dtype: str | None = flag("dtype of matrix products (default: bf16 if faster)", choices=("fp32", "bf16"))

    device: str | None = flag("cuda, mps or cpu (default: the first that works)", group="running")
    workers: int | None = flag("processes that load data (default: 4 with CUDA, else 0)",
                               type=at_least(0, MOST_WORKERS))
    timeout: float = flag("end all ranks if one of them is silent for so many seconds", 30.0, type=between(1))
    recompute: bool = flag("gradient checkpointing: slower, but needs less memory", False, action=SWITCH)
    ema_device: str = flag("device of the averaged (EMA) weights", "same", choices=("same", "cpu"))
    compile: bool = flag("compile the UNet with torch.compile", False, action=SWITCH)
    log_every: int = flag("steps between logged losses", 50, type=at_least(1))
    validate_every: int = flag("steps between validations; 0: none", 500, type=at_least(0))
    sample_every: int = flag("steps between sample sheets; 0: none", 1000, type=at_least(0))
    save_every: int = flag("steps between checkpoints", 500, type=at_least(1))
    keep: int = flag("number of checkpoints to keep", 2, type=at_least(1))
    tensorboard: bool = flag("also write the log to <out>/tensorboard", False, action=SWITCH)

    def __post_init__(self):
        if max(self.kind_weights) == 0:
            raise ValueError("--kind-weights are all zero; one of them has to be positive")
        if self.columns and len({*self.columns}) < 3:
            raise ValueError(f"--columns {' '.join(self.columns)}: the names have to differ")
        if sum(self.drop) > 1:
            raise ValueError(f"--drop {' '.join(map(str, self.drop))}: the fractions add up to more than 1")
        ranks = [int(word) for word in self.lora or () if NUMBER.fullmatch(word)]
        if len(ranks) > 1 or not all(1 <= rank <= MOST_RANK for rank in ranks):
            raise ValueError(f"--lora {' '.join(map(str, ranks))}: give one rank, from 1 to {MOST_RANK}")
        for name, (low, high) in (("text", self.cfg_text or (0, 0)), ("image", self.cfg_image or (0, 0))):
            if low > high:
                raise ValueError(f"--cfg-{name} {low} {high}: give the smallest scale first")
        if self.distill and (self.snr_gamma or self.ema_device == "cpu"):
            raise ValueError("--distill needs the averaged weights on the training device, and has no SNR "
                             "weights: leave out --ema-device cpu and --snr-gamma")
        if self.text_to_image and self.data != "scenes":
            raise ValueError("--text-to-image needs --data scenes; other data has no captions to train on")

    @property
    def rank(self) -> int:
        """The rank of the LoRA to train. 0: train all weights."""
        return max([int(word) for word in self.lora or () if NUMBER.fullmatch(word)], default=0)

    @property
    def lora_files(self) -> list[str]:
        """The LoRA files to add to the weights before training: "FILE" or "FILE:weight"."""
        return [word for word in self.lora or () if not NUMBER.fullmatch(word)]

    def to_json(self) -> dict:
        """The settings that a checkpoint stores. The path of the cache is relative to the run."""
        cache = self.cache and os.path.relpath(self.cache, self.out)
        return {key: value for key, value in vars(self).items() if key not in NOT_STORED} | {"cache": cache}

    @classmethod
    def as_flags(cls, settings: dict) -> list[str]:
        """The flags for settings that `to_json` made, so that the parser checks them.

        Raises ValueError for an unknown setting, unless it is None, False, 0 or empty.
        """
        fields, argv = cls.__dataclass_fields__, []
        known = fields.keys() - NOT_STORED | {"out"}  # older runs stored `out`
        if unknown := {key: value for key, value in settings.items() if key not in known and value}:
            raise ValueError(f"the run was begun by another version of train.py, with {unknown}")
        for key in sorted(settings.keys() & known):
            value, name = settings[key], f"--{key.replace('_', '-')}"
            if isinstance(value, list) and "nargs" in fields[key].metadata:
                kind = str if key == "columns" else float
                items = [str(item) for item in checked(value, list[kind], name)]
                if kind is str and any(item.startswith("-") for item in items):  # argparse sees a flag
                    raise ValueError(f"{name} should not begin with a dash")
                argv += [name, *items]
            elif key == "lora":
                argv += [f"{name}={item}" for item in checked(value or [], list[str], name)]
            elif isinstance(value, bool) and value != fields[key].default:
                argv.append(name if value else name.replace("--", "--no-", 1))
            elif value is not None and not isinstance(value, bool):
                argv.append(f"{name}={value}")
        return argv


def odd_settings(config: TrainConfig, batch: int, items: int) -> list[str]:
    """Warnings about unusual settings, one sentence each. batch: samples per step. items: number of items."""
    visits, steps = config.steps * batch / items, math.ceil(PAPER_VISITS * items / batch)
    notes = {
        f"{visits:,.0f} epochs; the paper trained for {PAPER_VISITS:.0f}, which is --steps {steps} here":
            visits > 10 * PAPER_VISITS,
        "the run is shorter than one epoch": visits < 1,
        f"a step of {batch} samples is longer than an epoch of {items} items": batch > items,
        f"--warmup {config.warmup} is longer than the run": config.warmup > config.steps,
        "there is no checkpoint before the end of the run": config.save_every >= config.steps >= 100}
    return [note for note, applies in notes.items() if applies]
