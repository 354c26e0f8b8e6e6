"""The trainer: optimizer steps, the moving average of the weights, validation, checkpoints, sample sheets."""

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import nullcontext, suppress

import torch
from PIL import Image
from torch import Tensor, nn

from nanoip2p.checkpoint.lora import file_hash, write_lora
from nanoip2p.checkpoint.save import save_parts
from nanoip2p.checkpoint.tensors import DTYPES, check_tensors, fingerprint, read_tensors
from nanoip2p.common.grids import grid
from nanoip2p.dataset.layouts import Item, load_picture
from nanoip2p.objective import encode, learning_rate, loss_weight, model_input, prediction_losses
from nanoip2p.pipeline import Model, encode_texts
from nanoip2p.training import low_rank
from nanoip2p.training import run_folder as runs
from nanoip2p.training.config import TrainConfig
from nanoip2p.training.distill import STUDENT_DEFAULTS, Teacher, on_grid
from nanoip2p.training.ranks import Ranks
from nanoip2p.training.signals import Stop
from nanoip2p.unet import UNet

Column = tuple[Image.Image, str, Image.Image]  # a column of a sample sheet: input, instruction, target


class Diverged(ValueError):
    """The loss or the gradient is NaN or infinite."""


class Trainer:
    """The trained UNet, the moving average of its weights, AdamW, and the frozen encoders.

    With --lora RANK, most weights of the UNet are frozen. The average and the teacher share these weights,
    and `model` keeps the UNet from which training began, in float32 on the CPU.
    """

    def __init__(self, config: TrainConfig, model: Model, ranks: Ranks, items: int):
        """config: `accumulate` and `dtype` are not None. items: number of items, stored in checkpoints."""
        self.config, self.model, self.ranks, self.device = config, model, ranks, ranks.device
        self.items, self.batch = items, config.batch_size * config.accumulate * ranks.count
        with torch.no_grad():
            [null] = encode_texts(model.text_encoder, model.tokenizer, [""]).values()
        self.place_encoders()
        self.alphas, self.null = model.schedule.alphas_cumprod().to(self.device), null.to(self.device)
        layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        self.unet = model.unet.to(self.device, memory_format=layout).train()
        if config.rank:
            self.unet = low_rank.freeze(self.unet, DTYPES[config.dtype])
            model.unet.to("cpu")
        self.teacher = self.make_teacher() if config.distill else None
        if config.rank:
            conv_in = model.unet.conv_in.weight if low_rank.is_blind(model.unet) else None
            low_rank.attach(self.unet, config.rank, config.lora_layers, config.seed, conv_in)
            self.unet.to(self.device, memory_format=layout)
        self.trained = {name: weight for name, weight in self.unet.named_parameters() if weight.requires_grad}
        self.average = self.twin("cpu" if config.ema_device == "cpu" else self.device)
        self.averages = {name: self.average.get_parameter(name) for name in self.trained}
        self.optimizer = torch.optim.AdamW(self.trained.values(), config.lr, betas=(0.9, 0.999),
                                           weight_decay=0.01, fused=True)
        self.parallel = self.unet if ranks.count == 1 else nn.parallel.DistributedDataParallel(
            self.unet, gradient_as_bucket_view=True)
        self.forward = torch.compile(self.parallel) if config.compile else self.parallel
        self.base = self.base_of()
        # Reasons for skipped pairs, to warn once of each; learning rate and gradient norm of the last step
        self.skipped, self.lr, self.norm = set(), 0.0, 0.0

    def place_encoders(self) -> None:
        """Freeze the encoders, and move them to the device, or to the CPU if a cache replaces them."""
        for encoder in (self.model.vae, self.model.text_encoder):
            encoder.requires_grad_(False).to("cpu" if self.config.cache else self.device)

    def base_of(self) -> str:
        """Hashes of what a resumed run needs but checkpoints lack: frozen weights and the teacher's scales.

        With --lora FILE, hashes the files, because merged weights differ by rounding on other machines.
        """
        if not self.config.rank and not self.teacher:
            return ""
        weights = [file_hash(file) for file in self.config.lora_files] or [fingerprint(self.model.unet)]
        return " ".join([*weights, *([str(self.teacher.scales)] if self.teacher else [])])

    def make_teacher(self) -> Teacher:
        """A frozen copy of the UNet as the teacher. The trained model gets the settings of a student."""
        scales = [given or [self.model.defaults[key]] * 2 for key, given in (
            ("cfg_text", self.config.cfg_text), ("cfg_image", self.config.cfg_image))]
        self.model.defaults = self.model.defaults | STUDENT_DEFAULTS
        return Teacher(self.twin(self.device), self.null, self.alphas, self.model.schedule.prediction_type,
                       *scales, DTYPES[self.config.dtype])

    def twin(self, device: str | torch.device) -> UNet:
        """A copy of the UNet in eval mode. Its trained weights are on `device`; it shares frozen weights."""
        memo = {id(weight): nn.Parameter(weight.detach().to(device, copy=True), False)
                if weight.requires_grad else weight for weight in self.unet.parameters()}
        return copy.deepcopy(self.unet, memo).eval()

    def losses(self, unet: nn.Module, batch: dict, recompute: bool = False) -> Tensor:
        """The losses (B,) of a batch from `to_device`: equation 1 of the paper, or the loss of distill.py."""
        if self.teacher:
            batch = batch | {"timestep": on_grid(batch["timestep"], len(self.alphas))}
        given = model_input(batch, self.null, self.model.vae.scaling_factor, self.alphas,
                            (0, 0, 0) if self.teacher else self.config.drop,
                            self.model.schedule.prediction_type)
        channels, dtype, timestep = self.unet.config.in_channels, DTYPES[self.config.dtype], batch["timestep"]
        if self.teacher:
            return self.teacher.losses(unet, self.average, given["z_in"][:, :channels], timestep,
                                       given["context"], batch["drop"], recompute)
        return prediction_losses(unet, channels, given, timestep, dtype, recompute)

    def to_device(self, batch: dict, stop: bool = False) -> dict:
        """Move a batch of `collate` to the device, and encode its pictures and texts if there is no cache.

        If any rank has a broken picture, all raise ValueError; if any has `stop`, KeyboardInterrupt.
        """
        verdict = self.ranks.largest(2 if "error" in batch else int(stop))
        if verdict == 2:
            raise ValueError(batch.get("error", "another process met a broken picture"))
        if verdict == 1:
            raise KeyboardInterrupt
        for reason in set(batch["skipped"]) - self.skipped:
            warnings.warn(f"left out: {reason}", stacklevel=2)
        self.skipped.update(batch["skipped"])
        batch = {key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
                 for key, value in batch.items()}
        if self.config.cache:
            return batch
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bf16"):
            batch = encode(batch, self.model.vae, self.model.text_encoder)
        return batch | {key: batch[key].float() for key in ("before", "after", "text")}

    def step(self, batches: Iterator[dict], step: int, stop: Stop | None = None) -> float:
        """Take optimizer step number `step` (from 0). Returns this rank's mean loss, without min-SNR weights.

        stop: called before each micro-batch; if True, the step raises KeyboardInterrupt. Also raises
        ValueError for a broken picture, and Diverged. After these errors, the weights are unchanged.
        """
        config, losses, names, stop = self.config, [], [], stop or Stop()
        for micro in range(config.accumulate):
            batch = self.to_device(stop.interruptible(next, batches) or {}, stop())
            exchange = micro == config.accumulate - 1 or self.ranks.count == 1
            with nullcontext() if exchange else self.parallel.no_sync():  # exchange gradients once a step
                loss = self.losses(self.forward, batch, config.recompute)                # (B,)
                weight = loss_weight(batch["timestep"], self.alphas, config.snr_gamma,
                                     self.model.schedule.prediction_type)
                ((loss * weight).mean() / config.accumulate).backward()
            losses.append(loss.detach())
            names += batch["name"]
        losses = torch.cat(losses).cpu()                                                 # (accumulate * B,)
        self.norm = nn.utils.clip_grad_norm_(self.trained.values(), config.clip or math.inf).item()
        bad = [name for name, loss in zip(names, losses.tolist()) if not math.isfinite(loss)]
        if self.ranks.largest(bool(bad) or not math.isfinite(self.norm)):
            found = f"loss of samples {', '.join(bad[:3])}" if bad else "gradient"
            raise Diverged(f"step {step + 1}: the {found} is not finite. Check the pairs, or --resume from "
                           "the last checkpoint with a smaller --lr")
        self.lr = learning_rate(step, config.steps, config.lr, config.warmup, config.cooldown)
        self.optimizer.param_groups[0]["lr"] = self.lr
        self.optimizer.step()
        self.optimizer.zero_grad()  # free the gradients' memory for validation
        self.update_average(step + 1)
        return losses.double().mean().item()

    @torch.no_grad()
    def update_average(self, n: int) -> None:
        """After optimizer step n = 1, 2, ...: update the average with decay min(ema_decay, (1+n)/(10+n))."""
        share = 1 - min(self.config.ema_decay, (1 + n) / (10 + n))
        raw = [weight.to(self.averages[name].device) for name, weight in self.trained.items()]
        torch._foreach_lerp_(list(self.averages.values()), raw, share)

    def averaged_unet(self) -> UNet:
        """The UNet with the averaged weights, on the training device."""
        memo = {id(weight): weight.to(self.device) for weight in self.average.parameters()}
        return copy.deepcopy(self.average, memo)

    @torch.no_grad()
    def validate(self, batches: list[dict]) -> dict[str, float]:
        """The mean losses of the raw and of the averaged weights. batches: as `to_device` returns them."""
        networks = {"validation": self.unet, "validation_ema": self.averaged_unet()}
        return {name: torch.cat([self.losses(unet, batch) for batch in batches]).double().mean().item()
                for name, unet in networks.items()}

    def load(self) -> int:
        """Load the newest checkpoint of the run. Returns its number of steps."""
        checkpoint, state = runs.newest_checkpoint(self.config.out)
        if state.get("base", self.base) != self.base:
            raise ValueError(f"{self.config.weights}, its guidance scales or a file of --lora have changed "
                             f"since {self.config.out} began; restore them, or begin another run")
        unet, average, first, second = files = [read_tensors(checkpoint / f"{name}.safetensors")
                                                for name in runs.FILES]
        for name, tensors in zip(runs.FILES, files):
            check_tensors(tensors, self.trained, checkpoint / f"{name}.safetensors")
        for name, weight in self.trained.items():
            weight.data.copy_(unet[name])
            self.averages[name].copy_(average[name])
            self.optimizer.state[weight] = {  # empty_like: the moments need the weight's memory format
                "step": torch.tensor(float(state["step"]), device=self.device),
                "exp_avg": torch.empty_like(weight).copy_(first[name]),
                "exp_avg_sq": torch.empty_like(weight).copy_(second[name])}
        return state["step"]

    def save(self, step: int) -> None:
        """On rank 0: write the averaged model to <out>/weights, then the checkpoint of this step.

        With --lora, <out> also gets the LoRA, in the layouts of diffusers and of kohya.
        """
        if self.ranks.rank > 0:
            return
        model, unet, out, rank = self.model, self.average, self.config.out, self.config.rank
        if rank:
            layers = low_rank.layers_of(self.average, model.unet, rank)
            unet = low_rank.merged(model.unet, layers, rank)
            write_lora(out / "lora.safetensors", layers, rank)
            write_lora(out / "lora-kohya.safetensors", layers, rank, kohya=True)
        save_parts(out / "weights", unet, model.vae, model.text_encoder,
                   model.tokenizer_folder, model.schedule.to_json(), model.defaults)
        moments = [{name: self.optimizer.state[weight][key] for name, weight in self.trained.items()}
                   for key in ("exp_avg", "exp_avg_sq")]
        files = dict(zip(runs.FILES, (self.trained, self.averages, *moments)))
        state = {"batch": self.batch, "items": self.items, "settings": self.config.to_json()}
        state |= {"base": self.base} if self.base else {}
        runs.write_checkpoint(out, step, files, state, self.config.keep)

    def sample_sheet(self, columns: list[Column]) -> Image.Image:
        """Draw a column per pair: input (if the model is an editor), output of the averaged model, target."""
        model, settings = copy.copy(self.model), {"seed": 0, "resolution": self.config.resolution}
        model.unet = self.averaged_unet()
        model.to(self.device)
        inputs, texts, targets = map(list, zip(*columns))
        rows, labels = ([], []) if self.config.text_to_image else ([inputs], [["input"] * len(texts)])
        mixed = self.config.rank > 0 and self.config.dtype == "bf16"  # the frozen weights are in bf16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            drawn = model.edit(*rows, texts, **settings) if rows else model.generate(texts, **settings)
        self.place_encoders()
        return grid([*rows, drawn, targets], [*labels, texts, ["target"] * len(texts)])


def columns_of(items: list[Item], resolution: int, skip_bad: bool) -> list[Column]:
    """A column for the first pair of each item. skip_bad: leave out a pair with a broken picture."""
    columns = []
    for [pair, *_] in items:
        with suppress(ValueError) if skip_bad else nullcontext():
            before, after = (load_picture(picture, resolution) for picture in (pair.before, pair.after))
            columns.append((before, pair.edit, after))
    return columns
