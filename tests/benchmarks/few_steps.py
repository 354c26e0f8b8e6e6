"""Seconds of an edit by a distilled student, beside its teacher at its own settings.

    OMP_NUM_THREADS=1 python tests/benchmarks/few_steps.py --repeat 5

Both edit the same pictures of the nano world, in batches and one by one; the sides take turns. The ratio is
the teacher's time over the student's: (median, smallest-largest) of all rounds.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import measure  # noqa: E402

from nanoip2p.editor import Editor  # noqa: E402
from nanoip2p.evaluate.scenes import choose_edits  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="weights/nano-ip2p")
    parser.add_argument("--student", default="weights/nano-ip2p-4step")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 35])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    teacher, student = (Editor.load(weights, args.device) for weights in (args.weights, args.student))
    print(measure.machine(args.device))
    for batch in args.batches:
        scenes, edits = zip(*choose_edits(batch))
        pictures, texts = [scene.render(teacher.side) for scene in scenes], [e.instructions[0] for e in edits]
        runs = {"teacher": partial(teacher.edit, pictures, texts, seed=0, batch=batch)}
        runs |= {steps: partial(student.edit, pictures, texts, seed=0, batch=batch, steps=steps)
                 for steps in args.steps}
        for each in runs.values():
            each()
        taken = measure.take_turns(runs, args.device, args.repeat)
        print(f"batch {batch:>2}: teacher {measure.spread([s / batch for s in taken['teacher']])} s an edit; "
              "times as fast: " + ", ".join(
                  f"{steps} steps {measure.spread(taken['teacher'], taken[steps])}" for steps in args.steps))


if __name__ == "__main__":
    main()
