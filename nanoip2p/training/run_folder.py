"""The folder of a training run: atomically written checkpoints, the log, and the plot of the log."""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from nanoip2p.checkpoint.tensors import read_tensors, write_tensors
from nanoip2p.common.files import append, locked, read_json, read_jsonl, replacing
from nanoip2p.common.plots import plot

CHECKPOINTS = "checkpoints"
FILES = ("unet", "ema", "exp_avg", "exp_avg_sq")  # raw and averaged weights, Adam's two moments


@contextmanager
def occupied(run: Path) -> Iterator[None]:
    """Lock a run's folder for a `with` block. Raises ValueError if another process holds the lock."""
    with locked(run / ".lock") as held:
        if not held:
            raise ValueError(f"{run} is being trained by another process; wait for it, or stop it")
        yield


def write_checkpoint(run: Path, step: int, files: dict[str, dict[str, Tensor]], state: dict,
                     keep: int) -> None:
    """Write <run>/checkpoints/<step>/ with <name>.safetensors for each of `files`, and state.json.

    Writes to a temporary folder, renames it when all files are on disk, then keeps the newest `keep` only.
    """
    folder = run / CHECKPOINTS / f"{step:07d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, tensors in files.items():
            write_tensors(tensors, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=2))
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        flush(folder.parent)
        flush(run)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # Delete newer checkpoints too: they are damaged, or the run would have resumed from them
    stay = [path for path in checkpoints(run) if path.name <= folder.name][-keep:]
    for other in set(checkpoints(run)) - set(stay):
        shutil.rmtree(other)


def flush(path: Path) -> None:
    """Wait until a file, or the directory entries of a folder, are on disk and survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run / CHECKPOINTS).glob("[0-9]*"))


def newest_checkpoint(run: Path) -> tuple[Path, dict]:
    """The newest undamaged checkpoint and its state.json. Warns about damaged checkpoints.

    Detects missing and truncated files, but not flipped bits. ValueError if no checkpoint is undamaged.
    """
    for folder in reversed(checkpoints(run)):
        try:
            state = read_json(folder / "state.json")
            for name in FILES:
                read_tensors(folder / f"{name}.safetensors")
            return folder, state
        except ValueError as error:
            warnings.warn(f"{error}; going back to the previous checkpoint", stacklevel=2)
    raise ValueError(f"{run} has no checkpoint to resume from; begin the run again without --resume")


class Log:
    """Writes log.jsonl, one row per step with something to log, and optionally a TensorBoard log."""

    def __init__(self, run: Path, first: int, tensorboard: bool = False):
        """Open the log. first: the step from which the run continues; deletes the rows of later steps."""
        self.path = run / "log.jsonl"
        rows = [row for row in read_jsonl(self.path) if row["step"] <= first]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(run / "tensorboard", purge_step=first + 1)

    def write(self, row: dict) -> None:
        """Append a row: {"step": number, name: number, ...}."""
        append(self.path, row)
        if self.board:
            for name, number in row.items():
                self.board.add_scalar(name, number, row["step"])
            self.board.flush()


def plot_log(run: Path) -> bool:
    """Draw loss.png from log.jsonl. Returns False if matplotlib is not installed."""
    rows = read_jsonl(run / "log.jsonl")

    def draw(axes) -> None:
        for key in ("loss", "validation", "validation_ema"):
            found = [row for row in rows if key in row]
            axes.plot([row["step"] for row in found], [row[key] for row in found], marker=".", label=key)

    return plot(run / "loss.png", draw, xlabel="optimizer step", ylabel="mean squared error of the noise",
                yscale="log")
