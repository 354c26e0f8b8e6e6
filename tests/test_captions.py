"""Captions through the real openai client, from a server here that answers well or as badly as servers do."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai
import pytest

import make_dataset
from nanoip2p import captions, prompts
from nanoip2p.fewshot import PROMPT, TRIPLETS
from nanoip2p.scenes import EDIT_KINDS, PHRASINGS

KEY = "sk-secret-of-mine"
TEXTS = [f"A picture of {number} boats." for number in range(12)]
TOKENS = {"prompt_tokens": 1500, "completion_tokens": 40}


def edit_of(text: str) -> tuple[str, str]:
    """What the server makes of a caption."""
    return f"paint all {len(text)} of them", f"{text} Seen by night, {hash_of(text)}."


def hash_of(text: str) -> int:
    return sum(map(ord, text))


class Server(BaseHTTPRequestHandler):
    """Speaks the chat, moderation, file and tuning API. server.plan: caption -> kinds of answers in turn."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        what, server = self.path.removeprefix("/v1"), self.server
        key = self.headers["Authorization"].removeprefix("Bearer ")
        if key != KEY:
            return self.reply({"error": {"message": f"Incorrect API key: {key}"}}, 401)
        if what == "/files":
            server.uploads.append(body)
            return self.reply({"id": "file-7", "object": "file", "purpose": "fine-tune"})
        request = json.loads(body)
        server.requests.append((what, request))
        if what == "/fine_tuning/jobs":
            return self.reply({"id": "ftjob-42", "object": "fine_tuning.job", "status": "queued"})
        if what == "/moderations":
            return self.reply({"results": [{"flagged": "forbidden" in text} for text in request["input"]]})
        text = request["messages"][-1]["content"]
        with server.lock:
            server.asked.append(text)
            kinds = server.plan.get(text, [])
            kind = kinds.pop(0) if len(kinds) > 1 else (kinds or ["well"])[0]
        server.before(text)
        getattr(self, kind.replace(" ", "_"), self.well)(request, text, kind)

    def well(self, request, text, kind):
        """In the format of the question, or spoilt as `kind` says."""
        edit, output = edit_of(text)
        if kind == "flagged":
            output += " forbidden"
        if kind == "unchanged":
            output = text.rstrip(".").upper() + "!"
        content = json.dumps({"edit": edit, "output": output})
        if "response_format" not in request:
            content = f"{edit}\n%%\n{output}"
        content = {"torn json": content[:-9], "wrong schema": '{"edit": "x"}',
                   "wrong types": '{"edit": 1, "output": []}', "no object": "[]",
                   "empty edit": '{"edit": " ", "output": "x"}', "no content": None,
                   "surrogate": r'{"edit": "\ud83d on\n it", "output": "b"}'}.get(kind, content)
        message = {"role": "assistant", "content": content}
        if kind == "refusal":
            message = {"role": "assistant", "content": None, "refusal": "I cannot help with boats."}
        reason = "content_filter" if kind == "filtered" else "stop"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        reply = {"id": "c", "object": "chat.completion", "created": 0, "model": request["model"],
                 "choices": [] if kind == "no choice" else [choice], "usage": TOKENS}
        if kind == "no usage":
            del reply["usage"]
        self.reply(reply)

    def busy(self, *_):
        self.reply({"error": {"message": "slow down"}}, 429, **{"Retry-After": "0.01"})

    def broken(self, *_):
        self.reply({"error": {"message": "oops"}}, 500)

    def policy(self, *_):
        self.reply({"error": {"message": "no", "code": "content_filter"}}, 400)

    def unknown_model(self, *_):
        self.reply({"error": {"message": "The model `m` does not exist"}}, 404)

    def hang_up(self, *_):
        self.close_connection = True
        self.connection.close()

    def cut_off(self, *_):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"id": "c", "cho')
        self.close_connection = True

    def web_page(self, *_):
        self.reply("<html>Welcome to the hotel", kind="text/html")

    def silent(self, *_):
        self.server.closing.wait(20)
        self.close_connection = True

    def reply(self, content, status: int = 200, kind: str = "application/json", **headers):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Keep quiet."""


@pytest.fixture
def server(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.handle_error = lambda *_: None  # clients that were killed
    server.plan, server.asked, server.requests, server.uploads = {}, [], [], []
    server.lock, server.closing, server.before = threading.Lock(), threading.Event(), lambda text: None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def ask(tmp_path, capsys):
    """Runs `make_dataset.py captions` over `texts` -> (exit code, rows, rows of what was dropped, output)."""
    def run(texts, *flags, out=tmp_path / "prompts.jsonl"):
        source = tmp_path / "captions.txt"
        source.write_text("\n".join(texts), encoding="utf-8")
        code = make_dataset.main(["captions", "--input", str(source), "--out", str(out), *map(str, flags)])
        said = capsys.readouterr()
        errors = [line for line in said.err.splitlines() if line.startswith(("error:", "stopped"))]
        return code, rows_of(out), rows_of(out.with_suffix(".dropped.jsonl")), "\n".join([said.out, *errors])
    return run


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def expected(texts) -> list[dict]:
    return [dict(zip(("input", "edit", "output"), (text, *edit_of(text)))) for text in texts]


def by_input(rows) -> list[dict]:
    return sorted(rows, key=lambda row: row["input"])


def test_every_caption_gets_its_edit(server, ask):
    code, rows, dropped, said = ask(TEXTS, "--model", "some-model", "--concurrency", 3)
    assert (code, dropped) == (0, [])
    assert by_input(rows) == by_input(expected(TEXTS))
    assert "12 edits written" in said and "18,000 in, 480 out" in said
    what, request = server.requests[0]
    assert what == "/chat/completions" and request["model"] == "some-model"
    assert (request["temperature"], request["frequency_penalty"], request["max_tokens"]) == (0.7, 0.1, 256)
    schema = request["response_format"]["json_schema"]
    assert request["response_format"]["type"] == "json_schema" and schema["strict"]
    assert set(schema["schema"]["required"]) == {"edit", "output"} == set(schema["schema"]["properties"])
    assert schema["schema"]["additionalProperties"] is False
    first, *turns, last = request["messages"]
    assert first == {"role": "system", "content": PROMPT} and last == {"role": "user", "content": TEXTS[0]}
    shown = [(a["content"], *json.loads(b["content"]).values()) for a, b in zip(turns[::2], turns[1::2])]
    assert shown == list(TRIPLETS) and {turn["role"] for turn in turns[1::2]} == {"assistant"}


def test_examples_are_many_and_sound():
    assert len(TRIPLETS) >= 30 and len({edit for _, edit, _ in TRIPLETS}) == len(TRIPLETS)
    assert len({text for before, _, after in TRIPLETS for text in (before, after)}) == 2 * len(TRIPLETS)
    assert all(len(edit.split()) <= 12 for _, edit, _ in TRIPLETS)


@pytest.mark.parametrize("kind, counted", [
    ("busy", None), ("broken", None), ("hang up", None), ("cut off", None),
    ("torn json", "malformed"), ("wrong schema", "malformed"), ("wrong types", "malformed"),
    ("no object", "malformed"), ("empty edit", "malformed"), ("no content", "malformed"),
    ("no choice", "malformed"), ("refusal", "refused"), ("filtered", "refused"), ("policy", "refused"),
    ("unchanged", "unchanged"),
])
def test_a_bad_answer_is_asked_for_again(server, ask, kind, counted):
    for text in (TEXTS[0], TEXTS[2]):
        server.plan[text] = [kind, "well"]
    code, rows, dropped, said = ask(TEXTS[:3], "--concurrency", 2)
    assert (code, by_input(rows), dropped) == (0, expected(TEXTS[:3]), [])
    assert Counter(server.asked) == {TEXTS[0]: 2, TEXTS[1]: 1, TEXTS[2]: 2}
    assert (f"once more: 2 {counted}" if counted else "once more: none") in said


@pytest.mark.parametrize("kind, reason", [
    ("refusal", "refused"), ("torn json", "malformed"), ("unchanged", "unchanged"),
])
def test_what_stays_bad_is_dropped_for_good(server, ask, kind, reason):
    server.plan[TEXTS[1]] = [kind]
    code, rows, dropped, said = ask(TEXTS[:3])
    assert (code, by_input(rows)) == (0, expected([TEXTS[0], TEXTS[2]]))
    assert dropped == [{"input": TEXTS[1], "why": reason}]
    assert f"dropped: 1 {reason}; answers asked for once more: 3 {reason}" in said
    assert server.asked.count(TEXTS[1]) == 4  # as the original: three more attempts
    server.asked.clear()
    code, again, *_ = ask(TEXTS[:4])
    assert (code, server.asked, by_input(again)) == (0, [TEXTS[3]], expected([TEXTS[0], *TEXTS[2:4]]))


@pytest.mark.parametrize("kind", ["broken", "busy", "hang up", "web page"])
def test_without_an_answer_a_caption_is_left_for_the_next_run(server, ask, kind):
    server.plan[TEXTS[1]] = [kind]
    code, rows, dropped, said = ask(TEXTS[:3])
    assert (code, by_input(rows), dropped) == (0, expected([TEXTS[0], TEXTS[2]]), [])
    assert "1 captions had no answer" in said
    assert server.asked.count(TEXTS[1]) == (1 if kind == "web page" else 1 + captions.SERVER_RETRIES)
    server.plan.clear()
    server.asked.clear()
    assert by_input(ask(TEXTS[:3])[1]) == expected(TEXTS[:3])
    assert server.asked == [TEXTS[1]]


def test_a_server_that_fails_for_good_ends_the_run(server, ask):
    server.plan.update({text: ["broken"] for text in TEXTS[3:]})
    code, rows, _, said = ask(TEXTS, "--concurrency", 1)
    assert code == 2 and by_input(rows) == expected(TEXTS[:3])
    assert said.count("error:") == 1 and "oops" in said
    assert len(set(server.asked)) == 3 + captions.PATIENCE


@pytest.mark.parametrize("trouble, hint", [
    ("wrong key", "OPENAI_API_KEY right"), ("no key", "set OPENAI_API_KEY"),
    ("empty key", "set OPENAI_API_KEY"), ("line break in key", "OPENAI"),
    ("no server", "OPENAI_BASE_URL name a server that runs"), ("no address", "OPENAI_BASE_URL"),
    ("unknown model", "does not exist"), ("hang up", "OPENAI_BASE_URL name a server that runs"),
])
def test_what_is_hopeless_is_one_line(server, ask, trouble, hint, monkeypatch):
    if trouble == "wrong key":
        monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another")
    elif trouble == "no key":
        monkeypatch.delenv("OPENAI_API_KEY")
    elif trouble == "empty key":
        monkeypatch.setenv("OPENAI_API_KEY", "")
    elif trouble == "line break in key":
        monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    elif trouble == "no server":
        monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    elif trouble == "no address":
        monkeypatch.setenv("OPENAI_BASE_URL", "my-server")
    server.plan.update({text: ["hang up" if trouble == "hang up" else "unknown model"] for text in TEXTS})
    code, rows, dropped, said = ask(TEXTS)
    assert (code, rows, dropped) == (2, [], [])
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert hint in line and KEY not in line and "sk-of-another" not in line
    assert set(server.asked) <= {TEXTS[0]}  # the others were spared


def test_a_slow_answer_keeps_nobody_waiting_and_concurrency_is_kept(server, ask):
    rest, now, most = threading.Event(), [], []

    def before(text):
        with server.lock:
            now.append(text)
            most.append(len(now))
            if len(server.asked) == len(TEXTS):
                rest.set()
        if text == TEXTS[1]:
            assert rest.wait(10)  # until all others were asked
        with server.lock:
            now.remove(text)

    server.before = before
    code, rows, *_ = ask(TEXTS, "--concurrency", 3)
    assert code == 0 and by_input(rows) == by_input(expected(TEXTS))
    assert rows[-1]["input"] != TEXTS[2] and 2 <= max(most) <= 3


def test_questions_are_put_at_the_same_time(server, ask):
    together = threading.Barrier(4)
    server.before = lambda text: text == TEXTS[0] or together.wait(10)
    assert by_input(ask(TEXTS[:9], "--concurrency", 4)[1]) == expected(TEXTS[:9])


def test_one_at_a_time_keeps_the_order(server, ask):
    assert ask(TEXTS, "--concurrency", 1)[1] == expected(TEXTS)


def test_silence_runs_into_the_time_limit(server, ask, monkeypatch):
    monkeypatch.setattr(captions, "TIMEOUT", 0.3)
    server.plan[TEXTS[0]] = ["silent", "well"]
    assert ask(TEXTS[:2])[1] == expected(TEXTS[:2])


@pytest.mark.parametrize("flags", [
    ["--max-tokens", 20_000], ["--max-cost", 0.03, "--price-in", 1.5, "--price-out", 6],
])
@pytest.mark.parametrize("concurrency", [1, 8])
def test_no_question_may_pass_the_limit(server, ask, flags, concurrency):
    """1,540 tokens or 0.249 cents a caption: twelve fit into 18,480 tokens, as many into 3 cents."""
    texts = [f"{text} {number}" for number in range(3) for text in TEXTS]
    code, rows, _, said = ask(texts, "--concurrency", concurrency, *flags)
    assert code == 0 and f"stopped with {36 - len(rows)} captions left" in said
    assert 10 <= len(rows) == len(server.asked) <= 12
    ask(texts, "--concurrency", concurrency, *flags)
    assert max(Counter(server.asked).values()) == 1 and len(server.asked) > len(rows)


def test_limits_hold_for_repeats_and_for_servers_that_do_not_count(server, ask):
    server.plan.update({text: ["torn json"] for text in TEXTS})
    code, rows, dropped, said = ask(TEXTS, "--max-tokens", 12_000, "--concurrency", 2)
    assert (code, rows) == (0, []) and len(server.asked) * 1540 <= 12_000 and len(dropped) == 1
    server.asked.clear()
    server.plan.update({text: ["no usage"] for text in TEXTS})
    _, rows, _, said = ask(TEXTS, "--max-tokens", 40_000)
    assert 2 <= len(rows) == len(server.asked) < 11 and "stopped with" in said
    assert ask(TEXTS, "--max-tokens", 0)[3].count("0 edits written") == 1


def test_moderation_of_captions_and_answers(server, ask):
    texts = [TEXTS[0], "A forbidden picture", TEXTS[1]]
    server.plan[TEXTS[1]] = ["flagged", "flagged", "well"]
    code, rows, dropped, said = ask(texts, "--moderate")
    assert (code, by_input(rows)) == (0, expected(TEXTS[:2]))
    assert dropped == [{"input": texts[1], "why": "flagged"}] and "once more: 2 flagged" in said
    assert texts[1] not in server.asked  # the language model never saw it
    inputs = [request["input"] for what, request in server.requests if what == "/moderations"]
    assert [TEXTS[0]] in inputs and list(edit_of(TEXTS[0])) in inputs


def test_odd_characters_become_sayable_lines(server, ask):
    server.plan["é 漢字"] = ["surrogate"]
    assert ask(["  é \t漢字 "])[1] == [{"input": "é 漢字", "edit": "? on it", "output": "b"}]


def test_captions_in_every_form(tmp_path):
    rows = [("Two cats, \"asleep\"", "http://a/1"), ("Ein Café", "http://a/2")]
    forms = {
        "a.txt": "Two cats, \"asleep\"\n\n  Ein  Café \r\n",
        "b.jsonl": "".join(json.dumps({"caption": text, "url": url}) + "\n" for text, url in rows),
        "c.jsonl": "\n".join(json.dumps({"input": text, "x": 1, "url": url}) for text, url in rows) + "\n",
        "d.csv": 'id,caption,url\n1,"Two cats, ""asleep""",http://a/1\n2,Ein Café,http://a/2\n3,,\n',
        "e.csv": 'URL,TEXT\nhttp://a/1,"Two cats, ""asleep"""\nhttp://a/2,Ein Café\n',
    }
    for name, content in forms.items():
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + content.encode())
        found, repeats = prompts.read_captions(path, "TEXT" if name == "e.csv" else None)
        urls = [{} if name == "a.txt" else {"url": url} for _, url in rows]
        assert found == [{"input": text, **url} for (text, _), url in zip(rows, urls)] and repeats == 0, name


