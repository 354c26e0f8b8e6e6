"""Ask a language model for an instruction and an edited caption for each caption (section 3.1.1).

Any server with OpenAI's chat API works. An ordinary model gets the examples of fewshot.json and answers in
JSON, under a schema. A model named "ft:..." was fine-tuned by finetune.py and gets only the caption.

Each answer is appended to a file immediately. OUT.jsonl holds the triplets. OUT.dropped.jsonl holds the
captions without a usable answer, with the reason. A new run skips the captions in these files.
"""

import asyncio
import json
import os
import signal
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path

import openai
from tqdm import tqdm

from nanoip2p.common import files
from nanoip2p.common.schema import LONGEST, checked
from nanoip2p.dataset import chat
from nanoip2p.dataset.config import Settings

# The first two constants are from the original's generate_txt_dataset.py
FREQUENCY_PENALTY = 0.1
RETRIES = 3              # further requests after an unusable answer
MAX_FAILURES = 5         # the run ends after this number of failed captions in a row
GRACE = 10.0             # seconds to wait for open requests after Ctrl-C
FATAL = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
FEWSHOT = files.read_json(Path(__file__).with_name("fewshot.json"))
PROMPT = "\n".join(FEWSHOT["prompt"])
TRIPLETS = [tuple(triplet) for triplet in FEWSHOT["triplets"]]  # input caption, instruction, output caption
SCHEMA = {"type": "object", "required": ["edit", "output"], "additionalProperties": False,
          "properties": {"edit": {"type": "string"}, "output": {"type": "string"}}}


class OverBudget(Exception):
    """The next request could exceed --max-tokens."""


def read_captions(path: Path, column: str | None = None) -> tuple[list[str], int]:
    """Read .txt (one caption per line), .jsonl or .csv.

    Returns lines of the form "caption TAB url", and the number of repeats. column: the key or column of the
    caption. Skips empty captions and repeats. A repeat has the caption or the URL of an earlier row. Raises
    ValueError for a row without a caption.
    """
    keys = (column,) if column else ("input", "caption")
    captions, repeats = [], 0
    known = set()  # hashes take less memory than texts. Two of 10^6 hashes are equal with probability 10^-8
    for number, row in files.read_rows(path):
        text = next((row[key] for key in keys if key in row), None)
        if not isinstance(text, str):
            raise ValueError(f"{path}, line {number}: no text under {' or '.join(keys)} (--column); there is "
                             f"{', '.join(row) or 'nothing'}")
        text = files.tidy(checked(text, str, f"{path}, line {number}: caption"))
        url, folded = files.tidy(str(row.get("url") or row.get("URL") or "")[:LONGEST]), files.fold(text)
        if not folded:
            continue
        marks = {hash(folded), hash(f"url {url}")} if url else {hash(folded)}
        if known.isdisjoint(marks):
            captions.append(f"{text}\t{url}")  # a million dictionaries would take 600 MB
            known |= marks
        else:
            repeats += 1
    return captions, repeats


def make_request(caption: str, settings: Settings) -> dict:
    """The request for one caption. The examples come first, so that servers can cache them."""
    request = {"model": settings.model, "temperature": settings.temperature,
               "frequency_penalty": FREQUENCY_PENALTY, "max_tokens": chat.ANSWER_TOKENS}
    messages = []
    if not settings.model.startswith("ft:"):
        messages = [{"role": "system", "content": PROMPT}]
        for before, edit, output in TRIPLETS:
            answer = json.dumps({"edit": edit, "output": output})
            messages += [{"role": "user", "content": before}, {"role": "assistant", "content": answer}]
        schema = {"name": "edit", "strict": True, "schema": SCHEMA}
        request["response_format"] = {"type": "json_schema", "json_schema": schema}
    return request | {"messages": [*messages, {"role": "user", "content": caption}]}


