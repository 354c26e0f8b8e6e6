"""Measure the nano autoencoder: the PSNR of held-out scenes after encoding and decoding, and the 16 worst.

    python weights/round_trip.py --n 512 --out weights/round-trip.webp

The picture has the 16 scenes with the lowest PSNR, each above its reconstruction.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanoip2p.checkpoint.folder import load_network
from nanoip2p.common import cli
from nanoip2p.common.files import CHECKOUT, replacing
from nanoip2p.common.grids import grid
from nanoip2p.images import to_pil, to_tensor
from nanoip2p.vae import VAE
from nanoip2p.world.scenes import random_scene

WORST, COLUMNS = 16, 8


@torch.inference_mode()
def run(args) -> None:
    """Measure, print, and draw."""
    vae, rows = load_network(VAE, args.weights / "vae").float(), []
    for first in range(0, args.n, 64):
        scenes = [random_scene("test", 1000 + i).render(64) for i in range(first, min(first + 64, args.n))]
        x = torch.stack([to_tensor(scene) for scene in scenes])                # (B, 3, 64, 64)
        after = [to_pil(picture) for picture in vae.decode(vae.encode(x)[0])]  # rounded to 8 bits
        errors = (torch.stack([to_tensor(image) for image in after]) - x).square().mean((1, 2, 3))
        rows += zip((-10 * torch.log10(errors / 4)).tolist(), scenes, after)
    rows.sort(key=lambda row: row[0])
    values = torch.tensor([value for value, *_ in rows])
    print(f"{len(rows)} scenes: {values.mean():.1f} dB, a twentieth below {values.quantile(0.05):.1f} dB, "
          f"the worst {values.min():.1f} dB")
    pictures, labels = [], []
    for i in range(0, WORST, COLUMNS):
        values, before, after = zip(*rows[i : i + COLUMNS])
        pictures += [list(before), list(after)]
        labels += [[""] * len(before), [f"{value:.1f} dB" for value in values]]
    with replacing(args.out) as temporary:  # a fifth of a PNG
        grid(pictures, labels).save(temporary, format="WEBP", quality=95)
    print(f"wrote {args.out}")


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code, see cli.run."""
    parser = cli.make_parser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=CHECKOUT / "weights/nano-sd")
    parser.add_argument("--n", type=cli.at_least(WORST), default=512, help="number of scenes")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "out/round-trip.webp", help="a WebP file")
    return cli.run(lambda: run(parser.parse_args(argv)), "interrupted", "try a smaller --n")


if __name__ == "__main__":
    sys.exit(main())
