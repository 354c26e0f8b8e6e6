"""The networks of a training run and one optimizer step of theirs."""

import argparse
import copy
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from nanoip2p.checkpoint.save import save_parts
from nanoip2p.checkpoint.tensors import DTYPES, read_tensors
from nanoip2p.dataset.layouts import Item, load_picture
from nanoip2p.editor import Editor
from nanoip2p.images import grid
from nanoip2p.objective import encode, learning_rate, loss_weight, model_input, noise_losses
from nanoip2p.pipeline import Model, encode_texts
from nanoip2p.text_to_image import TextToImage
from nanoip2p.training import ranks as parallel
from nanoip2p.training import run_folder as runs
from nanoip2p.training.ranks import Ranks
from nanoip2p.unet import UNet

Column = tuple[Image.Image, str, Image.Image]  # before, edit, after


class Diverged(ValueError):
    """A loss or a gradient was not finite: what was learned since the last checkpoint is in doubt."""


class Trainer:
    """Raw and averaged weights, Adam, and what they are fed with. args: as train.parse has them."""

    def __init__(self, args: argparse.Namespace, parts: Model, ranks: Ranks, items: int):
        """items: how many, which a run keeps. Without --cache, batches are pictures and token ids."""
        self.args, self.parts, self.ranks, self.device = args, parts, ranks, ranks.device
        self.items, self.skipped, self.batch = items, set(), args.batch_size * args.accumulate * ranks.count
        for encoder in (parts.vae, parts.text_encoder):
            encoder.requires_grad_(False)
        [null] = encode_texts(parts.text_encoder, parts.tokenizer, [""]).values()
        if args.cache:
            parts.vae.to("cpu")
            parts.text_encoder.to("cpu")
        fast = self.device.type == "cuda" and not args.fsdp  # fully_shard takes the plain layout only
        layout = torch.channels_last if fast else torch.contiguous_format
        self.unet = parts.unet.to(self.device, memory_format=layout).train()
        average = copy.deepcopy(self.unet).requires_grad_(False).eval()
        self.average = average.to("cpu" if args.ema_device == "cpu" else self.device)
        if args.fsdp:
            parallel.shard(self.unet)
            parallel.shard(self.average)
        self.norm = None  # of the last gradient
        self.optimizer = parallel.make_optimizer(self.unet, args.lr, args.shard_optimizer)
        self.shared = parallel.spread(self.unet, ranks)
        self.forward = torch.compile(self.shared) if args.compile else self.shared
        self.alphas, self.null = parts.schedule.alphas_cumprod().to(self.device), null.to(self.device)

    def losses(self, unet, batch: dict, recompute: bool = False) -> Tensor:
        """Equation 1 for each sample of a batch on the device: (B,)."""
        given = model_input(batch, self.null, self.parts.vae.scaling_factor, self.alphas,
                            self.args.offset_noise, self.args.drop)
        channels, dtype = self.unet.config.in_channels, DTYPES[self.args.dtype]
        return noise_losses(unet, channels, given, batch["timestep"], dtype, recompute)

    def to_device(self, batch: dict, stop: bool = False) -> dict:
        """A batch of `recipe.collate` on the device, encoded.

        ValueError when a picture of it is broken, KeyboardInterrupt to stop; in all processes, if in one.
        """
        said = self.ranks.agree(2 if "error" in batch else int(stop))
        if said == 2:
            raise ValueError(batch.get("error", "another process met a broken picture"))
        if said == 1:
            raise KeyboardInterrupt
        moved = {key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
                 for key, value in batch.items()}
        for reason in set(batch["skipped"]) - self.skipped:
            warnings.warn(f"left out: {reason}", stacklevel=2)
        self.skipped.update(batch["skipped"])
        if self.args.cache:
            return moved
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bf16"):
            moved = encode(moved, self.parts.vae, self.parts.text_encoder)
        return moved | {key: moved[key].float() for key in ("before", "after", "text")}

    def step(self, batches: Iterator[dict], step: int, stop: Callable[[], bool] = bool) -> float:
        """Optimizer step number `step`: gradients of --accumulate micro-batches, Adam, the average.

        Returns this rank's mean loss, unweighted; `lr` and `norm` (of the gradient) are of the last step.
        With the weights untouched, ValueError when a picture is broken, Diverged when a loss is not finite,
        KeyboardInterrupt when `stop` says so, which is asked before each micro-batch.
        """
        args, told, broken = self.args, [], []
        for micro in range(args.accumulate):
            batch = next(batches)
            moved = self.to_device(batch, stop())
            with parallel.gradients_shared(self.shared, now=micro == args.accumulate - 1):
                losses = self.losses(self.forward, moved, args.recompute)
                wait = fetch(losses.detach())
                weighted = losses * loss_weight(moved["timestep"], self.alphas, args.snr_gamma)
                (weighted.mean() / args.accumulate).backward()
            told.append(wait())  # by now the way back is queued, so the device does not idle
            numbers = (~told[-1].isfinite()).nonzero().flatten().tolist()
            broken += [f"{int(batch['number'][i])} ({batch['pair'][i]})" for i in numbers]
        if self.ranks.agree(len(broken)):
            self.check_gradient(step - 1)
            samples = ", ".join(broken[:3]) or "on another process"
            raise Diverged(f"step {step}: not finite is the loss of samples {samples}; look at them, or "
                           "--resume, which goes on from the last checkpoint, with a smaller --lr")
        self.norm = parallel.whole(torch.nn.utils.clip_grad_norm_(self.unet.parameters(), args.clip))
        self.lr = learning_rate(step, args.steps, args.lr, args.warmup, args.cooldown)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        self.optimizer.zero_grad()  # now, so that validation has the room
        self.update_average(step + 1)
        return torch.cat(told).double().mean().item()

    def check_gradient(self, step: int) -> None:
        """Diverged when that of `step`, the last one taken, was not finite: the weights are no longer."""
        if self.norm is not None and not self.norm.isfinite():
            raise Diverged(f"step {step}: the gradient is not finite; --resume goes on from the last "
                           "checkpoint, with a smaller --lr")

    @torch.no_grad()
    def update_average(self, n: int) -> None:
        """Moving average, once per optimizer step n = 1, 2, ..., of decay min(decay, (1+n)/(10+n))."""
        share = 1 - min(self.args.ema_decay, (1 + n) / (10 + n))
        average = [parallel.local(weight) for weight in self.average.parameters()]
        raw = [parallel.local(weight).to(average[0].device) for weight in self.unet.parameters()]
        torch._foreach_lerp_(average, raw, share)

    def averaged_unet(self) -> UNet:
        """The averaged weights as a network that is whole and on the device; every rank has to ask."""
        if self.args.ema_device == "same" and not self.args.fsdp:
            return self.average
        with torch.device("meta"):
            unet = UNet(self.unet.config)
        unet.load_state_dict(parallel.weights_of(self.average), assign=True)
        return unet.to(self.device).eval()

    @torch.no_grad()
    def validate(self, batches: list[dict], step: int) -> dict[str, float]:
        """Mean loss after `step` steps over batches on the device, with raw and with averaged weights."""
        self.check_gradient(step - 1)
        networks = {"validation": self.unet, "validation_ema": self.averaged_unet()}
        found = {name: torch.cat([self.losses(unet, batch) for batch in batches]).double().mean().item()
                 for name, unet in networks.items()}
        parallel.reshard(self.unet)
        return found

    def load(self, checkpoint: Path, step: int) -> None:
        """Go on from a checkpoint of `step` steps."""
        read = {name: read_tensors(checkpoint / f"{name}.safetensors")
                for name in ("unet", "ema", "exp_avg", "exp_avg_sq")}
        parallel.set_weights(self.unet, read["unet"])
        parallel.set_weights(self.average, read["ema"])
        parallel.set_moments(self.optimizer, self.unet, step, read["exp_avg"], read["exp_avg_sq"])

    def save(self, step: int) -> None:
        """Write a checkpoint of `step` steps and the averaged model to <out>/weights; all ranks have to call.

        Diverged, with nothing written, when the last gradient was not finite: the weights are no longer.
        """
        args = self.args
        self.check_gradient(step - 1)
        first = self.ranks.rank == 0
        gather = {"unet": lambda: parallel.weights_of(self.unet, first),
                  "ema": lambda: parallel.weights_of(self.average, first)}
        for moment in ("exp_avg", "exp_avg_sq"):
            gather[moment] = lambda moment=moment: parallel.moments_of(self.optimizer, self.unet, moment)
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
                    if key not in ("start", "accumulate", "resume", "check", "preset")}
        state = {"batch": self.batch, "items": self.items, "settings": settings}
        runs.write_checkpoint(args.out, step, gather, state, args.keep, first)
        self.export()

    def export(self) -> None:
        """Write the averaged model to <out>/weights; all ranks have to call."""
        args, parts, unet = self.args, self.parts, self.averaged_unet()
        if self.ranks.rank == 0:
            save_parts(args.out / "weights", unet, parts.vae, parts.text_encoder, parts.tokenizer_folder,
                       parts.schedule.to_json(), parts.defaults)


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the CPU; what is returned waits for it, but for no later work."""
    if tensor.device.type != "cuda":
        return tensor.cpu
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> Tensor:
        done.synchronize()
        return copied
    return wait


def memory_used(device: torch.device) -> dict[str, float]:
    """The most that was in use so far, in GB: tensors on the GPU, or else this process with all its code."""
    if device.type == "cuda":
        return {"memory_gb": torch.cuda.max_memory_allocated() / 1e9}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"process_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}


def columns_of(items: list[Item], args: argparse.Namespace) -> list[Column]:
    """The first pair of each, with its pictures; with --skip-bad, without those that are broken."""
    columns = []
    for [pair, *_] in items:
        try:
            before, after = (load_picture(picture, args.resolution) for picture in (pair.before, pair.after))
            columns.append((before, pair.edit, after))
        except ValueError:
            if not args.skip_bad:
                raise
    return columns


def sample_grid(parts: Model, unet: UNet, columns: list[Column], resolution: int) -> Image.Image:
    """Pairs as one picture, a column each: the input, the model's answer, the target."""
    device, home = unet.conv_in.weight.device, parts.vae.quant_conv.weight.device
    networks = (unet, parts.vae.to(device), parts.text_encoder.to(device), parts.tokenizer, parts.schedule,
                parts.defaults)
    inputs, texts, targets = map(list, zip(*columns))
    if unet.config.in_channels == unet.config.out_channels:
        painted = TextToImage(*networks).generate(texts, seed=0, resolution=resolution)
        rows, labels = [painted, targets], [texts, ["a true picture"] * len(texts)]
    else:
        edits = Editor(*networks).edit(inputs, texts, seed=0, resolution=resolution)
        rows, labels = [inputs, edits, targets], [["input"] * len(texts), texts, ["target"] * len(texts)]
    for encoder in (parts.vae, parts.text_encoder):
        encoder.to(home)
    return grid(rows, labels)
