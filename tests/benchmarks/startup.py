"""CPU time and peak memory from the shell to the end: an edit of one step, and --help, beside `import torch`.

    python tests/benchmarks/startup.py --repeat 7

Every turn runs each command once, as a process of its own, and divides its CPU time (user and system) by that
of `import torch` in the same turn. Prints the median of the ratios (smallest to largest).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EDIT = ["--input", "weights/nano-ip2p/examples/rocket.png", "--edit", "make it night", "--steps", "1",
        "--seed", "0", "--device", "cpu"]
HELP = ["sample.py", "train.py", "make_dataset.py", "make_dataset.py pairs", "-m nanoip2p",
        "-m nanoip2p.checkpoint", "-m nanoip2p.evaluate"]


def cost(words: list[str]) -> tuple[float, float]:
    """CPU seconds and peak MB of `python words`."""
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, words
    return used.ru_utime + used.ru_stime, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=7)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        commands = {"import torch": ["-c", "import torch"],
                    "an edit of one step": ["sample.py", *EDIT, "--output", f"{folder}/night.png"]}
        commands |= {f"{words} --help": [*words.split(), "--help"] for words in HELP}
        turns = [{name: cost(words) for name, words in commands.items()} for _ in range(args.repeat)]
    print(f"{'':<34}{'CPU s':>7}{'x import torch':>20}{'peak MB':>9}")
    for name in commands:
        seconds, megabytes = (statistics.median(turn[name][k] for turn in turns) for k in (0, 1))
        ratios = [turn[name][0] / turn["import torch"][0] for turn in turns]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{name:<34}{seconds:>7.2f}{spread:>20}{megabytes:>9.0f}")


if __name__ == "__main__":
    main()
