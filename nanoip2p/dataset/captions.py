"""Captions -> instructions and edited captions, by a language model (section 3.1.1 of the paper).

The paper fine-tunes GPT-3 on 700 hand-written triplets and samples it at temperature 0.7 with a frequency
penalty of 0.1. Here any server that speaks OpenAI's chat API is asked: with the examples of fewshot.py and a
JSON schema or, where the model's name begins with "ft:", in the bare format that finetune.py tuned it on.

What is finished is appended at once, in the order of completion, to one of two files: OUT.jsonl holds the
triplets, and OUT.dropped.jsonl the captions that gave none, with the reason. A caption in either is not asked
again; delete the second file to try those once more.
"""

import asyncio
import json
import signal
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import openai
from openai import AsyncOpenAI
from tqdm import tqdm

from nanoip2p.common.files import append, check_writable, finished, fold, read_rows, tidy
from nanoip2p.dataset.fewshot import PROMPT, TRIPLETS

FREQUENCY_PENALTY = 0.1  # this, the next two and the delimiter as in the original's generate_txt_dataset.py
ANSWER_TOKENS = 256  # the longest answer
RETRIES = 3  # more questions after an answer that is no use
DELIMITER = "\n%%\n"  # between instruction and caption, in what a tuned model says
SERVER_RETRIES, TIMEOUT = 5, 120.0  # the client's own, for 429, 5xx and lost connections; seconds
PATIENCE = 5  # captions without an answer in a row before the run gives up
GRACE = 10.0  # seconds that answers under way have after Ctrl-C
FINAL = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
SCHEMA = {
    "type": "object", "required": ["edit", "output"], "additionalProperties": False,
    "properties": {"edit": {"type": "string"}, "output": {"type": "string"}},
}


class Unusable(Exception):
    """An answer that is no edit, for one of the reasons refused, malformed, unchanged, flagged."""


class OverBudget(Exception):
    """The next question could cost more than is left."""


