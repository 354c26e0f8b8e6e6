"""A test server with OpenAI's API that also gives bad answers, and a fixture that runs `captions` on it."""

import contextlib
import functools
import gzip
import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai
import pytest

import make_dataset

KEY = "sk-secret-of-mine"
TEXTS = [f"A picture of {number} boats." for number in range(12)]
TOKENS = {"prompt_tokens": 1500, "completion_tokens": 40}
make_context = functools.cache(ssl.create_default_context)  # each client reads all root certificates


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
            return self.reply({"id": server.identity, "object": "fine_tuning.job", "status": "queued"})
        if what == "/moderations":
            verdict = [{"flagged": "forbidden" in text} for text in request["input"]]
            return self.reply(server.verdicts.pop() if server.verdicts else {"results": verdict})
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
                   "too long": f"{edit}\n%%\n{output[:-9]}",
                   "empty edit": '{"edit": " ", "output": "x"}', "no content": None,
                   "surrogate": r'{"edit": "\ud83d on\n it", "output": "b"}'}.get(kind, content)
        message = {"role": "assistant", "content": content}
        if kind == "refusal":
            message = {"role": "assistant", "content": None, "refusal": "I cannot help with boats."}
        reason = {"filtered": "content_filter", "too long": "length"}.get(kind, "stop")
        choice = {"index": 0, "message": message, "finish_reason": reason}
        reply = {"id": "c", "object": "chat.completion", "created": 0, "model": request["model"],
                 "choices": [] if kind == "no choice" else [choice], "usage": TOKENS}
        if kind == "no usage":
            del reply["usage"]
        if kind == "odd usage":
            reply["usage"] = self.server.usage
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

    def redirect(self, request, text, kind):
        """To server.elsewhere, or to this server under another path, which answers well."""
        if self.path.startswith("/v1/again"):
            return self.well(request, text, kind)
        target = self.server.elsewhere or "/v1/again/chat/completions"
        self.reply("", 307, Location=target)

    def endless(self, *_):
        self.stream(b" " * 2**16, 0)

    def dripping(self, *_):
        self.stream(b" ", 0.1)

    def dripping_header(self, *_):
        with contextlib.suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
            while not self.server.closing.wait(0.1):
                self.wfile.write(b"x")
        self.close_connection = True

    def endless_error(self, *_):
        self.stream(b" " * 2**16, 0, 400)

    def endless_redirect(self, *_):
        self.stream(b" " * 2**16, 0, 307, Location="/v1/again/chat/completions")

    def swelling(self, *_):
        """Two million zeros, compressed; the question asked for no compression."""
        body = gzip.compress(bytes(2 * 10**6))
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def odd_compression(self, *_):
        self.reply("{}", **{"Content-Encoding": "br"})

    def deep_json(self, *_):
        self.reply("[" * 100_000)

    def list(self, *_):
        self.reply("[]")

    def stream(self, piece, pause, status=200, **headers):
        """Send pieces until the client hangs up."""
        self.send_response(status)
        for name, value in {"Transfer-Encoding": "chunked", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            while not self.server.closing.wait(pause):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.server.sent += len(piece)
        self.close_connection = True

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


class ManyClients(ThreadingHTTPServer):
    request_queue_size = 64  # with 5, the sixth client that connects at once waits for a second


@pytest.fixture
def server(monkeypatch):
    server = ManyClients(("127.0.0.1", 0), Server)
    server.handle_error = lambda *_: None  # clients that were killed
    server.plan, server.asked, server.requests, server.uploads = {}, [], [], []
    server.identity = "ftjob-42"
    server.elsewhere, server.sent, server.usage, server.verdicts = None, 0, None, []
    server.lock, server.closing, server.before = threading.Lock(), threading.Event(), lambda text: None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(ssl, "create_default_context", make_context)
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
