"""Train an editor from pairs of pictures (section 3.2 of the paper): teach a UNet with 8 input channels to
predict the noise in the edited picture's latents, given the input picture's latents and the instruction.

    python train.py --weights runs/nano/start --data scenes --out runs/editor
    python train.py --text-to-image ...                 # without a picture: a caption becomes one
    python train.py --resume runs/editor                # goes on as if never stopped

Writes to --out: state.pt (to resume), weights/ (the averaged editor, which sample.py opens), loss.jsonl,
loss.png and samples-*.png. Every random draw is a function of --seed and the step, so a resumed run and an
uninterrupted one end in the same weights.
"""

import argparse
import copy
import json
import math
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nanoip2p import cli
from nanoip2p.checkpoint import add_flags, load_parts, open_checkpoint, save_parts, widen
from nanoip2p.cli import at_least, finite
from nanoip2p.data import (
    batch_rows,
    captioned_scenes,
    encoded_pairs,
    folder_pairs,
    load_picture,
    scene_pairs,
)
from nanoip2p.diffusion import add_noise
from nanoip2p.editor import Editor, pick_device
from nanoip2p.files import replacing
from nanoip2p.images import grid
from nanoip2p.scenes import EDIT_KINDS
from nanoip2p.tensors import DTYPES
from nanoip2p.text_to_image import TextToImage

LOG_EVERY = 50  # steps; the loss is fetched from the device no oftener


def draw_batch(data: dict, scale: float, alphas: Tensor, seed: int, step: int, batch: int) -> dict:
    """All that is random about one step, drawn on the CPU. alphas: `NoiseSchedule.alphas_cumprod()`.

    Returns noised latents z_t (B, 4, h, w), z_image (B, 4, h, w) with some rows zeroed, context (B, 77, D)
    with some rows the empty text's, noise (B, 4, h, w) and timestep (B,).
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    before, after, text = data["rows"][batch_rows(seed, step, batch, len(data["rows"]))].T
    mean, logvar = data["moments"][after].float().chunk(2, dim=1)                  # (B, 4, h, w) each
    target = scale * (mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator))
    z_image = data["moments"][before].float().chunk(2, dim=1)[0]                   # the mode, not scaled
    noise = torch.randn(target.shape, generator=generator)
    timestep = torch.randint(len(alphas), (batch,), generator=generator)
    # One number decides what is dropped: the text below 10%, the image from 5% to 15% (section 3.2.1)
    drop = torch.rand(batch, generator=generator)
    text = torch.where(drop < 0.10, 0, text)
    keep_image = 1 - ((drop >= 0.05) & (drop < 0.15)).float()
    return {
        "z_t": add_noise(target, noise, timestep, alphas),
        "z_image": z_image * keep_image[:, None, None, None],
        "context": data["texts"][text].float(), "noise": noise, "timestep": timestep,
    }


def loss_weight(timestep: Tensor, alphas: Tensor, gamma: float | None) -> Tensor:
    """Min-SNR weighting (Hang et al. 2023, section 3.4): min(SNR, gamma) / SNR, or 1 without gamma."""
    snr = alphas[timestep] / (1 - alphas[timestep])
    return torch.ones_like(snr) if gamma is None else snr.clamp(max=gamma) / snr


def noise_loss(unet: torch.nn.Module, batch: dict, weight: Tensor, device: torch.device,
               dtype: torch.dtype = torch.float32) -> Tensor:
    """The paper's equation 1: mean squared error of the predicted noise, with a weight (B,) an example.

    A text-to-picture model has no input for z_image. dtype bfloat16: of matrix products and convolutions.
    """
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    z_in = torch.cat([batch["z_t"], batch["z_image"]], dim=1)[:, : unet.config.in_channels]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        prediction = unet(z_in, batch["timestep"], batch["context"]).float()       # (B, 4, h, w)
    return ((prediction - batch["noise"]).square().mean((1, 2, 3)) * weight.to(device)).mean()


def learning_rate(step: int, args) -> float:
    """Linear warm-up, constant as in the paper, and down to zero over the last `--cooldown` of the run."""
    warm = min(1.0, (step + 1) / max(1, args.warmup))
    cool = min(1.0, (args.steps - step) / (args.cooldown * args.steps)) if args.cooldown else 1.0
    return args.lr * warm * cool


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, step: int, decay: float) -> None:
    """Moving average, once per optimizer step n = 1, 2, ..., of decay min(decay, (1+n)/(10+n))."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), share)