@dataclass(frozen=True)
class Settings:
    """How to ask. Prices are dollars for a million tokens; the limits hold for one run."""

    model: str
    temperature: float = 0.7
    concurrency: int = 8
    moderate: bool = False  # as the original: captions before the question, then what comes back
    max_tokens: int | None = None
    max_cost: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """In dollars."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


def question(caption: str, settings: Settings) -> dict:
    """The request for one caption. All but its last message is the same every time, which servers cache."""
    request = {"model": settings.model, "temperature": settings.temperature,
               "frequency_penalty": FREQUENCY_PENALTY, "max_tokens": ANSWER_TOKENS}
    asked = {"role": "user", "content": caption}
    if settings.model.startswith("ft:"):
        return {**request, "messages": [asked]}
    messages = [{"role": "system", "content": PROMPT}]
    for before, edit, output in TRIPLETS:
        answer = json.dumps({"edit": edit, "output": output})
        messages += [{"role": "user", "content": before}, {"role": "assistant", "content": answer}]
    schema = {"name": "edit", "strict": True, "schema": SCHEMA}
    return {**request, "messages": [*messages, asked],
            "response_format": {"type": "json_schema", "json_schema": schema}}


def read_answer(reply, caption: str) -> tuple[str, str]:
    """(instruction, edited caption) from a chat completion in either format. Raises Unusable."""
    try:
        choice = reply.choices[0]
        if choice.message.refusal or choice.finish_reason == "content_filter":
            raise Unusable("refused")
        if choice.finish_reason == "length":  # a tuned model's answer would pass for whole
            raise Unusable("malformed")
        content = choice.message.content
        if DELIMITER in content:  # which has line breaks, as no JSON of one line
            edit, output = content.split(DELIMITER)
        else:
            answer = json.loads(content)
            edit, output = answer["edit"], answer["output"]
        edit, output = tidy(edit), tidy(output)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Unusable("malformed") from None
    if not edit or not fold(output):
        raise Unusable("malformed")
    if fold(output) == fold(caption):
        raise Unusable("unchanged")
    return edit, output


@dataclass
class Job:
    """One run over the captions that are left."""

    client: AsyncOpenAI
    settings: Settings
    todo: deque[dict]
    out: Path
    dropped: Path
    bar: tqdm
    counts: Counter = field(default_factory=Counter)
    used: Counter = field(default_factory=Counter)  # tokens, "in" and "out", as the server counts them
    held: Counter = field(default_factory=Counter)  # and the most that questions under way may add
    fixed: int | None = None  # tokens that come with every question
    unanswered: int = 0  # captions in a row
    problem: openai.APIError | None = None
    interrupted: bool = False

    async def run(self) -> None:
        """Ask for all captions: the first alone, so that a wrong key or model is told once."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def stop() -> None:
            if self.interrupted:
                task.cancel()
            self.interrupted = True
            loop.call_later(GRACE, task.cancel)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        async with self.client:
            if await self.next():
                await asyncio.gather(*(self.work() for _ in range(self.settings.concurrency)))

    async def work(self) -> None:
        """Take caption after caption."""
        while await self.next():
            pass

    async def next(self) -> bool:
        """Take one caption, if any is left that may be asked; whether it was."""
        if not self.todo or self.interrupted or self.problem:
            return False
        caption = self.todo.popleft()
        try:
            await self.ask(caption)
        except OverBudget:
            self.todo.appendleft(caption)
            return False  # of others under way, those that come out cheaper than feared will go on
        except openai.APIError as error:
            self.counts["unanswered"] += 1
            self.unanswered += 1
            hopeless = FINAL if self.used else (*FINAL, openai.APIConnectionError)
            if isinstance(error, hopeless) or self.unanswered >= PATIENCE:
                self.problem = error
        self.bar.update()
        return True

    async def ask(self, caption: dict) -> None:
        """Ask until there is an edit, or until 1 + RETRIES answers were no use, and write down which."""
        text = caption["input"]
        if self.settings.moderate and await self.flagged([text]):
            return self.drop(text, "flagged")
        for left in reversed(range(1 + RETRIES)):
            try:
                edit, output = read_answer(await self.reply(text), text)
                if self.settings.moderate and await self.flagged([edit, output]):
                    raise Unusable("flagged")
            except Unusable as error:
                reason = str(error)
                if left:
                    self.counts[f"retried {reason}"] += 1
                continue
            append(self.out, {"input": text, "edit": edit, "output": output, **caption})
            self.counts["written"] += 1
            return
        self.drop(text, reason)

    def drop(self, text: str, reason: str) -> None:
        """List a caption, with the reason, as one that gave no edit."""
        append(self.dropped, {"input": text, "why": reason})
        self.counts[f"dropped {reason}"] += 1

    async def reply(self, text: str):
        """The server's answer to one question, paid for. Raises OverBudget before it is put."""
        request = question(text, self.settings)
        # A token is a byte at least, and what was counted once for the examples holds for all questions
        most_in = len(str(request).encode()) if self.fixed is None else self.fixed + len(text.encode())
        most = Counter({"in": most_in, "out": ANSWER_TOKENS})
        spent, limits = self.used + self.held + most, self.settings
        if limits.max_tokens is not None and spent.total() > limits.max_tokens:
            raise OverBudget
        if limits.max_cost is not None and limits.cost(spent["in"], spent["out"]) > limits.max_cost:
            raise OverBudget
        self.held += most
        try:  # fewer attempts for the first question: nobody wants to wait for a server that is not there
            client = self.client if self.used else self.client.with_options(max_retries=2)
            reply = await client.chat.completions.create(**request)
        except openai.BadRequestError as error:
            if error.code in ("content_filter", "content_policy_violation"):
                raise Unusable("refused") from None
            raise
        finally:
            self.held -= most
        if isinstance(reply, str):  # how the client returns a web page
            raise openai.APIError("the answer is no chat completion", request=None, body=None)
        tokens_in = getattr(reply.usage, "prompt_tokens", None) or most["in"]
        tokens_out = getattr(reply.usage, "completion_tokens", None) or most["out"]
        self.used.update({"in": tokens_in, "out": tokens_out})
        self.fixed, self.unanswered = self.fixed or tokens_in, 0
        return reply

    async def flagged(self, texts: list[str]) -> bool:
        """Whether OpenAI's moderation objects to any of the texts."""
        verdict = await self.client.moderations.create(model="omni-moderation-latest", input=texts)
        if isinstance(verdict, str) or len(verdict.results) != len(texts):
            raise openai.APIError("the moderation's answer is none", request=None, body=None)
        return any(result.flagged for result in verdict.results)

    def summary(self) -> str:
        """What came of this run, in some lines."""
        def listed(kind: str) -> str:
            some = {name: n for name, n in sorted(self.counts.items()) if name.startswith(kind)}
            return ", ".join(f"{n} {name.removeprefix(kind)}" for name, n in some.items()) or "none"

        cost = self.settings.cost(self.used["in"], self.used["out"])
        lines = [
            f"{self.counts['written']} edits written to {self.out}",
            f"captions dropped: {listed('dropped ')}; answers asked for once more: {listed('retried ')}",
            f"tokens: {self.used['in']:,} in, {self.used['out']:,} out" + (f", ${cost:.4f}" if cost else ""),
        ]
        if self.todo:
            lines.append(f"stopped with {len(self.todo)} captions left: one more could pass the limit")
        if self.counts["unanswered"]:
            lines.append(f"{self.counts['unanswered']} captions had no answer; the same command asks again")
        return "\n".join(lines)


