"""Train an editor from pairs of pictures (section 3.2 of the paper): teach a UNet with 8 input channels to
predict the noise in the edited picture's latents, given the input picture's latents and the instruction.

    python train.py --weights <Stable Diffusion 1.x> --data data/pairs --out runs/ip2p
    torchrun --nproc-per-node 8 train.py --preset paper ...           # several GPUs, several machines too
    python train.py --resume runs/ip2p                                # goes on as if never stopped
    python train.py --check --data my-pairs                           # looks at the data, prints the plan
    python train.py --text-to-image --data scenes ...                 # no picture: a caption becomes one

Writes to --out: checkpoints/ (to resume), weights/ (the averaged editor, which sample.py opens), log.jsonl,
loss.png and samples-*.png. What is computed and what is drawn stands in nanoip2p/recipe.py, a step in
nanoip2p/trainer.py.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.utils.data import DataLoader
from tqdm import tqdm

from nanoip2p.checkpoint.load import load_model, open_checkpoint, widen
from nanoip2p.common import cli
from nanoip2p.common.cli import add_flags, at_least, finite, leave_signals_to_the_parent, stop_between_steps
from nanoip2p.common.device import pick_dtype
from nanoip2p.dataset.layouts import Item, broken_pictures, read_data
from nanoip2p.dataset.rendered import captioned_scenes, scene_pairs
from nanoip2p.images import save_png
from nanoip2p.objective import DROP
from nanoip2p.pipeline import Model
from nanoip2p.training import ranks as parallel
from nanoip2p.training import run_folder as runs
from nanoip2p.training.cache import Stored, open_stored, store
from nanoip2p.training.ranks import Ranks
from nanoip2p.training.samples import Pictures, Samples, collate, sample_numbers, validation_batches
from nanoip2p.training.trainer import Column, Diverged, Trainer, columns_of, memory_used, sample_grid
from nanoip2p.unet import UNetConfig
from nanoip2p.world.scenes import EDIT_KINDS

VALIDATION_SAMPLES, GRID_COLUMNS = 64, 8
PAPER_BATCH = 1024  # samples of an optimizer step, over all devices
# Batches that fit by the count of memory.py, with --cache or without; --accumulate makes up for the rest
PRESETS = {
    "paper": {"batch_size": 32},  # on each of 8 GPUs
    "48gb": {"batch_size": 64},
    "24gb": {"batch_size": 16, "recompute": True, "ema_device": "cpu"},
    "nano": {"resolution": 64, "batch_size": 32, "accumulate": 1, "steps": 600, "lr": 1e-3, "warmup": 50,
             "cooldown": 0.4, "snr_gamma": 1.0, "ema_decay": 0.98, "pairs": 4000, "save_every": 200,
             "sample_every": 200, "validate_every": 50, "log_every": 25},
}
# What --resume may change. Everything else is what the run is, and would make another one of it
FREE = {"steps", "lr", "batch_size", "accumulate", "recompute", "compile", "shard_optimizer", "fsdp",
        "device", "ema_device", "workers", "cache", "skip_bad", "save_every", "keep", "sample_every",
        "validate_every", "log_every", "tensorboard", "out"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags; a preset, or with --resume the settings of that run, are the defaults of all the others.

    Adds `start`, None or the checkpoint to go on from, its state and all there are. ValueError for what does
    not go together.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.preset and args.resume:
        parser.error("--resume has the settings of its run; leave out --preset")
    if args.preset:
        parser.set_defaults(**PRESETS[args.preset])
    start, settings = None, {}
    if args.resume:
        start = (*runs.newest_checkpoint(args.resume), runs.checkpoints(args.resume))
        settings = start[1]["settings"]
        parser.set_defaults(**settings)
    args = parser.parse_args(argv)
    args.start = start
    for key, begun_with in settings.items():
        if key not in FREE and getattr(args, key) != begun_with:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)}: {args.resume} was begun with "
                             f"{begun_with}; leave it out, or begin another run")
    args.out = args.resume or args.out
    for name in ("data",) if args.check else ("weights", "data", "out"):
        if getattr(args, name) is None:
            parser.error(f"--{name} is needed (or --resume RUN)")
    if min(args.kind_weights) < 0 or max(args.kind_weights) == 0:
        parser.error("--kind-weights must not be negative, nor all zero")
    if min(args.drop) < 0 or sum(args.drop) > 1:
        parser.error("--drop takes three shares, of at most 1 together")
    if min(args.lr, args.clip) <= 0 or not (0 <= args.ema_decay <= 1 and 0 <= args.cooldown <= 1):
        parser.error("--lr and --clip have to be above 0, --ema-decay and --cooldown from 0 to 1")
    if args.text_to_image and args.data != "scenes":
        parser.error("--text-to-image knows captions of --data scenes only")
    if args.fsdp and (args.ema_device == "cpu" or args.shard_optimizer):
        parser.error("--fsdp shares the average and Adam's state already; leave out the other one")
    if args.flip is None:
        args.flip = args.data != "scenes"
    if args.data == "scenes" and args.out and not args.cache:
        args.cache = args.out / "latents"  # to render a scene takes longer than to train on it
    if args.tensorboard:
        runs.board_class()
    return args


def make_parser() -> argparse.ArgumentParser:
    """All flags, in groups."""
    parser = cli.make_parser(formatter_class=cli.HelpWithDefaults,
                             description="Train an InstructPix2Pix editor from pairs of pictures.")
    where = parser.add_argument_group("what to train on, and where to write")
    where.add_argument("--weights", help="editor or text-to-picture model to start from: a diffusers folder, "
                                         "a .safetensors or .ckpt file, or a name on the Hub")
    add_flags(where)
    where.add_argument("--data", help="folder in the original's layout or MagicBrush's, pairs.jsonl or its "
                                      "folder, parquet or a folder of it, or 'scenes' for rendered pairs")
    where.add_argument("--pairs", type=at_least(1), default=20_000, help="pairs to render for --data scenes")
    where.add_argument("--kind-weights", type=finite, nargs=len(EDIT_KINDS), default=[1.0] * len(EDIT_KINDS),
                       metavar="ODDS", help=f"for --data scenes, of {', '.join(EDIT_KINDS)}")
    where.add_argument("--text-to-image", action="store_true",
                       help="train a text-to-picture model on captions, of --data scenes")
    where.add_argument("--cache", type=Path, metavar="FOLDER", help="encode all data once, into this folder")
    where.add_argument("--skip-bad", action="store_true", help="leave out pairs with broken pictures")
    where.add_argument("--out", type=Path, help="folder of this run")
    where.add_argument("--resume", type=Path, metavar="RUN", help="go on; --steps and --lr may change")
    where.add_argument("--check", action="store_true", help="open the data, print the plan, no more")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--preset", choices=PRESETS, help="values of many flags, which given ones override")
    recipe.add_argument("--steps", type=at_least(1), default=10_000, help="optimizer steps in all")
    recipe.add_argument("--batch-size", type=at_least(1), default=16, help="samples at a time on each device")
    recipe.add_argument("--accumulate", type=at_least(1),
                        help=f"batches of each device in a step (as it takes to {PAPER_BATCH} samples)")
    recipe.add_argument("--lr", type=finite, default=1e-4, help="learning rate")
    recipe.add_argument("--warmup", type=at_least(0), default=0, help="steps of rising learning rate")
    recipe.add_argument("--cooldown", type=finite, default=0.0, help="last share of steps, where it falls")
    recipe.add_argument("--clip", type=finite, default=1.0, help="largest norm of the gradient")
    recipe.add_argument("--snr-gamma", type=finite, default=0.0, help="min-SNR weighting (0: off; often 5)")
    recipe.add_argument("--offset-noise", type=finite, default=0.0, help="strength (0.1 is usual)")
    recipe.add_argument("--drop", type=finite, nargs=3, default=list(DROP), metavar=("TEXT", "BOTH", "IMAGE"),
                        help="shares of samples that lack the text, both, or the picture, for guidance")
    recipe.add_argument("--ema-decay", type=finite, default=0.9999, help="of the averaged weights, at most")
    recipe.add_argument("--resolution", type=at_least(1), default=256, help="pixels, both ways")
    recipe.add_argument("--flip", action=argparse.BooleanOptionalAction,
                        help="mirror half of the pairs (on; off for scenes, where left and right matter)")
    recipe.add_argument("--seed", type=at_least(0), default=0, help="of everything drawn")
    recipe.add_argument("--dtype", choices=("fp32", "bf16"),
                        help="of products and convolutions; weights and sums are fp32 in any case (bf16 "
                             "where the device is faster in it, else fp32)")
    switch = {"action": argparse.BooleanOptionalAction, "default": False}  # --no-... undoes a preset's
    running = parser.add_argument_group("running")
    running.add_argument("--device", help="cuda, mps or cpu; the best there is by default")
    running.add_argument("--workers", type=at_least(0), help="processes that load data (CUDA: 4, else 0)")
    running.add_argument("--recompute", **switch, help="gradient checkpointing: slower, smaller")
    running.add_argument("--ema-device", choices=("same", "cpu"), default="same", help="of the average")
    running.add_argument("--shard-optimizer", **switch, help="processes share Adam's state (ZeRO)")
    running.add_argument("--fsdp", **switch, help="processes share all state (fully_shard)")
    running.add_argument("--compile", **switch, help="torch.compile the network")
    running.add_argument("--log-every", type=at_least(1), default=50, metavar="STEPS", help="tell the loss")
    running.add_argument("--validate-every", type=at_least(0), default=500, metavar="STEPS", help="0: never")
    running.add_argument("--sample-every", type=at_least(0), default=1000, metavar="STEPS", help="0: never")
    running.add_argument("--save-every", type=at_least(1), default=500, metavar="STEPS", help="checkpoints")
    running.add_argument("--keep", type=at_least(1), default=2, help="newest checkpoints to keep")
    running.add_argument("--tensorboard", **switch, help="write the log to <out>/tensorboard, too")
    return parser


def read_items(args: argparse.Namespace) -> tuple[list[Item], list[Item]]:
    """Training and validation items; where the data is too small to be split, some serve as both."""
    if args.data == "scenes":
        if args.text_to_image:
            splits = captioned_scenes(args.pairs), captioned_scenes(VALIDATION_SAMPLES, "validation")
        else:
            splits = (scene_pairs(args.pairs, weights=tuple(args.kind_weights)),
                      scene_pairs(VALIDATION_SAMPLES, "validation"))
        return tuple([(pair,) for pair in pairs] for pairs in splits)
    items = read_data(args.data, skip_bad=args.skip_bad)
    validation = read_data(args.data, "validation", skip_bad=args.skip_bad)[:VALIDATION_SAMPLES]
    return items, validation or items[:VALIDATION_SAMPLES]


def check_data(args: argparse.Namespace) -> None:
    """Open every picture of all splits and tell what is broken; then ValueError, but with --skip-bad."""
    pictures, pairs, told = broken_pictures(args.data, args.resolution)
    print(f"pictures  {pictures}; pairs that are sound: {pairs}, with those held out")
    print("".join(f"          {reason}\n" for reason in told[:20]), end="")
    if told and not args.skip_bad:
        raise ValueError("pictures are broken or missing, see above; --skip-bad leaves them out")


def settle_batch(args: argparse.Namespace, ranks: int, items: int) -> None:
    """Without --accumulate, a step takes as many samples as the paper's, or as before of a resumed run.

    ValueError when it cannot be as before, or a batch takes more than there is.
    """
    if args.batch_size > items:
        raise ValueError(f"--batch-size {args.batch_size} is more than {args.data} has to train on; take at "
                         f"most {items}")
    wanted, begun_with = (args.start[1][key] for key in ("batch", "items")) if args.start else (None, items)
    if items != begun_with:
        raise ValueError(f"{args.data} has {items} items to train on; the run was begun with {begun_with}")
    if args.accumulate is None:
        args.accumulate = max(1, (wanted or PAPER_BATCH) // (args.batch_size * ranks))
    if wanted and args.batch_size * args.accumulate * ranks != wanted:
        raise ValueError(f"--batch-size {args.batch_size} x --accumulate {args.accumulate} x {ranks} "
                         f"processes are not the {wanted} samples a step with which {args.resume} was begun")


def plan_text(args: argparse.Namespace, items: list[Item], validation: list[Item], ranks: int,
              unet: UNetConfig, side: int, *encoders) -> str:
    """What is going to happen, before it does. side: of the latents; encoders: their configs."""
    pairs, batch = sum(map(len, items)), args.batch_size * args.accumulate * ranks
    held_out = "none" if validation[0] in items else len(validation)
    total = args.steps * batch
    return (f"data      {args.data}: {len(items)} items to train on, {pairs} pairs; held out for validation: "
            f"{held_out}\n"
            f"batch     {args.batch_size} x {args.accumulate} accumulated x {ranks} devices = {batch}\n"
            f"computes  in {args.dtype} (--dtype)\n"
            f"run       {args.steps} steps = {total} samples = {total / len(items):.1f} visits of each item\n"
            f"writes    {args.out or 'into --out'}: weights, log.jsonl, loss.png, samples, and a checkpoint "
            f"every {args.save_every} steps (the newest {args.keep} stay)")


def prepare_and_train(args: argparse.Namespace) -> None:
    """Open data and weights, print the plan, encode what is to be encoded first, train."""
    if not args.start and args.out and runs.checkpoints(args.out):
        raise ValueError(f"{args.out} holds a run already; go on with --resume, or choose another --out")
    with parallel.started(args.device) as ranks:
        if (args.fsdp or args.shard_optimizer) and ranks.count == 1:
            raise ValueError("--fsdp and --shard-optimizer are for several processes; start with torchrun")
        if args.check and args.data != "scenes":
            check_data(args)
        items, validation = read_items(args)
        settle_batch(args, ranks.count, len(items))
        args.dtype = pick_dtype(args.dtype, ranks.device)
        unet, factor, encoders = UNetConfig(in_channels=8), 8, ()  # Stable Diffusion's, for --check alone
        if args.weights:
            checkpoint = open_checkpoint(args.weights, args.vae, args.tokenizer, args.raw_weights)
            checkpoint = checkpoint if args.text_to_image else widen(checkpoint)
            unet = checkpoint.networks["unet"].model.config
            factor = checkpoint.networks["vae"].model.downsampling
            encoders = [checkpoint.networks[part].model.config for part in ("vae", "text_encoder")]
        multiple = factor * 2 ** (len(unet.block_out_channels) - 1)
        if args.resolution % multiple:
            raise ValueError(f"--resolution {args.resolution}: these weights take multiples of {multiple}")
        if ranks.rank == 0:
            found = f"{args.weights}: {checkpoint.found}" if args.weights else "none: Stable Diffusion 1.5"
            print(f"weights   {found}")
            print(plan_text(args, items, validation, ranks.count, unet, args.resolution // factor, *encoders))
        if args.check:
            return
        parts = load_model(checkpoint, edits=not args.text_to_image)
        shape = (unet.out_channels, args.resolution // factor, args.resolution // factor)
        source = open_source(args, parts, items + validation, ranks)
        with runs.occupied(args.out, ranks.rank == 0):
            train(args, parts, items, validation, source, shape, ranks)


def open_source(args: argparse.Namespace, parts: Model, items: list[Item], ranks: Ranks) -> Pictures | Stored:
    """Where samples come from: --cache, filled first with what it lacks, or the pictures themselves."""
    parts.vae.to(ranks.device)
    parts.text_encoder.to(ranks.device)
    if not args.cache:
        return Pictures(args.resolution, parts.tokenizer)
    pairs = [pair for item in items for pair in item]
    networks = (parts.vae, parts.text_encoder, parts.tokenizer)
    what = (args.cache, pairs, *networks, args.resolution, args.flip, args.skip_bad)
    store(*what, rank=ranks.rank, ranks=ranks.count, progress=ranks.rank == 0)
    ranks.agree(0)  # wait until all have stored their part
    return open_stored(*what)


def train(args: argparse.Namespace, parts: Model, items: list[Item], validation_items: list[Item],
          source: Pictures | Stored, shape: tuple[int, int, int], ranks: Ranks) -> None:
    """Everything the loop needs, and the loop. shape: of the latents (C, h, w)."""
    trainer, first = Trainer(args, parts, ranks, len(items)), 0
    if args.start:
        checkpoint, state, seen = args.start
        first = state["step"]
        if first > args.steps:
            raise ValueError(f"--steps {args.steps}: {args.out} is at step {first} already")
        if runs.checkpoints(args.out) != seen:
            raise ValueError(f"{args.out} went on meanwhile; start again")
        if ranks.agree(first) != first or ranks.agree(-first) != -first:
            raise ValueError(f"processes found other checkpoints in {args.out}; they have to share it")
        trainer.load(checkpoint, first)
        if first >= args.steps:
            trainer.export()  # the run may have died between its last checkpoint and this
    timesteps, cuda = parts.schedule.num_train_timesteps, ranks.device.type == "cuda"
    samples = Samples(items, source, args.seed, args.flip, shape, timesteps, args.skip_bad)
    numbers = sample_numbers(first, args.steps, args.accumulate, args.batch_size, ranks.rank, ranks.count)
    workers = args.workers if args.workers is not None else 4 if cuda else 0
    batches = DataLoader(samples, batch_sampler=numbers, num_workers=workers, collate_fn=collate,
                         pin_memory=cuda, worker_init_fn=leave_signals_to_the_parent)
    fixed = Samples(validation_items, source, 0, False, shape, timesteps, args.skip_bad)
    validation = [trainer.to_device(batch)
                  for batch in validation_batches(fixed, VALIDATION_SAMPLES, args.batch_size)]
    shown = validation_items[:: max(1, len(validation_items) // GRID_COLUMNS)][:GRID_COLUMNS]
    with stop_between_steps() as stop:
        loop(trainer, iter(batches), validation, columns_of(shown, args), first, stop)
    if ranks.rank == 0 and first >= args.steps:
        print(f"{args.out} has had its {first} steps; --steps takes it further")
    if ranks.rank == 0 and not runs.plot_log(args.out):
        print(f"losses are in {args.out / 'log.jsonl'}; pip install matplotlib to see them drawn")


def loop(trainer: Trainer, batches: Iterator[dict], validation: list[dict], columns: list[Column], first: int,
         stop: Callable[[], bool]) -> None:
    """Step, log, validate, save, show. columns: what is shown. stop: whether a signal has come."""
    args, ranks, saved, recent = trainer.args, trainer.ranks, first, []
    log = runs.Log(args.out, first, args.tensorboard) if ranks.rank == 0 else None
    bar = tqdm(total=args.steps, initial=first, desc="train", disable=None if log else True)
    began, begun_at = time.perf_counter(), first
    for done in range(first + 1, args.steps + 1):
        try:
            recent.append(trainer.step(batches, done - 1, stop))
        except (ValueError, KeyboardInterrupt) as error:  # raised before the weights changed
            if saved < done - 1 and not isinstance(error, Diverged):
                trainer.save(done - 1)
            raise
        bar.update()

        def due(every: int, done=done) -> bool:
            return every > 0 and (done % every == 0 or done == args.steps)

        row = trainer.validate(validation, done) if due(args.validate_every) else {}
        if due(args.log_every):
            pace = (time.perf_counter() - began) / (done - begun_at)
            row |= {"loss": ranks.mean(sum(recent) / len(recent)), "lr": trainer.lr,
                    "grad_norm": trainer.norm.item(), "samples_per_second": trainer.batch / pace,
                    **memory_used(ranks.device), "seconds_left": pace * (args.steps - done)}
            recent, began, begun_at = [], time.perf_counter(), done
        if row and log:
            log.write({"step": done, **row})
            tqdm.write(f"step {done}: " + ", ".join(f"{name} {number:.4g}" for name, number in row.items()))
        if due(args.save_every):
            trainer.save(done)
            saved = done
        if columns and due(args.sample_every):
            unet = trainer.averaged_unet()
            if log:
                picture = sample_grid(trainer.parts, unet, columns, args.resolution)
                save_png(picture, args.out / f"samples-{done:06d}.png", {"step": done})
    bar.close()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see cli.run."""
    return cli.run(lambda: prepare_and_train(parse(argv)),
                   "stopped; go on with --resume and the --out folder, or if it had not begun to train, with "
                   "the same command",
                   "try a smaller --batch-size with more --accumulate, --recompute, or --ema-device cpu")


if __name__ == "__main__":
    sys.exit(main())
