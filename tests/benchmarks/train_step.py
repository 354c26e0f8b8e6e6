"""A training step, ours beside diffusers' method: images a second and peak memory.

    OMP_NUM_THREADS=1 python tests/benchmarks/train_step.py --width half --batch 4 --repeat 5     # on a CPU
    python tests/benchmarks/train_step.py --width full --batch 32 --steps 10                      # on a GPU
    python tests/benchmarks/train_step.py --width half --sides "ours, stored" "LoRA 16" "LoRA 64 all"

Theirs does in each step what diffusers' train_instruct_pix2pix.py does: encode both pictures (VAE and text
encoder in --dtype), the instruction and the empty text, autocast, clip, torch's AdamW, EMAModel. Ours is
Trainer.step, once with stored latents and once with encoding in each step. Same initial weights, pictures and
batch. First the losses of all three must agree on the same random numbers, in fp32. Batches are in memory, as
a DataLoader returns them; ours include their random numbers. Runs alternate; medians and (min-max) of rounds.
Time is wall-clock time on CUDA, and CPU time of the process on a CPU (use one thread).
"""

import argparse
import copy
import itertools
import statistics
import sys
import time
import warnings
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import measure  # noqa: E402
from comparing import randomise  # noqa: E402
from live import Live  # noqa: E402

from nanoip2p.checkpoint.tensors import DTYPES  # noqa: E402
from nanoip2p.clip import CLIPTextConfig, TextEncoder  # noqa: E402
from nanoip2p.diffusion import NoiseSchedule  # noqa: E402
from nanoip2p.objective import encode  # noqa: E402
from nanoip2p.pipeline import PAPER_DEFAULTS, Model  # noqa: E402
from nanoip2p.training.config import TrainConfig  # noqa: E402
from nanoip2p.training.ranks import Ranks  # noqa: E402
from nanoip2p.training.samples import collate, draw  # noqa: E402
from nanoip2p.training.trainer import Trainer  # noqa: E402
from nanoip2p.unet import UNet, UNetConfig  # noqa: E402
from nanoip2p.vae import VAE, VAEConfig  # noqa: E402

# Channels of the first level of the UNet and of the VAE, width and heads of the text encoder
WIDTHS = {"tiny": (32, 12, 80, 2), "half": (160, 64, 384, 6), "full": (320, 128, 768, 12)}
SIDES = ("diffusers", "ours, encoding", "ours, stored")
LORA = {"LoRA 16": ["16", "attention"], "LoRA 64 all": ["64", "all"]}  # sides on request, with stored latents


def make_networks(width: str) -> list[torch.nn.Module]:
    """Stable Diffusion 1.5's, all of them narrower alike, so that encoding keeps about its share."""
    channels, vae, text, heads = WIDTHS[width]
    levels, vae_levels = [(c, 2 * c, 4 * c, 4 * c) for c in (channels, vae)]
    return [randomise(network, seed) for seed, network in enumerate((
        UNet(UNetConfig(8, block_out_channels=levels, cross_attention_dim=text)),
        VAE(VAEConfig(block_out_channels=vae_levels, norm_num_groups=min(32, vae))),
        TextEncoder(CLIPTextConfig(49408, text, 4 * text, num_attention_heads=heads))))]


