"""Train an InstructPix2Pix editor from pairs of pictures (section 3.2 of the paper).

    python train.py --weights <Stable Diffusion 1.x> --data data/pairs --out runs/ip2p
    torchrun --nproc-per-node 8 train.py --preset paper ...      # several GPUs
    python train.py --resume runs/ip2p                           # same result as without interruption
    python train.py --check --data my-pairs                      # checks the data, prints the plan
    python train.py --text-to-image --data scenes ...            # a text-to-image model from captions
    python train.py --distill runs/ip2p/weights --data data/pairs --out runs/4step    # to edit in four steps
    python train.py --lora 16 --weights <editor> --data my-pairs --out runs/style     # needs less memory

Writes to --out: checkpoints/, weights/ (the EMA weights), log.jsonl, loss.png and samples-*.png; with --lora
RANK also lora.safetensors (diffusers' layout) and lora-kohya.safetensors.
"""

import os
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Set
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from nanoip2p.checkpoint import hub
from nanoip2p.common import cli
from nanoip2p.training import signals
from nanoip2p.training.config import DISTILL, MAY_CHANGE, PAPER_BATCH, PRESETS, TrainConfig, odd_settings

VALIDATION_SAMPLES, SHEET_COLUMNS = 64, 8


def parse(argv: list[str] | None) -> TrainConfig:
    """Read the flags. They override --preset, or the settings of a resumed run. ValueError for bad flags."""
    parser = cli.make_parser(description=__doc__)
    cli.add_settings(parser, TrainConfig)
    given = vars(parser.parse_args(argv))
    usual = PRESETS.get(given.get("preset"), {}) | (DISTILL if "distill" in given else {})
    if "resume" not in given:
        if "distill" in given and "weights" in given:
            raise ValueError("give --distill or --weights: a student begins with its teacher's weights")
        if "distill" not in given and {"cfg_text", "cfg_image"} & given.keys():
            raise ValueError("--cfg-text and --cfg-image are for --distill; leave them out")
        if "distill" in given and "drop" in given:
            raise ValueError("--drop has no effect with --distill; leave it out")
        given["weights"] = given.get("distill", given.get("weights"))
    config = resumed(parser, given) if "resume" in given else TrainConfig(**usual | given)
    asked = map(given.get, ("weights", "distill", "tokenizer"))  # by the user
    hub.cache_only = {config.weights, config.tokenizer}.difference(asked)
    for name in ("data",) if config.check else ("weights", "data", "out"):
        if getattr(config, name) is None:
            raise ValueError(f"--{name} is needed (or --resume RUN)")
    if config.resume:
        return config
    if config.lora_layers != "attention" and not config.rank:
        raise ValueError("--lora-layers is for --lora RANK; leave it out")
    if config.data == "scenes" and config.columns:
        raise ValueError("--columns has no effect on --data scenes; leave it out")
    if config.data == "scenes" and config.out and not config.cache:  # rendering takes longer than training
        config = replace(config, cache=config.out / "latents")
    return replace(config, flip=config.data != "scenes") if config.flip is None else config


def resumed(parser: ArgumentParser, given: dict) -> TrainConfig:
    """The settings of a run, changed by the given flags. ValueError for a flag that cannot change.

    state.json may come from a stranger: it causes no write outside its run, and no download (see `parse`).
    """
    cli.import_torch()
    from nanoip2p.training import run_folder as runs
    out = given["resume"]
    checkpoint, state = runs.newest_checkpoint(out)
    try:
        begun = TrainConfig(**vars(parser.parse_args(TrainConfig.as_flags(state["settings"]))))
    except ValueError as error:
        raise ValueError(f"{checkpoint / 'state.json'}: {error}") from None
    cache = begun.cache and Path(os.path.normpath(
        out / (os.path.relpath(begun.cache, begun.out) if begun.out else begun.cache)))
    below = cache and Path(os.path.realpath(cache)).is_relative_to(os.path.realpath(out))
    if cache and "cache" not in given and not below:
        raise ValueError(f"the cache of {out} is outside of that folder; name it again: --cache {cache}")
    config = replace(begun, **{"cache": cache} | given | {"out": out})
    for key in vars(config).keys() - MAY_CHANGE:
        if getattr(config, key) != getattr(begun, key):
            before = " ".join(TrainConfig.as_flags({key: state["settings"].get(key)}))
            raise ValueError(f"--{key.replace('_', '-')} cannot change: {out} was begun with "
                             f"{before or 'another setting'}; leave the flag out, or begin another run")
    return config


