"""Captions are read from every format, and files of triplets are sound after kills and full disks."""

import csv
import json
import random
import re
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from chat_server import TEXTS, by_input, expected, rows_of

import make_dataset
from nanoip2p.common import files
from nanoip2p.dataset import captions, rendered
from nanoip2p.world.scenes import EDIT_KINDS, HELD_OUT_THINGS, random_scene
from nanoip2p.world.wordings import HELD_OUT, PHRASINGS


def rows_in(lines):
    pairs = [line.split("\t") for line in lines]
    return [{"input": text, "url": url} if url else {"input": text} for text, url in pairs]


def test_captions_in_every_form(tmp_path):
    rows = [("Two cats, \"asleep\"", "http://a/1"), ("Ein Café", "http://a/2")]
    forms = {
        "a.txt": "Two cats, \"asleep\"\n\n  Ein  Café \r\n",
        "b.jsonl": "".join(json.dumps({"caption": text, "url": url}) + "\n" for text, url in rows),
        "c.jsonl": "\n".join(json.dumps({"input": text, "x": 1, "url": url}) for text, url in rows) + "\n",
        "d.csv": 'id,caption,url\n1,"Two cats, ""asleep""",http://a/1\n2,Ein Café,http://a/2\n3,,\n4\n',
        "e.csv": 'URL,TEXT\nhttp://a/1,"Two cats, ""asleep"""\nhttp://a/2,Ein Café\n',
    }
    for name, content in forms.items():
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + content.encode())
        found, repeats = captions.read_captions(path, "TEXT" if name == "e.csv" else None)
        urls = [{} if name == "a.txt" else {"url": url} for _, url in rows]
        assert rows_in(found) == [{"input": text, **url} for (text, _), url in zip(rows, urls)], name
        assert repeats == 0


def test_a_row_is_a_repeat_as_the_long_way_round_finds_it(tmp_path):
    """In random files with few words and URLs, of every kind."""
    rng = random.Random(0)
    for kind in ("jsonl", "csv", "txt") * 20:
        rows, kept, marks = [], [], set()
        for _ in range(30):
            text = rng.choice(("a", "A ", " b. ", "b", "c  d", "c d!", "", "é", "\u2029x"))
            url = {"url": rng.choice(("", "a", "u", "v w"))} if kind != "txt" else {}
            rows.append({"input": text, **url})
        path = tmp_path / f"a.{kind}"
        with path.open("w", encoding="utf-8", newline="") as file:
            if kind == "csv":
                writer = csv.DictWriter(file, ("input", "url"))
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines((json.dumps(row) if kind == "jsonl" else row["input"]) + "\n" for row in rows)
        rows = [row for row in rows if files.fold(row["input"])]
        for row in rows:
            own = {files.fold(row["input"])} | ({("url", row["url"])} if row.get("url") else set())
            if not own & marks:
                marks |= own
                url = {"url": row["url"]} if row.get("url") else {}
                kept.append({"input": files.tidy(row["input"]), **url})
        found, repeats = captions.read_captions(path)
        assert (rows_in(found), repeats) == (kept, len(rows) - len(kept))


def test_many_captions_take_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 2**16)  # so that 10,000 captions are several blocks
    path = tmp_path / "a.txt"
    path.write_text("".join(f"caption number {n} of a long list with some words\n" for n in range(10_000)))
    tracemalloc.start()
    try:
        found, _ = captions.read_captions(path)
        assert len(found) == 10_000 and tracemalloc.get_traced_memory()[1] < 250 * len(found)
    finally:
        tracemalloc.stop()


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


def test_a_long_cell_in_another_column_is_no_obstacle(tmp_path):
    (tmp_path / "a.csv").write_text("html,caption\n" + "x" * 140_000 + ",A cat\n")
    assert rows_in(captions.read_captions(tmp_path / "a.csv")[0]) == [{"input": "A cat"}]


