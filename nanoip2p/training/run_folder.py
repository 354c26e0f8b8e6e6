"""The folder of a training run: checkpoints, which are complete or absent; the log, and its plot."""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from nanoip2p.checkpoint.tensors import write_tensors
from nanoip2p.common.files import append, locked, read_json, read_jsonl, replacing
from nanoip2p.common.plots import plot

CHECKPOINTS = "checkpoints"


@contextmanager
def occupied(run: Path) -> Iterator[None]:
    """Lock a run's folder. ValueError if another process has it."""
    with locked(run / ".lock") as held:
        if not held:
            raise ValueError(f"{run} is being trained by another process; wait for it, or stop it")
        yield


def adam_moments(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Adam's "exp_avg" and "exp_avg_sq", each by the names of the network's weights; zero before a step."""
    return {moment: {name: optimizer.state[weight][moment] if weight in optimizer.state
                     else torch.zeros_like(weight) for name, weight in network.named_parameters()}
            for moment in ("exp_avg", "exp_avg_sq")}


def load_adam_moments(optimizer: torch.optim.Optimizer, network: nn.Module, step: int,
                      moments: dict[str, dict[str, Tensor]]) -> None:
    """The opposite of `adam_moments`, for an optimizer that has taken `step` steps."""
    state = {i: {"step": torch.tensor(float(step)),  # moments in the weight's dtype and memory format
                 **{key: torch.empty_like(weight).copy_(moment[name]) for key, moment in moments.items()}}
             for i, (name, weight) in enumerate(network.named_parameters())}
    groups = [group | {"params": list(state)} for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def write_checkpoint(run: Path, step: int, files: dict[str, dict[str, Tensor]], state: dict,
                     keep: int) -> None:
    """Write <run>/checkpoints/<step>/ with <name>.safetensors for each of `files`, and state.json.

    The folder gets its name when everything is on the disk. Then all but the newest `keep` checkpoints are
    deleted. OSError if it cannot be written; the checkpoints before it stay.
    """
    folder = run / CHECKPOINTS / f"{step:07d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        digests = {}
        for name, tensors in files.items():
            file = temporary / f"{name}.safetensors"
            write_tensors(tensors, file)
            digests[file.name] = digest_of(file)
            flush(file)
        state = {"step": step, "files": digests, **state}
        (temporary / "state.json").write_text(json.dumps(state | {"seal": seal_of(state)}, indent=2))
        flush(temporary / "state.json")
        flush(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        flush(folder.parent)
        flush(run)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # Newer checkpoints are damaged, or this step would not have been taken again: do not count them
    stay = [path for path in checkpoints(run) if path.name <= folder.name][-keep:]
    for other in set(checkpoints(run)) - set(stay):
        shutil.rmtree(other)


def flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk and would survive a power cut."""
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
    """SHA-256 of the content of state.json."""
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = run / CHECKPOINTS
    return sorted(path for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def newest_checkpoint(run: Path, tensors: bool = True) -> tuple[Path, dict]:
    """The newest checkpoint that is intact, and its state.json; warns of damaged ones.

    tensors: False checks state.json only, which takes no time. ValueError if there is none.
    """
    found = checkpoints(run)
    for folder in reversed(found):
        try:
            state = read_json(folder / "state.json")
            broken = ["state.json"] if state.pop("seal", None) != seal_of(state) else [
                name for name, digest in state["files"].items()
                if tensors and digest_of(folder / name) != digest]
            if not broken:
                return folder, state
            reason = f"{broken[0]} has changed since it was written"
        except (ValueError, KeyError, OSError) as error:
            reason = " ".join(str(error).split())
        warnings.warn(f"{folder} is damaged ({reason}); going back to the checkpoint before it", stacklevel=2)
    raise ValueError(f"{run} has no {'intact ' if found else ''}checkpoint; --resume needs the --out of a "
                     "run that has saved one. Before that, the command that began the run begins it again")


class Log:
    """log.jsonl, one row per event, and the same for TensorBoard if wanted."""

    def __init__(self, run: Path, first: int, tensorboard: bool = False):
        """Deletes the rows after step `first`, at which the run continues."""
        self.path = run / "log.jsonl"
        rows = [row for row in read_jsonl(self.path) if row["step"] <= first]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.board = board_class()(run / "tensorboard", purge_step=first + 1) if tensorboard else None

    def write(self, row: dict) -> None:
        """Append a row: "step", and numbers by name."""
        append(self.path, row)
        if self.board:
            for name, number in row.items():
                self.board.add_scalar(name, number, row["step"])
            self.board.flush()


def board_class() -> type:
    """TensorBoard's writer. ValueError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package that is missing; pip install tensorboard") from None
    return SummaryWriter


def plot_log(run: Path) -> bool:
    """Draw loss.png from log.jsonl; False if matplotlib is not installed."""
    rows = read_jsonl(run / "log.jsonl")
    labels = {"loss": "training", "validation": "validation", "validation_ema": "validation, averaged"}

    def draw(axes) -> None:
        for key, label in labels.items():
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot([step for step, _ in points], [loss for _, loss in points], label=label, linewidth=1,
                      marker="" if key == "loss" and len(points) > 20 else ".")

    return plot(run / "loss.png", draw, xlabel="optimizer step", ylabel="mean squared error of the noise",
                yscale="log")