@contextmanager
def stop_between_steps():
    """Yield a function that says whether Ctrl-C (or a SIGTERM) has come.

    In the middle of a step, weights, optimizer and average do not belong together; between two they do.
    """
    pressed = []
    previous = {number: signal.signal(number, lambda *_: pressed.append(1))
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(pressed)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def save_state(folder: Path, unet, average, optimizer, step: int, args) -> None:
    """Write state.pt, from which --resume goes on."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    state = {"unet": unet.state_dict(), "ema": average.state_dict(), "optimizer": optimizer.state_dict(),
             "step": step, "settings": settings}
    with replacing(folder / "state.pt") as temporary:
        torch.save(state, temporary)


def plot_loss(folder: Path) -> None:
    """loss.jsonl -> loss.png, raw and smoothed. Without matplotlib the numbers stay in the JSONL file."""
    rows = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    try:
        import matplotlib
    except ImportError:
        print(f"losses are in {folder / 'loss.jsonl'}; pip install matplotlib to see them drawn")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1)
    axes.set(xlabel="optimizer step", ylabel=f"loss (mean of {LOG_EVERY} steps)", yscale="log")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)


def sample_grid(parts, unet: torch.nn.Module, pairs: list, resolution: int):
    """Validation pairs as one picture, a column each: the input, the model's answer, the true answer."""
    networks = (unet, parts.vae, parts.text_encoder, parts.tokenizer, parts.schedule, parts.defaults)
    targets = [load_picture(pair.after, resolution) for pair in pairs]
    texts = [pair.edit for pair in pairs]
    if unet.config.in_channels == unet.config.out_channels:
        painted = TextToImage(*networks).generate(texts, seed=0, resolution=resolution)
        return grid([painted, targets], [texts, ["a true picture"] * len(pairs)])
    inputs = [load_picture(pair.before, resolution) for pair in pairs]
    edits = Editor(*networks).edit(inputs, texts, seed=0, resolution=resolution)
    labels = [["input"] * len(pairs), texts, ["true answer"] * len(pairs)]
    return grid([inputs, edits, targets], labels)


def train(args, parts, data: dict, validation: list, device: torch.device) -> None:
    """The loop. `parts`: the networks of the starting weights; `data`: from `data.encoded_pairs`."""
    unet, schedule = parts.unet.to(device).train(), parts.schedule
    average = copy.deepcopy(unet).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(unet.parameters(), args.lr, betas=(0.9, 0.999), weight_decay=0.01)
    alphas, scale, first = schedule.alphas_cumprod(), parts.vae.scaling_factor, 0
    if args.resume:
        state = torch.load(args.out / "state.pt", weights_only=True, map_location=device)
        unet.load_state_dict(state["unet"])
        average.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    log = args.out / "loss.jsonl"
    logged = log.read_text().splitlines() if first and log.exists() else []
    log.write_text("".join(line + "\n" for line in logged if json.loads(line)["step"] <= first))

    def save(step: int) -> None:
        save_state(args.out, unet, average, optimizer, step, args)
        save_parts(args.out / "weights", average, parts.vae, parts.text_encoder,
                    parts.tokenizer_folder, schedule.to_json(), parts.defaults)

    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="train", mininterval=5)
    recent, began, done = [], time.perf_counter(), first
    with stop_between_steps() as stop:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            batch = draw_batch(data, scale, alphas, args.seed, step, args.batch_size)
            weight = loss_weight(batch["timestep"], alphas, args.snr_gamma)
            loss = noise_loss(unet, batch, weight, device, DTYPES[args.dtype])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), args.clip)
            optimizer.step()
            done = step + 1
            update_average(average, unet, done, args.ema_decay)
            recent.append(loss.detach())
            if done % LOG_EVERY == 0 or done == args.steps:
                mean, recent = torch.stack(recent).mean().item(), []
                if not math.isfinite(mean):
                    raise ValueError(f"the loss is {mean} at step {done}; --resume with a smaller --lr")
                rate = (done - first) * args.batch_size / (time.perf_counter() - began)
                bar.set_postfix_str(f"loss {mean:.4f}, {rate:.0f} samples/s", refresh=False)
                row = {"step": done, "loss": round(mean, 5), "lr": learning_rate(step, args),
                       "samples_per_second": round(rate, 1)}
                with log.open("a") as file:
                    print(json.dumps(row), file=file)
            stopping = stop()
            if stopping or done % args.save_every == 0 or done == args.steps:
                save(done)
            if stopping:
                raise KeyboardInterrupt
            if args.sample_every and done % args.sample_every == 0:
                picture = sample_grid(parts, average, validation, args.resolution)
                picture.save(args.out / f"samples-{done:06d}.png")
    plot_loss(args.out)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags; with --resume, the settings of that run are the defaults of all the others."""
    parser = cli.make_parser(description="Train an InstructPix2Pix editor from pairs of pictures.")
    where = parser.add_argument_group("what to train on, and where to write")
    where.add_argument("--weights", help="editor or text-to-picture model to start from: a diffusers folder, "
                                         "a .safetensors or .ckpt file, or a name on the Hub")
    add_flags(where)
    where.add_argument("--data", help="a folder in the original's layout, or 'scenes' for rendered pairs")
    where.add_argument("--pairs", type=at_least(1), default=20_000, help="pairs to render for --data scenes")
    where.add_argument("--kind-weights", type=finite, nargs=len(EDIT_KINDS), default=[1.0] * len(EDIT_KINDS),
                       metavar="ODDS", help=f"for --data scenes, of {', '.join(EDIT_KINDS)}")
    where.add_argument("--text-to-image", action="store_true",
                       help="train a text-to-picture model on captions, of --data scenes")
    where.add_argument("--out", type=Path, help="folder of this run")
    where.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--steps", type=at_least(1), default=10_000, help="optimizer steps in all")
    recipe.add_argument("--batch-size", type=at_least(1), default=64)
    recipe.add_argument("--lr", type=finite, default=1e-4)
    recipe.add_argument("--warmup", type=at_least(0), default=0, help="steps of rising learning rate")
    recipe.add_argument("--cooldown", type=finite, default=0.0, help="last share of steps, where it falls")
    recipe.add_argument("--snr-gamma", type=finite, help="min-SNR loss weighting (off; 5 in its paper)")
    recipe.add_argument("--clip", type=finite, default=1.0, help="largest norm of the gradient")
    recipe.add_argument("--ema-decay", type=finite, default=0.9999)
    recipe.add_argument("--resolution", type=at_least(1), default=256)
    recipe.add_argument("--seed", type=at_least(0), default=0)
    running = parser.add_argument_group("running")
    running.add_argument("--save-every", type=at_least(1), default=500)
    running.add_argument("--sample-every", type=at_least(0), default=2000, help="0: never")
    running.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32",
                         help="bf16: of products and convolutions; weights and sums stay fp32")
    running.add_argument("--device", help="cuda, mps or cpu; the best there is by default")
    args = parser.parse_args(argv)
    if args.resume:
        file = args.resume / "state.pt"
        if not file.exists():
            raise ValueError(f"{file}: not found; --resume wants the --out folder of an earlier run")
        state = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
        parser.set_defaults(**state["settings"])
        args = parser.parse_args(argv)
        args.out = args.resume
    for name in ("weights", "data", "out"):
        if getattr(args, name) is None:
            parser.error(f"--{name} is needed (or --resume RUN)")
    if min(args.kind_weights) < 0 or max(args.kind_weights) == 0:
        parser.error("--kind-weights must not be negative, nor all zero")
    if args.text_to_image and args.data != "scenes":
        parser.error("--text-to-image knows captions of --data scenes only")
    return args


def prepare_and_train(args: argparse.Namespace) -> None:
    """Open weights and data, encode what was not encoded yet, train."""
    device = pick_device(args.device)
    if not args.resume and (args.out / "state.pt").exists():
        raise ValueError(f"{args.out} holds a run already; go on with --resume, or choose another --out")
    checkpoint = open_checkpoint(args.weights, args.vae, args.tokenizer, args.raw_weights)
    print(f"opened {args.weights}: {checkpoint.found}", file=sys.stderr)
    parts = load_parts(checkpoint, edits=False) if args.text_to_image else load_parts(widen(checkpoint))
    if args.text_to_image:
        pairs, validation = captioned_scenes(args.pairs), captioned_scenes(8, "validation")
    elif args.data == "scenes":
        pairs = scene_pairs(args.pairs, weights=tuple(args.kind_weights))
        validation = scene_pairs(8, "validation")
    else:
        pairs = folder_pairs(args.data)
        validation = folder_pairs(args.data, "validation", may_be_empty=True)[:8] or pairs[:8]
    args.out.mkdir(parents=True, exist_ok=True)
    encoders = (parts.vae.to(device).eval(), parts.text_encoder.to(device).eval(), parts.tokenizer)
    data = encoded_pairs(pairs, args.out / "encoded", *encoders, args.resolution)
    visits = args.steps * args.batch_size / len(pairs)
    rest = "" if args.data == "scenes" else " (of the first 90% of the prompts; the others are held out)"
    print(f"{len(pairs)} pairs{rest}, {args.steps} steps of {args.batch_size}: {visits:.1f} visits of each")
    train(args, parts, data, validation, device)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see cli.run."""
    return cli.run(lambda: prepare_and_train(parse(argv)),
                   "stopped; if it had begun to train, go on with --resume and the --out folder",
                   "try a smaller --batch-size or --resolution")


if __name__ == "__main__":
    sys.exit(main())
