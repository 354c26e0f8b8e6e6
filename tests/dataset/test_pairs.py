"""The pairs job: the original's layout and filter, equal results after kills, restarts and full disks."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pairs_jobs
import pytest
import torch
from pairs_jobs import SETTINGS, fake_job
from PIL import Image
from tiny_editor import write_tiny_clip, write_tiny_editor, write_tiny_painter

import make_dataset
from nanoip2p.clip_filter import SIMILARITIES, Judge
from nanoip2p.common import device
from nanoip2p.dataset import pairs, show
from nanoip2p.dataset.layouts import Pair, read_data
from nanoip2p.dataset.pairs import candidate, list_seeds, pair_settings, read_prompts
from nanoip2p.prompt_to_prompt import PairPainter
from nanoip2p.speed import fast as speed
from nanoip2p.text_to_image import TextToImage

TINY = {"clip": "clip", "clip_threshold": -1.0, "clip_dir_threshold": 0.0, "clip_img_threshold": -1.0,
        "n_samples": 4, "batch": 3, "steps": 2, "resolution": 32, "max_out_samples": 2}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = write_tiny_painter(tmp_path_factory.mktemp("weights") / "painter")
    write_tiny_clip(folder / "clip")
    (folder / "pairs.json").write_text(json.dumps(TINY))
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [{"input": f"a cat on sofa {n}", "edit": f"edit {n}", "output": f"a dog on sofa {n}"}
             for n in range(3)]
    lines[1]["caption"] = lines[1].pop("input")
    lines[2]["url"] = "https://example.org/é"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.fixture(scope="module")
def start():
    """Run jobs side by side in processes of their own, see pairs_jobs.py; returns their exit codes."""
    process = subprocess.Popen(
        [sys.executable, pairs_jobs.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def start(*jobs):
        process.stdin.write(json.dumps(jobs) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())
    yield start
    process.stdin.close()
    process.wait()


def argv(weights, prompts, out, *more):
    words = ["pairs", "--weights", weights, "--prompts", prompts, "--out", out, "--device", "cpu",
             "--dtype", "fp32", *more]
    return [str(word) for word in words]


def content(root):
    """Everything below a folder, hidden files as well."""
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
            for path in root.rglob("*")}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(weights, prompts, start, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "deep" / "pairs"
    assert start({"argv": argv(weights, prompts, out)}) == [0]
    return out


def test_folder_is_the_originals(finished, prompts):
    listed = json.loads((finished / "seeds.json").read_text())
    assert [name for name, _ in listed] == ["0000000", "0000001", "0000002"]
    expected = {"job.json", "seeds.json"}
    for (name, seeds), prompt in zip(listed, rows(prompts)):
        folder = finished / name
        assert json.loads((folder / "prompt.json").read_text()) == prompt
        kept, tried = rows(folder / "metadata.jsonl"), rows(folder / "candidates.jsonl")
        assert sorted(str(row["seed"]) for row in kept) == seeds and len(tried) == 4
        assert list(kept[0]) == ["seed", "p2p_threshold", "cfg_scale", *SIMILARITIES, "leakage"]
        passing = sorted((row["clip_sim_dir"] for row in tried if row["clip_sim_dir"] >= 0), reverse=True)
        assert [row["clip_sim_dir"] for row in kept] == passing[:2]
        files = [f"{seed}_{i}.jpg" for seed in seeds for i in (0, 1)]
        files += ["prompt.json", "metadata.jsonl", "candidates.jsonl"]
        expected |= {name, *(f"{name}/{file}" for file in files)}
        assert all(Image.open(folder / file).size == (32, 32) for file in files[:2])
        assert max(Image.open(folder / files[0]).quantization[0]) == 1  # of quality 100
    assert content(finished).keys() == expected
    seeds = [row["seed"] for path in finished.glob("*/candidates.jsonl") for row in rows(path)]
    assert len(set(seeds)) == 12


def test_training_reads_it(finished):
    items = read_data(finished)
    name, seeds = json.loads((finished / "seeds.json").read_text())[0]
    folder = finished / name
    captions = ("a cat on sofa 0", "a dog on sofa 0")
    assert items[0][0] == Pair(folder / f"{seeds[0]}_0.jpg", "edit 0", folder / f"{seeds[0]}_1.jpg", captions)


def test_any_pair_can_be_made_again(finished, weights):
    """From job.json, prompt.json and its row of metadata.jsonl alone, in a batch of its own."""
    job = json.loads((finished / "job.json").read_text())
    painter, judge = TextToImage.load(job["weights"], "cpu"), Judge.load(job["clip"])
    for folder in sorted(finished.glob("[0-9]*")):
        prompt = json.loads((folder / "prompt.json").read_text())
        texts = (prompt.get("input") or prompt["caption"], prompt["output"])
        settings = [job["job"][key] for key in ("inject", "steps", "sampler", "resolution")]
        for row in rows(folder / "metadata.jsonl"):
            again = PairPainter(painter, *texts, *settings).paint(
                [row["seed"]], [row["p2p_threshold"]], [row["cfg_scale"]])
            for i, picture in enumerate(again[0]):
                file = io.BytesIO()
                picture.save(file, "JPEG", quality=100)
                difference = torch.tensor(list(Image.open(file).tobytes())).sub(
                    torch.tensor(list(Image.open(folder / f"{row['seed']}_{i}.jpg").tobytes())))
                assert difference.abs().max() <= 4 and difference.ne(0).float().mean() < 0.02
            scores = judge.score(*zip(*again), judge.encode_texts(list(texts)))[0]
            assert scores == pytest.approx({name: row[name] for name in SIMILARITIES}, abs=1e-3)


def test_killed_at_any_moment_and_started_again_it_is_the_same(finished, weights, prompts, start, tmp_path):
    """By a timer, through the whole program."""
    began = time.perf_counter()
    start({"argv": argv(weights, prompts, tmp_path / "timed")})
    whole, draw, kills, n = time.perf_counter() - began, random.Random(0), 0, 0
    while kills < 6 or n == 0:
        job = {"argv": argv(weights, prompts, tmp_path / str(n))}
        killed = start(job | {"seconds": draw.uniform(0.3, 1.0) * whole}) != [0]
        kills += killed
        if not killed or kills == 6:
            assert start(job) == [0] and content(tmp_path / str(n)) == content(finished)
            n += 1


def test_killed_before_every_single_file_operation_it_is_the_same(start, tmp_path):
    """And in the middle of every file. Without networks, so that it can be tried at all moments."""
    assert start({"fake": {"out": str(tmp_path / "whole"), "count": 2, "n_samples": 3}}) == [0]
    expected, event, code = content(tmp_path / "whole"), 0, None
    while code != 0:
        event += 1
        job = {"fake": {"out": str(tmp_path / str(event)), "count": 2, "n_samples": 3}}
        code = start(job | {"event": event})[0]
        assert code in (0, -9) and (code == 0 or start(job) == [0]), event
        assert content(tmp_path / str(event)) == expected, event
    assert event > 40


def test_any_number_of_processes_gives_the_same_folder(finished, weights, prompts, start, tmp_path):
    for count in (2, 3):
        jobs = [{"argv": argv(weights, prompts, tmp_path / str(count)),
                 "env": {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}}
                for rank in range(count)]
        assert start(*jobs) == [0] * count
        assert content(tmp_path / str(count)) == content(finished)


def test_processes_share_the_prompts_and_may_die(start, tmp_path):
    """While none dies, no prompt is made twice; the last one to end lists the work of all."""
    assert start({"fake": {"out": str(tmp_path / "whole"), "count": 9}}) == [0]
    expected, draw = content(tmp_path / "whole"), random.Random(0)
    for n in range(12):
        out, log = tmp_path / str(n), tmp_path / f"{n}.log"
        job = {"fake": {"out": str(out), "count": 9, "log": str(log)}}
        if n >= 3:
            codes = start(*(job | {"event": draw.randrange(1, 150)} for _ in range(4)))
            assert set(codes) <= {0, -9}
        assert start(*[job] * draw.choice((2, 3))) and content(out) == expected
        if n < 3:
            painted = log.read_text().splitlines()
            assert len(painted) == len(set(painted)) == 9 * 5


def test_a_finished_prompt_takes_no_lock(tmp_path):
    """When all prompts are finished, another process may just be removing the folder of locks."""
    (tmp_path / "0000000").mkdir()
    with pairs.claimed(tmp_path, "0000000") as folder:
        assert folder is None
    assert not (tmp_path / pairs.UNFINISHED).exists()


def test_finished_prompts_are_not_redone(tmp_path):
    fake_job(tmp_path / "out", log=tmp_path / "log")
    before, times = (tmp_path / "log").read_text(), {}
    for path in (tmp_path / "out").rglob("*"):
        times[path] = path.stat().st_mtime_ns
    fake_job(tmp_path / "out", log=tmp_path / "log", batch=4)
    assert (tmp_path / "log").read_text() == before
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in times.items()
               if path.parent != tmp_path / "out" and path.is_file())


def test_a_signal_is_one_line_and_lists_what_is_there(
        weights, prompts, finished, tmp_path, monkeypatch, capsys):
    plain, calls = pairs.make_candidates, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)  # as from a scheduler; cli.run makes it a KeyboardInterrupt
        return plain(*args)
    monkeypatch.setattr(pairs, "make_candidates", interrupted)
    out = tmp_path / "out"
    assert make_dataset.main(argv(weights, prompts, out)) == 130
    assert "same command" in capsys.readouterr().err.splitlines()[-1]
    assert [name for name, _ in json.loads((out / "seeds.json").read_text())] == ["0000000"]
    assert make_dataset.main(argv(weights, prompts, out)) == 0
    assert len(calls) == 4 and content(out).keys() == content(finished).keys()


def test_nothing_of_a_process_that_died_is_taken_over(tmp_path):
    """Under another --batch it may have kept other pairs."""
    left = tmp_path / ".unfinished" / "0000001"
    left.mkdir(parents=True)
    (left / "1_0.jpg").touch()
    fake_job(tmp_path)
    assert not (tmp_path / "0000001" / "1_0.jpg").exists() and (tmp_path / "0000001").exists()


def test_candidates_are_drawn_from_their_own_seeds():
    prompt = pairs.Prompt(7, "a", "b", {})
    settings = replace(SETTINGS, seed=3)
    drawn = [candidate(prompt, k, settings) for k in range(2000)]
    assert len({row["seed"] for row in drawn}) == 2000 and drawn[5] == candidate(prompt, 5, settings)
    for other, seed in ((prompt, 4), (pairs.Prompt(8, "a", "b", {}), 3)):
        assert candidate(other, 0, replace(SETTINGS, seed=seed))["seed"] != drawn[0]["seed"]
    for key, low, high in (("p2p_threshold", 0.1, 0.9), ("cfg_scale", 7.5, 15.0)):
        values = torch.tensor([row[key] for row in drawn], dtype=torch.float64)
        values = (values - low) / (high - low)
        assert 0 <= values.min() < 0.01 and 0.99 < values.max() <= 1 and abs(values.mean() - 0.5) < 0.02
    p, cfg = (torch.tensor([row[key] for row in drawn]) for key in ("p2p_threshold", "cfg_scale"))
    assert torch.corrcoef(torch.stack([p, cfg]))[0, 1].abs() < 0.06


@pytest.mark.parametrize("stop, batch", [(1, 1), (1, 8), (3, 2), (3, 8), (0, 3), (99, 4)])
def test_early_stop_and_keep_rule(tmp_path, stop, batch):
    """The first candidates until `stop` have passed, whatever the batch; of these the best."""
    fake_job(tmp_path, 1, n_samples=20, batch=batch, early_stop=stop, max_out_samples=4)
    tried = rows(tmp_path / "0000000" / "candidates.jsonl")
    seeds = [candidate(pairs.Prompt(0, "", "", {}), k, SETTINGS)["seed"] for k in range(20)]
    reds = [seed % 256 for seed in seeds]
    passing = [k for k in range(20) if reds[k] > 127]
    end = passing[stop - 1] + 1 if 0 < stop <= len(passing) else 20
    assert [row["seed"] for row in tried] == seeds[:end]
    kept = sorted((k for k in passing if k < end), key=lambda k: (-reds[k], -seeds[k]))[:4]
    assert [row["seed"] for row in rows(tmp_path / "0000000" / "metadata.jsonl")] == [seeds[k] for k in kept]


@pytest.mark.parametrize("most, passing", [(None, 11), (0.5, 5), (0.0, 1)])
def test_leakage_has_a_threshold_that_passes_what_has_none(tmp_path, most, passing, capsys):
    fake_job(tmp_path, 1, n_samples=20, max_out_samples=20, leakage_threshold=most)
    kept, tried = (rows(tmp_path / "0000000" / f"{name}.jsonl") for name in ("metadata", "candidates"))
    wanted = [row for row in tried if row["clip_sim_dir"] >= 0 and (
        None in (most, row["leakage"]) or row["leakage"] <= most)]
    assert {row["seed"] for row in kept} == {row["seed"] for row in wanted} and len(wanted) == passing
    assert make_dataset.main(["show", str(tmp_path)]) == 0
    assert f"20, {passing / 20:.1%} pass" in capsys.readouterr().out


def test_prompts_without_survivors_have_no_seeds(tmp_path):
    fake_job(tmp_path, 2, clip_dir_threshold=1.01)
    assert json.loads((tmp_path / "seeds.json").read_text()) == []
    assert {path.name for path in (tmp_path / "0000001").iterdir()} == {"prompt.json", "candidates.jsonl"}


def test_seeds_are_listed_as_the_original_does(tmp_path):
    for name, files in (("0000002", ["9_0.jpg", "9_1.jpg", "10_0.jpg"]), ("0000001", ["5_0.jpg"]),
                        ("0000003", ["prompt.json"]), (".unfinished", ["1_0.jpg"]), ("notes", ["1_0.jpg"])):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    assert list_seeds(tmp_path) == [("0000001", ["5"]), ("0000002", ["10", "9"])]


GOOD = '{"input": "a", "edit": "b", "output": "c"}'


@pytest.mark.parametrize("line, reason", [
    (b"{", "is not a JSON object"),
    (b"[1]", "list"),
    (b'{"edit": "b", "output": "c"}', "'input'"),
    (b'{"input": "a", "output": "c"}', "'edit'"),
    (b'{"input": "a", "edit": "b", "output": " "}', "'output'"),
    (b'{"input": 3, "edit": "b", "output": "c"}', "'input'"),
    (b'{"input": "a\\ud800", "edit": "b", "output": "c"}', "half a character"),
    (b'\xff{"input": "a"}', "is not a JSON object"),
    (b"[" * 10**5, "is not a JSON object"),
])
def test_bad_lines_are_named_before_any_work(tmp_path, capsys, line, reason):
    """Neither weights nor --out are touched; line 2 is blank, which is no mistake."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\n\n" + line + b"\r\n" + GOOD.encode())
    good, bad = read_prompts(path)
    assert [prompt.folder for prompt in good] == ["0000000", "0000003"] and len(bad) == 1
    assert make_dataset.main(argv("nowhere", path, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "line 3" in error and reason in error and "--skip-bad" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_lines_are_skipped_on_demand(weights, prompts, finished, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(prompts.read_bytes() + b"broken\n[]\n")
    assert make_dataset.main(argv(weights, path, tmp_path / "out")) == 2
    assert "line 4" in capsys.readouterr().err
    assert make_dataset.main(argv(weights, path, tmp_path / "out", "--skip-bad")) == 0
    out, error = capsys.readouterr()
    kept = [seeds for _, seeds in json.loads((tmp_path / "out" / "seeds.json").read_text())]
    assert "2 bad lines" in error and f"{sum(map(len, kept))} pairs kept" in out
    assert content(tmp_path / "out").keys() == content(finished).keys()


def test_kept_features_are_another_job_but_an_old_job_goes_on(finished, weights, prompts, tmp_path, capsys):
    few = tmp_path / "prompts.jsonl"
    few.write_text(prompts.read_text().splitlines()[0])
    assert make_dataset.main(argv(weights, few, tmp_path / "out", "--deep-every", "2")) == 0
    made, plain = content(tmp_path / "out"), content(finished)
    assert made["0000000/candidates.jsonl"] != plain["0000000/candidates.jsonl"]
    assert json.loads(made["job.json"])["job"]["deep_every"] == 2
    for other in ([], ["--deep-every", "3"]):
        assert make_dataset.main(argv(weights, few, tmp_path / "out", *other)) == 2
        assert "was begun with deep_every = 2, not" in capsys.readouterr().err.splitlines()[-1]
    job = json.loads(plain["job.json"])
    del job["job"]["deep_every"]  # of a version without this setting
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "job.json").write_text(json.dumps(job))
    assert make_dataset.main(argv(weights, prompts, tmp_path / "old")) == 0
    assert content(tmp_path / "old")["0000000/candidates.jsonl"] == plain["0000000/candidates.jsonl"]


def test_fast_makes_the_same_pairs_and_the_same_job(finished, weights, prompts, tmp_path, monkeypatch):
    used, fast = [], speed.speed_up
    monkeypatch.setattr(speed, "speed_up", lambda *given, **how: used.append((fast(*given, **how), how)))
    assert make_dataset.main(argv(weights, prompts, tmp_path / "out", "--fast", "--attention", "sdpa")) == 0
    assert [how for _, how in used] == [{"injects": True, "attention": "sdpa", "verbose": False}]
    assert make_dataset.main(argv(weights, prompts, tmp_path / "none", "--attention", "ours")) == 2
    made, plain = content(tmp_path / "out"), content(finished)
    assert made.keys() == plain.keys() and made["job.json"] == plain["job.json"]
    for name in (name for name in made if name.endswith(".jpg")):
        a, b = (np.asarray(Image.open(io.BytesIO(of[name])), int) for of in (made, plain))
        assert abs(a - b).max() <= 3


@pytest.mark.parametrize("words, named", [
    (["--seed", "1"], "seed = 0"), (["--n-samples", "5"], "n_samples = 4"),
    (["--inject", "none"], "inject"), (["--early-stop", "2"], "early_stop"), (["--steps", "3"], "steps"),
    (["--resolution", "64"], "resolution"), (["--clip-dir-threshold", "0.1"], "clip_dir_threshold"),
    (["--dtype", "bf16"], "networks"),
])
def test_another_job_does_not_mix_with_this_one(finished, weights, prompts, capsys, words, named):
    before = content(finished)
    assert make_dataset.main(argv(weights, prompts, finished, *words)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert named in error and str(finished) in error and content(finished) == before


def test_a_job_keeps_the_dtype_that_the_device_chose(
        finished, weights, prompts, tmp_path, monkeypatch, capsys):
    few, words = tmp_path / "prompts.jsonl", argv(weights, tmp_path / "prompts.jsonl", tmp_path / "out")
    few.write_text(prompts.read_text().splitlines()[0])
    at = words.index("--dtype")
    chosen = words[:at] + words[at + 2 :]
    for faster in ("bf16", "fp32"):  # as if the device had changed before the second run
        monkeypatch.setattr(device, "pick_dtype", lambda name, device, faster=faster: name or faster)
        assert make_dataset.main(chosen) == 0
        assert "; computes in bf16\n" in capsys.readouterr().err
        job = json.loads((tmp_path / "out" / "job.json").read_text())
        assert job["dtype"] == "bf16" and "dtype" not in job["job"]
    plain = json.loads((finished / "job.json").read_text())
    assert plain["dtype"] == "fp32" and plain["job"]["networks"] != job["job"]["networks"]
    assert make_dataset.main(words) == 2 and "the same networks" in capsys.readouterr().err
    del plain["dtype"]  # of a version that painted in fp32
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "job.json").write_text(json.dumps(plain))
    monkeypatch.setattr(device, "pick_dtype", lambda name, device: "bf16")
    assert make_dataset.main([word.replace("/out", "/old") for word in chosen]) == 0
    assert "; computes in fp32\n" in capsys.readouterr().err


def test_prompts_may_follow(finished, weights, prompts, start, tmp_path):
    """A file that has grown goes on; in the end, all is as if it had been as long from the first."""
    few, lines = tmp_path / "prompts.jsonl", prompts.read_text().splitlines(keepends=True)
    few.write_text("".join(lines[:-1]))
    assert start({"argv": argv(weights, few, tmp_path / "out")}) == [0]
    assert len(list(tmp_path.glob("out/0*"))) == 2
    few.write_text("".join(lines))
    assert start({"argv": argv(weights, few, tmp_path / "out")}) == [0]
    assert content(tmp_path / "out") == content(finished)


def test_other_prompts_weights_or_clip_do_not_mix_with_these(finished, weights, prompts, tmp_path, capsys):
    before = content(finished)
    other = tmp_path / "prompts.jsonl"
    other.write_text(prompts.read_text().replace("a dog on sofa 2", "a dog on sofa two"))
    painter, clip = write_tiny_painter(tmp_path / "painter", 5), write_tiny_clip(tmp_path / "clip", 5)
    (painter / "pairs.json").write_text(json.dumps(TINY | {"clip": str(weights / "clip")}))
    for told, *words in (("begun with other prompts", weights, other, finished),
                         ("not begun with the same networks", painter, prompts, finished),
                         ("not begun with the same networks", weights, prompts, finished, "--clip", clip)):
        assert make_dataset.main(argv(*words)) == 2
        assert told in capsys.readouterr().err.splitlines()[-1]
    assert content(finished) == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").touch()
    assert make_dataset.main(argv(weights, prompts, tmp_path / "photos")) == 2
    assert "holiday.jpg" in capsys.readouterr().err and len(list((tmp_path / "photos").iterdir())) == 1


def test_settings_come_from_flags_then_the_weights_folder_then_the_paper(tmp_path):
    painter = {"steps": 7, "resolution": 64, "sampler": "ddim", "cfg_text": 1.0}
    paper = pair_settings({}, tmp_path, painter)
    assert paper == pairs.PairSettings(steps=7, resolution=64, sampler="ddim")
    assert (paper.n_samples, paper.max_out_samples, paper.clip) == (100, 4, "openai/clip-vit-large-patch14")
    (tmp_path / "nano-clip").mkdir()
    (tmp_path / "weights").mkdir()
    chosen = {"clip": "../nano-clip", "max_cfg": 9, "steps": 5, "clip_threshold": 0.1}
    (tmp_path / "weights" / "pairs.json").write_text(json.dumps(chosen))
    settings = pair_settings({"steps": 3, "out": "x"}, tmp_path / "weights", painter)
    changed = {key: value for key, value in asdict(settings).items() if value != getattr(paper, key)}
    where = str(tmp_path / "weights" / "../nano-clip")
    assert changed == {"clip": where, "max_cfg": 9, "steps": 3, "clip_threshold": 0.1}


@pytest.mark.parametrize("chosen, named", [
    ({"clips": "x"}, "clips"), ({"n_samples": "many"}, "n_samples"), ({"n_samples": 2.5}, "n_samples"),
    ({"n_samples": True}, "n_samples"), ({"n_samples": 0}, "from 1"), ({"min_p2p": 0.95}, "max_p2p"),
    ({"seed": -1}, "seed"), ({"steps": 0}, "from 1"), ({"batch": 10**9}, "from -10000 to 10000"),
    ({"clip": "owner/clip"}, "give it as --clip"), ({"inject": "all"}, "self"), ({"sampler": "x"}, "ddim"),
    ({"clip": []}, "a text"), ({"max_cfg": float("nan")}, "a number"),
    ({"blend": "red"}, "none, auto"), ({"blend": "auto"}, "sampler = ddim: --blend auto needs euler"),
    ({"leakage_threshold": -1}, "from 0"), ({"leakage_threshold": "low"}, "a number"),
    ({"min_cfg": 16}, "max_cfg"), ({"max_p2p": 1.5}, "max_p2p <= 1"), ({"min_p2p": -0.1}, "0 <= min_p2p"),
])
def test_settings_that_cannot_be_used_are_named(tmp_path, chosen, named):
    (tmp_path / "pairs.json").write_text(json.dumps(chosen))
    with pytest.raises(ValueError, match=named):
        pair_settings({}, tmp_path, {"steps": 7, "resolution": 64, "sampler": "ddim"})


@pytest.mark.parametrize("words, named", [
    (["--weights", "nowhere"], "nowhere"), (["--clip", "nowhere"], "nowhere"), (["--resolution", "33"], "33"),
    (["--n-samples", "0"], "--n-samples"), (["--min-p2p", "nan"], "--min-p2p"), (["--batch", "x"], "--batch"),
    (["--min-cfg", "20"], "min_cfg"), (["--inject", "all"], "--inject"), (["--device", "abacus"], "abacus"),
    (["--prompts", "nowhere"], "nowhere"), (["--prompts", os.devnull], "regular file"),
    (["--raw-weights"], "--raw-weights"), (["--steps", "5000"], "5000"), (["--blend", "red"], "--blend"),
    (["--blend", "auto", "--sampler", "ddim"], "euler"), (["--leakage-threshold", "-1"], "number from 0"),
])
def test_bad_input_is_one_line_and_exit_code_2(weights, prompts, tmp_path, capsys, words, named):
    assert make_dataset.main(argv(weights, prompts, tmp_path / "out", *words)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert named in lines[-1] and lines[-1].startswith("error: ") and not (tmp_path / "out").exists()
    assert not any("Traceback" in line for line in lines)


def test_an_editor_is_no_painter(tmp_path, prompts, weights, capsys):
    editor = write_tiny_editor(tmp_path / "editor")
    assert make_dataset.main(argv(editor, prompts, tmp_path / "out", "--clip", weights / "clip")) == 2
    assert "editor" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "pairs"):
        with pytest.raises(ValueError, match="cannot be written: (File exists|Not a directory)"):
            fake_job(out)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("full_at", range(1, 12))
def test_disk_full_loses_nothing(tmp_path, monkeypatch, full_at):
    """At any of the files that are written; afterwards the same command ends as if nothing had been."""
    fake_job(tmp_path / "whole", 2)
    written = []

    def failing(plain):
        def write(self, *args, **kwargs):
            written.append(1)
            if len(written) >= full_at:
                raise OSError(28, "No space left on device")
            return plain(self, *args, **kwargs)
        return write
    monkeypatch.setattr(Path, "write_text", failing(Path.write_text))
    monkeypatch.setattr(Image.Image, "save", failing(Image.Image.save))
    with pytest.raises(ValueError, match="No space left on device; (finished prompts stay|make room)"):
        fake_job(tmp_path / "out", 2)
    monkeypatch.undo()
    unfinished = tmp_path / "out" / ".unfinished"
    assert not unfinished.exists() or not [path for path in unfinished.iterdir() if path.is_dir()]
    fake_job(tmp_path / "out", 2)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_show_prints_statistics_and_a_contact_sheet(finished, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert make_dataset.main(["show", str(finished), "--sheet", str(sheet), "--rows", "2"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    kept = [row for path in finished.glob("*/metadata.jsonl") for row in rows(path)]
    tried = [row for path in finished.glob("*/candidates.jsonl") for row in rows(path)]
    passing = sum(row["clip_sim_dir"] >= 0 for row in tried) / len(tried)
    mean = sum(row["p2p_threshold"] for row in kept) / len(kept)
    for part in (f"kept pairs {len(kept)}, {len(kept) / 3:.2f} a prompt",
                 f"p of kept pairs mean {mean:.3f}",
                 f"candidates {len(tried)}, {passing:.1%} pass, {len(kept) / len(tried):.1%} are kept",
                 "3 finished"):
        assert part in text
    for i, name in enumerate(("caption before", "caption after", "direction", "pictures")):
        assert f"{name} {sum(row[SIMILARITIES[i]] for row in kept) / len(kept):.3f}" in text
    width, height = Image.open(sheet).size
    assert width == 4 * 192 + 5 * 8 and height > 2 * 192


def test_contact_sheet_has_the_best_pair_of_the_best_prompts_first(finished, monkeypatch):
    monkeypatch.setattr(show, "grid", lambda pictures, labels: (pictures, labels))
    pictures, labels = show.contact_sheet(show.read_pairs(finished), 2, seed=0)
    firsts = [(rows(path)[0], json.loads((path.parent / "prompt.json").read_text()), path.parent)
              for path in finished.glob("*/metadata.jsonl")]
    firsts.sort(key=lambda first: -first[0]["clip_sim_dir"])
    for (row, prompt, folder), images, texts in zip(firsts[:2], pictures, labels, strict=True):
        assert texts[0] == f"best: {prompt.get('input') or prompt['caption']}"
        assert texts[1].startswith(prompt["edit"]) and f"direction {row['clip_sim_dir']:.2f}" in texts[1]
        assert ", leakage" not in texts[1] if row["leakage"] is None else (
            f"direction {row['clip_sim_dir']:.2f}, pictures {row['clip_sim_image']:.2f}, "
            f"leakage {row['leakage']:.2f}, p" in texts[1])
        for i in (0, 1):
            assert images[i].tobytes() == Image.open(folder / f"{row['seed']}_{i}.jpg").tobytes()


def test_show_reads_the_papers_own_folder_and_names_what_is_broken(finished, tmp_path, capsys):
    """No job.json, no candidates.jsonl, a prompt without survivors."""
    folder = tmp_path / "0000000"
    folder.mkdir()
    (folder / "prompt.json").write_text('{"caption": "a", "edit": "b", "output": "c"}')
    assert make_dataset.main(["show", str(tmp_path)]) == 0
    assert "kept pairs 0, 0.00" in " ".join(capsys.readouterr().out.split())
    row = dict.fromkeys(("seed", "p2p_threshold", "cfg_scale", *SIMILARITIES), 1)
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    for i in (0, 1):
        Image.new("RGB", (16, 16)).save(folder / f"1_{i}.jpg")
    assert make_dataset.main(["show", str(tmp_path)]) == 0
    assert "0.9 ... 1.0 " + 40 * "#" + " 1" in capsys.readouterr().out
    assert (tmp_path / "contact-sheet.png").exists()
    for line, named in (("{", "metadata.jsonl"), ("3", "metadata.jsonl"), ('{"seed": 1}', "p2p_threshold")):
        (folder / "metadata.jsonl").write_text(line)
        assert make_dataset.main(["show", str(tmp_path)]) == 2
        assert named in capsys.readouterr().err
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "candidates.jsonl").write_text('{"seed": 1, "p2p')
    assert make_dataset.main(["show", str(tmp_path)]) == 2
    assert "candidates.jsonl, line 1" in capsys.readouterr().err
    assert make_dataset.main(["show", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_another_schedule_or_tokenizer_is_another_model(tmp_path, monkeypatch):
    fake_job(tmp_path / "out", 1)
    for what, value in (("mean", torch.ones(3)), ("tokenizer", SimpleNamespace(
            backend=SimpleNamespace(to_str=lambda: "other words")))):
        with monkeypatch.context() as patch:
            patch.setattr(pairs_jobs.FakeJudge, what, value)
            with pytest.raises(ValueError, match="not begun with the same networks"):
                fake_job(tmp_path / "out", 1)
    fake_job(tmp_path / "out", 1)


def test_a_picture_that_is_no_number_names_its_prompt_and_a_way_out(tmp_path, monkeypatch):
    def paint(self, seeds, shares, cfg_text):
        raise ValueError("the picture came out as NaN")

    monkeypatch.setattr(pairs_jobs.FakePainter, "measure", paint)
    with pytest.raises(ValueError, match="prompt 0000000: the picture came out as NaN, and a new --out"):
        fake_job(tmp_path / "out", 1)


def test_a_broken_job_file_is_one_line(tmp_path):
    fake_job(tmp_path / "out", 1)
    (tmp_path / "out" / "job.json").write_text('{"job": null}')
    with pytest.raises(ValueError, match="not begun with the same job"):
        fake_job(tmp_path / "out", 1)


@pytest.mark.parametrize("name, content, hint", [
    ("metadata.jsonl", {"clip_sim_dir": None}, "clip_sim_dir = None should be a number"),
    ("metadata.jsonl", {"p2p_threshold": "x"}, "p2p_threshold = 'x' should be a number"),
    ("metadata.jsonl", {"p2p_threshold": float("inf")}, "p2p_threshold = inf should be a number from 0 to 1"),
    ("metadata.jsonl", {"leakage": -1}, "leakage = -1 should be a number from 0 or null"),
    ("candidates.jsonl", {"leakage": "x"}, "leakage = 'x' should be a number from 0 or null"),
    ("job.json", {"job": dict.fromkeys(("clip_threshold", "clip_dir_threshold", "clip_img_threshold"), 0)
                  | {"leakage_threshold": []}}, "leakage_threshold = [] should be a number or null"),
    ("candidates.jsonl", {"clip_sim_0": None}, "clip_sim_0 = None should be a number"),
    ("metadata.jsonl", {"seed": "../1"}, "row 1: seed = '../1' should be a whole number"),
    ("prompt.json", {"edit": []}, "edit = [] should be a text or null"),
    ("job.json", {"job": []}, "job = [] should be an object"),
    ("job.json", {"job": {"clip_img_threshold": "x"}}, "clip_img_threshold = 'x' should be a number"),
])
def test_show_says_in_one_line_what_is_no_number(name, content, hint, tmp_path, capsys):
    folder, row = tmp_path / "0000000", dict.fromkeys(("seed", "p2p_threshold", *SIMILARITIES), 1)
    job = {"job": dict.fromkeys(("clip_threshold", "clip_dir_threshold", "clip_img_threshold"), 0.5)}
    files = {"prompt.json": {"input": "a", "edit": "b"}, "metadata.jsonl": row, "candidates.jsonl": row}
    folder.mkdir()
    for file, good in (files | {"../job.json": job}).items():
        (folder / file).write_text(json.dumps(good | content if Path(file).name == name else good) + "\n")
    assert make_dataset.main(["show", str(tmp_path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert hint in line and name in line


@pytest.mark.parametrize("dtype", ["int4", [], None, 7])
def test_a_job_of_an_unknown_dtype_is_one_line(dtype, tmp_path):
    (tmp_path / "job.json").write_text(json.dumps({"job": {}, "dtype": dtype}))
    with pytest.raises(ValueError, match="dtype = .* should be one of bf16, fp16, fp32"):
        make_dataset.job_dtype(tmp_path, None, torch.device("cpu"))
    assert make_dataset.job_dtype(tmp_path, "fp32", torch.device("cpu")) == "fp32"


def test_prompts_have_limits(tmp_path, monkeypatch):
    path, row = tmp_path / "prompts.jsonl", {"input": "a", "edit": "b", "output": "c"}
    path.write_text("".join(json.dumps(row | {"edit": "b" * n}) + "\n" for n in (1, 10_000, 10_001)))
    found, bad = read_prompts(path)
    assert len(found) == 2 and bad == ["line 3 has a text of more than 10000 letters"]
    monkeypatch.setattr(pairs, "PROMPTS", 2)
    with pytest.raises(ValueError, match="more than 2 lines"):
        read_prompts(path)
