"""A small server here answers as huggingface.co does; the clients are processes with caches of their own."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_editor import write_tiny_editor

from nanoip2p.checkpoint import hub
from nanoip2p.checkpoint.hub import find_tokenizer, needed_files, tokenizer_files
from nanoip2p.checkpoint.load import load_model
from nanoip2p.tokenizer import load_tokenizer

HUB = Path(hub.__file__).parent
COMMITS = {"main": 40 * "a", "v1": 40 * "b"}
TINY_FILES = {
    "model_index.json", "defaults.json", "scheduler/scheduler_config.json",
    "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json", "text_encoder/model.safetensors",
}
HALF = "unet/diffusion_pytorch_model.fp16.safetensors"
DECOYS = {
    "instruct-pix2pix-00-22000.safetensors", "instruct-pix2pix-00-22000.ckpt", "model.safetensors",
    "README.md", "config.json", "safety_checker/config.json", "safety_checker/model.safetensors",
    "feature_extractor/preprocessor_config.json", "unet/model.onnx", "unet/diffusion_pytorch_model.bin",
    HALF, "unet/diffusion_pytorch_model.non_ema.safetensors",
    "vae/diffusion_pytorch_model.bin", "vae/diffusion_flax_model.msgpack", "text_encoder/pytorch_model.bin",
    "text_encoder/openvino_model.bin", "text_encoder/flax_model.msgpack", "vae_decoder/model.onnx",
}
CLIP = "openai/clip-vit-large-patch14"
CLIP_FILES = {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
GATED, BROKEN, SILENT = "gated/model", "broken/model", "silent/model"
ANSWERS = {  # repository -> (status, X-Error-Code) for its description and for its files; None: as usual
    "private/model": ((401, ""), None), BROKEN: ((500, ""), None), "portal/login-page": ((200, ""), None),
    GATED: (None, (403, "GatedRepo")),
}
CLIENT = """
import json, os, sys
from pathlib import Path
import hub  # alone: the package around it imports torch, which takes seconds
assert not {"torch", "huggingface_hub"} & sys.modules.keys(), "imports that take seconds"
hub.cache_only = set(os.environ.get("CACHE_ONLY", "").split())
for name, checkpoint in json.load(sys.stdin):
    hub.TIMEOUT = 1 if name == "silent/model" else 10
    try:
        found = hub.find_tokenizer(Path(checkpoint), name) if checkpoint else hub.fetch_weights(name)
        print(json.dumps([str(found), ""]))
    except ValueError as error:
        print(json.dumps(["", str(error)]))