def make_batch(size: int, count: int) -> dict:
    """A batch as `collate` of training/samples.py makes it of pictures. size: side in pixels."""
    generator = torch.Generator().manual_seed(0)

    def sample(number: int) -> dict:
        before, after = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
        return draw(0, number, (4, size // 8, size // 8), 1000) | {
            "before": before, "after": after, "skipped": [], "name": "",
            "text": torch.randint(1000, (77,), generator=generator)}
    return collate([sample(number) for number in range(count)])


def no_words(texts: list[str]) -> Tensor:
    """A tokenizer, asked for nothing but the empty text."""
    return torch.full((len(texts), 77), 49407)


class Ours:
    """Trainer.step. cache: on stored latents."""

    def __init__(self, args: argparse.Namespace, networks: list, batch: dict, cache: bool,
                 lora: list[str] | None = None):
        config = TrainConfig(accumulate=1, batch_size=args.batch, cache=Path("latents") if cache else None,
                             dtype=args.dtype, compile=args.compile, recompute=args.recompute,
                             **({"lora": lora[:1], "lora_layers": lora[1]} if lora else {}))
        unet, vae, text_encoder = (copy.deepcopy(network).to(args.device) for network in networks)
        parts = Model(unet, vae, text_encoder, no_words, NoiseSchedule(), PAPER_DEFAULTS, Path())
        self.trainer = Trainer(config, parts, Ranks(0, 1, torch.device(args.device)), items=1)
        self.encoders, self.count = [] if cache else [vae, text_encoder], 0
        self.batch = encode(batch, *networks[1:]) if cache else batch

    def loss(self) -> Tensor:
        return self.trainer.losses(self.trainer.unet, self.trainer.to_device(self.batch)).mean()

    def step(self) -> None:
        self.trainer.step(itertools.repeat(self.batch), self.count)
        self.count += 1

    def kept(self) -> list[Tensor]:
        networks = [self.trainer.unet, self.trainer.average, *self.encoders]
        return state_of(networks, self.trainer.optimizer)


class Theirs:
    """diffusers' method, from its public parts."""

    def __init__(self, args: argparse.Namespace, networks: list, batch: dict):
        unet, vae, text_encoder = networks
        self.unet = diffusers.UNet2DConditionModel.from_config(unet.config.to_json())
        self.unet.load_state_dict(unet.state_dict())
        self.vae = diffusers.AutoencoderKL.from_config(vae.config.to_json())
        self.vae.load_state_dict(vae.state_dict())
        config = transformers.CLIPTextConfig(**text_encoder.config.to_json())
        self.text_encoder = transformers.CLIPTextModel(config)
        weights = text_encoder.state_dict()  # transformers 5 dropped the prefix of their names
        self.text_encoder.load_state_dict({name: weights["text_model." + name.removeprefix("text_model.")]
                                           for name in self.text_encoder.state_dict()})
        self.device, self.dtype = args.device, DTYPES[args.dtype]
        self.unet.to(self.device).train()
        for network in (self.vae, self.text_encoder):
            network.to(self.device, self.dtype).requires_grad_(False).eval()
        if args.recompute:
            self.unet.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-4, weight_decay=1e-2)
        self.average = EMAModel(self.unet.parameters())
        self.average.to(self.device)
        self.forward = torch.compile(self.unet) if args.compile else self.unet
        self.schedule = diffusers.DDPMScheduler.from_config(NoiseSchedule().to_json())
        self.batch = batch

    def loss(self, drawn: dict | None = None) -> Tensor:
        """drawn: what to use of a batch in place of random numbers of its own."""
        before, after = (self.batch[key].to(self.device, self.dtype) for key in ("before", "after"))
        posterior, ids = self.vae.encode(after).latent_dist, self.batch["text"].to(self.device)
        latents = posterior.mean + posterior.std * drawn["posterior"] if drawn else posterior.sample()
        latents = latents * self.vae.config.scaling_factor
        noise = drawn["noise"] if drawn else torch.randn_like(latents)
        timestep = drawn["timestep"] if drawn else torch.randint(1000, (len(latents),), device=self.device)
        noised = self.schedule.add_noise(latents, noise, timestep)
        text = self.text_encoder(ids)[0]
        picture = self.vae.encode(before).latent_dist.mode()
        drop = drawn["drop"] if drawn else torch.rand(len(latents), device=self.device)
        null = self.text_encoder(no_words([""]).to(self.device))[0]
        text = torch.where((drop < 0.1).view(-1, 1, 1), null, text)
        picture = picture * (1 - ((drop >= 0.05) & (drop < 0.15)).view(-1, 1, 1, 1).to(picture.dtype))
        z_in = torch.cat([noised, picture], dim=1)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            predicted = self.forward(z_in, timestep, text).sample
        return F.mse_loss(predicted.float(), noise.float())

    def step(self) -> None:
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.unet.parameters())
        loss.item()  # to its progress bar

    def kept(self) -> list[Tensor]:
        networks = [self.unet, self.vae, self.text_encoder]
        return state_of(networks, self.optimizer) + self.average.shadow_params


