"""Every argument of Editor.edit and TextToImage.generate, with values of every kind."""

import inspect
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_editor import write_tiny_editor, write_tiny_painter

from nanoip2p.editor import Editor
from nanoip2p.pipeline import as_image
from nanoip2p.text_to_image import TextToImage

WHITE = Image.new("L", (16, 16), 255)
PICTURE = Image.new("RGB", (16, 16), "red")
POOL = {
    "a text": "x", "a number as text": "2", "bytes": b"x", "minus one": -1, "zero": 0, "one": 1,
    "a half": 0.5, "a fraction": 2.5, "true": True, "nan": math.nan, "infinity": math.inf, "huge": 10**400,
    "65 bits": 2**64, "a large float": 1e30, "list of ints": [2], "list of floats": [1.0, 2.0],
    "list of texts": ["euler"], "list of nan": [math.nan], "list of bool": [True], "list of lists": [[1]],
    "tuple": (2, "x"), "dict": {"a": 1}, "set": {1}, "object": object(), "function": print,
    "array": np.zeros(3), "array of text": np.array([["a"]]),
    "array of objects": np.zeros((2, 2), object), "tensor": torch.zeros(2), "numpy float": np.float32(0.5),
    "empty picture": Image.new("RGB", (0, 5)), "generator": (i for i in range(2))}
INTS, NUMBERS = {"one"}, {"minus one", "zero", "one", "a half", "a fraction"}
TEXTS = {"a text", "a number as text"}
# Names of the values of POOL that an argument takes
FINE = {
    "instructions": TEXTS | {"list of texts"}, "captions": TEXTS | {"list of texts"}, "negative": TEXTS,
    "steps": INTS, "cfg_text": NUMBERS, "cfg_image": NUMBERS, "sampler": set(), "resolution": set(),
    "seed": {"minus one", "zero", "one", "list of ints"}, "low_memory": {"true"}, "progress": {"true"},
    "batch": {"one", "65 bits"}, "callback": {"function"}, "deep_every": {"one", "65 bits"}, "images": set(),
    "masks": set(), "mask_blur": {"zero", "one", "a half", "a fraction"}, "strength": {"one", "a half"}}
MANY = {("generate", "cfg_text"): {"list of ints", "list of floats"}}
CALLS = [(function, name) for function in (Editor.edit, TextToImage.generate)
         for name in inspect.signature(function).parameters if name != "self"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return {"edit": Editor.load(write_tiny_editor(folder / "editor"), "cpu"),
            "generate": TextToImage.load(write_tiny_painter(folder / "painter"), "cpu")}


@pytest.mark.parametrize("value", POOL)
@pytest.mark.parametrize("function, name", CALLS, ids=[f"{f.__name__}-{name}" for f, name in CALLS])
def test_a_wrong_value_is_a_value_error_that_names_it(models, function, name, value):
    call = function.__name__
    given = {"steps": 2, "seed": 0, "resolution": 16, "images": PICTURE}
    given |= {"instructions": "a", "masks": WHITE} if call == "edit" else {"captions": "a", "strength": 1}
    given |= {name: POOL[value]}
    if name.startswith("cfg") and value in ("65 bits", "a large float"):
        return  # they may overflow the networks, which is another error
    if value in FINE[name] | MANY.get((call, name), set()):
        function(models[call], **given)
        return
    with pytest.raises(ValueError) as caught:
        function(models[call], **given)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    if isinstance(POOL[value], (str, list, tuple)) and name in ("images", "masks"):
        return  # a path, or several: the message names the path or the item
    shown = {"huge": "10000", "array": "(3,)", "array of text": "(1, 1)", "array of objects": "(2, 2)",
             "tensor": "Tensor (2,)", "empty picture": "PIL.Image", "object": "<object"}
    assert name in message and shown.get(value, repr(POOL[value])[:12]) in message


@pytest.mark.parametrize("mask", [np.array([["a"]]), np.zeros((2, 2), object), np.ones((2, 2), complex)],
                         ids=lambda mask: str(mask.dtype))
def test_a_mask_without_numbers_is_named(models, mask):
    with pytest.raises(ValueError, match=r"masks = ndarray \(\d, \d\) should be a path"):
        models["edit"].edit(PICTURE, "a", steps=1, masks=mask)


def test_a_tensor_may_be_bfloat16():
    """numpy has no such dtype."""
    assert as_image(torch.full((3, 2, 2), 0.2, dtype=torch.bfloat16)).getpixel((1, 1)) == (51, 51, 51)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_an_empty_picture_is_refused(size):
    with pytest.raises(ValueError, match="images = <PIL.* should be a path"):
        as_image(Image.new("RGB", size))


def test_subclasses_and_long_lists_are_taken(models):
    """numpy's float64 and str_ are a float and a str. A list may be longer than a list in a file."""
    edited = models["edit"].edit([], np.array([]).tolist(), cfg_text=np.float64(2), negative=np.str_("a"))
    assert edited == []
    with pytest.raises(ValueError, match="20000 instructions"):
        models["edit"].edit([PICTURE], ["a"] * 20_000)
