"""Teach a trained text encoder new wordings of the nano world's edits. For make_nano.py.

    python weights/teach_wordings.py --out runs/wordings

The same command continues an interrupted run. The shipped CLIP already knows all wordings in
nanoip2p/world/wordings.json, so first add new ones there. A UNet that was trained with the old text encoder
(the teacher) keeps working with the new one (the student), without further training: the student encodes
"could you paint the hosue violet please?" as the teacher encodes "make the house purple".

Texts are padded to 77 tokens with the end token. The states of these tokens sum up the text, because
attention is causal. So the loss compares the student's states of a new wording with the teacher's states of
a known wording, at the end token and at the padding that both have. A second term keeps the states of
captions and of instructions that the teacher knows.
"""

import copy
import random
import sys
from pathlib import Path

import torch
from train_vae import fit

from nanoip2p.checkpoint.folder import load_network, save_network
from nanoip2p.clip import CLIP, TextEncoder
from nanoip2p.common import cli
from nanoip2p.common.cli import at_least
from nanoip2p.common.device import pick_device
from nanoip2p.common.files import CHECKOUT
from nanoip2p.dataset.rendered import draw_edit
from nanoip2p.tokenizer import load_tokenizer
from nanoip2p.world.scenes import random_scene
from nanoip2p.world.wordings import reword

# The teacher was trained on the first four phrasings of each kind, and knows all words of the last one. The
# second term uses these five. So the text encoder is trained on one of the two held-out phrasings
FIRST = 4
SHORT = 48  # tokens per text in two of three steps, to save time; no text is longer. The last 10% use all 77
KEEP = 4.0  # weight of the second term


def draw_texts(generator: torch.Generator, batch: int) -> tuple[list[str], list[str], list[str]]:
    """`batch` reworded instructions, the first phrasing of these edits, and texts that the teacher knows."""
    rng, rows = random.Random(generator.initial_seed()), []
    for number in torch.randint(2**31, (batch,), generator=generator).tolist():
        scene = random_scene("train", number)
        edit = draw_edit(scene.edits(), generator)
        known = rng.choice([*edit.instructions[:FIRST], edit.instructions[-1]])
        rows.append((reword(rng.choice(edit.seen_instructions), rng), edit.instructions[0],
                     known if rng.random() < 0.5 else scene.caption()))
    return tuple(map(list, zip(*rows)))


def distances(got: torch.Tensor, asked: torch.Tensor, ends: torch.Tensor, asked_ends: torch.Tensor) -> tuple:
    """Mean squared difference of the states at the end tokens, and at the padding that both texts have.

    got, asked: the student's and the teacher's states (B, T, D). ends, asked_ends: the end tokens (B,).
    """
    rows, places = torch.arange(len(got), device=got.device), torch.arange(got.shape[1], device=got.device)
    end = (got[rows, ends] - asked[rows, asked_ends]).square().mean()
    both = places >= torch.maximum(ends, asked_ends)[:, None]                                      # (B, T)
    return end, (got - asked)[both].square().mean()


def teach(clip: CLIP, tokenizer, device: str, steps: int, out: Path, batch: int = 20) -> None:
    """Train the text encoder of `clip`, in place. Continues from <out>/wordings-run.pt, as `fit` does."""
    student, teacher = clip.text_model.to(device), copy.deepcopy(clip.text_model).to(device).eval()
    eos, told = clip.config.text_config.eos_token_id, {}

    def states_of(texts: list[str], length: int) -> torch.Tensor:
        """The teacher's states (B, length, D). Computes those of the texts that `told` lacks."""
        new = [text for text in dict.fromkeys(texts) if text not in told]
        with torch.no_grad():
            told.update(zip(new, teacher(tokenizer(new).to(device))) if new else ())
        return torch.stack([told[text] for text in texts])[:, :length]

    def loss_of_step(generator):
        step = generator.initial_seed()
        length = SHORT if step % 3 and step < 0.9 * steps else clip.config.text_config.max_position_embeddings
        reworded, plain, known = draw_texts(generator, batch)
        ids = tokenizer(reworded + known)[:, :length].to(device)
        got, kept = student(ids).split(batch)
        before = states_of(known, length)
        ends, plain_ends = ((row == eos).int().argmax(1) for row in (ids[:batch],
                                                                     tokenizer(plain).to(device)))
        end, padding = distances(got, states_of(plain, length), ends, plain_ends)
        keep = (kept - before).square().mean()
        for text in known:
            told.pop(text, None)  # captions hardly ever return
        return end + padding + KEEP * keep, f"end {end:.3f} padding {padding:.3f} keep {keep:.4f}"

    fit("wordings", student, loss_of_step, steps, 8e-4, out)


def ship(clip: CLIP, weights: Path) -> None:
    """Replace the text encoder in all models of the folder `weights`, and in its nano-clip."""
    save_network(clip, weights / "nano-clip", torch.float16)
    for file in weights.glob("*/text_encoder/model.safetensors"):
        if not file.is_symlink():  # the other models link to nano-ip2p's
            encoder = load_network(TextEncoder, file.parent)
            encoder.text_model.load_state_dict(clip.text_model.state_dict())
            save_network(encoder, file.parent, torch.float16)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code, see cli.run."""
    parser = cli.make_parser(description=__doc__)
    parser.add_argument("--clip", type=Path, default=CHECKOUT / "weights/nano-clip", help="the teacher")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "runs/wordings", help="folder of the result")
    parser.add_argument("--steps", type=at_least(1), default=4000, help="training steps of 20 instructions")
    parser.add_argument("--ship", type=Path, help="folder of the models whose text encoders are replaced")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first that works")
    args = parser.parse_args(argv)

    def work() -> None:
        args.out.mkdir(parents=True, exist_ok=True)
        clip = load_network(CLIP, args.clip)
        teach(clip, load_tokenizer(args.clip), str(pick_device(args.device)), args.steps, args.out)
        save_network(clip, args.out / "clip")
        if args.ship:
            ship(clip, args.ship)

    return cli.run(work, "stopped; the same command continues", "try --device cpu")


if __name__ == "__main__":
    sys.exit(main())
