"""Caption pairs -> picture pairs that the CLIP filter lets pass (section 3.1.2): the job that makes the data.

    prompts.jsonl      {"input", "edit", "output"} a line, as captions.py writes them or the paper published

    out/job.json       settings of this job, so that another one does not mix with it
    out/0000000/       the first line's; appears whole, when it is finished, and is never redone
        prompt.json        the line
        <seed>_0.jpg  <seed>_1.jpg      before and after, of the pairs that were kept
        metadata.jsonl     their seeds, p, guidance and similarities, the best first
        candidates.jsonl   the same of all pairs that were painted: what other thresholds would do
    out/seeds.json     [["0000000", ["1234", ...]], ...] for data.py: the prompts that kept pairs

But for job.json and candidates.jsonl this is the layout of the paper's code. Any number of processes may work
on one folder, started by torchrun or by hand, each on the next prompt that no other one has claimed. All that
is random about a candidate comes from its seed, which comes from --seed and the numbers of prompt and
candidate; so neither interruptions nor the number of processes change the result.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nanoip2p.checkpoint import hub
from nanoip2p.checkpoint.load import with_defaults
from nanoip2p.clip_filter import Judge, Thresholds, best
from nanoip2p.common.files import claim_folder, locked, read_json, read_rows, write_json
from nanoip2p.pipeline import fingerprint
from nanoip2p.prompt_to_prompt import MODES, PairPainter
from nanoip2p.text_to_image import TextToImage

# generate_img_dataset.py of the paper's code, section 3.1.2. A weights folder overrides them in pairs.json,
# and steps, resolution and sampler, which are those of its defaults.json otherwise. early_stop: 0 for never.
PAPER_DEFAULTS = dict(
    n_samples=100, max_out_samples=4, min_p2p=0.1, max_p2p=0.9, min_cfg=7.5, max_cfg=15.0, clip_threshold=0.2,
    clip_dir_threshold=0.2, clip_img_threshold=0.7, inject="self", early_stop=0, seed=0, batch=8,
    clip=hub.CLIP)
UNFINISHED = ".unfinished"  # below out; goes when all is done


@dataclass(frozen=True)
class Prompt:
    """A caption pair with its instruction, and the number of its line, from 0, which names its folder."""

    number: int
    source: str
    output: str
    record: dict  # the whole line

    @property
    def folder(self) -> str:
        """Its folder's name, as the original counts."""
        return f"{self.number:07d}"


def read_prompts(path: Path) -> tuple[list[Prompt], list[str]]:
    """The good lines of a JSONL file, and the problem of each bad one ("line 3 ...").

    A line is an object of texts: `input` (or `caption`, as the paper's generator wrote), `edit` and `output`,
    and anything else. ValueError if there is no such file.
    """
    prompts, bad = [], []
    try:
        for number, row in read_rows(path, ".jsonl", bad):
            source = "input" if "input" in row else "caption"
            texts = {key: row.get(key) for key in (source, "edit", "output")}
            missing = [key for key, text in texts.items() if not isinstance(text, str) or not text.strip()]
            if missing:
                name = "input" if missing[0] == "caption" else missing[0]
                bad.append(f"line {number} lacks {name!r}, or it is no text")
            elif any("\ud800" <= letter <= "\udfff" for letter in "".join(texts.values())):
                bad.append(f"line {number} has half a character")
            else:
                prompts.append(Prompt(number - 1, row[source], row["output"], row))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    return prompts, bad


