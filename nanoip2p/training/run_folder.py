"""The folder of a training run: checkpoints that appear whole or not at all, the log, and its plot."""

import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from nanoip2p.checkpoint.tensors import write_tensors
from nanoip2p.common.files import read_json, replacing
from nanoip2p.common.plots import plot

CHECKPOINTS = "checkpoints"


@contextmanager
def occupied(run: Path, first: bool) -> Iterator[None]:
    """Keep other processes out of a run's folder; that of rank 0, the `first`, does it for all of them.

    ValueError when another one is at it. The lock of a process that dies is free, though processes that load
    its data may live on for seconds: they inherit flock's kind of lock, and not this one.
    """
    if not first:
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("a") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{run} is being trained by another process; wait for it, or stop it") from None
        yield


def write_checkpoint(run: Path, step: int, parts: dict[str, Callable[[], dict[str, Tensor]]], state: dict,
                     keep: int, writes: bool = True) -> None:
    """Write <run>/checkpoints/<step>/<part>.safetensors and state.json; the newest `keep` of all stay.

    parts: what gives the tensors of each file, one file after another. All ranks have to call, of which one
    `writes`. Everything is on the disk before the folder gets its name. OSError, with the checkpoints
    before it untouched, when it cannot be written.
    """
    folder = run / CHECKPOINTS / f"{step:07d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    if writes:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        files = {}
        for name, gather in parts.items():
            tensors, file = gather(), temporary / f"{name}.safetensors"
            if writes:
                write_tensors(tensors, file)
                files[file.name] = digest_of(file)
                flush(file)
        if not writes:
            return
        state = {"step": step, "files": files, **state}
        (temporary / "state.json").write_text(json.dumps(state | {"seal": seal_of(state)}, indent=2))
        flush(temporary / "state.json")
        flush(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        flush(folder.parent)
        flush(run)
    finally:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)
    # Later ones were damaged, or this step would not have been taken again; they must not push out sound ones
    stay = [path for path in checkpoints(run) if path.name <= folder.name][-keep:]
    for other in set(checkpoints(run)) - set(stay):
        shutil.rmtree(other)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk and would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def seal_of(state: dict) -> str:
    """SHA-256 of what state.json says."""
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = run / CHECKPOINTS
    return sorted(path for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def newest_checkpoint(run: Path) -> tuple[Path, dict]:
    """The newest checkpoint that is as it was written, and its state.json; damaged ones are warned of.

    ValueError when there is none.
    """
    found = checkpoints(run)
    for folder in reversed(found):
        try:
            state = read_json(folder / "state.json")
            broken = ["state.json"] if state.pop("seal", None) != seal_of(state) else [
                name for name, digest in state["files"].items() if digest_of(folder / name) != digest]
            if not broken:
                return folder, state
            reason = f"{broken[0]} is not as it was written"
        except (ValueError, KeyError, OSError) as error:
            reason = " ".join(str(error).split())
        warnings.warn(f"{folder} is damaged ({reason}); going back to the checkpoint before it", stacklevel=2)
    raise ValueError(f"{run} has no {'sound ' if found else ''}checkpoint; --resume wants the --out of a run "
                     "that has done a step; before that, the command that began it goes on")


class Log:
    """log.jsonl, a row for each event of a run, and the same for TensorBoard where it is wanted."""

    def __init__(self, run: Path, first: int, tensorboard: bool = False):
        """Rows after step `first` are of a future that did not happen; they go."""
        self.path = run / "log.jsonl"
        rows = [row for row in read_log(run) if row["step"] <= first]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.board = board_class()(run / "tensorboard", purge_step=first + 1) if tensorboard else None

    def write(self, row: dict) -> None:
        """Append a row, which has a "step" and numbers by name, seen by readers at once."""
        with self.path.open("a") as file:
            print(json.dumps(row), file=file)
        if self.board:
            for name, number in row.items():
                self.board.add_scalar(name, number, row["step"])
            self.board.flush()


def board_class() -> type:
    """TensorBoard's writer. ValueError when it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package that is missing; pip install tensorboard") from None
    return SummaryWriter


def read_log(run: Path) -> list[dict]:
    """The rows of log.jsonl; a last line that was cut off in the middle is left out."""
    rows, path = [], run / "log.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def plot_log(run: Path) -> bool:
    """log.jsonl -> loss.png: training loss, validation with raw and with averaged weights.

    False when matplotlib is not installed.
    """
    rows = read_log(run)
    labels = {"loss": "training", "validation": "validation", "validation_ema": "validation, averaged"}

    def draw(axes) -> None:
        for key, label in labels.items():
            seen = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot([step for step, _ in seen], [loss for _, loss in seen], label=label, linewidth=1,
                      marker="" if key == "loss" and len(seen) > 20 else ".")

    return plot(run / "loss.png", draw, xlabel="optimizer step", ylabel="mean squared error of the noise",
                yscale="log")
