"""The store of latents: what it holds, that it goes on after any end, and what it refuses."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comparing import relative_error
from PIL import Image
from safetensors.torch import load_file
from tiny_editor import write_tiny_editor
from torch.utils.data import DataLoader, Dataset

from nanoip2p.checkpoint.load import load_model
from nanoip2p.dataset.layouts import Pair, load_picture
from nanoip2p.dataset.rendered import scene_pairs
from nanoip2p.images import to_tensor
from nanoip2p.training import cache as module
from nanoip2p.training.cache import Stored, open_stored, store

HALF = 2e-3  # relative: float16 has 11 bits, so this leaves room for sums in another order


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_editor(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def networks(tiny):
    parts = load_model(tiny)
    return parts.vae, parts.text_encoder, parts.tokenizer


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """10 pairs of 12 or more pictures: scenes, and files of an odd size, in shards of 4."""
    monkeypatch.setattr(module, "SHARD", 4)
    for i in range(2):
        noise = torch.randint(256, (41, 57, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(noise.numpy()).save(tmp_path / f"{i}.png")
    return [*scene_pairs(9), Pair(tmp_path / "0.png", "swap the colours", tmp_path / "1.png")]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_line(match, work):
    with pytest.raises(ValueError, match=match) as error:
        work()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_rows_are_what_the_networks_say_of_each_picture_and_its_mirror_image(networks, pairs, tmp_path):
    store(tmp_path / "cache", pairs, *networks, 32, flips=True)
    opened = open_stored(tmp_path / "cache", pairs, *networks, 32, flips=True)
    vae, text_encoder, tokenizer = networks
    assert not opened.broken
    with torch.no_grad():
        assert relative_error(opened._row(""), text_encoder(tokenizer([""]))[0]) < HALF
        for pair in pairs:
            for flip in (False, True):
                *moments, text = opened.get(pair, flip)
                assert {tensor.dtype for tensor in (*moments, text)} == {torch.float32}
                assert relative_error(text, text_encoder(tokenizer([pair.edit]))[0]) < HALF
                for ours, picture in zip(moments, (pair.before, pair.after)):
                    image = to_tensor(load_picture(picture, 32, flip))
                    assert relative_error(ours, torch.cat(vae.encode(image[None]), 1)[0]) < HALF


def test_each_picture_and_text_has_one_row_in_order_of_first_appearance(networks, pairs, tmp_path):
    pairs = pairs + pairs[:3]
    store(tmp_path / "cache", pairs, *networks, 32, flips=False)
    shards = {path.stem: load_file(path) for path in sorted((tmp_path / "cache").glob("*.safetensors"))}
    texts = torch.cat([shard["texts"] for name, shard in shards.items() if name.startswith("texts")])
    moments = torch.cat([shard["moments"] for name, shard in shards.items() if name.startswith("pictures")])
    pictures = list(dict.fromkeys(picture for pair in pairs for picture in (pair.before, pair.after)))
    assert texts.shape == (1 + len({pair.edit for pair in pairs}), 77, 32) and texts.dtype == torch.float16
    assert moments.shape == (len(pictures), 1, 8, 8, 8) and moments.dtype == torch.float16
    assert all(len(*shard.values()) <= 4 for shard in shards.values()) and "pictures-00002" in shards
    opened = open_stored(tmp_path / "cache", pairs, *networks, 32, flips=False)
    assert torch.equal(opened._row(""), texts[0].float())
    assert torch.equal(opened.get(pairs[9], False)[1], moments[pictures.index(pairs[9].after), 0].float())


KILLED = """
import os, pickle, signal, sys
sys.path[:0] = sys.argv[4:]
from nanoip2p.training import cache as stored
from nanoip2p.checkpoint.load import load_model
stored.SHARD, left, plain = 4, int(sys.argv[3]), os.replace
def replace(*paths):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(*paths)
os.replace = replace
parts = load_model(sys.argv[1])
folder, pairs = pickle.loads(bytes.fromhex(sys.argv[2]))
stored.store(folder, pairs, parts.vae, parts.text_encoder, parts.tokenizer, 32, True)
"""


def test_killed_and_started_again_it_is_the_same_and_encodes_only_what_was_missing(
        tiny, networks, pairs, tmp_path, monkeypatch):
    store(tmp_path / "whole", pairs, *networks, 32, flips=True)
    whole = files(tmp_path / "whole")
    words = [tiny, pickle.dumps((tmp_path / "cache", pairs)).hex(), 5, Path(__file__).parents[2]]
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, words)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    there = {name for name in files(tmp_path / "cache") if not name.startswith(".")}
    assert len(there) == 5 and "pictures-00000.safetensors" in there

    encode, encoded = networks[0].encode, []
    monkeypatch.setattr(networks[0], "encode", lambda x: encoded.append(len(x)) or encode(x))
    bars, tqdm = [], module.tqdm
    monkeypatch.setattr(module, "tqdm", lambda **about: bars.append(about) or tqdm(**about))
    store(tmp_path / "cache", pairs, *networks, 32, flips=True)
    result = {name: content for name, content in files(tmp_path / "cache").items() if name[0] != "."}
    assert result == whole
    rows = sum(len(*load_file(tmp_path / "whole" / name).values()) for name in there - {"store.json"})
    pictures = sum(len(load_file(tmp_path / "whole" / name)["moments"])
                   for name in whole.keys() - there if name.startswith("pictures"))
    assert sum(encoded) == 2 * pictures > 0 and bars[0]["initial"] == rows < bars[0]["total"]
    encoded.clear()
    store(tmp_path / "cache", pairs, *networks, 32, flips=True)
    assert not encoded


def test_ctrl_c_keeps_finished_shards_and_leaves_nothing_half(networks, pairs, tmp_path, monkeypatch):
    encode, calls = networks[0].encode, []

    def interrupted(x):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(x)

    monkeypatch.setattr(networks[0], "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "cache", pairs, *networks, 32, flips=True)
    there = files(tmp_path / "cache")
    assert "pictures-00000.safetensors" in there and "pictures-00001.safetensors" not in there
    assert not [name for name in there if name.startswith(".")]


def test_the_shards_of_two_ranks_are_those_of_one(networks, pairs, tmp_path):
    store(tmp_path / "one", pairs, *networks, 32, flips=True)
    store(tmp_path / "two", pairs, *networks, 32, flips=True, rank=1, ranks=2)
    second = files(tmp_path / "two")
    one_line("is missing", lambda: open_stored(tmp_path / "two", pairs, *networks, 32, flips=True))
    store(tmp_path / "two", pairs, *networks, 32, flips=True, rank=0, ranks=2)
    whole = files(tmp_path / "one")
    assert files(tmp_path / "two") == whole
    assert abs((len(second) - 1) - (len(whole) - 1) / 2) < 1


def changed(name, networks, pairs):
    """The arguments of open_stored after one thing has changed."""
    vae, text_encoder, tokenizer = networks
    resolution, flips = 32, True
    with torch.no_grad():
        if name == "autoencoder":
            vae.quant_conv.bias[-1] += 1e-3
        elif name == "text encoder":
            text_encoder.text_model.final_layer_norm.weight[-1] += 1e-3
        elif name == "tokenizer":
            tokenizer.pad += 1
        elif name == "file":
            os.utime(pairs[-1].after, ns=(1, 1))
        elif name == "pairs":
            pairs = pairs[:-1]
        elif name == "text":
            pairs = [*pairs[:-1], replace(pairs[-1], edit="another edit")]
        elif name == "resolution":
            resolution = 16
        elif name == "flips":
            flips = False
    return pairs, vae, text_encoder, tokenizer, resolution, flips


@pytest.mark.parametrize("name, told", [
    ("autoencoder", "another autoencoder;"), ("text encoder", "another text encoder;"),
    ("tokenizer", "another text encoder;"), ("file", "another dataset;"), ("pairs", "another dataset;"),
    ("text", "another dataset;"), ("resolution", r"another transform \(resolution 32, not 16\);"),
    ("flips", r"another transform \(flips True, not False\);")])
def test_a_store_of_something_else_is_refused_and_says_what(networks, pairs, tmp_path, name, told):
    folder = tmp_path / "cache"
    store(folder, pairs, *networks, 32, flips=True)
    before, other = files(folder), changed(name, networks, pairs)
    for work in (store, open_stored):
        message = one_line(told, lambda work=work: work(folder, *other))
        assert str(folder) in message and "--cache" in message
    assert files(folder) == before


def test_a_folder_of_other_things_is_refused(networks, pairs, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.doc").write_text("all")
    one_line("thesis.doc", lambda: store(tmp_path / "cache", pairs, *networks, 32, True))
    assert files(tmp_path / "cache") == {"thesis.doc": b"all"}
    one_line("store.json is missing", lambda: open_stored(tmp_path / "cache", pairs, *networks, 32, True))
    (tmp_path / "file").touch()
    one_line("cannot be written", lambda: store(tmp_path / "file", pairs, *networks, 32, True))


@pytest.mark.parametrize("breakage", [
    lambda content: content[:-100], lambda content: b"", lambda content: b"\0" * len(content),
    lambda content: content.replace(b'"moments"', b'"momentS"'),
    lambda content: content.replace(b"F16", b"I16"),
    lambda content: content.replace(b'"broken"', b'"Broken"')])
def test_a_damaged_shard_is_named_with_a_remedy_that_works(networks, pairs, tmp_path, breakage):
    folder = tmp_path / "cache"
    store(folder, pairs, *networks, 32, True)
    shard, whole = folder / "pictures-00001.safetensors", files(folder)
    shard.write_bytes(breakage(shard.read_bytes()))
    assert shard.read_bytes() != whole[shard.name]
    for work in (store, open_stored):
        one_line(f"{shard} is damaged.*delete that file and run again",
                 lambda work=work: work(folder, pairs, *networks, 32, True))
    shard.unlink()
    one_line(f"{shard} is missing", lambda: open_stored(folder, pairs, *networks, 32, True))
    store(folder, pairs, *networks, 32, True)
    assert files(folder) == whole


def test_a_shard_of_other_rows_is_damaged(networks, pairs, tmp_path):
    store(tmp_path / "a", pairs, *networks, 32, True)
    store(tmp_path / "b", pairs, *networks, 32, False)
    shard = tmp_path / "a" / "pictures-00000.safetensors"
    shard.write_bytes((tmp_path / "b" / shard.name).read_bytes())
    one_line("is damaged", lambda: open_stored(tmp_path / "a", pairs, *networks, 32, True))


@pytest.mark.parametrize("breakage", [Path.unlink, lambda path: path.write_bytes(b"no picture")])
def test_broken_pictures_are_named_or_left_out(networks, pairs, tmp_path, breakage):
    folder, bad = tmp_path / "cache", pairs[-1].before
    breakage(bad)
    message = one_line("--skip-bad", lambda: store(folder, pairs, *networks, 32, True))
    assert str(bad) in message and "pictures-00000.safetensors" in files(folder)
    store(folder, pairs, *networks, 32, True, skip_bad=True)
    opened = open_stored(folder, pairs, *networks, 32, True, skip_bad=True)
    assert list(opened.broken) == [bad] and str(bad) in opened.broken[bad]
    for pair in pairs[:-1]:
        assert all(tensor.isfinite().all() for tensor in opened.get(pair, True))
    one_line(str(bad), lambda: opened.get(pairs[-1], False))
    one_line(str(bad), lambda: opened.get(Pair(pairs[0].before, "", bad), False))
    assert sum(row.isnan().all() for path in folder.glob("p*") for row in load_file(path)["moments"]) == 1
    for work in (store, open_stored):
        assert str(bad) in one_line("without 1 broken",
                                    lambda work=work: work(folder, pairs, *networks, 32, True))


def test_numbers_beyond_float16_are_an_error(networks, pairs, tmp_path):
    with torch.no_grad():
        networks[0].quant_conv.bias[0] = 7e4
    one_line("float16", lambda: store(tmp_path / "cache", pairs, *networks, 32, True, skip_bad=True))
    assert not [name for name in files(tmp_path / "cache") if name.startswith("pictures")]


def test_a_full_disk_is_one_line_and_what_is_there_stays(networks, pairs, tmp_path, monkeypatch):
    folder, plain = tmp_path / "cache", module.write_tensors

    def full(tensors, path, **about):
        if path.name == "pictures-00001.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(tensors, path, **about)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_tensors", full)
        assert str(folder) in one_line("No space left", lambda: store(folder, pairs, *networks, 32, True))
    assert "pictures-00000.safetensors" in files(folder)
    store(folder, pairs, *networks, 32, True)
    open_stored(folder, pairs, *networks, 32, True)


def test_networks_in_bfloat16_are_used_as_they_are(networks, pairs, tmp_path):
    low, rows = [networks[0], networks[1], networks[2]], []
    for name, dtype in (("a", torch.float32), ("b", torch.bfloat16)):
        low[:2] = [network.to(dtype) for network in low[:2]]
        store(tmp_path / name, pairs, *low, 32, True)
        rows.append(open_stored(tmp_path / name, pairs, *low, 32, True).get(pairs[0], True))
    for a, b in zip(*rows):
        assert 1e-4 < relative_error(b, a) < 0.1


class Visits(Dataset):
    def __init__(self, opened: Stored, pairs: list[Pair]):
        self.opened, self.pairs = opened, pairs

    def __len__(self):
        return 2 * len(self.pairs)

    def __getitem__(self, i):
        return self.opened.get(self.pairs[i // 2], bool(i % 2))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_the_same_rows(networks, pairs, tmp_path, start):
    store(tmp_path / "cache", pairs, *networks, 32, True)
    visits = Visits(open_stored(tmp_path / "cache", pairs, *networks, 32, True), pairs)
    visits.opened.get(pairs[0], False)  # so that a mapping is there when workers are made
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks in general
        batches = list(DataLoader(visits, 4, num_workers=2, multiprocessing_context=start))
    for i, columns in enumerate(zip(*[torch.cat(column) for column in zip(*batches)])):
        assert all(torch.equal(a, b) for a, b in zip(columns, visits[i]))


def resident(path):
    """KiB of a mapped file that this process holds in memory, by /proc."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def test_only_the_rows_asked_for_are_read(networks, tmp_path):
    pairs = scene_pairs(32)
    store(tmp_path / "cache", pairs, *networks, 256, True)
    opened = open_stored(tmp_path / "cache", pairs, *networks, 256, True)
    path = tmp_path / "cache" / "pictures-00000.safetensors"
    size = path.stat().st_size / 1024
    assert size > 4000 and resident(path) <= size / 4  # the kernel maps some pages around
    opened.get(pairs[16], True)
    assert 0 < resident(path) < size / 2
    with torch.no_grad():  # of the second batch that was encoded
        reference = torch.cat(networks[0].encode(to_tensor(load_picture(pairs[-1].after, 256))[None]), 1)[0]
    assert relative_error(opened.get(pairs[-1], False)[1], reference) < HALF
    for pair in pairs:  # the measure does see all that is read
        opened.get(pair, False), opened.get(pair, True)
    assert resident(path) > 0.9 * size
