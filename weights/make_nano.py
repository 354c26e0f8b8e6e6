"""Train all shipped weights from scratch: nano-clip, nano-sd and the editors.

    python weights/make_nano.py                  # all stages; continues an interrupted run
    python weights/make_nano.py --ship weights   # also replaces the shipped weights
    python weights/make_nano.py --editor-steps 3700 40000        # train the editor longer, then export it

The stages:

    tokenizer     byte pairs of the nano world's sentences
    VAE           by train_vae.py, which then trains the decoder further
    CLIP          by the function make_clip in this file; teach_wordings.py then teaches it more wordings
    nano-sd       the text-to-image model, by train.py
    paper editor  from nano-sd, on Prompt-to-Prompt pairs that pass the CLIP filter (by make_dataset.py)
    nano-ip2p     an editor trained on rendered pairs, by train.py
    4step         the student of nano-ip2p, which edits in four network calls, by train.py --distill
    export        copies of the models in half precision; of the student, a LoRA (by four_steps.py)

Each stage reads the results of earlier stages from --out, and does nothing if its own result is complete.
Only the exported copies, prompts.jsonl and nano-sd's pairs.json are written each time.
Random numbers depend only on seed and step: a resumed run gives the same weights as an uninterrupted run. The
repository does not contain these runs. In a fresh clone, `python train.py --weights weights/nano-ip2p --data
scenes ...` trains the shipped editor further.
"""

import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path

import demo
import four_steps
import torch
import torch.nn.functional as F
from probe import NONE, content
from run_scripts import call, make_dataset, train_run
from teach_wordings import FIRST, teach
from train_tokenizer import train_tokenizer
from train_vae import SIZE, fit, make_vae, picture, sharpen_vae

from nanoip2p.checkpoint.folder import load_network, save_network
from nanoip2p.checkpoint.load import load_model
from nanoip2p.checkpoint.save import save_parts
from nanoip2p.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig, TextEncoder
from nanoip2p.common import cli
from nanoip2p.common.cli import at_least
from nanoip2p.common.device import pick_device
from nanoip2p.common.files import CHECKOUT, check_writable, read_json, replacing, write_json
from nanoip2p.dataset.rendered import draw_edit, draw_scenes, pick
from nanoip2p.diffusion import NoiseSchedule
from nanoip2p.tokenizer import load_tokenizer
from nanoip2p.unet import UNet, UNetConfig
from nanoip2p.vae import VAE
from nanoip2p.world.painting import COLOURS
from nanoip2p.world.scenes import GROUNDS, KINDS, TIMES, WEATHERS, Scene, Thing, random_scene
from nanoip2p.world.wordings import reword

TOKENIZER_SCENES = 2000
UNET = dict(
    in_channels=8, block_out_channels=(64, 128, 128), layers_per_block=1, cross_attention_dim=128,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=4, norm_num_groups=16,
)
SD_UNET = UNET | dict(in_channels=4, block_out_channels=(64, 112, 112))
# For short runs of small networks. Unlike the paper: small batches, a schedule of the learning rate (which is
# ten times the paper's, see below), min-SNR weights, an EMA with a smaller decay
RECIPE = ["--resolution", SIZE, "--batch-size", 32, "--accumulate", 1, "--warmup", 200, "--cooldown", 0.4,
          "--snr-gamma", 1, "--ema-decay", 0.999]
# The second run starts from the weights of the first. Noisy steps decide where things stand, so it gives them
# more weight. The shipped nano-sd was trained in bf16
SD_RUNS = (["--lr", 1e-3, "--text-to-image"],
           ["--lr", 1e-3, "--text-to-image", "--snr-gamma", 0.2, "--seed", 1])
# The second run starts from the weights of the first. Kinds of edits that still failed have larger odds
EDITOR_RUNS = (["--lr", 1e-3, "--dtype", "fp32", "--kind-weights", 1.2, 2, 2, 1, 0.8, 1, 0.8],
               ["--lr", 8e-4, "--dtype", "fp32", "--kind-weights", 1.6, 2, 2, 1.6, 0.5, 0.7, 0.6])
