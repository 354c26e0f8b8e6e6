"""Make picture pairs from caption pairs, and filter them with CLIP (section 3.1.2), in the original layout.

    out/job.json                   settings of this job
    out/seeds.json                 the prompts with kept pairs, and the seeds of these pairs
    out/0000000/prompt.json        the first prompt; the folder appears when the prompt is finished
    out/0000000/<seed>_0.jpg, <seed>_1.jpg, metadata.jsonl       the kept pairs and their scores
    out/0000000/candidates.jsonl   the scores of all candidates

Several processes can share a folder: each process takes the next unclaimed prompt. --seed, prompt number and
candidate number determine all random numbers of a candidate, so interruptions do not change the result.
The original draws p and the guidance from torch's generator, so its seeds give other pairs here.
"""

import hashlib
import json
import random
import shutil
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from nanoip2p.checkpoint import hub
from nanoip2p.checkpoint.tensors import fingerprint
from nanoip2p.clip_filter import Judge, Thresholds, best
from nanoip2p.common.files import claim_folder, locked, read_json, read_rows, write_json
from nanoip2p.common.schema import LONGEST, checked
from nanoip2p.dataset.changes import MeasuredPainter
from nanoip2p.dataset.config import PairSettings
from nanoip2p.text_to_image import TextToImage

UNFINISHED = ".unfinished"  # folder in `out`, removed when all prompts are finished
PROMPTS = 10**7  # the maximum number of prompts: names of folders have 7 digits
MOST = 10_000  # the largest number that pairs.json may have, except the seed; the paper has at most 100


@dataclass(frozen=True)
class Prompt:
    """A caption pair."""

    number: int  # line number, from 0
    source: str
    output: str
    record: dict  # the whole line, with the instruction

    @property
    def folder(self) -> str:
        """The name of the prompt's folder, as in the original."""
        return f"{self.number:07d}"


def read_prompts(path: Path) -> tuple[list[Prompt], list[str]]:
    """Read a JSONL file. Returns the good lines, and a message for each bad line ("line 3 ...").

    A line has the keys "input" (or "caption", as in the paper's files), "edit" and "output".
    """
    prompts, bad = [], []
    for number, row in read_rows(path, ".jsonl", bad):
        source = "caption" if "caption" in row and "input" not in row else "input"
        keys = (source, "edit", "output")
        missing = [key for key in keys if not isinstance(row.get(key), str) or not row[key].strip()]
        if number > PROMPTS:
            raise ValueError(f"{path} has more than {PROMPTS} lines; split it, with an --out for each part")
        if missing:
            bad.append(f"line {number} has no text under {missing[0]!r}")
        elif max(len(row[key]) for key in keys) > LONGEST:
            bad.append(f"line {number} has a text of more than {LONGEST} letters")
        elif any("\ud800" <= letter <= "\udfff" for key in keys for letter in row[key]):
            bad.append(f"line {number} has half a character (a lone surrogate)")
        else:
            prompts.append(Prompt(number - 1, row[source], row["output"], row))
    return prompts, bad


def pair_settings(flags: dict, weights: Path, painter_defaults: dict) -> PairSettings:
    """Take each setting from `flags`, else from pairs.json in the weights folder, else from the defaults.

    `clip` in pairs.json is a path relative to the weights folder, or hub.CLIP: only the user decides which
    other model is downloaded. Raises ValueError for an invalid setting.
    """
    kinds, path = typing.get_type_hints(PairSettings), weights / "pairs.json"
    settings = {key: painter_defaults[key] for key in ("steps", "resolution", "sampler")}
    for key, value in (read_json(path, missing={}) if weights.is_dir() else {}).items():
        if key not in kinds:
            raise ValueError(f"{path}: unknown setting {key}; known are {', '.join(kinds)}")
        settings[key] = checked(value, kinds[key], f"{path}: {key}", -MOST, 2**63 if key == "seed" else MOST)
        if key == "clip" and (weights / value).exists():
            settings[key] = str(weights / value)
        elif key == "clip" and value != hub.CLIP and "clip" not in flags:
            raise ValueError(f"{path} names the CLIP model {value}, but there is no such folder; to download "
                             "a model of that name from the Hub, give it as --clip")
    return PairSettings(**settings | {key: flags[key] for key in kinds if key in flags})


