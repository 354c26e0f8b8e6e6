"""The ablations: the flags for the three scripts, the stored scores, and the statistics."""

import json
import math
from dataclasses import fields
from pathlib import Path

import ablate
import pytest
import run_scripts
import torch
from parsed import parsed
from PIL import Image

import make_dataset
import train
from nanoip2p.checkpoint.load import load_model
from nanoip2p.common.files import read_rows
from nanoip2p.dataset.config import PairSettings
from nanoip2p.dataset.layouts import read_data
from nanoip2p.evaluate import __main__ as evaluate

SCRIPTS = {make_dataset.main: "make_dataset.py", train.main: "train.py", evaluate.main: "evaluate"}


@pytest.fixture
def asked(monkeypatch):
    """The commands that are run, none of which runs; those that write are done by hand."""
    commands = []

    def run(main, *words):
        words = [SCRIPTS[main], *map(str, words)]
        commands.append(words)
        if words[:2] == ["make_dataset.py", "pairs"]:
            out = Path(words[words.index("--out") + 1])
            names = [f"{number:07d}" for number in range(20)]
            for name in names:
                (out / name).mkdir(parents=True, exist_ok=True)
                (out / name / "prompt.json").write_text('{"edit": "make it night"}')
                for side in (0, 1):
                    Image.new("RGB", (64, 64)).save(out / name / f"7_{side}.jpg")
            (out / "seeds.json").write_text(json.dumps([[name, ["7"]] for name in names]))
        if words[0] == "evaluate":
            out = Path(words[words.index("--out") + 1])
            out.mkdir(parents=True, exist_ok=True)
            (out / "scores.json").write_text('{"all": {"success": 0.5, "psnr": 20.0}}')

    monkeypatch.setattr(run_scripts, "call", run)
    monkeypatch.setattr(ablate, "untrained", lambda out: out)
    return commands


def evaluated(*flags) -> str:
    return ablate.run(ablate.make_parser().parse_args([*map(str, flags)]))


def test_unfiltered_pairs_meet_no_limit():
    """pairs.json of the weights sets all of these."""
    names = [field.name.replace("_", "-") for field in fields(PairSettings) if "threshold" in field.name]
    assert len(names) == 4 and {f"--{name}" for name in names} <= set(ablate.PAIRS["unfiltered"])


def test_every_variant_differs_from_the_first_by_one_choice():
    first, *others = ablate.VARIANTS.values()
    for other in others:
        assert sum(getattr(first, field.name) != getattr(other, field.name) for field in fields(other)) == 1


def test_the_scripts_understand_all_commands(asked, tmp_path, monkeypatch):
    evaluated("--out", tmp_path, "--seeds", 1, "--prompts", 100, "--steps", 3)
    runs, trained, scored = [], [], []
    for words in asked:
        main = next(main for main, name in SCRIPTS.items() if name == words[0])
        args = vars(parsed(main, words[1:], monkeypatch))  # may lack flags that are not given
        if words[1] == "pairs":
            runs.append(args)
        elif words[0] == "train.py":
            trained.append(args)
        elif words[0] == "evaluate":
            scored.append(args)
    assert {args.get("inject") for args in runs} == {None, "self", "cross", "none"}
    assert [args["n_samples"] for args in runs if args.get("clip_dir_threshold") == -1] == [4]
    assert len(trained) == len({args["out"] for args in trained}) == len(ablate.VARIANTS)
    assert {args["steps"] for args in trained} == {3} and {args["pairs"] for args in trained} == {400}
    assert {args["batch_size"] * args["accumulate"] for args in trained} == {32}
    assert [args["batch_size"] for args in trained if "0.1" in str(args["data"])] == [8]
    assert sum(list(args.get("drop") or []) == [0.1, 0, 0] for args in trained) == 1
    assert not any(args["flip"] for args in trained)
    assert sum(args["data"] == "scenes" for args in trained) == 1
    assert sum(str(args["weights"]).endswith("untrained") for args in trained) == 1
    assert len(scored) == len(ablate.MEASURES) * len(ablate.VARIANTS)
    assert {args["combinations"] for args in scored} == {"seen", "held-out"}
    assert {(args["sampler"], args["steps"]) for args in scored} == {(ablate.SAMPLER, ablate.SAMPLING_STEPS)}


def test_a_tenth_is_data_that_training_reads(asked, tmp_path):
    part = ablate.make_data(ablate.VARIANTS["a tenth of the data"], tmp_path, 20)
    pairs = [pair for item in read_data(part) for pair in item]
    whole = [pair for item in read_data(part.parent / "both") for pair in item]
    assert len(pairs) == 1 and len(whole) == 18
    assert pairs[0].before.read_bytes() == whole[0].before.read_bytes()


