"""Captions through the real openai client, from the server in chat_server.py."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import openai
import pytest
from chat_server import KEY, TEXTS, by_input, edit_of, expected, rows_of

import make_dataset
from nanoip2p.dataset import captions, chat
from nanoip2p.dataset.captions import PROMPT, TRIPLETS


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
    ("busy", None), ("broken", None), ("hang up", None), ("cut off", None), ("web page", None),
    ("endless", None), ("endless redirect", None), ("swelling", None), ("odd compression", None),
    ("deep json", None), ("list", None),
    ("torn json", "malformed"), ("wrong schema", "malformed"), ("wrong types", "malformed"),
    ("no object", "malformed"), ("empty edit", "malformed"), ("no content", "malformed"),
    ("no choice", "malformed"), ("refusal", "refused"), ("filtered", "refused"), ("policy", "refused"),
    ("unchanged", "unchanged"), ("too long", "malformed"),
])
def test_a_bad_answer_is_asked_for_again(server, ask, kind, counted):
    for text in (TEXTS[0], TEXTS[2]):
        server.plan[text] = [kind, "well"]
    code, rows, dropped, said = ask(TEXTS[:3], "--concurrency", 2)
    assert (code, by_input(rows), dropped) == (0, expected(TEXTS[:3]), [])
    assert Counter(server.asked) == {TEXTS[0]: 2, TEXTS[1]: 1, TEXTS[2]: 2}
    assert (f"retries: 2 {counted}" if counted else "retries: none") in said


@pytest.mark.parametrize("kind, reason", [
    ("refusal", "refused"), ("torn json", "malformed"), ("unchanged", "unchanged"),
])
def test_what_stays_bad_is_dropped_for_good(server, ask, kind, reason):
    server.plan[TEXTS[1]] = [kind]
    code, rows, dropped, said = ask(TEXTS[:3])
    assert (code, by_input(rows)) == (0, expected([TEXTS[0], TEXTS[2]]))
    assert dropped == [{"input": TEXTS[1], "why": reason}]
    assert f"dropped: 1 {reason}; retries: 3 {reason}" in said
    assert server.asked.count(TEXTS[1]) == 4  # as the original: three more attempts
    server.asked.clear()
    code, again, *_ = ask(TEXTS[:4])
    assert (code, server.asked, by_input(again)) == (0, [TEXTS[3]], expected([TEXTS[0], *TEXTS[2:4]]))


@pytest.mark.parametrize("kind", ["broken", "busy", "hang up", "web page"])
def test_without_an_answer_a_caption_is_left_for_the_next_run(server, ask, kind):
    server.plan[TEXTS[1]] = [kind]
    code, rows, dropped, said = ask(TEXTS[:3])
    assert (code, by_input(rows), dropped) == (0, expected([TEXTS[0], TEXTS[2]]), [])
    assert "1 without an answer" in said
    assert server.asked.count(TEXTS[1]) == 1 + chat.SERVER_RETRIES
    server.plan.clear()
    server.asked.clear()
    assert by_input(ask(TEXTS[:3])[1]) == expected(TEXTS[:3])
    assert server.asked == [TEXTS[1]]


def test_a_server_that_fails_for_good_ends_the_run(server, ask):
    server.plan.update({text: ["broken"] for text in TEXTS[3:]})
    code, rows, _, said = ask(TEXTS, "--concurrency", 1)
    assert code == 2 and by_input(rows) == expected(TEXTS[:3])
    assert said.count("error:") == 1 and "oops" in said
    assert len(set(server.asked)) == 3 + captions.MAX_FAILURES


def test_a_server_that_often_fails_is_borne_with(server, ask):
    server.plan.update({text: ["broken"] for text in TEXTS[1::2]})
    code, rows, _, said = ask(TEXTS, "--concurrency", 1)
    assert (code, rows) == (0, expected(TEXTS[::2])) and "6 without an answer" in said


def test_an_error_of_our_own_does_not_look_like_success(server, ask, monkeypatch):
    monkeypatch.setattr(chat, "spent_tokens", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(TEXTS)


@pytest.mark.parametrize("trouble, hint", [
    ("wrong key", "OPENAI_API_KEY right"), ("no key", "set OPENAI_API_KEY"),
    ("empty key", "set OPENAI_API_KEY"), ("line break in key", "OPENAI"),
    ("accent in key", "set OPENAI_API_KEY"),
    ("no server", "does OPENAI_BASE_URL name the right server"), ("no address", "OPENAI_BASE_URL"),
    ("unknown model", "does not exist"), ("hang up", "does OPENAI_BASE_URL name the right server"),
])
def test_what_is_hopeless_is_one_line(server, ask, trouble, hint, monkeypatch):
    if trouble == "wrong key":
        monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another")
    elif trouble == "no key":
        monkeypatch.delenv("OPENAI_API_KEY")
    elif trouble == "empty key":
        monkeypatch.setenv("OPENAI_API_KEY", " ")
    elif trouble == "line break in key":
        monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    elif trouble == "accent in key":
        monkeypatch.setenv("OPENAI_API_KEY", "clé")
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


def test_a_short_key_does_not_garble_the_message(server, ask, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "e")
    assert "Incorrect API key: e" in ask(TEXTS)[3]


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
    assert ask(TEXTS, "--concurrency", 1, "--n", 5)[1] == expected(TEXTS[:5])
    assert ask(TEXTS, "--concurrency", 1)[1] == expected(TEXTS)


def test_silence_runs_into_the_time_limit(server, ask):
    server.plan[TEXTS[0]] = ["silent", "well"]
    began = time.monotonic()
    assert ask(TEXTS[:2], "--timeout", 1)[1] == expected(TEXTS[:2])
    assert 1 < time.monotonic() - began < 3


@pytest.mark.parametrize("kind", ["dripping", "dripping header"])
def test_a_byte_at_a_time_runs_into_the_time_limit(server, ask, kind):
    server.plan[TEXTS[1]] = [kind, "well"]
    began = time.monotonic()
    assert by_input(ask(TEXTS[:3], "--timeout", 1)[1]) == expected(TEXTS[:3])
    assert 1 < time.monotonic() - began < 4


def test_no_answer_may_be_endless(server, ask):
    """Not that of an error either. Of each of six answers, the sockets hold some megabytes."""
    server.plan[TEXTS[1]] = ["endless error"]
    code, rows, _, said = ask(TEXTS[:3])
    assert (code, by_input(rows)) == (0, expected([TEXTS[0], TEXTS[2]])) and "1 without an answer" in said
    assert server.sent < 100 * chat.LONGEST_ANSWER
    server.plan.update({text: ["endless"] for text in TEXTS})
    assert "longer than 1,048,576 bytes" in ask(TEXTS)[3]


@pytest.mark.parametrize("scheme, host, followed", [
    ("", "", True), ("http", "127.0.0.1:{port}", True), ("https", "127.0.0.1:{port}", True),
    ("http", "localhost:{port}", False), ("http", "127.0.0.1:{other}", False),
    ("http", "127.0.0.1:{port}@localhost:{port}", False)])
def test_a_redirect_stays_on_its_server(server, ask, scheme, host, followed, monkeypatch):
    address = host.format(port=server.server_port, other=server.server_port + 1)
    server.elsewhere = scheme and f"{scheme}://{address}/v1/again/chat/completions"
    connected, connect = set(), socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda own, address: (
        connected.add(address[1]), connect(own, address))[1])
    server.plan[TEXTS[0]] = ["redirect"]
    code, rows, _, said = ask(TEXTS[:2])
    assert connected == {server.server_port}
    if followed and scheme != "https":  # here the server speaks no TLS
        assert (code, rows) == (0, expected(TEXTS[:2]))
    else:
        assert code == 2 and ("redirect to" not in said) == followed


def test_no_redirect_gives_up_encryption():
    client, new = chat.Client(1), chat.HTTP.Request
    asyncio.run(client.check_host(new("POST", "https://a/v1")))
    asyncio.run(client.check_host(new("POST", "https://A:443/v2")))
    with pytest.raises(chat.HTTP.RemoteProtocolError, match="redirect"):
        asyncio.run(client.check_host(new("POST", "http://a/v1")))


@pytest.mark.parametrize("count", [-5, 0, 1.5, "a", True, None, [], {}, 10**30, 10**400])
def test_odd_token_counts_give_way_to_the_bound(server, ask, count):
    server.plan[TEXTS[0]] = ["odd usage"]
    for server.usage in ({"prompt_tokens": count, "completion_tokens": count}, count):
        reply = {"usage": server.usage}
        assert chat.spent_tokens(reply, 7) == {"in": 7, "out": chat.ANSWER_TOKENS}
    if count != 10**400:  # json.dumps writes it, but no parser of ours reads it
        assert f"{chat.ANSWER_TOKENS} out" in ask(TEXTS[:1])[3]


@pytest.mark.parametrize("concurrency", [1, 8])
def test_no_question_may_pass_the_limit(server, ask, concurrency):
    """A caption takes 1,540 tokens; twelve captions take 18,480."""
    texts = [f"{text} {number}" for number in range(3) for text in TEXTS]
    code, rows, _, said = ask(texts, "--concurrency", concurrency, "--max-tokens", 20_000)
    assert code == 0 and f"{36 - len(rows)} not asked" in said
    assert 10 <= len(rows) == len(server.asked) <= 12
    ask(texts, "--concurrency", concurrency, "--max-tokens", 20_000)
    assert max(Counter(server.asked).values()) == 1 and len(server.asked) > len(rows)


def test_limits_hold_for_repeats_and_for_servers_that_do_not_count(server, ask):
    server.plan.update({text: ["torn json"] for text in TEXTS})
    code, rows, dropped, said = ask(TEXTS, "--max-tokens", 12_000, "--concurrency", 2)
    assert (code, rows) == (0, []) and len(server.asked) * 1540 <= 12_000 and len(dropped) == 1
    server.asked.clear()
    server.plan.update({text: ["no usage"] for text in TEXTS})
    _, rows, _, said = ask(TEXTS, "--max-tokens", 40_000)
    assert 2 <= len(rows) == len(server.asked) < 11 and f"{11 - len(rows)} not asked" in said
    assert ask(TEXTS, "--max-tokens", 0)[3].count("0 edits written") == 1


def test_moderation_of_captions_and_answers(server, ask):
    texts = [TEXTS[0], "A forbidden picture", TEXTS[1]]
    server.plan[TEXTS[1]] = ["flagged", "flagged", "well"]
    code, rows, dropped, said = ask(texts, "--moderate")
    assert (code, by_input(rows)) == (0, expected(TEXTS[:2]))
    assert dropped == [{"input": texts[1], "why": "flagged"}] and "retries: 2 flagged" in said
    assert texts[1] not in server.asked  # the language model never saw it
    inputs = [request["input"] for what, request in server.requests if what == "/moderations"]
    assert [TEXTS[0]] in inputs and list(edit_of(TEXTS[0])) in inputs


@pytest.mark.parametrize("verdict", [
    {}, {"results": None}, {"results": []}, {"results": [3]}, {"results": [{"flagged": "no"}]}, [], "<html>"])
def test_an_odd_moderation_is_asked_for_again(server, ask, verdict):
    server.verdicts = [verdict]
    assert ask(TEXTS[:1], "--moderate")[1] == expected(TEXTS[:1])
    server.verdicts = [verdict] * 99
    code, rows, dropped, said = ask(TEXTS[:2], "--moderate")
    assert (rows, dropped) == (expected(TEXTS[:1]), []) and ("1 without an answer" in said or code == 2)


def test_a_second_process_on_one_out_ends_at_once(server, ask, tmp_path):
    """The first has to be another process: a lock excludes no threads."""
    code = ("import sys; from pathlib import Path; from nanoip2p.common.files import locked\n"
            "with locked(Path(sys.argv[1])) as held: print(held, flush=True); sys.stdin.read()")
    first = subprocess.Popen([sys.executable, "-c", code, tmp_path / ".prompts.lock"], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout.readline() == "True\n"
    code, rows, _, said = ask(TEXTS)
    assert (code, rows, server.asked) == (2, [], []) and "prompts.jsonl is being written by another" in said
    first.communicate("")
    assert by_input(ask(TEXTS)[1]) == by_input(expected(TEXTS)) and len(server.asked) == len(TEXTS)


def test_odd_characters_become_sayable_lines(server, ask):
    server.plan["é 漢字"] = ["surrogate"]
    assert ask(["  é \t漢字 "])[1] == [{"input": "é 漢字", "edit": "? on it", "output": "b"}]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_writes_what_is_under_way_and_asks_no_more(server, ask, number):
    server.before = lambda text: text == TEXTS[3] and os.kill(os.getpid(), number)
    code, rows, _, said = ask(TEXTS, "--concurrency", 3)
    assert code == 130 and said.endswith("and the same command continues from there")
    assert by_input(rows) == by_input(expected(server.asked)) and 4 <= len(rows) < 12
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


def test_ctrl_c_while_the_client_closes_is_no_traceback(server, ask, monkeypatch):
    """A cancel can come then, too: from the timer of GRACE, for example."""
    plain = openai.AsyncOpenAI.close

    async def slow(client):
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.5)
        await plain(client)

    monkeypatch.setattr(captions, "GRACE", 0.05)
    monkeypatch.setattr(openai.AsyncOpenAI, "close", slow)
    code, rows, *_ = ask(TEXTS[:2], "--concurrency", 1)
    assert code == 130 and by_input(rows) == by_input(expected(TEXTS[:2]))


def test_the_third_ctrl_c_ends_even_the_look_up_of_a_name(tmp_path):
    """asyncio waits for its threads, and nothing interrupts getaddrinfo."""
    (tmp_path / "texts.txt").write_text("a house\n")
    code = ("import os, signal, socket, sys, threading, time\n"
            "def press():\n"
            "    for _ in range(3): time.sleep(0.1); os.kill(os.getpid(), signal.SIGINT)\n"
            "def slow(*_, **__): threading.Thread(target=press, daemon=True).start(); time.sleep(60)\n"
            "socket.getaddrinfo = slow\n"
            "import make_dataset; sys.exit(make_dataset.main(sys.argv[1:]))")
    words = ["captions", "--input", tmp_path / "texts.txt", "--out", tmp_path / "prompts.jsonl"]
    there = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": "http://slow.example/v1",
             "PYTHONPATH": str(Path(make_dataset.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code, *words], env=os.environ | there, timeout=50,
                          capture_output=True, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr


def test_the_papers_way(server, ask, tmp_path, capsys):
    """Training data, its upload, the job; the tuned model is asked as it was taught, its answers are read."""
    human, chats = tmp_path / "human.jsonl", tmp_path / "human.chat.jsonl"
    triplets = [(text, *edit_of(text)) for text in TEXTS]
    keys = [("input", "edit", "output"), ("caption", "edit", "output")]
    human.write_text("".join(
        json.dumps(dict(zip(keys[number % 2], triplet))) + "\n\n" for number, triplet in enumerate(triplets)))
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
    ('{"input": "a", "edit": "b", "output": "c"}\n' * 9, "9 triplets; fine-tuning needs 10"),
    ('{"input": "a", "edit": "b", "output": "c"}\n' * 10 + '{"input": "a", "edit": "b"}\n', "line 11"),
    ('{"input": "a", "edit": "b", "output": "c"}\n\n' * 9, "9 triplets; fine-tuning needs 10"),
    ('\n{"input": "a", "edit": "b", "output": " "}\n' * 10, "human.jsonl, line 2"),
    ('{"input": "", "edit": "b", "output": "c"}\n' * 10, "human.jsonl, line 1"),
    ('\n{"input": "\xe9", "edit": "b", "output": "c"}\n' * 10, "human.jsonl, line 2"),
    ("[]\n" * 10, "line 1"),
])
def test_training_data_is_checked(tmp_path, capsys, content, hint):
    human = tmp_path / "human.jsonl"
    human.write_text(content, encoding="latin-1")
    assert make_dataset.main(["captions", "prepare-finetune", str(human)]) == 2
    assert hint in capsys.readouterr().err and list(tmp_path.iterdir()) == [human]


@pytest.mark.parametrize("identity", [None, 3, {}, ["x"]])
def test_a_job_without_an_id_is_one_line(server, tmp_path, capsys, identity):
    (tmp_path / "chats.jsonl").write_text("{}\n")
    server.identity = identity
    assert make_dataset.main(["captions", "finetune", str(tmp_path / "chats.jsonl")]) == 2
    assert "the server's answer: id =" in capsys.readouterr().err


def test_tuning_that_cannot_start_is_one_line(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another")
    (tmp_path / "chats.jsonl").write_text("{}\n")
    for name, hint in (("chats.jsonl", "OPENAI_API_KEY right"), ("none.jsonl", "none.jsonl")):
        assert make_dataset.main(["captions", "finetune", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and hint in error


@pytest.mark.parametrize("words", [[], ["captions"], ["captions", "--n", "0"], ["captions", "tune"]])
def test_what_cannot_be_meant_is_one_line(words, capsys):
    assert make_dataset.main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1