def candidate(prompt: Prompt, k: int, settings: PairSettings) -> dict:
    """The seed of candidate k, and p and guidance drawn from it, under the keys of metadata.jsonl."""
    name = f"nanoip2p pair {settings.seed} {prompt.number} {k}".encode()
    seed = int.from_bytes(hashlib.sha256(name).digest()[:6], "big")  # 48 bits: repeats are unlikely
    uniform = random.Random(f"nanoip2p pair {seed}").random  # the same numbers in every version of Python
    return {"seed": seed,
            "p2p_threshold": settings.min_p2p + uniform() * (settings.max_p2p - settings.min_p2p),
            "cfg_scale": settings.min_cfg + uniform() * (settings.max_cfg - settings.min_cfg)}


def make_candidates(prompt: Prompt, painter: TextToImage, judge: Judge,
                    settings: PairSettings) -> tuple[list[dict], list[tuple[dict, tuple]]]:
    """Generate and score the candidates of one prompt.

    Returns the rows of all candidates in order, and (row, (before, after)) of the candidates to keep, best
    first. With early_stop, the rows end at the early_stop-th passing candidate, for any batch size.
    """
    pair_painter = MeasuredPainter(painter, prompt.source, prompt.output, settings.inject, settings.steps,
                                   settings.sampler, settings.resolution, deep_every=settings.deep_every,
                                   blend=None if settings.blend == "none" else settings.blend)
    captions = judge.encode_texts([prompt.source, prompt.output])                          # (2, P)
    thresholds = Thresholds(settings.clip_img_threshold, settings.clip_dir_threshold, settings.clip_threshold,
                            settings.leakage_threshold)
    candidates = [candidate(prompt, k, settings) for k in range(settings.n_samples)]
    rows, kept, passed = [], [], 0
    for begin in range(0, settings.n_samples, settings.batch):
        drawn = candidates[begin : begin + settings.batch]
        try:
            pairs, notes = pair_painter.measure(*zip(*(row.values() for row in drawn)))
        except ValueError as error:  # NaN in half precision: the message says to try another --dtype
            raise ValueError(f"prompt {prompt.folder}: {error}, and a new --out") from None
        for row, pair, note, scores in zip(drawn, pairs, notes, judge.score(*zip(*pairs), captions)):
            rows.append(row | scores | note)
            if not thresholds.reasons(rows[-1]):
                passed += 1
                kept = best([*kept, (rows[-1], pair)], settings.max_out_samples)
            if passed == settings.early_stop > 0:
                return rows, kept
    return rows, kept


def write_prompt(folder: Path, prompt: Prompt, rows: list[dict], kept: list[tuple[dict, tuple]]) -> None:
    """Write the result of `make_candidates` into the prompt's folder."""
    for name, records in (("prompt.json", [prompt.record]), ("candidates.jsonl", rows),
                          ("metadata.jsonl", [row for row, _ in kept])):
        if records:
            (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    for row, pair in kept:
        for i, picture in enumerate(pair):
            picture.save(folder / f"{row['seed']}_{i}.jpg", quality=100)


def make_pairs(prompts: list[Prompt], out: Path, painter: TextToImage, judge: Judge, settings: PairSettings,
               notes: dict, progress: bool = False, prepare: Callable[[], None] = lambda: None) -> None:
    """Process every prompt that no other process has finished or claimed, then write seeds.json.

    notes: further entries of job.json. prepare: called before the first prompt, after the weights are hashed,
    to speed up the networks. ValueError if `out` holds another job or cannot be written.
    """
    try:
        claim_folder(out, "job.json", {"job": job_of(painter, judge, settings)}, "--out", notes)
        waiting = [prompt for prompt in prompts if not is_finished(out, prompt)]
        done, tried, survived = len(prompts) - len(waiting), 0, 0
        if waiting:
            prepare()
        try:
            with tqdm(total=len(prompts), initial=done, unit="prompt", disable=not progress) as bar:
                for prompt in waiting:
                    with claimed(out, prompt.folder) as folder:
                        if folder:
                            rows, kept = make_candidates(prompt, painter, judge, settings)
                            write_prompt(folder, prompt, rows, kept)
                            tried, survived = tried + len(rows), survived + len(kept)
                    bar.set_postfix_str(f"{survived} of {tried} pairs kept", refresh=False)
                    bar.update()
        finally:  # also after Ctrl-C: training on the finished prompts needs seeds.json
            finish_job(out, prompts)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror or error}; finished prompts stay, and "
                         "the same command continues from there") from None