# The editor made as in the paper starts from nano-sd and trains on fewer pairs, painted by nano-sd
PAPER_EDITOR_RUN = ["--lr", 1e-3, "--dtype", "fp32", "--no-flip"]
# The student of the editor, see training/distill.py
DISTILL_RUN = ["--lr", 2e-4, "--dtype", "fp32", "--kind-weights", 1.2, 2, 2, 1, 0.8, 1, 0.8]
DEFAULTS = {"resolution": 64, "steps": 20, "cfg_text": 2.0, "cfg_image": 1.0, "sampler": "euler_ancestral"}
PAPER_EDITOR_DEFAULTS = DEFAULTS | {"cfg_image": 1.5, "cfg_text": 3.0}
SD_DEFAULTS = DEFAULTS | {"cfg_text": 3.0}
# Defaults of `make_dataset.py pairs` for nano-sd. nano-clip's similarities are larger than CLIP's. 76% of the
# candidates passed, so the first four that pass take a third of the time of the best four of 20
PAIRS = {"clip": "../nano-clip", "clip_threshold": 0.8, "clip_dir_threshold": 0.7, "clip_img_threshold": 0.5,
         "min_cfg": 2.0, "max_cfg": 5.0, "n_samples": 20, "early_stop": 4, "batch": 6, "steps": 10,
         "inject": "both", "blend": "auto", "leakage_threshold": 0.3}
EXAMPLES = {
    "house": Scene("day", "clear", "grass", (Thing("house", "red", "large", 1),), 11),
    "car": Scene("sunset", "clear", "sand", (Thing("car", "blue", "large", 0),
                                             Thing("tree", "green", "large", 2)), 5),
    "balloon": Scene("day", "cloudy", "snow", (Thing("balloon", "orange", "large", 1),), 42),
    "rocket": Scene("night", "clear", "dirt", (Thing("tent", "yellow", "medium", 0),
                                               Thing("rocket", "white", "large", 1)), 77),
}


def make_tokenizer(folder: Path) -> None:
    """Learn byte pairs from the captions and instructions of training scenes."""
    generator, sentences = torch.Generator().manual_seed(0), []
    for index in range(TOKENIZER_SCENES):
        scene = random_scene("train", index)
        sentences += [scene.caption(), *draw_edit(scene.edits(), generator).instructions[:FIRST]]
    train_tokenizer(sentences, 1000, folder)


