"""Edits of the nano world in one batch: ours and ours with --fast, beside diffusers.

    OMP_NUM_THREADS=1 python tests/benchmarks/batch.py --repeat 5

Each side makes the same edits from the same weights, with three branches of guidance and with two
(cfg_image 1: no branch without the picture; diffusers computes all three). The sides take turns. A ratio is
diffusers' time over the time of a side: median (smallest-largest) of all rounds.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import diffusers  # noqa: E402
import measure  # noqa: E402
import torch  # noqa: E402

from nanoip2p.editor import Editor  # noqa: E402
from nanoip2p.evaluate.scenes import choose_edits  # noqa: E402
from nanoip2p.speed.fast import speed_up  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="weights/nano-ip2p")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args(argv)
    measure.quiet()
    peer = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(
        args.weights, torch_dtype=torch.float32)
    peer.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)
    ours = {"ours": Editor.load(args.weights, "cpu"), "ours, fast": Editor.load(args.weights, "cpu")}
    for name, editor in ours.items():
        speed_up(editor, name != "ours", print)
    scenes, edits = zip(*choose_edits(args.batch))
    pictures, texts = [scene.render(64) for scene in scenes], [edit.instructions[0] for edit in edits]
    print(measure.machine("cpu"))
    for branches, cfg_image in ((3, 1.5), (2, 1.0)):
        runs = {name: partial(editor.edit, pictures, texts, seed=0, batch=args.batch, steps=args.steps,
                              cfg_image=cfg_image) for name, editor in ours.items()}
        runs["diffusers"] = partial(peer, texts, pictures, num_inference_steps=args.steps, guidance_scale=2.0,
                                    image_guidance_scale=cfg_image)
        taken = measure.take_turns(runs, "cpu", args.repeat)
        print(f"{branches} branches: diffusers {measure.spread(taken['diffusers'])} s a batch")
        for name in ours:
            print(f"  {name:<12} {measure.spread(taken['diffusers'], taken[name])} times as fast")


if __name__ == "__main__":
    main()
