"""Seconds and memory for opening and converting a full-size checkpoint, compared with diffusers.

    python tests/benchmarks/load.py             # random Stable Diffusion 1.5 editor; 13 GB of disk, minutes

Every run is a process of its own; our runs and diffusers' alternate. Memory is the growth since the start of
the process: "anonymous" memory cannot be dropped, "resident" adds the pages of mapped files, which the system
drops when it needs them. For loading, memory is given in multiples
of the size of all weights; for a conversion, of the largest tensor.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "weights")]

from tiny_configs import tiny_unet  # noqa: E402
from train_tokenizer import train_tokenizer  # noqa: E402

from nanoip2p.checkpoint.load import load_model, open_checkpoint  # noqa: E402
from nanoip2p.checkpoint.save import convert, save_parts  # noqa: E402
from nanoip2p.checkpoint.single_file import PARTS  # noqa: E402
from nanoip2p.clip import CLIPTextConfig  # noqa: E402
from nanoip2p.diffusion import NoiseSchedule  # noqa: E402
from nanoip2p.unet import UNet, UNetConfig  # noqa: E402
from nanoip2p.vae import VAEConfig  # noqa: E402


def make_editor(folder: Path) -> None:
    """Write a full-size editor with random weights: folders in fp32 and fp16, a single file in fp16."""
    networks = [cls(config) for cls, config in zip(
        PARTS.values(), (UNetConfig(in_channels=8), VAEConfig(), CLIPTextConfig()))]
    train_tokenizer(["make it night"] * 3, 600, folder / "tokenizer")
    save_parts(folder / "fp32", *networks, folder / "tokenizer", NoiseSchedule().to_json(), {})
    shutil.copytree(folder / "tokenizer", folder / "single" / "tokenizer")
    checkpoint = open_checkpoint(folder / "fp32")
    convert(checkpoint, folder / "fp16", torch.float16)
    convert(checkpoint, folder / "single" / "model.safetensors", torch.float16)


def memory(*keys: str) -> int:
    """The sum of these lines of /proc/self/status, in bytes."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return sum(1024 * int(lines[key].split()[0]) for key in keys)


def measure(work) -> dict:
    """Seconds of work(), and its highest memory above the start, sampled every 2 ms."""
    peak = {"anonymous": 0, "resident": 0}
    before = {"anonymous": memory("RssAnon"), "resident": memory("RssAnon", "RssFile")}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            for name, keys in (("anonymous", ["RssAnon"]), ("resident", ["RssAnon", "RssFile"])):
                peak[name] = max(peak[name], memory(*keys) - before[name])

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    del result
    return {"seconds": seconds, **peak}


def load_ours(path: Path):
    return load_model(path)


def load_diffusers(path: Path):
    import diffusers
    return diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(path, torch_dtype=torch.float32)


def to_single(path: Path):
    convert(open_checkpoint(path), path.parent / "converted.safetensors", torch.float16)


def rewrite(path: Path):
    convert(open_checkpoint(path), path.parent / "rewritten.safetensors")


CASES = {
    "load fp32 folder, ours": (load_ours, "fp32"), "load fp32 folder, diffusers": (load_diffusers, "fp32"),
    "load fp16 folder as fp32, ours": (load_ours, "fp16"),
    "load fp16 folder as fp32, diffusers": (load_diffusers, "fp16"),
    "load fp16 single file as fp32, ours": (load_ours, "single/model.safetensors"),
    "convert fp32 folder to fp16 file": (to_single, "fp32"),
    "convert fp16 file to fp16 file": (rewrite, "single/model.safetensors"),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="of the random editor, made if missing (temporary)")
    parser.add_argument("--case", nargs=2, help="(one run, in a process of its own)")
    args = parser.parse_args(argv)
    if args.case:
        work, path = CASES[args.case[0]]
        if work is load_diffusers:
            import diffusers
            assert diffusers.StableDiffusionInstructPix2PixPipeline  # imported before the clock starts
        with torch.device("meta"):
            UNet(tiny_unet())  # so that torch's imports do not count as memory of loading
        print(json.dumps(measure(lambda: work(Path(args.case[1]) / path))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "single" / "model.safetensors").exists():
            make_editor(folder)
        weights = open_checkpoint(folder / "fp32").networks.values()
        tensors = [tensor for network in weights for tensor in network.read().values()]
        size, largest = 4 * sum(t.numel() for t in tensors), 4 * max(t.numel() for t in tensors)
        print(f"weights {size / 1e9:.2f} GB in fp32, largest tensor {largest / 1e6:.0f} MB")
        runs = {name: [] for name in CASES}
        for _ in range(args.repeat):
            for name in CASES:
                command = [sys.executable, __file__, "--case", name, str(folder)]
                runs[name].append(json.loads(subprocess.check_output(command).splitlines()[-1]))
        print(f"{'':<38}{'seconds (min-max)':>22}{'anonymous':>12}{'resident':>12}")
        for name, rows in runs.items():
            seconds = sorted(row["seconds"] for row in rows)
            unit, word = (size, "x weights") if name.startswith("load") else (largest, "x largest")
            peaks = [f"{statistics.median(row[key] for row in rows) / unit:8.2f}" for key in
                     ("anonymous", "resident")]
            spread = f"{statistics.median(seconds):.1f} ({seconds[0]:.1f}-{seconds[-1]:.1f})"
            print(f"{name:<38}{spread:>22}{peaks[0]:>12}{peaks[1]:>12} {word}")


if __name__ == "__main__":
    main()