def test_repeats_are_asked_once_and_urls_are_kept(server, ask, tmp_path):
    lines = [("A cat", "u1"), (" a CAT. ", "u2"), ("A dog", "u1"), ("A dog", "u3"), ("A dog", None)]
    kept = [{"url": "u1"}, {"url": "u3"}]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"input": text, "url": url}) + "\n" for text, url in lines))
    out = tmp_path / "deep" / "er" / "out.jsonl"
    words = ["captions", "--input", source, "--out", out, "--concurrency", 1]
    assert make_dataset.main([str(word) for word in words]) == 0
    assert rows_of(out) == [{**row, **url} for row, url in zip(expected(["A cat", "A dog"]), kept)]
    assert server.asked == ["A cat", "A dog"]


@pytest.mark.parametrize("name, content, flags, hint", [
    ("a.jsonl", b'{"input": "x"}\n{"inp', [], "line 2 is not JSON"),
    ("a.jsonl", b'{"input": "x"}\n[1]\n', [], "line 2"),
    ("a.jsonl", b'\n{"text": "x"}\n', [], "line 2: no text under input or caption (--column); there is text"),
    ("a.jsonl", b'{"input": 3}\n', [], "line 1"),
    ("a.csv", b"id,TEXT\n1,x\n", [], "there is id, TEXT"),
    ("a.csv", b"id,TEXT\n1,x\n", ["--column", "text"], "no text under text"),
    ("a.txt", b"caf\xe9\n", [], "cannot be read"),
    ("a.txt", b"x\n", ["--max-cost", "1"], "--max-cost needs --price-in and --price-out"),
    ("a.txt", b"x\n", ["--price-in", "-1"], "must not be negative"),
    ("a.txt", b"x\n", ["--column", "TEXT"], "no text under TEXT"),
    ("missing.txt", None, [], "missing.txt"),
])
def test_bad_input_is_one_line(server, tmp_path, capsys, name, content, flags, hint):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    out = tmp_path / "out.jsonl"
    assert make_dataset.main(["captions", "--input", str(tmp_path / name), "--out", str(out), *flags]) == 2
    error = capsys.readouterr().err
    assert hint in error and error.count("\n") == 1 and not out.exists() and not server.asked