def complete(flags: dict, weights: Path, painter_defaults: dict) -> dict:
    """Settings of a job: flags that are not None, else pairs.json in the weights folder, else the paper's.

    Keys are those of PAPER_DEFAULTS, with steps, resolution and sampler, whose defaults are those of the
    painter. `clip` in pairs.json is a path from there, or a name on the Hub. Others among the flags are left
    out. ValueError for what cannot be used.
    """
    known = PAPER_DEFAULTS | {key: painter_defaults[key] for key in ("steps", "resolution", "sampler")}
    path = weights / "pairs.json"
    chosen = read_json(path, missing={}) if weights.is_dir() else {}
    settings = with_defaults(chosen, path, known)
    if "clip" in chosen and (weights / chosen["clip"]).exists():
        settings["clip"] = str(weights / chosen["clip"])
    settings |= {key: flags[key] for key in known if flags.get(key) is not None}
    for key in ("n_samples", "max_out_samples", "batch", "steps"):
        if settings[key] < 1:
            raise ValueError(f"{key} = {settings[key]}: at least 1 is needed")
    for low, high in (("min_p2p", "max_p2p"), ("min_cfg", "max_cfg")):
        if settings[low] > settings[high]:
            raise ValueError(f"{low} = {settings[low]} is more than {high} = {settings[high]}")
    if settings["inject"] not in MODES:
        raise ValueError(f"no way to inject {settings['inject']!r}; there are {', '.join(MODES)}")
    if settings["min_p2p"] < 0 or settings["max_p2p"] > 1:
        raise ValueError("p is a share of the steps: min_p2p and max_p2p lie in 0 ... 1")
    return settings


def candidate(prompt: Prompt, k: int, settings: dict) -> dict:
    """Candidate k of a prompt: seed, p and guidance, by the names of metadata.jsonl.

    p and guidance come from the seed by another stream than the noise does. Python promises never to change
    the one used here.
    """
    place = f"nanoip2p pair {settings['seed']} {prompt.number} {k}"
    seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:6], "big")  # 48 bits: never twice a prompt
    uniform = random.Random(f"nanoip2p pair {seed}").random
    return {
        "seed": seed,
        "p2p_threshold": settings["min_p2p"] + uniform() * (settings["max_p2p"] - settings["min_p2p"]),
        "cfg_scale": settings["min_cfg"] + uniform() * (settings["max_cfg"] - settings["min_cfg"]),
    }


def make_candidates(prompt: Prompt, painter: TextToImage, judge: Judge,
                    settings: dict) -> tuple[list[dict], list[tuple[dict, tuple]]]:
    """Paint and judge the candidates of one prompt.

    Returns the rows of metadata.jsonl of all in order (with early_stop, up to the one with which that many
    passed, whatever the batch), and the best: (row, (before, after)) each.
    """
    pair_painter = PairPainter(
        painter, prompt.source, prompt.output, settings["inject"], settings["steps"], settings["sampler"],
        settings["resolution"])
    captions = judge.encode_texts([prompt.source, prompt.output])
    thresholds = Thresholds(settings["clip_img_threshold"], settings["clip_dir_threshold"],
                            settings["clip_threshold"])
    rows, kept, passed = [], [], 0
    for begin in range(0, settings["n_samples"], settings["batch"]):
        end = min(begin + settings["batch"], settings["n_samples"])
        drawn = [candidate(prompt, k, settings) for k in range(begin, end)]
        columns = ([row[key] for row in drawn] for key in ("seed", "p2p_threshold", "cfg_scale"))
        try:
            pairs = pair_painter.paint(*columns)
        except ValueError as error:  # half precision can end in NaN, and would do so again
            raise ValueError(f"prompt {prompt.folder}: {error}, and a new --out") from None
        for row, pair, scores in zip(drawn, pairs, judge.score(*zip(*pairs), captions)):
            rows.append(row | scores)
            if not thresholds.reasons(scores):
                passed += 1
                kept = best([*kept, (rows[-1], pair)], settings["max_out_samples"])
            if passed == settings["early_stop"] > 0:
                return rows, kept
    return rows, kept