def job_of(painter: TextToImage, judge: Judge, settings: PairSettings) -> dict:
    """What determines the result, without the prompts, `batch` (rounding only) and `clip` (in "networks")."""
    fixed = (painter.schedule, painter.vae.scaling_factor, judge.mean.tolist(), judge.std.tolist())
    tokenizers = [model.tokenizer.backend.to_str() for model in (painter, judge)]
    networks = fingerprint(painter.unet, painter.vae, painter.text_encoder, judge.clip,
                           begin=repr((fixed, tokenizers)).encode())
    return {"networks": networks,
            **{key: value for key, value in asdict(settings).items() if key not in ("batch", "clip")},
            "deep_every": settings.deep_every if settings.deep_every > 1 else None,
            "blend": settings.blend if settings.blend != "none" else None}  # older jobs lack these two keys


def is_finished(out: Path, prompt: Prompt) -> bool:
    """Whether the prompt's folder exists. ValueError if the folder belongs to another prompt."""
    path = out / prompt.folder / "prompt.json"
    if path.parent.exists() and read_json(path) != prompt.record:
        raise ValueError(f"{out} was begun with other prompts ({path} is not line {prompt.number + 1}); "
                         "use the same prompts, or another --out")
    return path.parent.exists()


@contextmanager
def claimed(out: Path, name: str) -> Iterator[Path | None]:
    """Yield an empty folder. It becomes out/name if the block succeeds, and is removed if the block fails.

    Yields None if out/name exists, or if another process has claimed `name`.
    """
    folder = out / UNFINISHED / name
    lock = folder.with_suffix(".lock")
    # No lock if nothing is left to claim: another process may just be removing UNFINISHED, in finish_job
    with nullcontext(False) if (out / name).exists() else locked(lock) as held:
        if not held or (out / name).exists():
            yield None
            return
        shutil.rmtree(folder, ignore_errors=True)  # left by a dead process
        folder.mkdir()
        try:
            yield folder
            folder.rename(out / name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)


def finish_job(out: Path, prompts: list[Prompt]) -> None:
    """Write seeds.json under a lock, so that the last process lists all prompts. Tidy up a finished job."""
    with locked(out / "job.json", wait=True):
        write_json(list_seeds(out), out / "seeds.json")
        if all((out / prompt.folder).exists() for prompt in prompts):
            shutil.rmtree(out / UNFINISHED, ignore_errors=True)
            for temporary in out.glob(".*.tmp"):  # left by killed processes
                temporary.unlink()


def prompt_folders(root: Path) -> list[Path]:
    """The folders of finished prompts, in order."""
    return sorted(folder for folder in root.iterdir() if folder.name.isdigit())


def list_seeds(root: Path) -> list[tuple[str, list[str]]]:
    """The content of seeds.json: the name of each prompt with kept pairs, and the pairs' seeds as strings."""
    found = [(folder.name, sorted(path.name.removesuffix("_0.jpg") for path in folder.glob("*_0.jpg")))
             for folder in prompt_folders(root)]
    return [(name, seeds) for name, seeds in found if seeds]
