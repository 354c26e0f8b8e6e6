"""A stopped run of weights/*.py goes on with the same command, whatever its flags."""

import ablate
import make_nano
import pytest
from run_scripts import train_run
from tiny_editor import write_tiny_editor

from nanoip2p.training.run_folder import newest_checkpoint

FEW = ("--batch-size", 2, "--accumulate", 1, "--sample-every", 0, "--validate-every", 0, "--save-every", 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    home = tmp_path_factory.mktemp("tiny")
    return {channels: write_tiny_editor(home / str(channels), in_channels=channels) for channels in (4, 8)}


def ablation(name):
    variant = ablate.Variant("scenes", **{"share": 0.1} if name == "a tenth of the data" else {}, flags=FEW)

    def run(tiny, out, steps):
        ablate.train_editor(variant, out / "run", "scenes", 4, steps, seed=0)
    return run


def recipe(channels, flags, **options):
    def run(tiny, out, steps):
        data = ("--data", "scenes", "--pairs", 4)
        train_run(out / "run", tiny[channels], steps, *flags, *data, *FEW, **options)
    return run


RUNS = {
    "ablation": ablation("baseline"), "a tenth": ablation("a tenth of the data"),
    "nano-sd": recipe(4, [*make_nano.RECIPE, *make_nano.SD_RUNS[1]]),
    "the editor": recipe(4, [*make_nano.RECIPE, *make_nano.EDITOR_RUNS[0]]),
    "the paper's editor": recipe(4, [*make_nano.RECIPE, *make_nano.PAPER_EDITOR_RUN]),
    "the student": recipe(8, make_nano.DISTILL_RUN, begin="--distill", preset="nano"),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_command_continues(name, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "PAINTER", tiny[4])
    monkeypatch.setattr("train.VALIDATION_SAMPLES", 2)
    for steps in (1, 2, 2):  # --steps may change; a finished run stays as it is
        RUNS[name](tiny, tmp_path, steps)
        assert newest_checkpoint(tmp_path / "run")[0].name.endswith(str(steps))
    assert (tmp_path / "run" / "weights" / "unet").is_dir()