@pytest.mark.parametrize("content", [
    b"a cat", b"a cat\na dog\n", b'{"caption": "x"}\n', b'{"input": "x", "edit": "y"}\n',
    b'{"input": "x", "edit": "y", "output": "z"}\n\n', b'[{"input": "',
    b'{"input": "x", "edit": 1, "output": ""}',
])
def test_files_that_are_not_ours_stay_as_they_are(server, ask, tmp_path, content):
    out = tmp_path / "mine.jsonl"
    out.write_bytes(content)
    source = tmp_path / "captions.txt"
    source.write_text("A cat")
    assert make_dataset.main(["captions", "--input", str(source), "--out", str(out)]) == 2
    assert out.read_bytes() == content and not server.asked


def test_goes_on_from_any_byte_at_which_it_was_killed(server, ask, tmp_path):
    """Cut both files anywhere: the next run ends with the same lines and asks only what is not in them."""
    texts = [*TEXTS[:4], "A refused picture", 'Quotes " and Ünïcode']
    server.plan["A refused picture"] = ["refusal"]
    _, whole, dropped, _ = ask(texts, "--concurrency", 1)
    files = [(path, path.read_bytes())
             for path in (tmp_path / "prompts.jsonl", tmp_path / "prompts.dropped.jsonl")]
    records = {json.dumps(row, ensure_ascii=False): row["input"] for row in [*whole, *dropped]}
    rng, places = random.Random(0), [set(), set()]
    for place, (_, content) in zip(places, files):
        ends = [at for at, byte in enumerate(content, start=1) if byte == 10]
        place |= {0, 1, len(content), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])}
        place |= set(rng.sample(range(len(content)), 3))
    whole_second = len(files[1][1])
    for cuts in [(place, whole_second) for place in places[0]] + [(0, place) for place in places[1]]:
        kept = set()
        for (path, content), cut in zip(files, cuts):
            path.write_bytes(content[:cut])
            lines = content[:cut].decode(errors="replace").split("\n")
            kept |= {records[line] for line in lines if line in records}
        server.asked.clear()
        code, rows, reasons, _ = ask(texts, "--concurrency", 2)
        assert (code, by_input(rows), reasons) == (0, by_input(whole), dropped), cuts
        assert set(server.asked) == set(texts) - kept and not kept & set(server.asked), cuts