def ask_all(captions: list[dict], settings: Settings, out: Path) -> str:
    """Ask for every caption that is not finished yet, and return a summary of some lines.

    captions: of `prompts.read_captions`. OPENAI_API_KEY and OPENAI_BASE_URL say whom to ask. Raises
    ValueError, in one line, for a server that does not serve. After Ctrl-C (or SIGTERM) nothing new is asked,
    answers under way get ten seconds and are written, and KeyboardInterrupt follows; a second Ctrl-C does not
    wait.
    """
    check_writable(out)
    dropped = out.with_suffix(".dropped.jsonl")
    done = finished(out, ("input", "edit", "output")) | finished(dropped, ("input", "why"))
    todo = deque(caption for caption in captions if fold(caption["input"]) not in done)
    client = connect(AsyncOpenAI)
    with tqdm(total=len(captions), initial=len(captions) - len(todo), desc="captions", unit="caption") as bar:
        job = Job(client, settings, todo, out, dropped, bar)
        with suppress(asyncio.CancelledError):  # which comes of Ctrl-C only
            asyncio.run(job.run())
    if job.problem:
        raise ValueError(explain(job.problem, client)) from None
    if job.interrupted:
        raise KeyboardInterrupt
    return job.summary()


def connect(kind: type):
    """An OpenAI or AsyncOpenAI client. Raises ValueError for want of a key or for an address that is none."""
    try:
        client = kind(max_retries=SERVER_RETRIES, timeout=TIMEOUT)
        if not client.api_key.strip():
            raise openai.OpenAIError("the key is empty")  # which some releases let pass
        return client
    except openai.OpenAIError:
        raise ValueError("set OPENAI_API_KEY to your key (to any word for a server that wants none, whose "
                         "address is in OPENAI_BASE_URL)") from None
    except Exception as error:  # of the HTTP library
        raise ValueError(f"OPENAI_BASE_URL: {error}") from None


def explain(error: openai.APIError, client) -> str:
    """What went wrong at the server, in one line that does not give the key away (of 8 letters or more)."""
    remedy = ""
    if isinstance(error, openai.APIConnectionError):
        remedy = "; does OPENAI_BASE_URL name a server that runs?"
    elif isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        remedy = "; is OPENAI_API_KEY right for this server?"
    elif isinstance(error, openai.NotFoundError):
        remedy = "; does this server have that model?"
    cause = f" ({error.__cause__})" if error.__cause__ else ""
    said, key = f"{error.message[:300]}{cause}", client.api_key.strip()
    if len(key) >= 8:  # a shorter one is no secret, and may be part of any word
        said = said.replace(key, "***")
    return f"{client.base_url} says: {said}{remedy}"


def read_captions(path: Path, column: str | None = None) -> tuple[list[dict], int]:
    """Captions from a text file (one a line), .jsonl or .csv, each once, as {"input"} or {"input", "url"}.

    column: the key or column of the caption ("input" or "caption" by default). Also returns how many were
    left out because caption or url had come before. ValueError names the line that has no caption.
    """
    keys = (column,) if column else ("input", "caption")
    captions, seen, repeats = [], set(), 0
    for place, row in read_rows(path):
        text = next((row[key] for key in keys if key in row), None)
        if not isinstance(text, str):
            names = ", ".join(row) or "nothing"
            raise ValueError(f"{path}, line {place}: no text under {' or '.join(keys)} (--column); "
                             f"there is {names}")
        url = row.get("url") or row.get("URL")
        caption = {"input": tidy(text), **({"url": str(url)} if url else {})}
        marks = {fold(text), *([("url", str(url))] if url else [])}
        if not fold(text):
            continue
        if seen & marks:
            repeats += 1
        else:
            captions.append(caption)
            seen |= marks
    return captions, repeats
