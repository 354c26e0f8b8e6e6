"""CPU seconds to encode and to decode one picture: ours, ours fast, diffusers' and (if installed) OpenVINO's.

    OMP_NUM_THREADS=1 python tests/benchmarks/autoencoder.py --size 256 --repeat 3

The autoencoder of Stable Diffusion with random weights, in fp32. First each side's result is compared with
diffusers'. Then the sides take turns: CPU seconds, and times as fast as diffusers within each round. Without
--fast, sample.py leaves the autoencoder as it is.
"""

import argparse
import copy
import sys
from pathlib import Path

import diffusers
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import measure  # noqa: E402
from comparing import randomise, relative_error  # noqa: E402

from nanoip2p.speed.cpu import lay_out  # noqa: E402
from nanoip2p.vae import VAE, VAEConfig  # noqa: E402


def with_openvino(call, peer, given: torch.Tensor):
    """`call` as OpenVINO runs it, in float32 on torch's number of threads; None where it is not installed."""
    try:
        import openvino
    except ModuleNotFoundError:
        return None

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, x):
            return call(self.peer, x)

    model = openvino.convert_model(Plain(), example_input=given, input=[given.shape])
    run = openvino.compile_model(model, "CPU", {
        "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()})
    return lambda: torch.from_numpy(run([given])[0].copy())


def encode(vae, x: torch.Tensor) -> torch.Tensor:
    return vae.encode(x)[0] if isinstance(vae, VAE) else vae.encode(x).latent_dist.mode()


def decode(vae, x: torch.Tensor) -> torch.Tensor:
    return vae.decode(x) if isinstance(vae, VAE) else vae.decode(x).sample


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="pixels of the picture's sides")
    parser.add_argument("--width", type=int, default=128, help="channels of the first level")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args(argv)
    measure.quiet()
    widths = tuple(args.width * times for times in (1, 2, 4, 4))
    ours = randomise(VAE(VAEConfig(block_out_channels=widths))).eval()
    peer = diffusers.AutoencoderKL.from_config(ours.config.to_json()).eval()
    peer.load_state_dict(ours.state_dict())
    fast = lay_out(copy.deepcopy(ours), winograd=True)
    print(f"{args.size} px, fp32, {measure.machine('cpu')}")
    picture = torch.rand(1, 3, args.size, args.size) * 2 - 1
    latents = torch.randn(1, 4, args.size // 8, args.size // 8)
    for name, given, call in (("encode", picture, encode), ("decode", latents, decode)):
        runs = {"diffusers": lambda given=given, call=call: call(peer, given),
                "ours": lambda given=given, call=call: call(ours, given),
                "ours, fast": lambda given=given, call=call: call(fast, given)}
        if converted := with_openvino(call, peer, given):
            runs["OpenVINO"] = converted
        for side, run in runs.items():
            if (off := relative_error(run(), runs["diffusers"]())) > 1e-4:
                raise ValueError(f"{name}: {side} differs from diffusers by {off:.1e}, so times mean nothing")
        times = measure.take_turns(runs, "cpu", args.repeat)
        for side, taken in times.items():
            ratio = measure.spread(times["diffusers"], taken)
            print(f"{name}  {side:<12}{measure.spread(taken):>20}{ratio:>20}", flush=True)


if __name__ == "__main__":
    main()