"""


class Hub(BaseHTTPRequestHandler):
    """/api/models/OWNER/NAME[/revision/R], /api/models/OWNER/NAME/tree/R, /OWNER/NAME/resolve/R/FILE."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        owner, name, *rest = path.removeprefix("/api/models").strip("/").split("/")
        repository, about_it = f"{owner}/{name}", path.startswith("/api/")
        self.server.asked.append((self.command, repository, "" if about_it else "/".join(rest[2:])))
        if repository == SILENT:
            return self.server.closing.wait()
        revision = rest[1] if rest else "main"
        commit = COMMITS.get(revision, revision)
        folder = self.server.folders.get(repository, {}).get(commit)
        answer = ANSWERS.get(repository, (None, None))[not about_it]
        if not answer and not folder:
            known = repository in self.server.folders
            answer = 404, "RevisionNotFound" if known else "RepoNotFound"
        if answer:
            return self.reply(b"<html>", *answer)
        files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        if not about_it:
            content = files["/".join(rest[2:])].read_bytes()
        elif rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": name, "size": files[name].stat().st_size, "oid": name}
                    for name in files]
            content = json.dumps(tree).encode()
        else:
            about = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            content = json.dumps(about).encode()
        self.reply(content, commit=commit)

    do_HEAD = do_GET

    def reply(self, content: bytes, status: int = 200, code: str = "", commit: str = ""):
        self.send_response(status)
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Content-Length": str(len(content)),
                   "X-Repo-Commit": commit, "X-Error-Code": code}
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        """Keep quiet."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Serves folders and records the requests as `asked`: [(GET or HEAD, repository, file or "")]."""
    served = tmp_path_factory.mktemp("served")
    tiny = write_tiny_editor(served / "tiny")
    small = served / "small"
    shutil.copytree(tiny, small)
    (small / "unet" / "diffusion_pytorch_model.safetensors").rename(small / HALF)
    (small / HALF).write_text("half as large")
    clip = served / "clip"
    for root, names in ((tiny, DECOYS), (clip, {*CLIP_FILES, "tokenizer.json", "model.safetensors"})):
        for name in names:
            (root / name).parent.mkdir(exist_ok=True, parents=True)
            (root / name).write_text(name)  # no equal contents: these would be fetched only once
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    main, v1 = COMMITS.values()
    server.folders = {"tiny/editor": {main: tiny, v1: small}, CLIP: {main: clip}, GATED: {main: tiny},
                      "single/file": {main: clip}}
    server.asked, server.closing = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def ask(server, home: Path, *calls: tuple, **environment) -> list[tuple[str, str]]:
    """fetch_weights(name), or find_tokenizer(checkpoint, name), in a process -> [(folder, complaint)].

    server: None stands for a server that is down. home: the folder of the cache. A minute of retries fails.
    """
    if server:
        server.asked.clear()
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    port = server.server_port if server else 9  # the discard port: nothing listens there
    mine |= {"HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{port}", "NO_PROXY": "127.0.0.1",
             "PYTHONPATH": os.pathsep.join([str(HUB), os.environ.get("PYTHONPATH", "")])}
    calls = json.dumps([(*call, None)[:2] for call in calls])
    done = subprocess.run([sys.executable, "-c", CLIENT], input=calls, env=mine | environment,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert all("\n" not in complaint for _, complaint in answers)
    return answers


def files_below(folder: str | Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def fetched(server) -> list[str]:
    return sorted(file for command, _, file in server.asked if command == "GET" and file)


def test_fetches_what_is_needed_once_then_uses_the_cache(server, tmp_path):
    calls = ("tiny/editor",), ("tiny/editor@v1",), (f"tiny/editor@{COMMITS['v1']}",)
    answers = ask(server, tmp_path, *calls)
    (folder, _), (tagged, _), (by_commit, _) = answers
    assert fetched(server) == sorted(TINY_FILES | {HALF})
    assert {file for _, _, file in server.asked} == TINY_FILES | {HALF, ""}
    assert files_below(folder) == TINY_FILES
    assert files_below(tagged) == TINY_FILES - {"unet/diffusion_pytorch_model.safetensors"} | {HALF}
    assert by_commit == tagged
    source = server.folders["tiny/editor"][COMMITS["main"]]
    assert all((source / name).read_bytes() == (Path(folder) / name).read_bytes() for name in TINY_FILES)
    load_model(folder)

    assert ask(None, tmp_path, *calls) == answers
    assert ask(server, tmp_path, *calls, HF_HUB_OFFLINE="1") == answers
    assert server.asked == []

    link = Path(folder) / "unet" / "diffusion_pytorch_model.safetensors"
    link.resolve().unlink()  # as after a power failure during the download
    link.unlink()
    [(_, complaint)] = ask(server, tmp_path, ("tiny/editor",), HF_HUB_OFFLINE="1")
    assert "lacks files of the model" in complaint
    assert ask(server, tmp_path, ("tiny/editor",)) == [[folder, ""]]
    assert fetched(server) == ["unet/diffusion_pytorch_model.safetensors"]


def test_a_name_from_a_file_is_read_from_the_cache_only(server, tmp_path):
    """Whatever the cache lacks: nobody is asked, and there is one line. So too if the model has changed."""
    main, names = "tiny/editor", ("tiny/editor", "tiny/editor@v1", f"tiny/editor@{COMMITS['v1']}")
    empty = tmp_path / "hub" / "models--tiny--editor"
    tokenizer = str(tmp_path / "a.ckpt")

    def ask_nobody(*calls):
        answers = ask(server, tmp_path, *calls, CACHE_ONLY=" ".join(names))
        assert server.asked == []
        lacks = f"{calls[-1][0]}, and the Hub's cache lacks files of the model; name it again with its flag"
        return [folder or (lacks in complaint and "lacks") for folder, complaint in answers]

    assert ask_nobody((main,)) == ["lacks"]
    empty.mkdir(parents=True)
    for call in [*((name,) for name in names), (main, tokenizer)]:
        assert ask_nobody(call) == ["lacks"]
    assert ask(server, tmp_path, (main, tokenizer))[0][0]  # the user's own command fetches only the tokenizer
    assert ask_nobody((main,)) == ["lacks"] and ask_nobody((main, tokenizer)) != ["lacks"]
    [(folder, _)] = ask(server, tmp_path, (main,))
    for name in names[1:]:
        assert ask_nobody((name,)) == ["lacks"]
    assert ask_nobody((main,)) == [folder]
    folders = server.folders[main]
    COMMITS["main"], folders[40 * "c"] = 40 * "c", folders[COMMITS["v1"]]
    try:
        assert ask_nobody((main,)) == [folder]
    finally:
        COMMITS["main"] = 40 * "a"
        del folders[40 * "c"]
    needed = ["model_index.json", *(name for name in sorted(TINY_FILES) if "model.safetensors" in name)]
    for name in needed:  # as after a download that was stopped
        path = Path(folder) / name
        path.rename(tmp_path / "away")
        assert ask_nobody((main,)) == ["lacks"], name
        (tmp_path / "away").rename(path)
    assert ask_nobody((main,)) == [folder]


REFUSED = {
    "weights/nope": "has no such model; for a private one `hf auth login`",
    "private/model": "has no such model; for a private one `hf auth login`",
    GATED: "terms must be accepted",
    BROKEN: "500 Internal Server Error",
    SILENT: "neither in the Hub's cache nor can it be fetched (ReadTimeout",
    "portal/login-page": "neither in the Hub's cache nor can it be fetched",
    "tiny/editor@v2": "no such revision",
    "single/file": "no diffusers model",
    "../nope": "would be owner/name",
    "/tmp/a/nope": "would be owner/name",
    "nope.safetensors": "would be owner/name",
    "no--such/name": "'no--such/name'",
}


def test_complaints_name_the_model_and_the_remedy(server, tmp_path):
    for name, (folder, complaint) in zip(REFUSED, ask(server, tmp_path, *((name,) for name in REFUSED))):
        assert folder == "" and REFUSED[name] in complaint
        start = f"{name} on the Hub" if name == "single/file" else f"there is no file or folder {name}, and "
        assert complaint.startswith(start)
        assert ("HF_TOKEN" in complaint) == (name in ("weights/nope", "private/model", GATED))
    assert fetched(server) == []
    assert server.asked.count(("GET", BROKEN, "")) == 1  # one request, no retries


def test_out_of_reach_and_not_cached(server, tmp_path):
    [(_, down)] = ask(None, tmp_path, ("tiny/editor",))
    assert "neither in the Hub's cache nor can it be fetched (ConnectError" in down
    offline = ask(server, tmp_path, ("tiny/editor",), (None, "a/model.ckpt"), HF_HUB_OFFLINE="1")
    assert all("unset HF_HUB_OFFLINE to download" in complaint for _, complaint in offline)
    assert server.asked == []
    fetch = f"model.ckpt comes without a tokenizer: put vocab.json and merges.txt of {CLIP} beside it"
    assert offline[1][1].startswith(fetch)


def test_tokenizer_of_a_single_file(server, tmp_path):
    checkpoint = tmp_path / "model.safetensors"
    theirs = server.folders["tiny/editor"][COMMITS["main"]] / "tokenizer"
    assert find_tokenizer(checkpoint, str(theirs)) == theirs
    assert find_tokenizer(checkpoint, str(theirs.parent)) == theirs

    home = tmp_path / "home"
    names = (None, "tiny/editor", "private/model", str(tmp_path / "gone"))
    (clip, _), (tiny, _), (_, complaint), (_, gone) = ask(
        server, home, *((name, str(checkpoint)) for name in names))
    tiny_files = {"tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json"}
    assert files_below(clip) == CLIP_FILES and fetched(server) == sorted(CLIP_FILES | tiny_files)
    assert load_tokenizer(tiny)(["a boat"]).tolist() == load_tokenizer(theirs)(["a boat"]).tolist()
    assert complaint.startswith("there is no file or folder private/model, and the Hub has no such model")
    assert gone.startswith(f"there is no file or folder {tmp_path / 'gone'}")
    assert ask(None, home, (None, str(checkpoint))) == [[clip, ""]]

    with pytest.raises(ValueError, match="home holds no tokenizer"):
        find_tokenizer(checkpoint, str(home))
    with pytest.raises(ValueError, match="vocab.json holds no tokenizer"):
        find_tokenizer(checkpoint, str(theirs / "vocab.json"))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").touch()
    assert find_tokenizer(checkpoint, None) == tmp_path / "tokenizer"
    (tmp_path / "vocab.json").touch()  # without merges.txt, it is no tokenizer
    assert find_tokenizer(checkpoint, None) == tmp_path / "tokenizer"
    (tmp_path / "merges.txt").touch()
    assert find_tokenizer(checkpoint, None) == tmp_path


def test_tokenizer_json_only_in_place_of_the_older_files():
    assert set(tokenizer_files([*CLIP_FILES, "tokenizer.json", "config.json"])) == CLIP_FILES
    names = ["tokenizer.json", "tokenizer_config.json"]
    assert tokenizer_files(names) == names
    assert tokenizer_files(["merges.txt", "tokenizer_config.json", "text/vocab.json"]) == []


STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.mark.parametrize("network", STEMS)
def test_one_set_of_weights_per_network(network):
    stem = f"{network}/{STEMS[network]}"
    sets = [
        {f"{stem}.safetensors"},
        {f"{stem}.safetensors.index.json", f"{stem}-00001-of-00002.safetensors",
         f"{stem}-00002-of-00002.safetensors"},
        {f"{stem}.fp16.safetensors"},
        {f"{stem}.safetensors.index.fp16.json", f"{stem}.fp16-00001-of-00002.safetensors",
         f"{stem}-00002-of-00002.fp16.safetensors"},  # both spellings occur
        {f"{network}/{'pytorch_model' if network == 'text_encoder' else STEMS[network]}.bin"},
        {f"{stem}.bin.index.json", f"{stem}-00001-of-00002.bin", f"{stem}-00002-of-00002.bin"},
        {f"{stem}.fp16.bin"},
    ]
    others = (TINY_FILES | DECOYS).difference(*sets)
    for first in range(len(sets)):
        names = sorted(others.union(*sets[first:]))
        assert set(needed_files(names)) == TINY_FILES - sets[0] | sets[first]
    assert needed_files(sorted(others)) == []  # no weights
    assert needed_files(sorted(TINY_FILES - {"model_index.json"})) == []
