"""The LoRA that turns nano-ip2p into its student for four network calls: write it, or merge it.

    python weights/four_steps.py runs/4step/weights --out runs/4step.safetensors    # write such a LoRA
    python weights/four_steps.py --out runs/nano-ip2p-4step    # merge the shipped LoRA: a model of its own

A student of `train.py --distill` has as many weights as its teacher. A part of low rank of their difference
is enough (docs/results.md). So the LoRA keeps the largest singular values of each layer's change: of all
matrices of this rank, it is nearest to the change (Eckart and Young 1936).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoip2p.checkpoint.load import load_model
from nanoip2p.checkpoint.lora import apply_loras, write_lora
from nanoip2p.checkpoint.save import save_parts
from nanoip2p.common import cli
from nanoip2p.common.files import CHECKOUT
from nanoip2p.training.distill import STUDENT_DEFAULTS
from nanoip2p.unet import UNet

TEACHER, LORA = CHECKOUT / "weights" / "nano-ip2p", CHECKOUT / "weights" / "nano-ip2p-4step.safetensors"
RANK = 8


def low_rank(before: UNet, after: UNet, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of each linear layer and convolution -> (down (rank, in[, k, k]), up (out, rank)), in fp16.

    up @ down is the change of its weight from `before` to `after`, without its smaller singular values. Other
    weights (biases and norms) are left out.
    """
    layers, old = {}, before.state_dict()
    for name, layer in after.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            change = layer.weight.detach().float() - old[f"{name}.weight"].float()
            up, values, down = torch.linalg.svd(change.flatten(1), full_matrices=False)
            root = F.pad(values.sqrt(), (0, rank))[:rank]                   # conv_out has only four values
            up = F.pad(up, (0, rank))[:, :rank] * root
            down = F.pad(down, (0, 0, 0, rank))[:rank] * root[:, None]
            layers[name] = down.reshape(rank, *change.shape[1:]).half(), up.half()
    return layers


def write(student: Path, teacher: Path, out: Path, rank: int = RANK) -> str:
    """Write the LoRA from a teacher to its student. Returns what it did. ValueError if their sizes differ."""
    before, after = (load_model(weights).unet for weights in (teacher, student))
    if before.config != after.config:
        raise ValueError(f"{student}: its UNet has another config than its teacher's, {teacher}")
    layers = low_rank(before, after, rank)
    write_lora(out, layers, rank)
    return f"wrote {out}: rank {rank}, {len(layers)} layers, {out.stat().st_size / 1e6:.1f} MB"


def merge(out: Path, lora: Path = LORA, teacher: Path = TEACHER) -> str:
    """Write the teacher with its LoRA to the folder `out`, with a student's defaults. Returns what it did."""
    model = load_model(teacher)
    [line] = apply_loras(model, [str(lora)])
    save_parts(out, model.unet, model.vae, model.text_encoder, model.tokenizer_folder,
               model.schedule.to_json(), model.defaults | STUDENT_DEFAULTS)
    return f"{line}; the merged student is in {out}"


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code, see cli.run."""
    parser = cli.make_parser(description=__doc__.splitlines()[0])
    parser.add_argument("student", type=Path, nargs="?", help="weights of the student; without them, merges")
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="weights of its teacher")
    parser.add_argument("--rank", type=cli.at_least(1), default=RANK, help="rank of a LoRA that is written")
    parser.add_argument("--lora", type=Path, default=LORA, help="LoRA that is merged")
    parser.add_argument("--out", type=Path, required=True, help="LoRA, or folder of the merged student")

    def run(args: argparse.Namespace) -> None:
        print(write(args.student, args.teacher, args.out, args.rank) if args.student else
              merge(args.out, args.lora, args.teacher))

    return cli.run(lambda: run(parser.parse_args(argv)), "stopped", "run it with more memory")


if __name__ == "__main__":
    sys.exit(main())
