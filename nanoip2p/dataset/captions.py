"""Captions -> instructions and edited captions, by a language model (section 3.1.1 of the paper).

The paper fine-tunes GPT-3 on 700 hand-written triplets and samples it at temperature 0.7 with a frequency
penalty of 0.1. Here any server that speaks OpenAI's chat API is asked. An ordinary model gets the prompt and
thirty examples of fewshot.json, and answers in a JSON schema. A model whose name begins with "ft:" was
fine-tuned by finetune.py, and gets the caption alone.

Each answer is appended to a file as soon as it comes: OUT.jsonl holds the triplets, OUT.dropped.jsonl the
captions that gave none, with the reason. A caption that is in either file is not asked again.
"""

import json
import math
import signal
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path

import openai
from openai import OpenAI
from tqdm import tqdm

from nanoip2p.common.files import (
    append,
    check_writable,
    fold,
    mend_last_line,
    read_json,
    read_jsonl,
    read_rows,
    tidy,
)

FREQUENCY_PENALTY = 0.1  # this, ANSWER_TOKENS, RETRIES and DELIMITER: generate_txt_dataset.py of the original
ANSWER_TOKENS = 256      # of the longest answer
RETRIES = 3              # further questions after an unusable answer
DELIMITER = "\n%%\n"     # between instruction and caption, in the answers of a fine-tuned model
SERVER_RETRIES, TIMEOUT = 5, 120.0  # the client's own, for 429, 5xx and lost connections; seconds
PATIENCE = 5             # captions without an answer in a row that end the run
GRACE = 10.0             # seconds that questions under way have after Ctrl-C
FINAL = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
FEWSHOT = read_json(Path(__file__).with_name("fewshot.json"))
PROMPT = "\n".join(FEWSHOT["prompt"])
TRIPLETS = [tuple(triplet) for triplet in FEWSHOT["triplets"]]  # input caption, instruction, output caption
SCHEMA = {"type": "object", "required": ["edit", "output"], "additionalProperties": False,
          "properties": {"edit": {"type": "string"}, "output": {"type": "string"}}}


class Unusable(Exception):
    """The answer is no edit: "refused", "malformed", "unchanged" or "flagged"."""


class OverBudget(Exception):
    """The next question could cost more than the limit leaves."""


@dataclass(frozen=True)
class Settings:
    """How to ask. Prices are dollars per million tokens; the limits hold for one run."""

    model: str
    temperature: float = 0.7
    concurrency: int = 8
    moderate: bool = False  # captions before the question, then the answers, as the original
    max_tokens: int | None = None
    max_cost: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0

    def cost(self, tokens: Counter) -> float:
        """Dollars for tokens["in"] and tokens["out"]."""
        return (tokens["in"] * self.price_in + tokens["out"] * self.price_out) / 1e6


def read_captions(path: Path, column: str | None = None) -> tuple[list[dict], int]:
    """Captions of a text file (one a line), .jsonl or .csv as {"input"} or {"input", "url"}, without repeats.

    column: the key or column of the caption ("input" or "caption" by default). Also returns the number of
    repeats: rows whose caption or url an earlier row has. ValueError names the line that has no caption.
    """
    keys = (column,) if column else ("input", "caption")
    captions, known, repeats = [], set(), 0
    for number, row in read_rows(path):
        text = next((row[key] for key in keys if key in row), None)
        if not isinstance(text, str):
            raise ValueError(f"{path}, line {number}: no text under {' or '.join(keys)} (--column); there is "
                             f"{', '.join(row) or 'nothing'}")
        url = str(row.get("url") or row.get("URL") or "")
        marks = {fold(text), ("url", url)} if url else {fold(text)}
        if not fold(text):
            continue
        if known & marks:
            repeats += 1
        else:
            captions.append({"input": tidy(text), **({"url": url} if url else {})})
            known |= marks
    return captions, repeats


def question(caption: str, settings: Settings) -> dict:
    """The request for one caption. All messages but the last are always the same, which servers cache."""
    request = {"model": settings.model, "temperature": settings.temperature,
               "frequency_penalty": FREQUENCY_PENALTY, "max_tokens": ANSWER_TOKENS}
    messages = [{"role": "user", "content": caption}]
    if not settings.model.startswith("ft:"):
        examples = [{"role": "system", "content": PROMPT}]
        for before, edit, output in TRIPLETS:
            answer = json.dumps({"edit": edit, "output": output})
            examples += [{"role": "user", "content": before}, {"role": "assistant", "content": answer}]
        messages = examples + messages
        schema = {"name": "edit", "strict": True, "schema": SCHEMA}
        request["response_format"] = {"type": "json_schema", "json_schema": schema}
    return request | {"messages": messages}


