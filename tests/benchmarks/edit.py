"""Seconds and memory of one edit: ours, ours with --fast, diffusers' and (if installed) OpenVINO's.

    OMP_NUM_THREADS=1 python tests/benchmarks/edit.py --width half --latents 32 --steps 1 --repeat 5
    python tests/benchmarks/edit.py --width full --latents 64 --steps 100 --dtype bf16      # on a GPU
    OMP_NUM_THREADS=1 python tests/benchmarks/edit.py --width full --steps 20 --repeat 1 --deep-every 2 3 5

A UNet like Stable Diffusion 1.5's with random weights runs as an Editor and as diffusers' own pipeline. The
autoencoder and the text encoder are so small that they hardly count. First the pictures are compared: in fp32
they must agree with diffusers' to one level of 255; in half precision our error against fp32 may be at most
1.25 times diffusers' error plus one level. Then the runs alternate. "matrix": operations a second, relative
to one large matrix product. "copy": bytes a second, relative to one large copy. Both count the work of the
plain network, so a run that saves work can exceed 100%. With --deep-every, only edits with whole steps and
edits with kept deep features alternate.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "weights")]

import measure  # noqa: E402
from comparing import randomise  # noqa: E402
from tiny_editor import write_tiny_editor  # noqa: E402

from nanoip2p.checkpoint.tensors import DTYPES  # noqa: E402
from nanoip2p.editor import Editor  # noqa: E402
from nanoip2p.speed.fast import speed_up  # noqa: E402
from nanoip2p.unet import UNet, UNetConfig  # noqa: E402

WIDTHS = {"tiny": 32, "half": 160, "full": 320}  # channels of the first level
GUIDANCE = (2.0, 1.3)  # low, because random networks amplify every difference


def make_editors(folder: Path, width: int, device: str, dtype: torch.dtype, alone: bool = False) -> dict:
    """Editors and pipelines by name, all with the same weights. alone: only ours."""
    write_tiny_editor(folder)
    widths = (width, 2 * width, 4 * width, 4 * width)
    config = UNetConfig(8, block_out_channels=widths, cross_attention_dim=32)
    plain = Editor.load(folder, device, dtype)
    plain.unet = randomise(UNet(config)).to(device, dtype)
    if alone:
        return {"ours": plain}
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline
    peer = pipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    with torch.device("meta"):
        peer.unet = diffusers.UNet2DConditionModel.from_config(config.to_json()).eval()
    peer.unet.load_state_dict(plain.unet.state_dict(), assign=True)
    peer.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)
    editors = {"diffusers": peer}
    for name, fast in (("ours", False), ("ours, fast", True)):
        editors[name] = copy.copy(plain)
        editors[name].unet, editors[name].vae = copy.deepcopy(plain.unet), copy.deepcopy(plain.vae)
        began = time.process_time()
        speed_up(editors[name], fast, print)
        print(f"{name}: prepared in {time.process_time() - began:.1f} CPU s, besides the first step")
    if device == "cpu" and dtype == torch.float32 and (network := openvino_unet(peer.unet)):
        editors["OpenVINO"] = copy.copy(peer)
        editors["OpenVINO"].unet = network
    if device == "cuda":
        editors["diffusers, compiled"] = copy.copy(peer)
        editors["diffusers, compiled"].unet = torch.compile(copy.deepcopy(peer.unet), mode="max-autotune")
    return editors


def openvino_unet(unet: torch.nn.Module) -> torch.nn.Module | None:
    """The UNet as OpenVINO runs it, in float32 on one thread; None, and a line, if it is not installed."""
    try:
        import openvino
    except ModuleNotFoundError:
        print("OpenVINO is not installed (pip install openvino): its row is left out")
        return None

    class Compiled(torch.nn.Module):
        config, dtype, device = unet.config, torch.float32, torch.device("cpu")

        def forward(self, latents, timestep, encoder_hidden_states, **_) -> tuple[torch.Tensor]:
            if latents.shape not in compiled:
                given = latents, timestep.reshape(()), encoder_hidden_states
                shapes = [one.shape for one in given]
                model = openvino.convert_model(Plain(), example_input=given, input=shapes)
                compiled[latents.shape] = openvino.compile_model(model, "CPU", {
                    "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()})
            run = compiled[latents.shape]
            return (torch.from_numpy(run([latents, timestep.reshape(()), encoder_hidden_states])[0].copy()),)

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, latents, timestep, text):
            return self.unet(latents, timestep, text, return_dict=False)[0]

    compiled = {}
    return Compiled()


def edit(editor, picture: Image.Image, steps: int, deep_every: int = 1) -> np.ndarray:
    if isinstance(editor, Editor):
        [made] = editor.edit([picture], ["make it night"], steps, *GUIDANCE, seed=3,
                             sampler="euler_ancestral", resolution=picture.width, deep_every=deep_every)
    else:
        [made] = editor("make it night", picture, num_inference_steps=steps, guidance_scale=GUIDANCE[0],
                        image_guidance_scale=GUIDANCE[1], generator=torch.Generator().manual_seed(3)).images
    return np.asarray(made, dtype=float)


def check(pictures: dict, exact: dict) -> str:
    """The errors against diffusers in fp32, in words. ValueError if they are too large. exact: in fp32."""
    apart = {name: np.abs(exact[name] - exact["diffusers"]).max() for name in exact}
    if max(apart.values()) > 1:
        raise ValueError(f"not the same pictures, so the times would mean nothing: {apart}")
    off = {name: np.sqrt(np.mean((pictures[name] - exact["diffusers"]) ** 2)) for name in pictures}
    if max(off.values()) > 1.25 * off["diffusers"] + 1:
        raise ValueError(f"some pictures are much farther from fp32 than others: {off}")
    return "; ".join(f"{name} {off[name]:.2f}" for name in off)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", choices=WIDTHS, default="tiny")
    parser.add_argument("--latents", type=int, choices=(8, 16, 32, 64), default=32)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--deep-every", type=int, nargs="+", metavar="N")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    measure.quiet()
    low = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(low).resize((4 * args.latents,) * 2, Image.Resampling.BICUBIC)

    if args.deep_every:
        return report_deep(args, picture)

    def made_in(dtype: torch.dtype) -> tuple[dict, dict]:
        with tempfile.TemporaryDirectory() as folder:
            editors = make_editors(Path(folder), WIDTHS[args.width], args.device, dtype)
        runs = {name: lambda editor=editor: edit(editor, picture, args.steps)
                for name, editor in editors.items()}
        return runs, {name: run() for name, run in runs.items()}

    exact = None if args.dtype == "fp32" else made_in(torch.float32)[1]
    runs, pictures = made_in(DTYPES[args.dtype])
    exact = exact or pictures
    print(f"width {args.width}, latents {args.latents}, {args.steps} steps, {args.dtype}, "
          f"{measure.machine(args.device)}, diffusers {diffusers.__version__}")
    print(f"levels from diffusers' in fp32 (root mean square): {check(pictures, exact)}")
    report(args, runs)


def report_deep(args: argparse.Namespace, picture: Image.Image) -> None:
    with tempfile.TemporaryDirectory() as folder:
        editor = make_editors(Path(folder), WIDTHS[args.width], args.device, DTYPES[args.dtype],
                              alone=True)["ours"]
    runs = {n: lambda n=n: edit(editor, picture, args.steps, n) for n in (1, *args.deep_every)}
    edit(editor, picture, 2, 2)
    taken = measure.take_turns(runs, args.device, args.repeat)
    print(f"width {args.width}, latents {args.latents}, {args.steps} steps, {args.dtype}, "
          f"{measure.machine(args.device)}")
    for n in runs:
        print(f"deep_every {n}: {measure.spread(taken[n])} s an edit, "
              f"{measure.spread(taken[1], taken[n])} times as fast")


def report(args: argparse.Namespace, runs: dict) -> None:
    memory = {name: measure.peak_bytes(run, args.device) for name, run in runs.items()}
    operations, touched = measure.work(runs["diffusers"])  # the counters miss the operators of oneDNN
    times = measure.take_turns(runs, args.device, args.repeat)
    rate, copying = measure.matrix_rate(args.device, DTYPES[args.dtype]), measure.copy_rate(args.device)
    print(f"one large product: {rate / 1e9:.4g} GFLOP/s; one large copy: {copying / 1e9:.3g} GB/s; "
          f"an edit: {operations / 1e9:.4g} GFLOP, {touched / 1e9:.3g} GB")
    print(f"{'':<20}{'seconds an edit':>20}{'times as fast':>20}{'peak MB':>9}{'matrix':>9}{'copy':>7}")
    for name, taken in times.items():
        median, ratio = statistics.median(taken), measure.spread(times["diffusers"], taken)
        print(f"{name:<20}{measure.spread(taken):>20}{ratio:>20}{memory[name] / 1e6:>9.1f}"
              f"{operations / median / rate:>9.0%}{touched / median / copying:>7.0%}", flush=True)


if __name__ == "__main__":
    main()
