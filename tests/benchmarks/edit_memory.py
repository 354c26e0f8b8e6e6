"""Peak memory of one edit with Stable Diffusion 1.5, counted on fake tensors (see live.py).

    python tests/benchmarks/edit_memory.py

Counts weights, activations and latents that are alive at once. Assumes that no attention kernel stores its
map. CUDA itself, workspaces of cuDNN and gaps in memory come on top.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from live import Live  # noqa: E402

from nanoip2p.clip import CLIPTextConfig, TextEncoder  # noqa: E402
from nanoip2p.guidance import guided_denoiser  # noqa: E402
from nanoip2p.unet import UNet, UNetConfig  # noqa: E402
from nanoip2p.vae import VAE, VAEConfig  # noqa: E402


def peaks(side: int, low_memory: bool) -> dict[str, tuple[int, int]]:
    """Bytes of each network's weights, and its peak above them for a picture of side x side pixels."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        torch.set_default_dtype(torch.float16)
        unet, vae, text = UNet(UNetConfig(8)), VAE(VAEConfig()), TextEncoder(CLIPTextConfig())
        z, context = torch.empty(1, 4, side // 8, side // 8), torch.empty(1, 77, 768)
        picture, ids = torch.empty(1, 3, side, side), torch.zeros(1, 77, dtype=torch.long)

        def denoise() -> None:
            levels = SimpleNamespace(timestep_of=lambda _: {1.0: torch.zeros(1)}, prediction_type="epsilon")
            guided_denoiser(unet, levels, z, context, context, 7.5, 1.5, low_memory)(z.float(), 1.0)

        parts = {"text": (text, lambda: text(ids)), "denoise": (unet, denoise),
                 "encode": (vae, lambda: (vae.encode_low_memory if low_memory else vae.encode)(picture)),
                 "decode": (vae, lambda: (vae.decode_low_memory if low_memory else vae.decode)(z))}
        found = {}
        for name, (network, run) in parts.items():
            with Live() as live:
                run()
            weights = sum(weight.numel() * weight.element_size() for weight in network.parameters())
            found[name] = weights, live.peak
    return found


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    print(f"{'GB in fp16':<16}{'512 px':>10}{'1024 px':>10}")
    for low_memory in (False, True):
        line = f"{'--low-memory' if low_memory else 'as it is':<16}"
        for side in (512, 1024):
            parts = peaks(side, low_memory)
            weights = sum(parts[name][0] for name in ("text", "denoise", "decode"))  # encode has decode's
            one_at_a_time = max(sum(part) for part in parts.values())
            together = weights + max(peak for _, peak in parts.values())
            line += f"{(one_at_a_time if low_memory else together) / 1e9:>10.2f}"
        print(line)


if __name__ == "__main__":
    main()
