"""Helpers that all commands use: parsers, flags with checked values, one-line errors."""

import argparse
import dataclasses
import gc
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from nanoip2p import __version__
from nanoip2p.common.schema import checked, shown

# Choices of flags. They repeat keys of tables in modules that import torch: --help should not wait for torch
SAMPLERS = ("ddim", "dpmpp_2m", "euler", "euler_ancestral", "lcm")
DTYPES = ("bf16", "fp16", "fp32")
MODES = ("self", "cross", "both", "none")
LETTERS = 500  # maximum number of characters in a message
# What Python, the system, torch (on CPU, CUDA and MPS), cuBLAS and cuDNN say when memory runs out
NO_MEMORY = re.compile("out of memory|allocate memory|not enough memory|bad_alloc|_ALLOC_FAILED")
SWITCH = argparse.BooleanOptionalAction  # adds --no-FLAG beside --FLAG, to override a preset


def import_torch():
    """Import torch and return it. This takes seconds; Ctrl-C ends the process without a traceback.

    The signal handler exits, because torch's C code, which imports numpy, loses a KeyboardInterrupt. The
    garbage collector skips torch's objects, because they stay until the process ends. This saves 0.5 s.
    """
    if "torch" not in sys.modules:
        before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        gc.disable()
        try:
            import torch  # noqa: F401
            gc.freeze()
        finally:
            gc.enable()
            signal.signal(signal.SIGINT, before)
    return sys.modules["torch"]


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Appends each flag's default to its help, and keeps the line breaks of the description."""

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = action.default is None or action.default is False or action.default == []
        return action.help if hidden else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Raises a one-line ValueError for a wrong flag, instead of exiting."""

    def error(self, message: str):
        """Called for a wrong flag."""
        raise ValueError(f"{message} (see --help)")

    def parse_known_args(self, args=None, namespace=None):
        """Parse the words of a command line. Refuses `--` as the value of a flag, and a second `--`."""
        words = sys.argv[1:] if args is None else args
        odd = [word for word in words if word[:1] == "-" and word.partition("=")[2] == "--"]
        if odd or words.count("--") > 1:  # argparse would turn the value "--" into an empty list
            self.error(f"{odd[0]}: -- cannot be a value" if odd else "a second -- cannot be a value")
        return super().parse_known_args(args, namespace)


def make_parser(**settings) -> argparse.ArgumentParser:
    """A Parser with --version."""
    parser = Parser(allow_abbrev=False, formatter_class=HelpWithDefaults, **settings)
    parser.add_argument("--version", action="version", version=f"nanoip2p {__version__}")
    parser.register("type", Path, path)
    return parser


def path(text: str) -> Path:
    """An argparse type for paths. Refuses an empty text, which Path reads as the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def flag(help: str, default=None, **options):
    """A dataclass field for add_settings. options: of add_argument, or `group`, the title of a new group."""
    return dataclasses.field(default=default, metadata={"help": help, **options})


def add_settings(parser: argparse.ArgumentParser, settings: type) -> None:
    """Add a flag for each `flag` field of a dataclass. parse_args omits flags that the user did not give."""
    group = parser
    for field in dataclasses.fields(settings):
        options = dict(field.metadata)
        if "group" in options:
            group = parser.add_argument_group(options.pop("group"))
        if field.default is False:
            options.setdefault("action", "store_true")
        elif field.default not in (None, ""):
            options["help"] += f" (default: {field.default})"
        group.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, **options)


def between(low: float, high: float = math.inf, kind: type = float) -> Callable[[str], float]:
    """An argparse type: a finite number of `kind` (int or float) from `low` to `high`."""
    wanted = f"{'whole ' * (kind is int)}number" + f" from {low}" * (low > -math.inf)
    wanted += f" to {high:,}" if high < 2**63 - 1 else " up" * (low > -math.inf)

    def number(text: str) -> float:
        with suppress(ValueError):
            if low <= kind(text) <= high and math.isfinite(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a {wanted}")
    return number


def at_least(lowest: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """An argparse type: an integer from `lowest` to `most`."""
    return between(lowest, most, int)


finite = between(-math.inf)
pixels = at_least(1, 10_000)  # the length of a side; images.MAX_MEGAPIXELS is 10,000 x 10,000 pixels


def split(given: str) -> tuple[Path, float]:
    """"FILE" -> (file, 1.0). "FILE:weight" -> (file, weight). ValueError if the weight is not a number."""
    name, colon, weight = given.rpartition(":")
    if not given or given.startswith(":"):
        raise ValueError("--lora needs a file, or FILE:weight")
    if not colon or Path(given).exists():  # the name itself may have a colon
        return Path(given), 1.0
    try:
        return Path(name), checked(float(weight), float, "weight")
    except ValueError:
        raise ValueError(f"--lora {given}: there is no such file, and {shown(weight)} is no weight; write "
                         "FILE or FILE:weight, such as style.safetensors:0.8") from None


def one_line(message) -> str:
    """A message as one line of at most LETTERS. Escapes control characters, which could change a terminal."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(message).split()))
    half = LETTERS // 2 - 2
    return text if len(text) <= LETTERS else f"{text[:half]} … {text[-half:]}"  # advice is at the end


def say(*messages) -> None:
    """Print messages to stderr, each as one line."""
    sys.stderr.writelines(f"{one_line(message)}\n" for message in messages)


def advised(error: Exception, memory: str) -> str:
    """The line for an error; `memory` if memory ran out. Raises any other RuntimeError: it is our fault."""
    ran_out = isinstance(error, MemoryError) or NO_MEMORY.search(str(error))
    if isinstance(error, RuntimeError) and not ran_out:
        raise error
    advice = "; ask its owner for the right to use it" * isinstance(error, PermissionError)
    return memory if ran_out else one_line(f"{error}{advice}")


def run(work: Callable[[], None], interrupted: str, memory: str) -> int:
    """Do the work. Returns 0, 130 after Ctrl-C or SIGTERM, or 2 after an error that the user can fix.

    interrupted: the message after a signal. memory: the advice when memory runs out.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers end jobs with SIGTERM
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: say(f"note: {message}")
            work()
        return 0
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        print(f"error: {advised(error, f'out of memory; {memory}')}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --vae, --tokenizer and --raw-weights of `open_checkpoint`. sample.py and train.py add their own."""
    parser.add_argument("--vae", help="use this autoencoder instead of the checkpoint's: a file or folder")
    parser.add_argument("--tokenizer", help="tokenizer of a single-file checkpoint: a folder or Hub name")
    parser.add_argument("--raw-weights", action=SWITCH,
                        help="use raw weights, not averaged (EMA) ones; default: raw if the EMA is stale")
