"""Tensor files: reading files of other programs, one-line errors for broken files, writing by tensor."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nanoip2p.checkpoint import tensors
from nanoip2p.checkpoint.folder import StoredNetwork
from nanoip2p.checkpoint.tensors import (
    cast,
    check_tensors,
    read_metadata,
    read_tensors,
    read_weights,
    write_tensors,
)

TENSORS = {
    "bytes": torch.arange(3, dtype=torch.uint8), "yes": torch.tensor([True, False, True]),
    "half": torch.arange(5).half(), "brain": torch.arange(5).bfloat16(), "number": torch.tensor(7.5),
    "whole": torch.arange(3), "wide": torch.randn(2, 3, dtype=torch.float64), "none": torch.zeros(0, 4),
    "turned": torch.arange(6.0).view(2, 3).T,
}


def same(a, b):
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def test_the_library_reads_what_we_write(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(TENSORS, path, metadata={"who": "we"})
    assert same(load_file(path), TENSORS) and same(read_tensors(path), TENSORS)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    for name, entry in json.loads(content[8:8 + length]).items():
        if name != "__metadata__":  # readers map the file, so each offset is a multiple of the item size
            assert (8 + length + entry["data_offsets"][0]) % TENSORS[name].itemsize == 0
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "we"} == read_metadata(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_only_floating_point_is_converted(dtype, tmp_path):
    write_tensors(TENSORS, tmp_path / "x.safetensors", dtype)
    expected = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor
                for name, tensor in TENSORS.items()}
    assert same(load_file(tmp_path / "x.safetensors"), expected)


def test_what_is_read_can_be_written_over(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors({"a": torch.ones(1000)}, path)
    tensors = read_tensors(path)
    write_tensors({"a": 2 * tensors["a"]}, path)
    assert tensors["a"].sum() == 1000 and read_tensors(path)["a"].sum() == 2000
    tensors["a"].zero_()  # changes our copy, not the file
    assert read_tensors(path)["a"].sum() == 2000


@pytest.mark.parametrize("names", [
    ["model.safetensors"], ["model.fp16.safetensors"], ["model.bin"], ["pytorch_model.bin"],
    ["pytorch_model.fp16.bin"],
    ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
    ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors",
     "model.safetensors.index.fp16.json"],
    ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"],
    ["diffusion_pytorch_model-00001-of-00002.bin", "diffusion_pytorch_model-00002-of-00002.bin",
     "diffusion_pytorch_model.bin.index.json"],
])
def test_weights_are_found_in_every_form(names, tmp_path):
    tensors = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    if names[-1].endswith(".json"):
        for file, key in zip(names, tensors):
            save = torch.save if file.endswith(".bin") else save_file
            save({key: tensors[key]}, tmp_path / file)
        index = {"metadata": {}, "weight_map": dict(zip(tensors, names))}
        (tmp_path / names[-1]).write_text(json.dumps(index))
    elif names[0].endswith(".bin"):
        torch.save(tensors, tmp_path / names[0])
    else:
        save_file(tensors, tmp_path / names[0])
    assert same(read_weights(tmp_path), tensors)


def test_full_precision_goes_before_half(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.fp16.safetensors")
    assert read_weights(tmp_path)["a"] == 1


def test_a_missing_shard_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ValueError, match="model-1.safetensors is missing"):
        read_weights(tmp_path)


def test_an_index_names_files_of_its_own_folder_only(tmp_path):
    folder = tmp_path / "unet"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(ValueError, match="unet/other.safetensors is missing"):
        read_weights(folder)


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWO = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
DOUBLED = b'{"a": %s, "a": %s}' % (json.dumps(ONE).encode(), json.dumps(TWO).encode())
BROKEN = {
    "overlapping offsets": ({"a": ONE, "b": ONE}, 16),
    "a hole": ({"a": ONE, "b": TWO | {"data_offsets": [12, 20]}}, 20),
    "beyond the end": ({"a": ONE, "b": TWO}, 12),
    "bytes left over": ({"a": ONE, "b": TWO}, 20),
    "no such dtype": ({"a": ONE | {"dtype": "FLOAT"}}, 8),
    "shape and size differ": ({"a": ONE | {"shape": [3]}}, 8),
    "doubled key": (DOUBLED, 16),
    "no JSON": (b"{'a': 1}", 0),
    "a list": (b"[]", 0),
}


def raw(header, size, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(size)


@pytest.mark.parametrize("content", [
    *(raw(*broken) for broken in BROKEN.values()), raw({"a": ONE}, 8, length=10**6), raw({"a": ONE}, 8)[:30],
    raw(b"{}", 0, length=2**63), b"", b"abc", b"Once upon a time there was a text file.\n" * 100,
], ids=[*BROKEN, "length beyond the file", "cut header", "giant header", "empty", "three bytes", "text"])
def test_broken_files_are_one_line(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or no safetensors file") as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_what_does_not_fit_a_network_is_named(tmp_path):
    expected = {f"layer.{i}": torch.zeros(2) for i in range(5)}
    good = {name: torch.ones(2) for name in expected} | {"layer.3": torch.tensor([3e38, 3e38])}
    check_tensors(good, expected, tmp_path)
    for change, message in [
        ({}, "lacks layer.0, layer.1, layer.2 and 2 more"), (good | {"new": torch.ones(1)}, "unknown new"),
        (good | {"layer.1": torch.ones(3)}, r"layer.1 of \(3,\) for \(2,\)"),
        (good | {"layer.1": torch.tensor([1.0, float("nan")])}, "NaN or infinity in layer.1"),
        (good | {"layer.1": torch.tensor([-float("inf"), float("inf")])}, "NaN or infinity in layer.1"),
        (good | {"layer.1": torch.ones(2).int()}, "floating-point numbers .* in layer.1"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_tensors(change, expected, tmp_path)


def test_disk_full_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    write_tensors({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    monkeypatch.setattr("nanoip2p.checkpoint.tensors.cast", full)
    with pytest.raises(OSError, match="No space"):
        write_tensors({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "x.safetensors")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert read_tensors(tmp_path / "x.safetensors")["a"].sum() == 2


def test_one_bad_number_in_a_large_tensor_is_seen(tmp_path):
    expected, tensor = {"a": torch.zeros(2**21 + 5)}, torch.zeros(2**21 + 5)
    check_tensors({"a": tensor}, expected, tmp_path)
    for place in (0, 2**20 + 1, -1):
        bad = tensor.clone()
        bad[place] = torch.nan
        with pytest.raises(ValueError, match="NaN or infinity in a"):
            check_tensors({"a": bad}, expected, tmp_path)


def test_numbers_too_large_for_half_precision_are_refused(tmp_path):
    for value in (65504.0, -7e4):
        tensors = {"a": torch.ones(3), "b": torch.tensor([value])}
        if abs(value) < 65505:
            write_tensors(tensors, tmp_path / "fits.safetensors", torch.float16)
        else:
            with pytest.raises(ValueError, match="b holds numbers beyond the range of fp16"):
                write_tensors(tensors, tmp_path / "not.safetensors", torch.float16)
            write_tensors(tensors, tmp_path / "brain.safetensors", torch.bfloat16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["brain.safetensors", "fits.safetensors"]


FLOATS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGE = {"fp64": [torch.finfo(torch.float64).max, -1e300], "fp32": [torch.finfo(torch.float32).max, -3.4e38],
         "bf16": [torch.finfo(torch.bfloat16).max, -1e38], "fp16": [65504.0, -1.0]}


@pytest.mark.parametrize("begin", FLOATS)
@pytest.mark.parametrize("end", FLOATS)
@pytest.mark.parametrize("known", FLOATS)
def test_no_cast_makes_a_number_infinite(begin, end, known):
    """Numbers of every dtype that `begin` holds, to `end`."""
    for number in LARGE[known]:
        tensor = torch.tensor([1.0, number], dtype=torch.float64).to(FLOATS[begin])
        if not tensor.isfinite().all():
            continue
        if tensor.to(FLOATS[end]).isfinite().all():
            assert torch.equal(cast(tensor, FLOATS[end], "a"), tensor.to(FLOATS[end]))
            continue
        with pytest.raises(ValueError, match=f"^a holds numbers beyond the range of {end}") as error:
            cast(tensor, FLOATS[end], "a")
        for other in str(error.value).partition("; use ")[2].split(" or "):  # the advice helps
            assert not other or cast(tensor, FLOATS[other], "a").isfinite().all()


def test_a_cast_that_cannot_overflow_reads_no_number_twice(monkeypatch):
    def read(_):
        raise AssertionError

    monkeypatch.setattr(tensors, "_is_finite", read)
    pairs = ("fp16", "fp32"), ("fp16", "bf16"), ("bf16", "fp32"), ("fp32", "fp64"), ("fp32", "fp32")
    for begin, end in pairs:
        assert cast(torch.ones(2, dtype=FLOATS[begin]), FLOATS[end], "a").dtype == FLOATS[end]
    assert cast(torch.ones(2, dtype=torch.int64), torch.int64, "a").dtype == torch.int64


@pytest.mark.parametrize("number, dtype", [
    (1e300, "fp32"), (-1e39, "fp32"), (1e300, "bf16"), (3.4e38, "bf16"), (1e300, "fp16"), (7e4, "fp16")])
def test_a_network_with_numbers_too_large_is_refused(number, dtype, tmp_path):
    weight = torch.full((1, 1), number, dtype=torch.float64)
    model = torch.nn.Linear(1, 1, bias=False, device="meta")
    stored = StoredNetwork(model, lambda: {"weight": weight}, tmp_path)
    with pytest.raises(ValueError, match=f"^weight holds numbers beyond the range of {dtype}"):
        stored.load(FLOATS[dtype])
    assert stored.load(None).weight.item() == number


def test_a_safetensors_file_by_another_name_and_a_broken_index(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.ckpt")
    assert read_tensors(tmp_path / "model.ckpt")["a"] == 1
    for content in ("[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": ["x"]}}'):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match="index.json"):
            read_weights(tmp_path)
