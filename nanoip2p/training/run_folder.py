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
from nanoip2p.common import files
from nanoip2p.common.plots import plot
from nanoip2p.common.schema import checked, checked_rows

CHECKPOINTS = "checkpoints"
FILES = ("unet", "ema", "exp_avg", "exp_avg_sq")  # raw and averaged weights, Adam's two moments
STATE = {"step": int, "batch": int, "items": int, "settings": dict}  # of state.json
LARGEST = 2**53  # up to here, float64 and all JSON readers keep whole numbers exact


def check_folder(run: Path) -> None:
    """Raise ValueError if a path that a run writes is a link, or of the wrong kind (file or folder)."""
    single = [run / ".lock", run / "log.jsonl", run / "loss.png", run / "lora.safetensors",
              run / "lora-kohya.safetensors", *run.glob("samples-*.png")]
    weights, saved = run / "weights", run / CHECKPOINTS
    parts = [weights / name for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")]
    for path in (run, saved, *saved.glob("[0-9]*"), *saved.glob(".[0-9]*"), weights, *parts,
                 run / "tensorboard", *single):
        kind, is_link = "file" if path in single else "folder", path.is_symlink() and path != run
        if is_link or os.path.lexists(path) and not (path.is_file() if path in single else path.is_dir()):
            raise ValueError(f"{path} is {'a link' if is_link else 'no ' + kind}; a run writes a {kind} of "
                             f"this name; move {path.name} away, or name another folder")


@contextmanager
def occupied(run: Path) -> Iterator[None]:
    """Lock a run's folder for a `with` block. Raises ValueError if another process holds the lock."""
    with files.locked(run / ".lock") as held:
        if not held:
            raise ValueError(f"{run} is being trained by another process; wait for it, or stop it")
        yield


def write_checkpoint(run: Path, step: int, content: dict[str, dict[str, Tensor]], state: dict,
                     keep: int) -> None:
    """Write <run>/checkpoints/<step>/ with <name>.safetensors for each of `content`, and state.json.

    The folder gets its name when all files are on disk. Then deletes all checkpoints but the newest `keep`.
    """
    folder = run / CHECKPOINTS / f"{step:07d}"
    for broken in (folder, *folder.parent.glob(".*.tmp")):  # left by a run that was killed, or damaged
        shutil.rmtree(broken, ignore_errors=True)
    with files.replacing(folder) as temporary:
        temporary.mkdir()
        for name, tensors in content.items():
            write_tensors(tensors, temporary / f"{name}.safetensors")
        files.write_json({"step": step, **state}, temporary / "state.json")
        for path in (*temporary.iterdir(), temporary):
            flush(path)
    flush(folder.parent)
    flush(run)
    # Delete checkpoints of later steps too: they are damaged, else the run would have resumed from them
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
            state = files.read_json(folder / "state.json")
            for key, kind in STATE.items():
                checked(state.get(key), kind, f"{folder / 'state.json'}: {key}", 1, LARGEST)
            for name in FILES:
                read_tensors(folder / f"{name}.safetensors")
            return folder, state
        except ValueError as error:
            warnings.warn(f"{error}; going back to the previous checkpoint", stacklevel=2)
    raise ValueError(f"{run} has no checkpoint to resume from; begin the run again without --resume")


def read_log(run: Path) -> list[dict]:
    """The rows of log.jsonl. ValueError if a row has no step, or a value that is no number."""
    path = run / "log.jsonl"
    rows = checked_rows(path, {"step": (int, 0, LARGEST)})
    for number, row in enumerate(rows, 1):
        for name, value in row.items():
            if not isinstance(value, float):  # a validation loss can be NaN
                checked(value, int, f"{path}, row {number}: {name}", -LARGEST, LARGEST)
    return rows


class Log:
    """Writes log.jsonl and optionally a TensorBoard log. Only steps with something to log have a row."""

    def __init__(self, run: Path, first: int, tensorboard: bool = False):
        """Open the log, and delete the rows of steps after `first`, from which the run continues."""
        self.path = run / "log.jsonl"
        rows = [row for row in read_log(run) if row["step"] <= first]
        with files.replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(run / "tensorboard", purge_step=first + 1)

    def write(self, row: dict) -> None:
        """Append a row: {"step": number, name: number, ...}."""
        files.append(self.path, row)
        if self.board:
            for name, number in row.items():
                self.board.add_scalar(name, number, row["step"])
            self.board.flush()


def plot_log(run: Path) -> bool:
    """Draw loss.png from log.jsonl. Returns False if matplotlib is not installed."""
    rows = read_log(run)

    def draw(axes) -> None:
        for key, label in (("loss", "training"), ("validation", "validation"),
                           ("validation_ema", "validation, averaged")):
            found = [row for row in rows if key in row]
            axes.plot([row["step"] for row in found], [row[key] for row in found], marker=".", label=label)

    return plot(run / "loss.png", draw, xlabel="optimizer step", ylabel="mean squared error", yscale="log")