ROW = {"variant": "P2P: none", "seed": 0, "prompts": 100, "steps": 3, "n": 210, "unchanged": 20.0,
       "sampler": ablate.SAMPLER, "sampling_steps": ablate.SAMPLING_STEPS,
       **dict.fromkeys(ablate.MEASURES, 0.5)}


@pytest.mark.parametrize("key", ROW)
def test_a_row_that_is_not_ours_is_named(key, tmp_path):
    path = tmp_path / "ablate.jsonl"
    for value in ({}, "x" * 20_000, 10**400, float("nan"), *(() if key == "unchanged" else (None,))):
        path.write_text("".join(json.dumps(row) + "\n" for row in (ROW, ROW | {key: value})))
        with pytest.raises(ValueError, match=f"ablate.jsonl, row 2: {key} (= |is 20,000 long)"):
            ablate.read_scores(path)


def test_the_table_takes_each_editor_once_and_needs_no_psnr(tmp_path):
    path = tmp_path / "ablate.jsonl"
    path.write_text("".join(json.dumps(ROW | {"unchanged": None}) + "\n" for _ in range(20)))
    assert "| P2P: none | 1 | 50.0% | 50.0% | 50.0% | nan dB |" in ablate.table(ablate.read_scores(path))


def test_what_is_scored_is_not_made_again(asked, tmp_path):
    table = evaluated("--out", tmp_path, "--seeds", 2, "--only", "rendered pairs")
    assert "| rendered pairs | 2 | 50.0 ± 0.0% | 50.0 ± 0.0% | 50.0 ± 0.0% | 20.0 ± 0.0 dB |" in table
    seeds = [row["seed"] for _, row in read_rows(tmp_path / "ablate.jsonl")]
    count = len(asked)
    assert evaluated("--out", tmp_path, "--seeds", 2, "--only", "rendered pairs") == table
    assert seeds == [0, 1] and len(asked) == count


def test_other_settings_share_no_run_and_no_data(asked, tmp_path):
    for flags in (["--steps", 3], ["--steps", 7], ["--prompts", 200]):
        evaluated("--out", tmp_path, "--seeds", 1, "--only", "P2P: none", *flags)
    outs = [[words[words.index("--out") + 1] for words in asked if words[0] == script and "--out" in words]
            for script in ("train.py", "make_dataset.py")]
    assert len(set(outs[0])) == len(outs[0]) == 3
    assert outs[1][:2] == outs[1][2:4] and not {*outs[1][:2]} & {*outs[1][4:]}
    caches = [words[words.index("--cache") + 1] for words in asked if words[0] == "train.py"]
    assert caches[0] == caches[1] != caches[2]


def test_intervals_are_students():
    assert ablate.interval([0.5]) == (0.5, float("inf"))
    mean, half = ablate.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.30 / 3**0.5)
    for k, quantile in enumerate(ablate.STUDENT, start=2):  # the density's integral up to there is 97.5%
        df = k - 1
        x = torch.linspace(0, quantile, 200_001, dtype=torch.float64)
        constant = math.gamma((df + 1) / 2) / (math.gamma(df / 2) * (df * math.pi) ** 0.5)
        below = 0.5 + torch.trapezoid(constant * (1 + x**2 / df) ** (-(df + 1) / 2), x).item()
        assert below == pytest.approx(0.975, abs=5e-4)


def test_an_untrained_network_knows_nothing_of_nano_sd(tmp_path):
    parts = load_model(ablate.untrained(tmp_path / "start"), edits=False)
    learned = load_model(ablate.PAINTER, edits=False)
    assert parts.unet.config == learned.unet.config
    assert not torch.equal(parts.unet.mid_block.resnets[0].conv1.weight,
                           learned.unet.mid_block.resnets[0].conv1.weight)
    assert torch.equal(parts.vae.decoder.conv_in.weight, learned.vae.decoder.conv_in.weight)
    assert parts.unet.conv_out.weight.abs().max() == 0


def test_a_script_that_fails_or_is_stopped_ends_it(tmp_path, capsys):
    with pytest.raises(ValueError, match="exit code 2"):
        run_scripts.call(make_dataset.main, "pairs", "--prompts", tmp_path / "none", "--out", tmp_path,
                         "--weights", "x")
    assert "none" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        run_scripts.call(lambda words: 130, "a")


def test_a_run_that_has_checkpoints_is_resumed(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(run_scripts, "call", lambda main, *words: commands.append(words))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for _ in range(2):
        assert run_scripts.train_run(tmp_path / "run", "start", 9, "--lr", 1) == tmp_path / "run" / "weights"
        (tmp_path / "run" / "checkpoints" / "0000005").mkdir(exist_ok=True)
    assert commands == [("--weights", "start", "--out", tmp_path / "run", "--steps", 9, "--lr", 1),
                        ("--resume", tmp_path / "run", "--steps", 9, "--lr", 1)]