@pytest.mark.parametrize("name, content, flags, hint", [
    ("a.jsonl", b'{"input": "x"}\n{"inp', [], "line 2 is not a JSON object"),
    ("a.jsonl", b'{"input": "x"}\n[1]\n', [], "line 2"),
    ("a.jsonl", b'\n{"text": "x"}\n', [], "line 2: no text under input or caption (--column); there is text"),
    ("a.jsonl", b'{"input": 3}\n', [], "line 1"),
    ("a.txt", b"x" * 10_001 + b"\n", [], "is 10,001 long; at most 10,000 are read"),
    ("a.txt", b"y\n" + b"x" * 2**21 + b"\n", [], "longer than 1,048,576 bytes"),
    ("a.csv", b'input\n"' + b"x\n" * 2**20, [], "cannot be read after line"),
    ("a.csv", b"input\nx\ncaf\xe9\n", [], "cannot be read after line 2: 'utf-8'"),
    ("a.csv", b"id,TEXT\n1,x\n", [], "there is id, TEXT"),
    ("a.csv", b"id,TEXT\n1,x\n", ["--column", "text"], "no text under text"),
    ("a.txt", b"caf\xe9\n", [], "line 1 is not UTF-8"),
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
    b'[{"input": "',
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


def test_kill_minus_nine_loses_nothing_that_was_written(server, ask, tmp_path):
    """Killed while the sixth question was under way, and started again, here."""
    source, out = tmp_path / "captions.txt", tmp_path / "prompts.jsonl"
    source.write_text("\n".join(TEXTS))
    words = ["captions", "--input", source, "--out", out, "--concurrency", "2"]
    process = subprocess.Popen([sys.executable, make_dataset.__file__, *map(str, words)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    server.before = lambda _: process.kill() if len(server.asked) >= 6 else None
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    written = {row["input"] for row in rows_of(out)}
    server.asked.clear()
    server.before = lambda _: None
    assert by_input(ask(TEXTS, "--concurrency", 2)[1]) == by_input(expected(TEXTS))
    assert written and not written & set(server.asked)


def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(server, ask, monkeypatch):
    append = files.append

    def fill_up(path, row):
        if len(rows_of(path)) == 2:
            raise OSError(28, "No space left on device")
        append(path, row)

    monkeypatch.setattr(files, "append", fill_up)
    code, rows, _, said = ask(TEXTS, "--concurrency", 3)
    assert code == 2 and len(rows) == 2 and said.count("error:") == 1
    assert "prompts.jsonl cannot be written: No space left on device; if its disk is full, free space" in said
    monkeypatch.setattr(files, "append", append)
    assert by_input(ask(TEXTS)[1]) == by_input(expected(TEXTS))


def draw(out: Path, *flags) -> int:
    return make_dataset.main(["captions", "--backend", "scenes", "--out", str(out), *map(str, flags)])


def test_scenes_need_no_server(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    one, two, other = (tmp_path / name for name in ("1.jsonl", "2.jsonl", "3.jsonl"))
    assert draw(one, "--n", 210) == draw(two, "--n", 210) == draw(other, "--n", 50, "--seed", 1) == 0
    rows = rows_of(one)
    assert one.read_bytes() == two.read_bytes() and len(rows) == 210
    assert len({tuple(row.values()) for row in rows}) == 210
    assert all(row["input"] != row["output"] for row in rows)
    assert not {row["input"] for row in rows} & {row["input"] for row in rows_of(other)}
    assert all(any(fits(row["edit"], phrase) for row in rows for phrase in PHRASINGS[kind][:-HELD_OUT])
               for kind in EDIT_KINDS)
    assert not [row for row in rows for kind in ("add", "ground") for phrase in PHRASINGS[kind][-HELD_OUT:]
                if fits(row["edit"], phrase)]
    added = sum(len(row["output"].split(" and ")) > len(row["input"].split(" and ")) for row in rows)
    assert 10 < added < 60  # a seventh is 30; were all edits equally likely, most would add


def test_scenes_keep_to_what_training_may_see():
    rows = rendered.draw_scenes(300, seed=3)
    for kind, colour in HELD_OUT_THINGS:
        assert not [row for row in rows if f"{colour} {kind}" in row["input"] + row["output"]]
    assert not [row for row in rows if "rocket" in row["output"] and "rocket" not in row["input"]
                and len(row["output"].split(" and ")) > len(row["input"].split(" and "))]  # added


def test_scenes_never_repeat(monkeypatch):
    monkeypatch.setattr(rendered, "random_scene", lambda split, index: random_scene(split, index % 4))
    assert len({tuple(row.values()) for row in rendered.draw_scenes(150, seed=0)}) == 150


def fits(edit: str, phrase: str) -> bool:
    """Whether an instruction could be this phrase with its gaps filled."""
    return re.fullmatch(re.sub(r"\\{\w+\\}", ".+", re.escape(phrase)), edit) is not None


def test_scenes_grow_and_spare_what_is_not_theirs(tmp_path, capsys):
    out, long = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    draw(out, "--n", 5)
    draw(long, "--n", 9)
    assert draw(out, "--n", 9) == 0 and out.read_bytes() == long.read_bytes()
    capsys.readouterr()
    assert draw(out, "--n", 5) == draw(out, "--n", 9, "--seed", 1) == 2
    fewer, others = capsys.readouterr().err.splitlines()
    assert "holds more or other captions than these 5" in fewer and "--seed 1" in others
    assert out.read_bytes() == long.read_bytes()
