"""Inspect or convert a checkpoint.

    python -m nanoip2p.checkpoint instruct-pix2pix-00-22000.ckpt           # list the networks
    python -m nanoip2p.checkpoint in.ckpt out-folder/                      # single file -> diffusers folder
    python -m nanoip2p.checkpoint out-folder/ single.safetensors --dtype fp16
"""

import argparse
import signal
import sys
from pathlib import Path

from nanoip2p.common import cli

with cli.slow_imports():
    from nanoip2p.checkpoint.load import open_checkpoint
    from nanoip2p.checkpoint.save import convert
    from nanoip2p.checkpoint.tensors import DTYPES


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see cli.run."""
    parser = cli.make_parser(prog="python -m nanoip2p.checkpoint", description=__doc__,
                             formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder, a single file, or a name on the Hub")
    parser.add_argument("target", type=Path, nargs="?",
                        help="a new folder or .safetensors file; default: only inspect the source")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the written weights; default: unchanged")
    parser.add_argument("--ema-copy", action="store_true",
                        help="also write the UNet under the names of the EMA weights")
    cli.add_flags(parser)

    def work() -> None:
        args = parser.parse_args(argv)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # deletes unfinished files, as Ctrl-C does
        checkpoint = open_checkpoint(args.source, args.vae, args.tokenizer, args.raw_weights)
        print(f"{args.source}: {checkpoint.description}")
        for part, network in checkpoint.networks.items():
            model = network.model if args.target else network.load(None)  # loading checks the weights
            print(f"  {part:<13}{sum(p.numel() for p in model.parameters()) / 1e6:>8.1f} M parameters")
        if args.target:
            convert(checkpoint, args.target, DTYPES.get(args.dtype), args.ema_copy)
            print(f"wrote {args.target}")
            if args.target.suffix == ".safetensors":
                print("a single file has no tokenizer; keep the source's tokenizer for --tokenizer")

    return cli.run(work, "interrupted; nothing was written", "close other programs")


if __name__ == "__main__":
    sys.exit(main())