def read_items(config: TrainConfig, broken: Set = frozenset()) -> tuple[list, list]:
    """Items for training and for validation, without the pairs that have a picture in `broken`.

    If there is no validation split, training items are used for validation too.
    """
    from nanoip2p.dataset.layouts import read_data, without
    from nanoip2p.dataset.rendered import captioned_scenes, scene_pairs
    if config.text_to_image:
        splits = captioned_scenes(config.pairs), captioned_scenes(VALIDATION_SAMPLES, "validation")
    elif config.data == "scenes":
        splits = (scene_pairs(config.pairs, weights=config.kind_weights),
                  scene_pairs(VALIDATION_SAMPLES, "validation"))
    else:
        items, validation = (without(read_data(config.data, split, config.skip_bad, config.columns), broken)
                             for split in ("train", "validation"))
        if not items:
            raise ValueError(f"{config.data}: no pair of the train split is sound")
        return items, validation[:VALIDATION_SAMPLES] or items[:VALIDATION_SAMPLES]
    return tuple([(pair,) for pair in pairs] for pairs in splits)


def fill_in(config: TrainConfig, ranks, items: int) -> TrainConfig:
    """Set `accumulate` and `dtype`. ValueError if the resumed run had other numbers of items or samples."""
    from nanoip2p.common.device import pick_dtype
    from nanoip2p.training import run_folder as runs
    state = runs.newest_checkpoint(config.out)[1] if config.resume else {"batch": PAPER_BATCH}
    micro = config.batch_size * ranks.count
    accumulate = config.accumulate or max(1, state["batch"] // micro)
    if config.resume and (items, micro * accumulate) != (state["items"], state["batch"]):
        raise ValueError(f"{items} items and {micro * accumulate} samples a step: {config.out} was begun "
                         f"with {state['items']} items and {state['batch']} samples a step")
    return replace(config, accumulate=accumulate, dtype=pick_dtype(config.dtype, ranks.device))


def print_plan(config: TrainConfig, items: list, validation: list, ranks: int, description: str) -> None:
    """Print the plan of the run. description: of the weights. ranks: number of ranks."""
    batch = config.batch_size * config.accumulate * ranks
    samples, held_out = config.steps * batch, 0 if validation[0] in items else len(validation)
    data = cli.one_line(config.data)
    print(f"weights   {cli.one_line(description)}\n"
          f"data      {data}: {len(items)} items to train on, {sum(map(len, items))} pairs; held out "
          f"for validation: {held_out}\n"
          f"batch     {config.batch_size} x {config.accumulate} accumulated x {ranks} devices = {batch}, "
          f"computed in {config.dtype}\n"
          f"run       {config.steps} steps = {samples} samples = {samples / len(items):,.1f} epochs, "
          f"written to {cli.one_line(config.out or '--out')}")
    for note in odd_settings(config, batch, len(items)):
        print(f"note      {note}")


def check_data(config: TrainConfig) -> Set:
    """Print the problems of the data, and return the broken pictures.

    Raises ValueError if no pair is sound, or if any pair is bad without --skip-bad.
    """
    from nanoip2p.dataset.layouts import broken_pictures, told
    pictures, pairs, counts, bad, broken = broken_pictures(config.data, config.resolution, config.columns)
    left_out = f"; left out: {told(counts)}" if bad else ""
    print(f"pictures  {pictures}; sound pairs in all splits: {pairs}{left_out}",
          *map(cli.one_line, bad[:20]), sep="\n  ")
    if bad and not pairs:
        raise ValueError(f"{config.data} has no sound pair ({told(counts)}); {bad[0]}")
    if bad and not config.skip_bad:
        raise ValueError(f"some pairs cannot be used ({told(counts)}); --skip-bad leaves these out")
    return broken


def run(config: TrainConfig) -> None:
    """Open data and weights, print the plan, train."""
    cli.import_torch()
    from nanoip2p.checkpoint.load import load_model, open_checkpoint, widen
    from nanoip2p.checkpoint.lora import apply_loras
    from nanoip2p.training import run_folder as runs
    from nanoip2p.training.ranks import started
    if config.out:
        runs.check_folder(config.out)
    if not config.resume and config.out and runs.checkpoints(config.out):
        raise ValueError(f"{config.out} already holds a run; continue it with --resume, or change --out")
    if config.tensorboard and not find_spec("tensorboard"):
        raise ValueError("--tensorboard needs the package tensorboard; pip install tensorboard")
    with started(config.device, config.timeout) as ranks:
        broken = check_data(config) if config.check and config.data != "scenes" else frozenset()
        items, validation = read_items(config, broken)
        config, model, description = fill_in(config, ranks, len(items)), None, "none"
        if config.weights:
            checkpoint = open_checkpoint(config.weights, config.vae, config.tokenizer, config.raw_weights)
            keeps = config.text_to_image or config.distill  # not widened: a teacher is an editor already
            checkpoint = checkpoint if keeps else widen(checkpoint)
            model = load_model(checkpoint, edits=not config.text_to_image)
            description = "; ".join([f"{config.weights}: {checkpoint.description}",
                                     *apply_loras(model, config.lora_files)])
            if model.defaults["sampler"] == "lcm" and not config.distill:
                description += "; the model loses its ability to edit in few steps, but keeps sampler lcm"
        if model and config.resolution % model.multiple:
            raise ValueError(f"--resolution {config.resolution}: not a multiple of {model.multiple}")
        if ranks.rank == 0:
            print_plan(config, items, validation, ranks.count, description)
        if config.check:
            return
        train(config, model.to(ranks.device), items, validation, ranks)


def train(config: TrainConfig, model, items: list, validation_items: list, ranks) -> None:
    """Fill the cache, prepare trainer and data loader, load the checkpoint, and run the loop."""
    from torch.utils.data import DataLoader

    from nanoip2p.training import run_folder as runs
    from nanoip2p.training.cache import Cache
    from nanoip2p.training.samples import Samples, collate, load_pair, sample_numbers, validation_batches
    from nanoip2p.training.trainer import Trainer, columns_of
    get = partial(load_pair, config.resolution, model.tokenizer)
    if config.cache:
        pairs = [pair for item in items + validation_items for pair in item]
        source = Cache(config.cache, pairs, model, config.resolution, config.flip, config.skip_bad)
        source.fill(model, ranks.rank, ranks.count)
        ranks.largest(0)  # wait for all ranks
        get = source.open().get
    trainer, cuda = Trainer(config, model, ranks, len(items)), ranks.device.type == "cuda"
    first = trainer.load() if config.resume else 0
    if first > config.steps:
        raise ValueError(f"--steps {config.steps}: {config.out} is at step {first} already")
    shape, timesteps = model.latent_shape(config.resolution), model.schedule.num_train_timesteps
    samples = Samples(items, get, config.seed, config.flip, shape, timesteps, config.skip_bad)
    numbers = sample_numbers(first, config.steps, config.accumulate, config.batch_size, ranks.rank,
                             ranks.count)
    workers = config.workers if config.workers is not None else 4 if cuda else 0
    loader = DataLoader(samples, batch_sampler=numbers, num_workers=workers, collate_fn=collate,
                        pin_memory=cuda, worker_init_fn=signals.leave_signals_to_the_parent)
    fixed = Samples(validation_items, get, 0, False, shape, timesteps, config.skip_bad)
    held = validation_batches(fixed, VALIDATION_SAMPLES, config.batch_size) if config.validate_every else ()
    validation = [trainer.to_device(batch) for batch in held]
    chosen = validation_items[:: max(1, len(validation_items) // SHEET_COLUMNS)][:SHEET_COLUMNS]
    columns = columns_of(chosen, config.resolution, config.skip_bad)
    lock = runs.occupied(config.out) if ranks.rank == 0 else nullcontext()
    with lock, signals.stop_between_steps() as stop:
        batches = iter(loader)
        with signals.ending_loaders(batches):
            loop(trainer, batches, validation, columns, first, stop)
    if ranks.rank == 0 and not runs.plot_log(config.out):
        print("pip install matplotlib for loss.png")


def loop(trainer, batches: Iterator[dict], validation: list[dict], columns: list, first: int,
         stop: signals.Stop) -> None:
    """The training loop from step first + 1: train, validate, log, save, draw sample sheets."""
    torch = cli.import_torch()
    from nanoip2p.common.saving import save_png
    from nanoip2p.training import run_folder as runs
    from nanoip2p.training.trainer import Diverged
    config, ranks, recent, saved = trainer.config, trainer.ranks, [], first
    log = runs.Log(config.out, first, config.tensorboard) if ranks.rank == 0 else None
    bar = tqdm(total=config.steps * trainer.batch, initial=first * trainer.batch, unit=" samples",
               disable=None if log else True)  # None: a bar only in a terminal
    began, begun_at = time.perf_counter(), first

    def due(every: int, done: int) -> bool:
        return every > 0 and (done % every == 0 or done == config.steps)

    for done in range(first + 1, config.steps + 1):
        bar.set_description(f"step {done}/{config.steps}")
        try:
            loss = trainer.step(batches, done - 1, stop)
        except (ValueError, KeyboardInterrupt) as error:  # the weights are unchanged, except after AtOnce
            bar.close()
            if done - 1 > saved and not isinstance(error, (Diverged, signals.AtOnce)):
                trainer.save(done - 1)
                ranks.largest(0)  # wait for the checkpoint: torchrun ends all ranks as soon as one ends
            raise
        recent.append(loss)
        bar.update(trainer.batch)
        bar.set_postfix(loss=f"{loss:.4f}")

        memory = {"memory_gb": torch.cuda.max_memory_allocated() / 1e9} if ranks.device.type == "cuda" else {}
        if log and done == first + 1:
            tqdm.write(f"the first step took {time.perf_counter() - began:.1f} s {memory or ''}")
        validate = due(config.validate_every, done)
        row = (stop.interruptible(trainer.validate, validation) if validate else None) or {}
        if due(config.log_every, done):
            pace = (time.perf_counter() - began) / (done - begun_at)
            row |= {"loss": ranks.mean(sum(recent) / len(recent)), "lr": trainer.lr,
                    "grad_norm": trainer.norm, "samples_per_second": trainer.batch / pace,
                    **memory, "seconds_left": pace * (config.steps - done)}
            recent, began, begun_at = [], time.perf_counter(), done
        if row and log:
            log.write({"step": done, **row})
            tqdm.write(f"step {done}: " + ", ".join(f"{name} {number:.4g}" for name, number in row.items()))
        if due(config.save_every, done):
            trainer.save(done)
            saved = done
        draw = columns and log and due(config.sample_every, done)
        if draw and (sheet := stop.interruptible(trainer.sample_sheet, columns)):
            save_png(sheet, config.out / f"samples-{done:06d}.png", {"step": done})
    bar.close()
    if ranks.largest(stop()):
        raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code, see cli.run."""
    with signals.lasting_streams():
        return cli.run(lambda: run(parse(argv)), "stopped; go on with --resume, if there is a checkpoint",
                       "try a smaller --batch-size with more --accumulate, --recompute, --ema-device cpu, or "
                       "--lora 16")


if __name__ == "__main__":
    sys.exit(main())
