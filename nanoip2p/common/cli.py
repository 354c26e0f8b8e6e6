"""What all commands share: flags that check themselves, and mistakes told in one line."""

import argparse
import math
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def make_parser(**settings) -> argparse.ArgumentParser:
    """An ArgumentParser whose complaints are ValueErrors of one line; argparse prints the usage first."""
    parser = argparse.ArgumentParser(allow_abbrev=False, **settings)

    def fail(message: str):
        raise ValueError(f"{message} (see --help)")

    parser.error = fail
    return parser


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def at_least(lowest: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `lowest` up."""
    def number(text: str) -> int:
        if not text.isascii() or not text.removeprefix("-").isdigit() or not lowest <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {lowest} up")
        return int(text)
    return number


def finite(text: str) -> float:
    """An argparse type: a number that is neither NaN nor infinite."""
    try:
        if math.isfinite(float(text)):
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number")


def run(work: Callable[[], None], interrupted: str, memory: str) -> int:
    """Do the work and return the exit code: 0; 2 for what a person can put right, told in one line; 130.

    interrupted: what Ctrl-C leaves behind. memory: what to try when memory runs out.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
            work()
        return 0
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}"
        if isinstance(error, MemoryError) or "out of memory" in message or "allocate memory" in message:
            message = f"out of memory; {memory}"
        elif isinstance(error, RuntimeError):
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


@contextmanager
def stop_between_steps() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C (or a SIGTERM) has come; the third Ctrl-C does not wait.

    In the middle of a step, weights, optimizer and average do not belong together; between two they do.
    """
    pressed = []

    def press(number: int, _frame) -> None:
        pressed.append(number)
        if pressed.count(signal.SIGINT) > 2:  # the second may be torchrun's, which passes it on
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, press) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(pressed)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def leave_signals_to_the_parent(_worker: int) -> None:
    """For processes that load data: Ctrl-C reaches them, too, and they have to outlive its work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of open_checkpoint, for every script that opens one."""
    parser.add_argument("--vae", help="autoencoder to use instead of the checkpoint's: a file or folder")
    parser.add_argument("--tokenizer", help="its folder or name on the Hub, where a single file stands alone")
    parser.add_argument("--raw-weights", action="store_true", default=None,
                        help="of a file with averaged (EMA) weights, take the others")