def state_of(networks: list, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything that stays between steps, but gradients."""
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [*(weight for network in networks for weight in network.state_dict().values()), *moments]


def check_losses(args: argparse.Namespace, networks: list, batch: dict) -> None:
    """The same draws must give the same loss: to 1e-5, in fp32. ValueError if they do not."""
    plain = argparse.Namespace(**{**vars(args), "dtype": "fp32", "compile": False})
    with torch.no_grad():
        drawn = {key: value.to(args.device) for key, value in batch.items() if isinstance(value, Tensor)}
        reference = Theirs(plain, networks, batch).loss(drawn).item()
        losses = [Ours(plain, networks, batch, cache).loss().item() for cache in (True, False)]
    errors = [abs(loss / reference - 1) for loss in losses]
    print(f"loss in fp32: diffusers {reference:.6f}; off by {errors[0]:.1e} (ours, stored), "
          f"{errors[1]:.1e} (ours, encoding)")
    if not max(errors) < 1e-5:
        raise ValueError("the losses do not agree, so that timings would mean nothing")


def seconds(side: Ours | Theirs, steps: int, device: str) -> float:
    """A step, on average."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    began = clock()
    for _ in range(steps):
        side.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (clock() - began) / steps


def peak_bytes(side: Ours | Theirs, device: str) -> int:
    """What stays, and the most that a step takes besides; after a step, so that Adam has its state."""
    kept = sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for tensor in side.kept() if tensor.device.type == device}.values())
    for weight in (side.trainer.unet if isinstance(side, Ours) else side.unet).parameters():
        weight.grad = None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.step()
        return kept + torch.cuda.max_memory_allocated() - before
    with Live() as live:
        side.step()
    return kept + live.peak


def flops(run) -> int:
    aten = torch.ops.aten  # torch counts the attention kernels of CUDA only
    cpu = {aten._scaled_dot_product_flash_attention_for_cpu:
           lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
           aten._scaled_dot_product_flash_attention_for_cpu_backward:
           lambda out, q, k, v, *_, **__: sdpa_backward_flop_count(out, q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
        run()
    return counter.get_total_flops()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", choices=WIDTHS, default="tiny")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=256, help="of the pictures")
    parser.add_argument("--steps", type=int, default=1, help="in a round")
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--sides", nargs="+", choices=[*SIDES, *LORA], default=SIDES,
                        help="those that fit on a GPU together")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # diffusers' of its own future
    networks, batch = make_networks(args.width), make_batch(args.size, args.batch)
    check_losses(args, networks, batch)
    make = {"diffusers": lambda: Theirs(args, networks, batch),
            "ours, encoding": lambda: Ours(args, networks, batch, False),
            "ours, stored": lambda: Ours(args, networks, batch, True),
            **{name: lambda lora=lora: Ours(args, networks, batch, True, lora)
               for name, lora in LORA.items()}}
    sides = {name: make[name]() for name in args.sides}
    for side in sides.values():
        side.step()  # compiles, and makes Adam's state
    report(args, sides)


def report(args: argparse.Namespace, sides: dict) -> None:
    """Measure and print."""
    measured = args.device == "cuda" or not args.compile
    memory = {name: peak_bytes(side, args.device) if measured else 0 for name, side in sides.items()}
    work = {name: flops(side.step) for name, side in sides.items()} if not args.compile else {}
    rounds = [{name: seconds(side, args.steps, args.device) for name, side in sides.items()}
              for _ in range(args.repeat)]
    rate = measure.matrix_rate(args.device, DTYPES[args.dtype])
    cpu = f"CPU, threads: {torch.get_num_threads()}"
    where = torch.cuda.get_device_name() if args.device == "cuda" else cpu
    how = ", compiled" * args.compile + ", recompute" * args.recompute
    print(f"width {args.width}, {args.size} px, batch {args.batch}, {args.dtype}{how}, {where}, "
          f"torch {torch.__version__}, diffusers {diffusers.__version__}")
    print(f"one large {args.dtype} product: {rate / 1e12:.3g} TFLOP/s; share is what a step reaches of it")
    over = f"over {args.sides[0]}"
    print(f"{'':<16}{'images/s':>20}{over:>20}{'peak GB':>9}{'GFLOP/image':>13}{'share':>7}")
    for name in sides:
        pace, ratio = ([f(r) for r in rounds] for f in (
            lambda r, name=name: args.batch / r[name], lambda r, name=name: r[args.sides[0]] / r[name]))
        image = work[name] / args.batch if work else float("nan")
        share = image * statistics.median(pace) / rate
        print(f"{name:<16}{spread(pace):>20}{spread(ratio):>20}{memory[name] / 1e9:>9.2f}{image / 1e9:>13.1f}"
              f"{share:>7.1%}")
    if {"ours, stored", "ours, encoding"} <= work.keys():
        encoding = 1 - work["ours, stored"] / work["ours, encoding"]
        print(f"encoding is {encoding:.0%} of the operations of a step that encodes")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


if __name__ == "__main__":
    main()