def run_apart(server, source: Path, out: Path, *flags) -> subprocess.Popen:
    words = [sys.executable, "make_dataset.py", "captions", "--input", source, "--out", out, *flags]
    return subprocess.Popen(list(map(str, words)), cwd=Path(make_dataset.__file__).parent,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_kill_minus_nine_loses_nothing_that_was_written(server, tmp_path):
    """Killed while the sixth question was under way, and started again."""
    source, out = tmp_path / "captions.txt", tmp_path / "prompts.jsonl"
    source.write_text("\n".join(TEXTS))
    twice = []
    for fatal in (6, None):
        process = run_apart(server, source, out, "--concurrency", 2)
        server.before = lambda _, fatal=fatal, process=process: (
            process.kill() if fatal and len(server.asked) >= fatal else None)
        written = {row["input"] for row in rows_of(out)}
        first = len(server.asked)
        process.communicate(timeout=60)
        twice += [text for text in server.asked[first:] if text in written]
        assert process.returncode == (-signal.SIGKILL if fatal else 0)
    assert by_input(rows_of(out)) == by_input(expected(TEXTS)) and not twice


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_writes_what_is_under_way_and_asks_no_more(server, ask, number):
    server.before = lambda text: len(server.asked) == 5 and os.kill(os.getpid(), number)
    code, rows, _, said = ask(TEXTS, "--concurrency", 3)
    assert code == 130 and said.endswith("stopped; the same command goes on from here")
    assert by_input(rows) == by_input(expected(server.asked)) and 5 <= len(rows) < 9
    server.before = lambda text: None
    assert by_input(ask(TEXTS)[1]) == by_input(expected(TEXTS))
    assert max(Counter(server.asked).values()) == 1


@pytest.mark.parametrize("grace, times", [(0.05, 1), (30, 2)])
def test_ctrl_c_waits_for_a_while_and_a_second_one_does_not(server, ask, monkeypatch, grace, times):
    monkeypatch.setattr(captions, "GRACE", grace)
    server.plan[TEXTS[3]] = ["silent"]

    def press(text):
        if text == TEXTS[3]:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(times - 1):
                threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()

    server.before = press
    began = time.monotonic()
    code, rows, *_ = ask(TEXTS, "--concurrency", 1)
    assert code == 130 and rows == expected(TEXTS[:3]) and time.monotonic() - began < 10


def test_a_full_disk_leaves_whole_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    prompts.append(path, {"input": "a"})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 7, hard))
    try:
        with pytest.raises(OSError):
            prompts.append(path, {"input": "b" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before


def test_the_papers_way(server, ask, tmp_path, capsys):
    """Training data, its upload, the job; the tuned model is asked as it was taught, its answers are read."""
    human, chats = tmp_path / "human.jsonl", tmp_path / "human.chat.jsonl"
    triplets = [(text, *edit_of(text)) for text in TEXTS]
    keys = [("input", "edit", "output"), ("caption", "edit", "output")]
    human.write_text("".join(
        json.dumps(dict(zip(keys[number % 2], triplet))) + "\n" for number, triplet in enumerate(triplets)))
    assert make_dataset.main(["captions", "prepare-finetune", str(human)]) == 0
    assert "12 chats written" in capsys.readouterr().out
    lessons = [row["messages"] for row in rows_of(chats)]
    assert [[turn["role"] for turn in lesson] for lesson in lessons] == [["user", "assistant"]] * 12
    assert [(a["content"], *b["content"].split("\n%%\n")) for a, b in lessons] == triplets
    assert make_dataset.main(["captions", "finetune", str(chats), "--model", "base"]) == 0
    assert capsys.readouterr().out == "ftjob-42\n"
    assert chats.read_bytes() in server.uploads[0] and b"fine-tune" in server.uploads[0]
    what, job = server.requests.pop()
    assert what == "/fine_tuning/jobs" and (job["model"], job["training_file"]) == ("base", "file-7")
    assert job["method"] == {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}}
    code, rows, *_ = ask(TEXTS, "--model", "ft:base:us::1", "--concurrency", 1)
    assert (code, rows) == (0, expected(TEXTS))
    assert [request["messages"] for _, request in server.requests] == [lesson[:1] for lesson in lessons]
    assert all("response_format" not in request for _, request in server.requests)


@pytest.mark.parametrize("content, hint", [
    ('{"input": "a", "edit": "b", "output": "c"}\n' * 9, "9 triplets; tuning takes 10"),
    ('{"input": "a", "edit": "b", "output": "c"}\n' * 10 + '{"input": "a", "edit": "b"}\n', "line 11"),
    ('{"input": "a", "edit": "b", "output": "c"}\n' * 10 + "\n", "line 11"),
    ("[]\n" * 10, "line 1"),
])
def test_training_data_is_checked(tmp_path, capsys, content, hint):
    human = tmp_path / "human.jsonl"
    human.write_text(content)
    assert make_dataset.main(["captions", "prepare-finetune", str(human)]) == 2
    assert hint in capsys.readouterr().err and list(tmp_path.iterdir()) == [human]


def test_tuning_that_cannot_start_is_one_line(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another")
    (tmp_path / "chats.jsonl").write_text("{}\n")
    for name, hint in (("chats.jsonl", "OPENAI_API_KEY right"), ("none.jsonl", "none.jsonl")):
        assert make_dataset.main(["captions", "finetune", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and hint in error


def draw(out: Path, *flags) -> int:
    return make_dataset.main(["captions", "--backend", "scenes", "--out", str(out), *map(str, flags)])


def test_scenes_need_no_server(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    one, two, other = (tmp_path / name for name in ("1.jsonl", "2.jsonl", "3.jsonl"))
    assert draw(one, "--n", 350) == draw(two, "--n", 350) == draw(other, "--n", 350, "--seed", 1) == 0
    rows = rows_of(one)
    assert one.read_bytes() == two.read_bytes() and len(rows) == 350
    assert len({tuple(row.values()) for row in rows}) == 350
    assert all(row["input"] != row["output"] for row in rows)
    assert not {row["input"] for row in rows} & {row["input"] for row in rows_of(other)[:50]}
    first = Counter(kind for row in rows for kind in EDIT_KINDS if fits(row["edit"], PHRASINGS[kind][0]))
    assert set(first) == set(EDIT_KINDS)
    assert not [row for row in rows for kind in ("add", "ground") if fits(row["edit"], PHRASINGS[kind][-1])]
    added = sum(len(row["output"].split(" and ")) > len(row["input"].split(" and ")) for row in rows)
    assert 20 < added < 90  # a seventh is 50; were all edits equally likely, most would add


def fits(edit: str, phrase: str) -> bool:
    """Whether an instruction could be this phrase with its gaps filled."""
    fixed = [word for word in phrase.replace(",", "").split() if "{" not in word]
    words = edit.replace(",", "").split()
    if phrase.startswith("{"):  # "{where}, put {new}"
        return "put" in words[1:]
    return words[0] == fixed[0] and all(word in words for word in fixed)


def test_scenes_grow_and_spare_what_is_not_theirs(tmp_path, capsys):
    out, long = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    draw(out, "--n", 5)
    draw(long, "--n", 9)
    assert draw(out, "--n", 9) == 0 and out.read_bytes() == long.read_bytes()
    capsys.readouterr()
    assert draw(out, "--n", 5) == draw(out, "--n", 9, "--seed", 1) == 2
    assert capsys.readouterr().err.count("\n") == 2 and out.read_bytes() == long.read_bytes()
