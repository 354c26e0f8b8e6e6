"""Count the mistakes in pictures of the nano world. A small network, the probe, reads what a picture shows.

    python weights/probe.py --seed 0
    python weights/probe.py --pairs data/nano/pairs

The first command paints captions with nano-sd. For each kind of mistake, it prints the share of pictures that
have it, and the share for renders after the autoencoder, which is the probe's own error. Kinds of mistakes:

    number    more or fewer things than in the caption
    place     the right things, at least one of them in another place
    thing     another kind of thing
    colour    a thing of another colour
    scene     another time, weather or ground

The second command reads the pairs of `make_dataset.py pairs`. For each kind of edit, it prints the share of
pairs that show the edit ("shown"), that change nothing else ("alone"), and both. The first call trains the
probe on renders, in about ten minutes, and keeps it in runs/probe.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_vae import draw_scene, fit, picture

from nanoip2p import TextToImage
from nanoip2p.common import cli
from nanoip2p.common.files import CHECKOUT, read_json
from nanoip2p.dataset.pairs import prompt_folders
from nanoip2p.images import open_image, to_tensor
from nanoip2p.world.painting import COLOURS
from nanoip2p.world.scenes import EDIT_KINDS, GROUNDS, KINDS, SLOTS, TIMES, WEATHERS, random_scene

NONE = len(KINDS)  # the kind in an empty place; its colour is -100, which counts as read correctly
# What the probe reads: the kinds in the three places, their colours, time, weather, ground
SIZES = [NONE + 1] * 3 + [len(COLOURS)] * 3 + [len(TIMES), len(WEATHERS), len(GROUNDS)]
STEPS, BATCH, WIDTHS = 3000, 32, (3, 32, 64, 96, 128)
MISTAKES = ("number", "place", "thing", "colour", "scene")


class Probe(nn.Module):
    """Pictures (B, 3, 64, 64) in [-1, 1] -> logits of each of SIZES, a list of (B, size)."""

    def __init__(self):
        super().__init__()
        blocks = [nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU())
                  for before, after in zip(WIDTHS, WIDTHS[1:])]                     # (B, 128, 4, 4)
        self.layers = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128 * 16, 256), nn.ReLU(),
                                    nn.Linear(256, sum(SIZES)))

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.layers(x).split(SIZES, 1)

    @torch.no_grad()
    def read(self, x: Tensor) -> Tensor:
        """Pictures -> the content of each, (B, 9)."""
        parts = [self(part) for part in x.split(128)]
        return torch.cat([torch.stack([logits.argmax(1) for logits in part], 1) for part in parts])


def content(caption: str) -> Tensor:
    """A caption of `Scene.caption` -> its content, (9,): what the probe should read."""
    if not (match := re.fullmatch(r"(.+), on (\w+), (\w+ \w+)", caption)):
        raise ValueError(f"the probe reads captions of the nano world only, and not: {caption}")
    things, ground, when = match.groups()
    kinds, colours, (weather, time) = [NONE] * 3, [-100] * 3, when.split()
    for colour, kind, place in re.findall(rf"an? (\w+) (\w+) ({'|'.join(SLOTS)})", things):
        slot = SLOTS.index(place)
        kinds[slot], colours[slot] = KINDS.index(kind), list(COLOURS).index(colour)
    return torch.tensor([*kinds, *colours, TIMES.index(time), WEATHERS.index(weather), GROUNDS.index(ground)])


def trained_probe(folder: Path) -> Probe:
    """The probe of `folder`, trained if it is not there."""
    torch.manual_seed(0)
    probe = Probe()

    def loss_of_step(generator):
        scenes = [draw_scene(generator) for _ in range(BATCH)]
        wanted = torch.stack([content(scene.caption()) for scene in scenes])     # (B, 9)
        x = torch.stack([picture(scene) for scene in scenes])
        if torch.rand((), generator=generator) < 0.5:  # models paint softer pictures than renders
            x = (x + F.avg_pool2d(F.pad(x, (1,) * 4, mode="replicate"), 3, 1)) / 2
        x = x + 0.1 * torch.rand((), generator=generator) * torch.randn(x.shape, generator=generator)
        loss = sum(F.cross_entropy(logits, wanted[:, i], ignore_index=-100)
                   for i, logits in enumerate(probe(x)))
        return loss, f"loss {loss:.3f}"

    folder.mkdir(parents=True, exist_ok=True)
    fit("probe", probe, loss_of_step, STEPS, 2e-3, folder)
    return probe.eval()


def mistakes(found: Tensor, wanted: Tensor) -> set[str]:
    """The kinds of mistakes of a picture that shows `found` (9,) and should show `wanted` (9,)."""
    pairs = [list(zip(row[:3].tolist(), row[3:6].tolist())) for row in (found, wanted)]
    things = [sorted(pair for pair in row if pair[0] != NONE) for row in pairs]
    kinds = [[kind for kind, _ in row] for row in things]
    scene = {"scene"} if (found[6:] != wanted[6:]).any() else set()
    if len(things[0]) != len(things[1]):
        return scene | {"number"}
    if kinds[0] != kinds[1]:
        return scene | {"thing"}
    if things[0] != things[1]:
        return scene | {"colour"}
    return scene | ({"place"} if (found[:3] != wanted[:3]).any() else set())


def report(rows: list[set[str]]) -> str:
    """The shares of pictures with each kind of mistake, and with any."""
    counts = [sum(kind in row for row in rows) for kind in MISTAKES] + [sum(map(bool, rows))]
    return "".join(f"{count / len(rows):>9.1%}" for count in counts)


@torch.inference_mode()
def read_painter(probe: Probe, weights: Path, n: int, seed: int) -> str:
    """Paint `n` captions, and read the pictures, and renders after the autoencoder."""
    painter, scenes = TextToImage.load(weights), [random_scene(f"mistakes {seed}", i) for i in range(n)]
    captions, painted = [scene.caption() for scene in scenes], []
    for i in range(0, n, BATCH):
        painted += painter.generate(captions[i : i + BATCH], seed=i, batch=BATCH)
    renders = torch.stack([picture(scene) for scene in scenes])
    renders = torch.cat([painter.vae.decode(painter.vae.encode(part)[0]) for part in renders.split(BATCH)])
    painted = torch.stack([to_tensor(image) for image in painted])
    lines = [f"{f'{n} pictures':<22}" + "".join(f"{kind:>9}" for kind in (*MISTAKES, "any"))]
    for name, x in ((weights.name, painted), ("renders, autoencoder", renders)):
        rows = [mistakes(found, content(caption)) for found, caption in zip(probe.read(x), captions)]
        lines.append(f"{name:<22}{report(rows)}")
    return "\n".join(lines)


def kind_of(before: Tensor, after: Tensor) -> str:
    """The kind of the edit between two contents."""
    changed = before != after
    for i, kind in ((6, "time"), (7, "weather"), (8, "ground")):
        if changed[i]:
            return kind
    if not changed[:3].any():
        return "recolour"
    slot = int(changed[:3].int().argmax())
    return "add" if before[slot] == NONE else "remove" if after[slot] == NONE else "replace"


def read_pairs(probe: Probe, folder: Path) -> str:
    """Read all pairs of a folder of `make_dataset.py pairs`."""
    rows = defaultdict(list)
    for prompt in prompt_folders(folder):
        record = read_json(prompt / "prompt.json")
        wanted = torch.stack([content(record["input"]), content(record["output"])])              # (2, 9)
        edited = wanted[0] != wanted[1]
        for first in prompt.glob("*_0.jpg"):
            files = first, first.with_name(first.name.replace("_0.", "_1."))
            found = probe.read(torch.stack([to_tensor(open_image(file)) for file in files]))
            shown = ((found == wanted) | (wanted == -100))[:, edited].all()
            # The colour that the probe reads in an empty place means nothing
            same = ((found[0] == found[1]) | (wanted == -100).any(0))[~edited].all()
            rows[kind_of(*wanted)].append((shown.item(), same.item(), (shown & same).item()))
    lines = [f"{'edit':<10}{'pairs':>7}{'shown':>8}{'alone':>8}{'both':>8}"]
    for kind in (*EDIT_KINDS, "all"):
        chosen = rows[kind] if kind != "all" else sum(rows.values(), [])
        if chosen:
            shares = "".join(f"{sum(column) / len(chosen):>8.0%}" for column in zip(*chosen))
            lines.append(f"{kind:<10}{len(chosen):>7}{shares}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code, see cli.run."""
    def work() -> None:
        parser = cli.make_parser(description=__doc__)
        parser.add_argument("--weights", type=Path, default=CHECKOUT / "weights/nano-sd")
        parser.add_argument("--pairs", type=Path, help="read these pairs, and paint nothing")
        parser.add_argument("--n", type=cli.at_least(1), default=512, help="captions to paint")
        parser.add_argument("--seed", type=cli.at_least(0), default=0)
        args = parser.parse_args(argv)
        probe = trained_probe(CHECKOUT / "runs/probe")
        if args.pairs:
            print(read_pairs(probe, args.pairs))
        else:
            print(read_painter(probe, args.weights, args.n, args.seed))
    return cli.run(work, "stopped; the same command continues", "try a smaller --n")


if __name__ == "__main__":
    sys.exit(main())