class Job:
    """One run over the remaining captions. Several `work` tasks share it, in one thread."""

    def __init__(self, client: openai.AsyncOpenAI, settings: Settings, todo: deque, out: Path, bar: tqdm):
        """todo: lines of `read_captions`."""
        self.client, self.settings, self.todo, self.out, self.bar = client, settings, todo, out, bar
        self.counts, self.used = Counter(), Counter()  # outcomes; input and output tokens
        self.reserved = 0    # upper bound on the tokens of the open requests
        self.shared = 0      # input tokens of the first request: an upper bound for prompt and examples
        self.failures = 0    # number of captions in a row without an answer
        self.problem: Exception | None = None  # the error that ends the run
        self.signals = 0     # number of times that Ctrl-C or SIGTERM came

    async def run(self) -> None:
        """Process all captions. Processes the first caption alone, to report a wrong key or model only once.

        After Ctrl-C or SIGTERM, starts no new caption, and waits up to GRACE seconds for open requests. A
        second signal ends the wait. A third signal ends the process, even during a DNS look-up.
        """
        loop, whole = asyncio.get_running_loop(), asyncio.current_task()

        def stop() -> None:
            self.signals += 1
            if self.signals > 2:
                os._exit(130)
            loop.call_later(GRACE if self.signals == 1 else 0, whole.cancel)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        with suppress(asyncio.CancelledError):
            async with self.client:
                await self.work(1)
                tasks = min(self.settings.concurrency, len(self.todo))
                await asyncio.gather(*(self.work(len(self.todo)) for _ in range(tasks)))

    async def work(self, most: int) -> None:
        """Process at most `most` captions, one after another. Returns early when the run has to stop."""
        for _ in range(most):
            if not self.todo or self.signals or self.problem:
                return
            line = self.todo.popleft()
            try:
                await self.ask(line)
            except OverBudget:  # another task retries it, if open requests free tokens that they reserved
                self.todo.appendleft(line)
                return
            except openai.APIError as error:
                self.counts["unanswered"] += 1
                self.failures += 1
                fatal = FATAL if self.used else (*FATAL, openai.APIConnectionError)
                if isinstance(error, fatal) or self.failures >= MAX_FAILURES:
                    self.problem = ValueError(chat.explain(error, self.client))
            except Exception as error:  # the disk is full, for example
                self.problem = error
            self.bar.update()

    async def ask(self, line: str) -> None:
        """Ask for an edit of one caption, at most 1 + RETRIES times, and append the outcome to a file."""
        (text, _, url), moderate, reason = line.partition("\t"), self.settings.moderate, "flagged"
        attempts = 0 if moderate and await self.flagged([text]) else 1 + RETRIES
        for attempt in range(attempts):
            try:
                edit, output = chat.read_answer(await self.reply(text), text)
                if moderate and await self.flagged([edit, output]):
                    raise chat.Unusable("flagged")
            except chat.Unusable as error:
                reason = str(error)
                self.counts[f"retried {reason}"] += attempt < RETRIES
                continue
            row = {"input": text, "edit": edit, "output": output}
            files.append(self.out, row | {"url": url} if url else row)
            self.counts["written"] += 1
            return
        files.append(dropped_path(self.out), {"input": text, "why": reason})
        self.counts[f"dropped {reason}"] += 1

    async def reply(self, text: str) -> dict:
        """Send a request; return the completion. OverBudget if the request could exceed --max-tokens."""
        request, client = make_request(text, self.settings), self.client
        # A token has at least one byte, so the number of bytes is an upper bound
        tokens_in = self.shared + len(text.encode()) if self.shared else len(str(request).encode())
        reserved, limit = tokens_in + chat.ANSWER_TOKENS, self.settings.max_tokens
        if limit is not None and self.used.total() + self.reserved + reserved > limit:
            raise OverBudget
        if not self.shared:  # first request: fail early if the server is down
            client = client.with_options(max_retries=2)
        self.reserved += reserved
        try:
            reply = await chat.ask(client.chat.completions, **request)
        except openai.BadRequestError as error:
            if error.code in ("content_filter", "content_policy_violation"):
                raise chat.Unusable("refused") from None
            raise
        finally:
            self.reserved -= reserved
        spent = chat.spent_tokens(reply, tokens_in)
        self.used += spent
        self.shared, self.failures = self.shared or spent["in"], 0
        return reply

    async def flagged(self, texts: list[str]) -> bool:
        """Whether OpenAI's moderation objects to any of the texts."""
        for _ in range(1 + RETRIES):
            verdict = await chat.ask(self.client.moderations, model="omni-moderation-latest", input=texts)
            with suppress(ValueError):
                return any(chat.read_flags(verdict, len(texts)))
        raise openai.APIError("the answer is not a moderation result", request=None, body=None)

    def summary(self) -> str:
        """A text of several lines about the outcome of this run."""
        def listed(kind: str) -> str:
            return ", ".join(f"{n} {name.removeprefix(kind)}" for name, n in sorted(self.counts.items())
                             if name.startswith(kind) and n) or "none"

        return (f"{self.counts['written']} edits written to {self.out}\n"
                f"captions dropped: {listed('dropped ')}; retries: {listed('retried ')}\n"
                f"tokens: {self.used['in']:,} in, {self.used['out']:,} out\n"
                f"captions left for the next run: {len(self.todo)} not asked (--max-tokens), "
                f"{self.counts['unanswered']} without an answer")


def dropped_path(out: Path) -> Path:
    """The file of captions without a usable answer, beside the file of triplets."""
    return out.with_suffix(".dropped.jsonl")


def known_captions(out: Path) -> set[int]:
    """The hashes of the captions in OUT.jsonl and OUT.dropped.jsonl. ValueError if these hold other rows."""
    known = set()
    for path, keys in ((out, ("input", "edit", "output")), (dropped_path(out), ("input", "why"))):
        for number, row in files.read_rows(path, ".jsonl", appended=True) if path.exists() else ():
            if not all(isinstance(row.get(key), str) for key in keys):
                raise ValueError(f"{path}, line {number} lacks one of {', '.join(keys)}; name another --out")
            known.add(hash(files.fold(row["input"])))
    return known


def ask_all(captions: list[str], settings: Settings, out: Path) -> str:
    """Process every caption that is not yet in OUT.jsonl or OUT.dropped.jsonl; return a summary.

    captions: from `read_captions`. Needs OPENAI_API_KEY in the environment; OPENAI_BASE_URL names a server
    other than OpenAI's. Raises ValueError if the server fails or `out` cannot be written, and
    KeyboardInterrupt after Ctrl-C or SIGTERM (see Job.run).
    """
    files.check_writable(out)
    try:
        # Not a lock on `out` itself: another program could replace that file
        with files.locked(out.with_name(f".{out.stem}.lock")) as held:
            if not held:
                raise ValueError(f"{out} is being written by another process; wait for it, or stop it")
            known = known_captions(out)
            for path in (out, dropped_path(out)):
                files.mend_last_line(path)
            todo = deque(line for line in captions if hash(files.fold(line.partition("\t")[0])) not in known)
            client, done = chat.connect(settings.timeout), len(captions) - len(todo)
            with tqdm(total=len(captions), initial=done, desc="captions", unit="caption") as bar:
                job = Job(client, settings, todo, out, bar)
                asyncio.run(job.run())
            if job.signals:
                raise KeyboardInterrupt
            if job.problem:
                raise job.problem
            return job.summary()
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror or error}; if its disk is full, free "
                         "space. Finished captions stay, and the same command continues from there") from None