def write_prompt(folder: Path, prompt: Prompt, rows: list[dict], kept: list[tuple[dict, tuple]]) -> None:
    """What is to be seen of a prompt, into its folder."""
    def write(name: str, records: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    write("prompt.json", [prompt.record])
    write("candidates.jsonl", rows)
    for row, pair in kept:
        for i, picture in enumerate(pair):
            picture.save(folder / f"{row['seed']}_{i}.jpg", quality=100)
    if kept:
        write("metadata.jsonl", [row for row, _ in kept])


def make_pairs(prompts: list[Prompt], out: Path, painter: TextToImage, judge: Judge, settings: dict,
               names: dict, progress: bool = False) -> None:
    """Finish every prompt that no other process is at, then list what there is in seeds.json.

    settings: from `complete`. names: of weights and CLIP, which job.json keeps for people. ValueError, in one
    line, when `out` holds another job or cannot be written; what was finished stays.
    """
    try:
        try:
            claim_folder(out, "job.json", {"job": job_of(painter, judge, settings)}, "--out", names)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"{out} cannot be written: {reason}; make room or name another --out") from None
        waiting = [prompt for prompt in prompts if not is_finished(out, prompt)]
        done, tried, survived = len(prompts) - len(waiting), 0, 0
        try:
            with tqdm(total=len(prompts), initial=done, unit="prompt", disable=not progress) as bar:
                for prompt in waiting:
                    with claimed(out, prompt.folder) as folder:
                        if folder:
                            rows, kept = make_candidates(prompt, painter, judge, settings)
                            write_prompt(folder, prompt, rows, kept)
                            tried, survived = tried + len(rows), survived + len(kept)
                    rate = survived / max(tried, 1)
                    bar.set_postfix_str(f"{survived} of {tried} pairs survive, {rate:.1%}", refresh=False)
                    bar.update()
        finally:  # also after Ctrl-C, so that what is there can be used
            finish_job(out, prompts)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror or error}; finished prompts stay, and "
                         "the same command goes on from there") from None


def job_of(painter: TextToImage, judge: Judge, settings: dict) -> dict:
    """What, beside its prompt, makes a folder what it is. Without the batch, which changes the last bits."""
    settled = (painter.schedule, painter.vae.scaling_factor, judge.mean.tolist(), judge.std.tolist())
    words = [model.tokenizer.backend.to_str() for model in (painter, judge)]
    networks = fingerprint(painter.unet, painter.vae, painter.text_encoder, judge.clip,
                           begin=repr((settled, words)).encode())
    matter = {key: value for key, value in settings.items() if key not in ("batch", "clip")}
    return {"networks": networks, **matter}


def is_finished(out: Path, prompt: Prompt) -> bool:
    """Whether its folder is there. ValueError when that is of another prompt: the file may grow, no more."""
    path = out / prompt.folder / "prompt.json"
    if not path.parent.exists() or read_json(path) == prompt.record:
        return path.parent.exists()
    raise ValueError(f"{out} was begun with other prompts (line {prompt.number + 1} is not as in {path}); go "
                     "on with the same, or choose another --out")


@contextmanager
def claimed(out: Path, name: str) -> Iterator[Path | None]:
    """Yield an empty folder, which becomes out/name if the block succeeds, and is removed if the block fails.

    Yields None if out/name is there, or another process is making it.
    """
    folder = out / UNFINISHED / name
    lock = folder.with_suffix(".lock")
    with locked(lock) as held:
        if not held or (out / name).exists():
            yield None
            return
        shutil.rmtree(folder, ignore_errors=True)  # of a process that died
        folder.mkdir()
        try:
            yield folder
            folder.rename(out / name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)


def finish_job(out: Path, prompts: list[Prompt]) -> None:
    """Write seeds.json from what is there, one process at a time: the last one lists the work of all."""
    with locked(out / "job.json", wait=True):
        write_json(list_seeds(out), out / "seeds.json")
        if all((out / prompt.folder).exists() for prompt in prompts):
            shutil.rmtree(out / UNFINISHED, ignore_errors=True)
            for temporary in out.glob(".*.tmp"):  # of processes that were killed
                temporary.unlink()


def prompt_folders(root: Path) -> list[Path]:
    """The folders of finished prompts, in order."""
    return [root / name for name in sorted(os.listdir(root)) if name.isdigit()]


def list_seeds(root: Path) -> list[tuple[str, list[str]]]:
    """The content of seeds.json: prompts with surviving pairs, in order, and the seeds of these as texts."""
    seeds = [(folder.name, sorted(path.name[:-len("_0.jpg")] for path in folder.glob("*_0.jpg")))
             for folder in prompt_folders(root)]
    return [(name, of_prompt) for name, of_prompt in seeds if of_prompt]