def make_clip(folder: Path, tokenizer_folder: Path, device: str, steps: int, batch: int = 32) -> CLIP:
    """Train CLIP on two contrastive tasks: picture with caption, and change of picture with instruction.

    The second task teaches the text encoder words that only instructions contain. Each batch holds scenes
    and an edited version of each scene, so CLIP has to distinguish captions that differ in one word.
    """
    torch.manual_seed(0)
    tokenizer = load_tokenizer(tokenizer_folder)
    eos = json.loads((tokenizer_folder / "vocab.json").read_text())["<|endoftext|>"]
    text = CLIPTextConfig(eos + 1, 128, 512, 3, 4, 77, projection_dim=128, eos_token_id=eos)
    vision = CLIPVisionConfig(SIZE, 8, 3, 128, 512, 3, 4, projection_dim=128)
    clip = CLIP(CLIPConfig(text, vision, projection_dim=128)).to(device)

    def ids_of(texts):
        ids = tokenizer(texts)
        # Attention is causal and the first end token is pooled, so the tokens after it have no effect.
        return ids[:, : int((ids == eos).int().argmax(1).max()) + 1].to(device)

    def agree(a, b):
        """Symmetric cross-entropy: row i of a belongs to row i of b (Radford et al. 2021, figure 3)."""
        logits = clip.logit_scale.exp().clamp(max=100) * a @ b.T
        own = torch.arange(len(a), device=device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return loss, (logits.argmax(1) == own).float().mean()

    def loss_of_step(generator):
        numbers = torch.randint(2**31, (batch,), generator=generator).tolist()
        scenes = [random_scene("train", number) for number in numbers]
        edits = [draw_edit(scene.edits(), generator) for scene in scenes]
        after = [edit.scene for edit in edits]
        pixels = torch.stack([picture(scene) for scene in scenes + after]).to(device)
        images = clip.encode_image(pixels)
        captions = clip.encode_text(ids_of([scene.caption() for scene in scenes + after]))
        told = [pick(edit.instructions[:FIRST], generator) for edit in edits]
        instructions = clip.encode_text(ids_of(told))
        change = F.normalize(images[batch:] - images[:batch], dim=-1)
        loss_caption, hit_caption = agree(images, captions)
        loss_edit, hit_edit = agree(change, instructions)
        note = f"caption {loss_caption:.2f} {hit_caption:.0%} edit {loss_edit:.2f} {hit_edit:.0%}"
        return loss_caption + loss_edit, note

    fit("clip", clip, loss_of_step, steps, 1e-3, folder)
    return clip


def clip_folder(out: Path, device: str, steps: int, wording_steps: int) -> Path:
    """Train CLIP. Its folder also gets the tokenizer, and a preprocessor that scales pixels to [-1, 1]."""
    folder = out / "clip"
    if not (folder / "preprocessor_config.json").exists():
        clip = make_clip(out, out / "tokenizer", device, steps)
        teach(clip, load_tokenizer(out / "tokenizer"), device, wording_steps, out)
        save_network(clip, folder)
        for file in (out / "tokenizer").iterdir():
            shutil.copyfile(file, folder / file.name)
        half = [0.5, 0.5, 0.5]
        write_json({"image_processor_type": "CLIPImageProcessor", "image_mean": half, "image_std": half,
                    "size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}},
                   folder / "preprocessor_config.json")
    return folder


def start_folder(folder: Path, unet_settings: dict, defaults: dict, out: Path, vae: Path, clip: Path) -> Path:
    """Write the model from which train.py begins: trained VAE and text encoder, untrained UNet."""
    if not (folder / "model_index.json").exists():
        torch.manual_seed(0)
        joint = load_network(CLIP, clip)
        text_encoder = TextEncoder(joint.config.text_config)
        text_encoder.text_model.load_state_dict(joint.text_model.state_dict())
        unet = UNet(UNetConfig(**unet_settings))
        torch.nn.init.zeros_(unet.conv_out.weight)
        save_parts(folder, unet, load_network(VAE, vae), text_encoder, out / "tokenizer",
                   NoiseSchedule().to_json(), defaults)
    return folder


def paper_prompts(path: Path, count: int, local: int, new: int) -> Path:
    """Write triplets: `count` with all kinds of edits, `local` that edit a thing, `new` that bring a thing.

    Few pairs teach edits of the ground, the weather and the time. Edits of a thing need more pairs, and those
    that bring a new thing (add, replace) need most. A caption names the things before its first comma.
    """
    rows = draw_scenes(count + 4 * local + 8 * new, 0)
    things = [row for row in rows[count:]
              if row["input"].partition(",")[2] == row["output"].partition(",")[2]]
    named = [[{*row[key].partition(",")[0].split()} & {*KINDS} for key in ("input", "output")]
             for row in things]
    bringing = [row for row, (before, after) in zip(things[local:], named[local:]) if after - before]
    with replacing(path) as temporary:
        chosen = rows[:count] + things[:local] + bringing[:new]
        temporary.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return path


def in_wordings(pairs: Path, out: Path, copies: int = 3) -> Path:
    """Copy the prompts of a pair job, with hard links to the pictures, in `copies` random wordings each.

    So the editor sees an edit in more than one wording, and no further pair has to be painted.
    """
    rng, rows = random.Random(0), []
    for name, seeds in read_json(pairs / "seeds.json", kind=list):
        prompt = read_json(pairs / name / "prompt.json")
        for copy in range(copies):
            text = reword(rng.choice(seen_wordings(prompt)), rng)
            rows.append((f"{name}-{copy}", seeds))
            folder = out / rows[-1][0]
            folder.mkdir(parents=True, exist_ok=True)
            write_json(prompt | {"edit": text}, folder / "prompt.json")
            for file in (pairs / name).glob("*.jpg"):
                (folder / file.name).unlink(missing_ok=True)
                os.link(file, folder / file.name)
    write_json(rows, out / "seeds.json")  # copies stay together, so a split hardly cuts them apart
    return out


def seen_wordings(prompt: dict) -> tuple[str, ...]:
    """The instructions for training that ask for the edit of a prompt."""
    numbers = content(prompt["input"]).tolist()
    things = tuple(Thing([*KINDS][kind], [*COLOURS][colour], slot=slot)
                   for slot, (kind, colour) in enumerate(zip(numbers[:3], numbers[3:6])) if kind != NONE)
    scene = Scene(TIMES[numbers[6]], WEATHERS[numbers[7]], GROUNDS[numbers[8]], things, 0)
    return next(edit.seen_instructions for edit in scene.edits() if edit.caption == prompt["output"])


def trained(run: Path, weights: Path, steps: list[int], recipes: tuple, pairs: int, device: str,
            data: str | Path = "scenes") -> Path:
    """Train in one run for each of `steps`, from the weights of the run before. Returns the last weights."""
    for number, (count, flags) in enumerate(zip(steps, recipes), start=1):
        out = run.with_name(f"{run.name}-{number}")
        weights = train_run(out, weights, count, "--pairs", pairs, "--device", device, "--data", data,
                            "--cache", out / "latents", *RECIPE, *flags)
    return weights


def export(tokenizer: Path, editor: Path, student: Path, paper_editor: Path, painter: Path, clip: Path,
           ship: Path) -> None:
    """Write what to ship, in half precision: the models, the student's LoRA, examples, the demo's picture."""
    for name, weights, defaults in (("nano-ip2p", editor, DEFAULTS), ("nano-sd", painter, SD_DEFAULTS),
                                    ("nano-ip2p-paper", paper_editor, PAPER_EDITOR_DEFAULTS)):
        parts = load_model(weights, edits=weights != painter)
        save_parts(ship / name, parts.unet, parts.vae, parts.text_encoder, tokenizer,
                   parts.schedule.to_json(), defaults, torch.float16)
    for file in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        for name in ("nano-sd", "nano-ip2p-paper"):  # they have the editor's; links save 5 MB
            (ship / name / file).unlink()
            (ship / name / file).symlink_to(Path("../../nano-ip2p") / file)
    four_steps.write(student, editor, ship / "nano-ip2p-4step.safetensors")
    write_json(PAIRS, ship / "nano-sd" / "pairs.json")
    save_network(load_network(CLIP, clip), ship / "nano-clip", torch.float16)
    for file in clip.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(file, ship / "nano-clip" / file.name)
    examples = ship / "nano-ip2p" / "examples"
    examples.mkdir(exist_ok=True)
    for name, scene in EXAMPLES.items():
        scene.render(SIZE).save(examples / f"{name}.png")
    demo.run(ship / "nano-ip2p", ship / "nano-ip2p" / "demo.png")


def make(args: argparse.Namespace) -> None:
    """Run all stages, in order."""
    device = str(pick_device(args.device))
    check_writable(args.out / "tokenizer" / "vocab.json")
    if not (args.out / "tokenizer" / "tokenizer_config.json").exists():
        make_tokenizer(args.out / "tokenizer")
    clip = clip_folder(args.out, device, args.clip_steps, args.wording_steps)
    vae = make_vae(args.out, device, args.vae_steps)
    stages = (args.out, sharpen_vae(vae, args.out, device, args.decoder_steps), clip)
    painter = start_folder(args.out / "sd-start", SD_UNET, SD_DEFAULTS, *stages)
    painter = trained(args.out / "sd", painter, args.sd_steps, SD_RUNS, args.captions, device)
    write_json(PAIRS | {"clip": str(clip.resolve())}, painter / "pairs.json")
    prompts = paper_prompts(args.out / "prompts.jsonl", args.prompts, args.local_prompts, args.new_prompts)
    pairs = args.out / "pairs"
    call(make_dataset.main, "pairs", "--prompts", prompts, "--out", pairs, "--weights", painter,
         "--device", device)
    pairs = in_wordings(pairs, args.out / "pairs-in-wordings")
    paper_editor = trained(args.out / "paper-editor", painter, [args.paper_steps], (PAPER_EDITOR_RUN,),
                           args.pairs, device, pairs)
    editor = start_folder(args.out / "start", UNET, DEFAULTS, *stages)
    editor = trained(args.out / "editor", editor, args.editor_steps, EDITOR_RUNS, args.pairs, device)
    of = "-".join(map(str, args.editor_steps))  # a student's run resumes only with the same teacher
    student = train_run(args.out / f"4step-of-{of}", editor, args.distill_steps, *DISTILL_RUN, "--pairs",
                        min(args.pairs, 20_000), "--device", device, "--data", "scenes", begin="--distill",
                        preset="nano")
    ship = args.ship or args.out / "ship"
    export(args.out / "tokenizer", editor, student, paper_editor, painter, clip, ship)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code, see cli.run."""
    parser = cli.make_parser(description="Train the shipped nano weights from scratch.")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "runs/nano", help="folder of all stages")
    parser.add_argument("--ship", type=Path, help="folder of the exported weights (default: <out>/ship); "
                                                  "--ship weights replaces the shipped weights")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first that works")
    parser.add_argument("--vae-steps", type=at_least(1), default=3200, help="training steps, 8 pictures each")
    parser.add_argument("--decoder-steps", type=at_least(1), default=5000,
                        help="more training steps of the VAE's decoder alone, 8 pictures each")
    parser.add_argument("--clip-steps", type=at_least(1), default=800, help="training steps, 32 edits each")
    parser.add_argument("--wording-steps", type=at_least(1), default=12_000,
                        help="training steps of the text encoder on more wordings, 20 instructions each")
    parser.add_argument("--sd-steps", type=at_least(1), nargs=len(SD_RUNS), default=(9000, 7000),
                        metavar="STEPS", help="training steps of nano-sd's two runs, 32 pictures each")
    parser.add_argument("--captions", type=at_least(1), default=60_000, help="captioned renders for nano-sd")
    parser.add_argument("--prompts", type=at_least(40), default=1091, help="captions to make pairs from")
    parser.add_argument("--local-prompts", type=at_least(0), default=4600,
                        help="more such captions, only with edits of a thing")
    parser.add_argument("--new-prompts", type=at_least(0), default=5000,
                        help="more such captions, only with additions and replacements")
    parser.add_argument("--paper-steps", type=at_least(1), default=24_200,
                        help="training steps of the paper editor, 32 filtered pairs each")
    parser.add_argument("--editor-steps", type=at_least(1), nargs=len(EDITOR_RUNS), default=(3700, 7400),
                        metavar="STEPS", help="training steps of the editor's two runs, 32 pairs each")
    parser.add_argument("--distill-steps", type=at_least(1), default=1600,
                        help="training steps of the student, 32 pairs each")
    parser.add_argument("--pairs", type=at_least(1), default=40_000, help="number of rendered training pairs")
    return cli.run(lambda: make(parser.parse_args(argv)), "stopped; the same command continues",
                   "try a smaller --pairs")


if __name__ == "__main__":
    sys.exit(main())
