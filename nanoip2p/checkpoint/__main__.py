"""Inspect, convert or merge checkpoints.

    python -m nanoip2p.checkpoint instruct-pix2pix-00-22000.ckpt           # list the networks
    python -m nanoip2p.checkpoint in.ckpt out-folder/                      # single file -> diffusers folder
    python -m nanoip2p.checkpoint out-folder/ single.safetensors --dtype fp16
    python -m nanoip2p.checkpoint merge A --add B --minus C out-folder/    # add difference: A + M (B - C)
    python -m nanoip2p.checkpoint merge A --with B --weight 0.3 out.safetensors    # sum: (1 - M) A + M B

M is --weight. `merge` merges all networks, as the web UIs do. A + M (B - C) makes an editor from the model B:
A is an editor, and C is the base of A and B. `merge --help` lists the flags.
"""

import sys
from pathlib import Path

from nanoip2p.common import cli


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code, see cli.run."""
    words = sys.argv[1:] if argv is None else argv
    merging = words[:1] == ["merge"]
    parser = cli.make_parser(prog="python -m nanoip2p.checkpoint" + " merge" * merging, description=__doc__)
    parser.add_argument("source", help="a folder, a single file, or a name on the Hub")
    parser.add_argument("target", type=Path, nargs=None if merging else "?",
                        help="a new folder or .safetensors file; default: only inspect the source")
    if merging:
        either = parser.add_mutually_exclusive_group(required=True)
        either.add_argument("--add", metavar="B", help="model B of A + M (B - C)")
        either.add_argument("--with", metavar="B", dest="other", help="model B of (1 - M) A + M B")
        parser.add_argument("--minus", metavar="C", help="model C, the base of A and B")
        parser.add_argument("--weight", metavar="M", type=cli.finite, help="default: 1; 0.5 with --with")
    parser.add_argument("--dtype", choices=cli.DTYPES, help="dtype of written weights; default: unchanged")
    parser.add_argument("--ema-copy", action="store_true",
                        help="also write the UNet under the names of the EMA weights")
    cli.add_flags(parser)

    def work() -> None:
        args = parser.parse_args(words[merging:])
        if merging and (args.add is None) != (args.minus is None):
            raise ValueError("--add and --minus need each other: A --add B --minus C is A + (B - C)")
        cli.import_torch()
        from nanoip2p.checkpoint import load, merge, save, tensors
        others = (args.add, args.other, args.minus) if merging else ()
        sources, opened = [source for source in (args.source, *others) if source is not None], []
        for source in sources:
            opened.append(load.open_checkpoint(source, args.vae, args.tokenizer, args.raw_weights))
            print(f"{source}: {opened[-1].description}")
        checkpoint, dtype = opened[0], tensors.DTYPES.get(args.dtype)
        if merging:
            names = [Path(source).absolute().name for source in sources]
            share = args.weight if args.weight is not None else 0.5 if args.add is None else 1
            checkpoint = merge.merge(opened, names, share, dtype)
            print(f"merged: {checkpoint.merged_from}")
        for part, network in checkpoint.networks.items():
            model = network.model if args.target else network.load(None)  # loading checks the weights
            print(f"  {part:<13}{sum(p.numel() for p in model.parameters()) / 1e6:>8.1f} M parameters")
        if args.target:
            save.convert(checkpoint, args.target, dtype, args.ema_copy)
            print(f"wrote {args.target}")
            if args.target.suffix.lower() == ".safetensors":
                print("the file has no tokenizer; to load it, give the source's tokenizer as --tokenizer")

    return cli.run(work, "interrupted; nothing was written", "close other programs")


if __name__ == "__main__":
    sys.exit(main())
