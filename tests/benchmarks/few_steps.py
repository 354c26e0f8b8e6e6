"""Seconds of an edit by a distilled student, beside its teacher at its own settings.

    OMP_NUM_THREADS=1 python tests/benchmarks/few_steps.py --repeat 5
    OMP_NUM_THREADS=1 python tests/benchmarks/few_steps.py --batches 35 --steps --deep-every 2 3 4 5

Both edit the same pictures of the nano world, in batches and one by one, and so does the teacher with few
steps of DPM-Solver++; the sides take turns. The ratio is the teacher's time at its own settings over the time
of a side: median (smallest-largest) of all rounds. --deep-every adds the teacher with kept deep features, and
how far its pictures are from the teacher's: mean absolute difference, in levels of 255.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import measure  # noqa: E402
import numpy as np  # noqa: E402

from nanoip2p.checkpoint.lora import apply_loras  # noqa: E402
from nanoip2p.editor import Editor  # noqa: E402
from nanoip2p.evaluate.scenes import choose_edits  # noqa: E402
from nanoip2p.training.distill import STUDENT_DEFAULTS  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="weights/nano-ip2p")
    parser.add_argument("--lora", default="weights/nano-ip2p-4step.safetensors", help="of the student")
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 2, 3, 4])
    parser.add_argument("--deep-every", type=int, nargs="*", default=[], metavar="N")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 35])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    teacher, student = (Editor.load(args.weights, args.device) for _ in range(2))
    apply_loras(student, [args.lora])
    student.defaults |= STUDENT_DEFAULTS
    print(measure.machine(args.device))
    for batch in args.batches:
        scenes, edits = zip(*choose_edits(batch))
        pictures, texts = [scene.render(teacher.side) for scene in scenes], [e.instructions[0] for e in edits]
        runs = {"teacher": partial(teacher.edit, pictures, texts, seed=0, batch=batch)}
        for steps in args.steps:
            few = {"seed": 0, "batch": batch, "steps": steps}
            runs[f"student, {steps} steps"] = partial(student.edit, pictures, texts, **few)
            runs[f"teacher, dpmpp_2m, {steps} steps"] = partial(
                teacher.edit, pictures, texts, sampler="dpmpp_2m", **few)
        for n in args.deep_every:
            name = f"teacher, deep_every {n}"
            runs[name] = partial(teacher.edit, pictures, texts, seed=0, batch=batch, deep_every=n)
        made = {name: np.array([np.asarray(picture, float) for picture in run()])
                for name, run in runs.items()}
        taken = measure.take_turns(runs, args.device, args.repeat)
        print(f"batch {batch}: teacher {measure.spread([s / batch for s in taken['teacher']])} s an edit")
        for name in sorted(runs.keys() - {"teacher"}):
            off = f", {abs(made[name] - made['teacher']).mean():.2f} levels off" if "deep" in name else ""
            print(f"  {name:<28} {measure.spread(taken['teacher'], taken[name])} times as fast{off}")


if __name__ == "__main__":
    main()
