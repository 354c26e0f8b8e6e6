"""Give mutated inputs to every reader: `python tests/fuzz/fuzz.py --n 100000 --seed 1`, or `make fuzz`.

An input passes if the reader accepts it, or refuses it as the scripts do (exit code 2, one line of at most
500 printable characters), within SECONDS and MEGABYTES. It must not write outside its folder, start a
program or make a connection.
"""

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(path) for path in (
    TESTS / "helpers", TESTS.parent / "weights", TESTS.parent, TESTS / "fuzz")]

import torch  # noqa: E402
from mutators import change_file  # noqa: E402
from readers import READERS  # noqa: E402

from nanoip2p.common import cli  # noqa: E402

SECONDS, MEGABYTES, LETTERS = 10, 500, 500  # 100 megapixels, which are allowed, take 400 MB with alpha
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
watch = {"folder": None, "problem": None}  # of the input that is being read


class Hang(BaseException):
    """The reader took longer than SECONDS."""


def hook(event: str, args: tuple) -> None:
    """Note what an input must not cause."""
    if not watch["folder"]:
        return
    if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & WRITING:
        written = args[0]
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        written = args[1] if event == "os.rename" else args[0]
        if event in ("os.remove", "os.rmdir") and args[1] != -1:  # shutil.rmtree names open folders
            written = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), os.fsdecode(written))
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect",
                   "socket.getaddrinfo"):
        watch["problem"] = f"{event} {args!r:.100}"
        return
    else:
        return
    path = os.path.realpath(os.fsdecode(written)) if not isinstance(written, int) else watch["folder"]
    if not path.startswith((watch["folder"], "/dev/null")):
        watch["problem"] = f"{event} outside its folder: {path}"


def expire(*_) -> None:
    """The handler of the timer."""
    raise Hang


def problem_of(read, folder: Path) -> str | None:
    """Read the files in `folder` as a command does; what went wrong, or None."""
    out, err = io.StringIO(), io.StringIO()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    watch.update(folder=os.path.realpath(folder), problem=None)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.run(lambda: read(folder), "interrupted", "less memory")
    except Hang:
        return f"takes more than {SECONDS} s"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        watch["folder"] = None
    if watch["problem"]:
        return watch["problem"]
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if used > MEGABYTES:
        return f"takes {used:.0f} MB"
    text = out.getvalue() + err.getvalue()
    last = err.getvalue().strip("\n").rsplit("\n", 1)[-1]
    if code not in (0, 2) or code == 2 and not last.startswith("error: "):
        return f"exit code {code}: {text!r:.300}"
    # tqdm moves the cursor with \r; everything else is data
    if "less memory" in last:  # what this file's cli.run advises
        return "runs out of memory"
    bad = [letter for letter in text if not letter.isprintable() and letter not in "\n\r"]
    if bad:
        return f"prints {bad[0]!r}: {text!r:.300}"
    if len(last) > LETTERS + 7:
        return f"a message of {len(last)} letters: {last:.100}"
    return "slow" if time.monotonic() - began > SECONDS else None


class Fuzzer:
    """The valid inputs, written once, and the mutations of them."""

    def __init__(self, root: Path, only: list[str] | None = None):
        signal.signal(signal.SIGALRM, expire)
        self.root, self.readers = root, {name: READERS[name] for name in only or READERS}
        for i, (write, _) in enumerate(self.readers.values()):
            (root / f"valid-{i}").mkdir()
            write(root / f"valid-{i}")

    def folder(self, name: str) -> Path:
        """A fresh copy of the valid input of a reader."""
        target = self.root / "input"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.root / f"valid-{list(self.readers).index(name)}", target)
        return target

    def try_one(self, name: str, seed: str) -> str | None:
        """Change one or two files of a valid input; what went wrong, or None."""
        rng, folder = random.Random(f"{name} {seed}"), self.folder(name)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        text = [path for path in files if path.suffix != ".safetensors"] or files
        for _ in range(rng.choice((1, 1, 1, 2))):
            path = rng.choice(text if rng.random() < 0.8 else files)
            if path.is_file():  # the first of two changes can make it something else
                change_file(path, rng)
        return problem_of(self.readers[name][1], folder)


def fuzz(n: int, seed: int, fuzzer: Fuzzer, progress: bool = False) -> list[tuple]:
    """Try `n` inputs, the readers in turn. Returns (reader, seed, what went wrong) of the failures."""
    torch.set_num_threads(1)
    if "hooked" not in watch:
        sys.addaudithook(hook)
        watch["hooked"] = True
    failures, names = [], list(fuzzer.readers)
    for k in range(n):  # without a bar: tqdm moves the bars of readers below it
        if progress and k % 1000 == 0:
            print(f"{k} of {n} inputs, {len(failures)} failures", file=sys.stderr)
        name = names[k % len(names)]
        if problem := fuzzer.try_one(name, f"{seed} {k}"):
            failures.append((name, f"{seed} {k}", problem))
    return failures


def main(argv: list[str] | None = None) -> int:
    """Print the failures by kind; exit code 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=READERS)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as root:
        failures = fuzz(args.n, args.seed, Fuzzer(Path(root), args.only), True)
    kinds, first = Counter(), {}
    for name, seed, problem in failures:
        lines = problem.strip().splitlines()
        places = [line.split("/main/")[-1] for line in lines if "File " in line and "nanoip2p/" in line]
        kind = name, (places or [""])[-1].strip(), lines[-1][:110]
        kinds[kind] += 1
        first.setdefault(kind, seed)
    for kind, count in kinds.most_common():
        print(f"{count:5} {' | '.join(kind)} | seed {first[kind]}")
    print(f"{len(failures)} of {args.n} inputs failed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