def read_answer(reply, caption: str) -> tuple[str, str]:
    """(instruction, edited caption) of a chat completion, in JSON or in a fine-tuned model's format.

    Raises Unusable.
    """
    try:
        choice = reply.choices[0]
        if choice.message.refusal or choice.finish_reason == "content_filter":
            raise Unusable("refused")
        content = choice.message.content
        if choice.finish_reason == "length":  # a fine-tuned model's answer would look complete
            raise Unusable("malformed")
        if DELIMITER in content:  # JSON on one line has no line breaks
            edit, output = map(tidy, content.split(DELIMITER))
        else:
            answer = json.loads(content)
            edit, output = tidy(answer["edit"]), tidy(answer["output"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Unusable("malformed") from None
    if not edit or not fold(output):
        raise Unusable("malformed")
    if fold(output) == fold(caption):
        raise Unusable("unchanged")
    return edit, output


class Job:
    """One run over the captions that are left. Threads share it; `lock` guards every attribute and file."""

    def __init__(self, client: OpenAI, settings: Settings, todo: list[dict], out: Path, bar: tqdm):
        self.client, self.settings, self.todo, self.out, self.bar = client, settings, deque(todo), out, bar
        self.counts, self.used, self.reserved = Counter(), Counter(), Counter()  # outcomes; tokens
        self.unanswered = 0  # captions in a row
        self.problem: Exception | None = None
        self.deadline = math.inf  # set by Ctrl-C: when to wait no longer, by time.monotonic()
        self.lock = threading.RLock()

    def run(self) -> None:
        """Ask for all captions. The first is asked alone, so that a wrong key or model is reported once.

        After Ctrl-C or SIGTERM no question is begun, questions under way have GRACE seconds, and then
        KeyboardInterrupt is raised. A second Ctrl-C does not wait.
        """
        def stop(_number: int, _frame) -> None:
            if self.deadline < math.inf:
                raise KeyboardInterrupt
            self.deadline = time.monotonic() + GRACE

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for work, count in ((self.next, 1), (self.work, self.settings.concurrency)):
                # Daemon threads: the process does not wait for them when it ends
                threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
                for thread in threads:
                    thread.start()
                while any(thread.is_alive() for thread in threads) and time.monotonic() < self.deadline:
                    time.sleep(0.01)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.lock.acquire()  # for good: no thread writes a line from now on
        if self.deadline < math.inf:
            raise KeyboardInterrupt

    def work(self) -> None:
        """Take caption after caption."""
        while self.next():
            pass

    def next(self) -> bool:
        """Take one caption, if there is one that may be asked. Returns whether there was."""
        with self.lock:
            if not self.todo or self.deadline < math.inf or self.problem:
                return False
            caption = self.todo.popleft()
        try:
            self.ask(caption)
        except OverBudget:
            with self.lock:
                self.todo.appendleft(caption)
            return False  # questions under way may turn out cheaper than reserved; their threads go on
        except openai.APIError as error:
            with self.lock:
                self.counts["unanswered"] += 1
                self.unanswered += 1
                hopeless = FINAL if self.used else (*FINAL, openai.APIConnectionError)
                if isinstance(error, hopeless) or self.unanswered >= PATIENCE:
                    self.problem = error
        except OSError as error:  # the disk is full
            self.problem = error
        self.bar.update()
        return True

    def ask(self, caption: dict) -> None:
        """Ask until the answer is an edit, at most 1 + RETRIES times, and write the outcome down."""
        text, reason = caption["input"], "flagged"
        for attempt in range(1 + RETRIES):
            if attempt == 0 and self.settings.moderate and self.flagged([text]):
                break
            try:
                edit, output = read_answer(self.reply(text), text)
                if self.settings.moderate and self.flagged([edit, output]):
                    raise Unusable("flagged")
            except Unusable as error:
                reason = str(error)
                self.counts[f"retried {reason}"] += attempt < RETRIES
                continue
            with self.lock:
                append(self.out, {"input": text, "edit": edit, "output": output, **caption})
                self.counts["written"] += 1
            return
        with self.lock:
            append(dropped_path(self.out), {"input": text, "why": reason})
            self.counts[f"dropped {reason}"] += 1

    def reply(self, text: str):
        """The server's answer to one question. Raises OverBudget if the question could pass a limit."""
        request, client = question(text, self.settings), self.client
        most = Counter({"in": len(str(request).encode()), "out": ANSWER_TOKENS})  # a token is at least a byte
        with self.lock:
            if "in" in self.used:  # the examples are the same as before; only the caption differs
                most["in"] = self.fixed + len(text.encode())
            else:  # nobody wants to wait long for a server that is not there
                client = client.with_options(max_retries=2)
            total, limits = self.used + self.reserved + most, self.settings
            if limits.max_tokens is not None and total.total() > limits.max_tokens:
                raise OverBudget
            if limits.max_cost is not None and limits.cost(total) > limits.max_cost:
                raise OverBudget
            self.reserved += most
        try:
            reply = client.chat.completions.create(**request)
        except openai.BadRequestError as error:
            if error.code in ("content_filter", "content_policy_violation"):
                raise Unusable("refused") from None
            raise
        finally:
            with self.lock:
                self.reserved -= most
        if isinstance(reply, str):  # the client returns a web page as text
            raise openai.APIError("the answer is no chat completion", request=None, body=None)
        tokens = Counter({"in": getattr(reply.usage, "prompt_tokens", None) or most["in"],
                          "out": getattr(reply.usage, "completion_tokens", None) or most["out"]})
        with self.lock:
            if not self.used:
                self.fixed = tokens["in"]
            self.used += tokens
            self.unanswered = 0
        return reply

    def flagged(self, texts: list[str]) -> bool:
        """Whether OpenAI's moderation objects to any of the texts."""
        verdict = self.client.moderations.create(model="omni-moderation-latest", input=texts)
        if isinstance(verdict, str) or len(verdict.results) != len(texts):
            raise openai.APIError("the answer is no moderation", request=None, body=None)
        return any(result.flagged for result in verdict.results)

    def summary(self) -> str:
        """The outcome of this run, in some lines."""
        def listed(kind: str) -> str:
            some = {name: n for name, n in sorted(self.counts.items()) if name.startswith(kind) and n}
            return ", ".join(f"{n} {name.removeprefix(kind)}" for name, n in some.items()) or "none"

        cost, used = self.settings.cost(self.used), self.used
        lines = [
            f"{self.counts['written']} edits written to {self.out}",
            f"captions dropped: {listed('dropped ')}; answers asked for once more: {listed('retried ')}",
            f"tokens: {used['in']:,} in, {used['out']:,} out" + (f", ${cost:.4f}" if cost else "")]
        if self.todo:
            lines.append(f"stopped with {len(self.todo)} captions left: one more could pass the limit")
        if self.counts["unanswered"]:
            lines.append(f"{self.counts['unanswered']} captions had no answer; the same command asks again")
        return "\n".join(lines)


def dropped_path(out: Path) -> Path:
    """The file of captions that gave no edit, beside the file of triplets."""
    return out.with_suffix(".dropped.jsonl")


def ask_all(captions: list[dict], settings: Settings, out: Path) -> str:
    """Ask for every caption that no file lists yet, and return a summary of some lines.

    captions: from `read_captions`. OPENAI_API_KEY and OPENAI_BASE_URL name the server. Raises ValueError, in
    one line, for a server that does not serve. Ctrl-C and SIGTERM: see Job.run.
    """
    check_writable(out)
    known = set()
    for path, keys in ((out, ("input", "edit", "output")), (dropped_path(out), ("input", "why"))):
        for number, row in enumerate(read_jsonl(path), start=1):
            if not all(isinstance(row.get(key), str) for key in keys):
                raise ValueError(f"{path}, line {number} is not {{{', '.join(keys)}}}; name another --out")
            known.add(fold(row["input"]))
        mend_last_line(path)
    todo, client = [caption for caption in captions if fold(caption["input"]) not in known], connect()
    with tqdm(total=len(captions), initial=len(captions) - len(todo), desc="captions", unit="caption") as bar:
        job = Job(client, settings, todo, out, bar)
        job.run()
    if isinstance(job.problem, openai.APIError):
        raise ValueError(explain(job.problem, client)) from None
    if job.problem:
        raise job.problem
    return job.summary()


def connect() -> OpenAI:
    """The client. Raises ValueError if there is no key, or the address is no address."""
    try:
        client = OpenAI(max_retries=SERVER_RETRIES, timeout=TIMEOUT)
        if not client.api_key.strip():
            raise openai.OpenAIError("the key is empty")  # some releases accept it
        return client
    except openai.OpenAIError:
        raise ValueError("set OPENAI_API_KEY to your key (to any word for a server that needs none, and "
                         "OPENAI_BASE_URL to its address)") from None
    except Exception as error:  # of the HTTP library
        raise ValueError(f"OPENAI_BASE_URL: {error}") from None


def explain(error: openai.APIError, client: OpenAI) -> str:
    """The server's problem and a remedy, in one line without the key (if the key has 8 letters or more)."""
    remedies = {openai.APIConnectionError: "; does OPENAI_BASE_URL name a server that runs?",
                openai.AuthenticationError: "; is OPENAI_API_KEY right for this server?",
                openai.PermissionDeniedError: "; is OPENAI_API_KEY right for this server?",
                openai.NotFoundError: "; does this server have that model?"}
    remedy = next((remedy for kind, remedy in remedies.items() if isinstance(error, kind)), "")
    cause = f" ({error.__cause__})" if error.__cause__ else ""
    message, key = f"{error.message[:300]}{cause}", client.api_key.strip()
    if len(key) >= 8:  # a shorter one is no secret, and may be part of any word
        message = message.replace(key, "***")
    return f"{client.base_url} says: {message}{remedy}"
