"""The cache of latents: its rows, continuing after an interruption, and the caches that it refuses."""

import errno
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comparing import relative_error
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from train_runs import write_pairs

from nanoip2p.checkpoint.load import load_model
from nanoip2p.dataset.layouts import Pair, load_picture
from nanoip2p.dataset.rendered import scene_pairs
from nanoip2p.images import to_tensor
from nanoip2p.training import cache as module
from nanoip2p.training.cache import Cache

HALF = 2e-3  # relative: float16 has 11 bits, so this leaves room for sums in another order


@pytest.fixture(scope="module")
def model(start):
    """No test changes it."""
    return load_model(start)


def filled(folder, pairs, model, resolution=32, flips=True, skip_bad=False, rank=0, ranks=1):
    """A cache with the files of one rank."""
    cache = Cache(folder, pairs, model, resolution, flips, skip_bad)
    cache.fill(model, rank, ranks)
    return cache


def opened(*about, **settings):
    return filled(*about, **settings).open()


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def whole_cache(model, tmp_path_factory):
    """Pairs and the folder of their cache. No test changes them. In this module, files have up to 4 rows."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARD", 4)
        filled(root / "cache", pairs := write_pairs(root), model)
        yield pairs, root / "cache"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_line(match, work):
    with pytest.raises(ValueError, match=match) as error:
        work()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_rows_are_the_encodings_of_each_picture_and_its_mirror_image(model, pairs, tmp_path):
    cache = opened(tmp_path / "cache", pairs, model)
    vae, text_encoder, tokenizer = model.vae, model.text_encoder, model.tokenizer
    with torch.no_grad():
        assert relative_error(cache.row(""), text_encoder(tokenizer([""]))[0]) < HALF
        for pair in pairs:
            for flip in (False, True):
                *moments, text = cache.get(pair, flip)
                assert {tensor.dtype for tensor in (*moments, text)} == {torch.float32}
                assert relative_error(text, text_encoder(tokenizer([pair.edit]))[0]) < HALF
                for ours, picture in zip(moments, (pair.before, pair.after)):
                    image = to_tensor(load_picture(picture, 32, flip))
                    assert relative_error(ours, torch.cat(vae.encode(image[None]), 1)[0]) < HALF


def test_each_picture_and_text_has_one_row_in_order_of_first_appearance(model, pairs, tmp_path):
    pairs = pairs + pairs[:3]
    cache = opened(tmp_path / "cache", pairs, model, flips=False)
    shards = {path.stem: load_file(path) for path in sorted((tmp_path / "cache").glob("*.safetensors"))}
    texts = torch.cat([shard["texts"] for name, shard in shards.items() if name.startswith("texts")])
    moments = torch.cat([shard["moments"] for name, shard in shards.items() if name.startswith("pictures")])
    pictures = list(dict.fromkeys(picture for pair in pairs for picture in (pair.before, pair.after)))
    assert texts.shape == (1 + len({pair.edit for pair in pairs}), 77, 32) and texts.dtype == torch.float16
    assert moments.shape == (len(pictures), 1, 8, 8, 8) and moments.dtype == torch.float16
    assert all(len(*shard.values()) <= 4 for shard in shards.values()) and "pictures-00002" in shards
    assert torch.equal(cache.row(""), texts[0].float())
    assert torch.equal(cache.get(pairs[9], False)[1], moments[pictures.index(pairs[9].after), 0].float())


def test_killed_and_started_again_it_is_the_same_and_encodes_only_what_was_missing(
        model, pairs, tmp_path, monkeypatch):
    opened(tmp_path / "whole", pairs, model)
    whole, replace_file, left = files(tmp_path / "whole"), os.replace, iter(range(5))

    def replace(*paths):
        if next(left, None) is None:
            os._exit(9)                                         # without clean-up, like a kill
        replace_file(*paths)

    child = os.fork()
    if child == 0:
        os.replace = replace
        filled(tmp_path / "cache", pairs, model)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    there = {name for name in files(tmp_path / "cache") if not name.startswith(".")}
    assert len(there) == 5 and "pictures-00000.safetensors" in there

    encode, encoded = model.vae.encode, []
    monkeypatch.setattr(model.vae, "encode", lambda x: encoded.append(len(x)) or encode(x))
    bars, tqdm = [], module.tqdm
    monkeypatch.setattr(module, "tqdm", lambda **about: bars.append(about) or tqdm(**about))
    filled(tmp_path / "cache", pairs, model)
    result = {name: content for name, content in files(tmp_path / "cache").items() if name[0] != "."}
    assert result == whole
    rows = sum(len(*load_file(tmp_path / "whole" / name).values()) for name in whole.keys() - there)
    pictures = sum(len(load_file(tmp_path / "whole" / name)["moments"])
                   for name in whole.keys() - there if name.startswith("pictures"))
    assert sum(encoded) == 2 * pictures > 0 and bars[0]["total"] == rows
    encoded.clear()
    filled(tmp_path / "cache", pairs, model)
    assert not encoded


def test_ctrl_c_keeps_finished_files_and_leaves_nothing_half(model, pairs, tmp_path, monkeypatch):
    encode, calls = model.vae.encode, []

    def interrupted(x):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(x)

    monkeypatch.setattr(model.vae, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "cache", pairs, model)
    there = files(tmp_path / "cache")
    assert "pictures-00000.safetensors" in there and "pictures-00001.safetensors" not in there
    assert not [name for name in there if name.startswith(".")]


def test_the_files_of_two_ranks_are_those_of_one(model, pairs, tmp_path):
    filled(tmp_path / "one", pairs, model)
    one_line("is missing", lambda: opened(tmp_path / "two", pairs, model, rank=1, ranks=2))
    second = files(tmp_path / "two")
    opened(tmp_path / "two", pairs, model, rank=0, ranks=2)
    whole = files(tmp_path / "one")
    assert files(tmp_path / "two") == whole
    assert abs((len(second) - 1) - (len(whole) - 1) / 2) < 1


def changed(name, model, pairs):
    """The arguments of a cache after one thing has changed."""
    resolution, flips = 32, True
    with torch.no_grad():
        if name == "autoencoder":
            model.vae.quant_conv.bias[-1] += 1e-3
        elif name == "text encoder":
            model.text_encoder.text_model.final_layer_norm.weight[0] += 1e-3
        elif name == "tokenizer":
            model.tokenizer.pad += 1
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
    return pairs, model, resolution, flips


@pytest.mark.parametrize("name, message", [
    ("autoencoder", "autoencoder"), ("text encoder", "text encoder"), ("tokenizer", "text encoder"),
    ("file", "dataset"), ("pairs", "dataset"), ("text", "dataset"), ("resolution", "resolution = 32, not 16"),
    ("flips", "flips = True, not False")])
def test_a_cache_of_something_else_is_refused_and_says_what(start, pairs, tmp_path, name, message):
    folder, model = tmp_path / "cache", load_model(start)
    Cache(folder, pairs, model, 32, True)
    (folder / "texts-00000.safetensors").touch()
    before, other = files(folder), changed(name, model, pairs)
    error = one_line(message, lambda: Cache(folder, *other))
    assert str(folder) in error and "--cache" in error
    assert files(folder) == before


@pytest.mark.parametrize("edit, refused", [("swap it’s colours &amp; sky", True), ("swap colours", False)])
def test_a_cache_of_texts_as_they_were_typed_is_refused_where_cleaning_changes_them(
        model, pairs, tmp_path, edit, refused):
    """Old versions cached texts without cleaning. Such a cache stays valid if cleaning changes no text."""
    pairs = [*pairs[:-1], replace(pairs[-1], edit=edit)]
    model.tokenizer.clean, clean = str, model.tokenizer.clean
    Cache(tmp_path / "cache", pairs, model, 32, True)
    model.tokenizer.clean = clean
    if refused:
        one_line("dataset", lambda: Cache(tmp_path / "cache", pairs, model, 32, True))
    else:
        Cache(tmp_path / "cache", pairs, model, 32, True)


def test_a_folder_of_other_things_is_refused(model, pairs, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.doc").write_text("all")
    one_line("thesis.doc", lambda: filled(tmp_path / "cache", pairs, model))
    assert files(tmp_path / "cache") == {"thesis.doc": b"all"}
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        filled(tmp_path / "file", pairs, model)


@pytest.mark.parametrize("breakage", [
    lambda content: content[:-100], lambda content: b"", lambda content: b"\0" * len(content),
    lambda content: content.replace(b'"moments"', b'"momentS"')])
def test_a_damaged_file_is_named_with_a_remedy_that_works(model, whole_cache, tmp_path, breakage):
    pairs, folder = whole_cache[0], shutil.copytree(whole_cache[1], tmp_path / "cache")
    shard, whole = folder / "pictures-00001.safetensors", files(folder)
    shard.write_bytes(breakage(shard.read_bytes()))
    assert shard.read_bytes() != whole[shard.name]
    one_line(f"{shard} is damaged.*delete that file and run again", lambda: opened(folder, pairs, model))
    shard.unlink()
    one_line(f"{shard} is missing", lambda: Cache(folder, pairs, model, 32, True).open())
    opened(folder, pairs, model)
    assert files(folder) == whole


@pytest.mark.parametrize("change", [
    lambda rows: rows.float(), lambda rows: rows[1:], lambda rows: rows[..., 1:], lambda rows: rows[:, None],
    lambda rows: torch.cat([rows, rows])])
@pytest.mark.parametrize("name", ["texts-00000", "pictures-00001"])
def test_stored_rows_of_another_shape_or_dtype_are_named(model, whole_cache, tmp_path, name, change):
    pairs, folder = whole_cache[0], shutil.copytree(whole_cache[1], tmp_path / "cache")
    path = folder / f"{name}.safetensors"
    (key, rows), = load_file(path).items()
    save_file({key: change(rows).contiguous()}, path)
    one_line(f"{path} is damaged .*delete that file", lambda: opened(folder, pairs, model))


def test_an_infinite_row_is_no_row(model, whole_cache, tmp_path):
    pairs, folder = whole_cache[0], shutil.copytree(whole_cache[1], tmp_path / "cache")
    path = folder / "texts-00000.safetensors"
    save_file({"texts": load_file(path)["texts"].fill_(torch.inf)}, path)
    one_line("was broken", lambda: opened(folder, pairs, model).row(""))


def test_broken_pictures_are_named_or_left_out(model, pairs, tmp_path):
    folder, bad = tmp_path / "cache", pairs[-1].before
    bad.write_bytes(b"no picture")
    message = one_line("--skip-bad", lambda: filled(folder, pairs, model))
    assert str(bad) in message and "pictures-00000.safetensors" in files(folder)
    cache = opened(folder, pairs, model, skip_bad=True)
    for pair in pairs[:-1]:
        assert all(tensor.isfinite().all() for tensor in cache.get(pair, True))
    one_line(str(bad), lambda: cache.get(pairs[-1], False))
    one_line(str(bad), lambda: cache.get(Pair(pairs[0].before, "", bad), False))
    assert sum(row.isnan().all() for path in folder.glob("p*") for row in load_file(path)["moments"]) == 1


def test_numbers_beyond_float16_are_an_error(start, pairs, tmp_path):
    model = load_model(start)
    with torch.no_grad():
        model.vae.quant_conv.bias[0] = 7e4
    one_line("float16", lambda: filled(tmp_path / "cache", pairs, model, skip_bad=True))
    assert not [name for name in files(tmp_path / "cache") if name.startswith("pictures")]


def test_finished_files_stay_when_the_disk_is_full(model, pairs, tmp_path, monkeypatch):
    folder, plain = tmp_path / "cache", module.write_tensors

    def full(tensors, path, **about):
        if path.name == "pictures-00001.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(tensors, path, **about)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_tensors", full)
        with pytest.raises(OSError, match="No space left"):
            filled(folder, pairs, model)
    assert "pictures-00000.safetensors" in files(folder)
    opened(folder, pairs, model)


def test_networks_in_bfloat16_are_used_as_they_are(start, pairs, tmp_path):
    model, rows = load_model(start), []
    for name, dtype in (("a", torch.float32), ("b", torch.bfloat16)):
        model.vae.to(dtype)
        model.text_encoder.to(dtype)
        rows.append(opened(tmp_path / name, pairs, model).get(pairs[0], True))
    for a, b in zip(*rows):
        assert 1e-4 < relative_error(b, a) < 0.1


class Visits(Dataset):
    def __init__(self, cache: Cache, pairs: list[Pair]):
        self.cache, self.pairs = cache, pairs

    def __len__(self):
        return 2 * len(self.pairs)

    def __getitem__(self, i):
        return self.cache.get(self.pairs[i // 2], bool(i % 2))


@pytest.mark.parametrize("how, count", [("fork", 2), ("spawn", 1)])  # a spawned one takes seconds to start
def test_workers_read_the_same_rows(model, pairs, tmp_path, how, count):
    visits = Visits(opened(tmp_path / "cache", pairs, model), pairs)
    visits.cache.get(pairs[0], False)  # the file is mapped before the workers start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks in general
        batches = list(DataLoader(visits, 4, num_workers=count, multiprocessing_context=how))
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


def test_only_the_rows_asked_for_are_read(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 256)
    pairs = scene_pairs(60)
    cache = opened(tmp_path / "cache", pairs, model, resolution=128)
    path = tmp_path / "cache" / "pictures-00000.safetensors"
    size = path.stat().st_size / 1024
    assert size > 2000 and resident(path) <= size / 4  # the kernel maps a few pages in advance
    cache.get(pairs[16], True)
    assert 0 < resident(path) < size / 2
    with torch.no_grad():  # a picture of the second batch
        reference = torch.cat(model.vae.encode(to_tensor(load_picture(pairs[-1].after, 128))[None]), 1)[0]
    assert relative_error(cache.get(pairs[-1], False)[1], reference) < HALF
    for pair in pairs:  # `resident` counts the whole file once all rows are read
        cache.get(pair, False), cache.get(pair, True)
    assert resident(path) > 0.9 * size
