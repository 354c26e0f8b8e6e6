"""Textual inversions, against diffusers' load_textual_inversion and maybe_convert_prompt."""

import zipfile
from contextlib import nullcontext

import diffusers
import numpy as np
import pytest
import torch
from comparing import relative_error
from PIL import Image
from safetensors.torch import save_file
from tiny_editor import VOCABULARY, write_tiny_editor, write_tiny_painter
from torch import nn

from nanoip2p import Editor, TextToImage
from nanoip2p.checkpoint.embeddings import add_embedding
from nanoip2p.checkpoint.load import open_checkpoint
from nanoip2p.checkpoint.save import convert
from nanoip2p.prompt_to_prompt import PairPainter, find_words

WIDTH = 32  # of the tiny text encoder
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))


def vectors(count, seed=0):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def web_ui(path, content):
    """As AUTOMATIC1111's Embedding.save. diffusers reads the word in "name", web UIs the file's name."""
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": content}, "name": path.stem,
                "step": 9, "sd_checkpoint": None, "sd_checkpoint_name": None}, path)


def of_2022(path, content):
    """As textual_inversion/ldm/modules/embedding_manager.py: vectors in a module, the token as a tensor."""
    torch.save({"string_to_token": {"sks": torch.tensor(265)}, "name": path.stem,
                "string_to_param": nn.ParameterDict({"sks": nn.Parameter(content)})}, path)


FILES = {  # name of the file -> function that writes it
    "sks-toy.pt": web_ui,
    "EasyThing.pt": of_2022,
    "learned_embeds.bin": lambda path, content: torch.save({"<cat-toy>": content}, path),
    "learned_embeds.safetensors": lambda path, content: save_file({"<cat-toy>": content}, path),
    "web-ui.safetensors": lambda path, content: save_file({"emb_params": content}, path),
}


def open_peer(folder, cls=diffusers.StableDiffusionInstructPix2PixPipeline):
    peer = cls.from_pretrained(folder, torch_dtype=torch.float32)
    peer.set_progress_bar_config(disable=True)
    return peer


def ids_of(peer, text):
    text = peer.maybe_convert_prompt(text, peer.tokenizer)
    return peer.tokenizer(text, padding="max_length", truncation=True, max_length=77).input_ids


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_editor(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.mark.parametrize("name, count", [
    *((name, 3) for name in FILES), ("sks-toy.pt", 1), ("learned_embeds.bin", 1)])
def test_ids_states_and_pictures_are_diffusers(name, count, tiny, tmp_path):
    path = tmp_path / name
    FILES[name](path, vectors(count) if count > 1 or "learned" not in name else vectors(1)[0])
    word = {"learned_embeds": "<cat-toy>"}.get(path.stem, path.stem)
    editor, peer = Editor.load(tiny, device="cpu"), open_peer(tiny)
    assert add_embedding(editor, path).endswith(f"its word is {word} ({count} vector{'s' * (count > 1)})")
    if name == "EasyThing.pt":  # diffusers cannot unpickle a module: give it the tensor
        peer.load_textual_inversion({word: vectors(count)})
    else:  # without a name, diffusers would call the word emb_params
        peer.load_textual_inversion(str(path), token="web-ui" if path.stem == "web-ui" else None)
    for text in (f"make {word} night", f"{word}{word}, a{word}b", f"{word}_1 {word}_2", "make it night",
                 f"the {word} " * 40):
        with pytest.warns(UserWarning, match="fit") if len(text) > 100 else nullcontext():
            assert editor.tokenizer([text])[0].tolist() == ids_of(peer, text), text
    ids = torch.tensor([ids_of(peer, f"a {word} boat")])
    assert relative_error(editor.text_encoder(ids), peer.text_encoder(ids)[0]) < 1e-5
    if name != "sks-toy.pt":  # the same ids and states give the same pictures, whatever the file was
        return
    text = f"turn it into {word}"
    theirs = peer(text, PICTURE, num_inference_steps=3, guidance_scale=3.0, image_guidance_scale=1.2,
                  generator=torch.Generator().manual_seed(5), negative_prompt=word).images[0]
    ours = editor.edit(PICTURE, text, seed=5, steps=3, negative=word)
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1


def test_folders_saved_with_textual_inversions_paint_as_in_diffusers(tmp_path):
    """Also after conversion to a single file, and for words in other capitals."""
    peer = open_peer(write_tiny_painter(tmp_path / "plain"), diffusers.StableDiffusionPipeline)
    peer.load_textual_inversion({"<x>": vectors(3)})
    peer.load_textual_inversion({"<y>": vectors(1, seed=1)})
    peer.save_pretrained(tmp_path / "saved")
    convert(open_checkpoint(tmp_path / "saved"), tmp_path / "single.safetensors")
    single = open_checkpoint(tmp_path / "single.safetensors", tokenizer=str(tmp_path / "saved/tokenizer"))
    for weights in (tmp_path / "saved", single):
        painter = TextToImage.load(weights, device="cpu")
        for text in ("a <x> boat", "<y> and <x>.", "<x>_1", "a boat"):
            assert painter.tokenizer([text])[0].tolist() == ids_of(peer, text), text
        assert painter.tokenizer(["a <X>"]).tolist() == painter.tokenizer(["a <x>"]).tolist()
        ours = painter.generate("a <x> boat", seed=3, steps=3, cfg_text=3.0, resolution=48)
        theirs = peer("a <x> boat", num_inference_steps=3, guidance_scale=3.0, height=48, width=48,
                      generator=torch.Generator().manual_seed(3)).images[0]
        assert np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1
    assert find_words(painter.tokenizer, "a <x> boat <y>", "<x>") == [2, 3, 4]
    assert find_words(painter.tokenizer, "a <x> boat <y>", "<Y>")[0] > find_words(
        painter.tokenizer, "a <x> boat <y>", "boat")[-1]
    pairs = PairPainter(painter, "a <x> boat", "a <y> boat", "cross", steps=2, resolution=48,
                        reweight={"<y>": 2.0})
    assert len(pairs.paint([0], [0.5], [3.0])) == 1


def test_words_that_begin_alike_stay_apart(tiny, tmp_path):
    """diffusers replaces text: "<x>_1" beside "<x>" becomes "<x> <x>_1_1", which ends in the letters "_1"."""
    editor, peer = Editor.load(tiny, device="cpu"), open_peer(tiny)
    save_file({"<x>": vectors(2)}, tmp_path / "x.safetensors")
    add_embedding(editor, tmp_path / "x.safetensors")
    peer.load_textual_inversion(str(tmp_path / "x.safetensors"))
    assert peer.maybe_convert_prompt("<x>, <x>_1", peer.tokenizer) == "<x> <x>_1, <x> <x>_1_1"
    assert peer.maybe_convert_prompt("<X>", peer.tokenizer) == "<X>"  # only one of the two vectors
    assert editor.tokenizer(["<X>"]).tolist() == editor.tokenizer(["<x>"]).tolist()
    first, second = (editor.tokenizer.backend.token_to_id(word) for word in ("<x>", "<x>_1"))
    ids = editor.tokenizer(["<x> boat <x>_1"])[0].tolist()
    assert ids[1:3] == [first, second] and ids.count(first) == 1 and ids.count(second) == 2


def test_two_embeddings_and_half_precision(tiny, tmp_path):
    editor = Editor.load(tiny, device="cpu", dtype=torch.float16)
    for name, seed in (("first", 1), ("second", 2)):
        save_file({"emb_params": vectors(36, seed).double()}, tmp_path / f"{name}.safetensors")
        add_embedding(editor, tmp_path / f"{name}.safetensors")
    table = editor.text_encoder.text_model.embeddings.token_embedding
    size = editor.text_encoder.config.vocab_size
    assert table.weight.dtype == torch.float16 and len(table.weight) == size > VOCABULARY  # it has grown
    ids = editor.tokenizer(["first second"])[0, 1:73]
    assert torch.equal(table.weight[ids], torch.cat([vectors(36, 1), vectors(36, 2)]).half())


BAD = {
    "width": ({"emb_params": torch.zeros(2, 40)}, r"its configuration: bad of \(2, 40\) for \(2, 32\)"),
    "depth": ({"emb_params": torch.zeros(1, 2, WIDTH)}, "does not fit"),
    "none": ({"emb_params": torch.zeros(0, WIDTH)}, "does not fit"),
    "too many": ({"emb_params": torch.zeros(76, WIDTH)}, r"of \(76, 32\) for \(75, 32\)"),
    "NaN": ({"emb_params": torch.full((1, WIDTH), torch.nan)}, "has NaN or infinity"),
    "integers": ({"emb_params": torch.zeros(1, WIDTH, dtype=torch.int32)}, "floating-point numbers"),
    "SDXL": ({"clip_l": torch.zeros(1, 9), "clip_g": torch.zeros(1, 12)}, "holds 2 tensors; a"),
    "known": ({"it</w>": torch.zeros(1, WIDTH)}, "would share tokens with a known word; rename its tensor"),
    "a part of another": ({"<z>": torch.zeros(1, WIDTH)}, "its word '<z>' is empty, known, or would share"),
    "a later part": ({"<z>_2": torch.zeros(1, WIDTH)}, "its word '<z>_2' is empty, known, or would share"),
    "capitals": ({"<Z>_1": torch.zeros(1, WIDTH)}, "its word '<Z>_1' is empty, known, or would share"),
    "empty": ({" ": torch.zeros(1, WIDTH)}, "its word '' is empty"),
}


def test_words_with_numbers_that_continue_no_word_are_taken(tiny, tmp_path):
    editor = Editor.load(tiny, device="cpu")
    for name in ("style_2", "style_4", "other_1"):
        save_file({"emb_params": torch.ones(1, WIDTH)}, tmp_path / f"{name}.safetensors")
        add_embedding(editor, tmp_path / f"{name}.safetensors")
        assert editor.tokenizer.prepare(f"a {name} b") == f"a {name} b"


@pytest.fixture(scope="module")
def with_z(tiny, tmp_path_factory):
    """An editor with a new word. The files that it refuses change nothing, as each test sees."""
    editor, path = Editor.load(tiny, device="cpu"), tmp_path_factory.mktemp("z") / "z.safetensors"
    save_file({"<z>_1": torch.ones(1, WIDTH)}, path)
    add_embedding(editor, path)
    return editor


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_embedding_of_this_text_encoder_is_refused(kind, with_z, tmp_path):
    (tensors, complaint), editor = BAD[kind], with_z
    save_file(tensors, tmp_path / "bad.safetensors")
    before = editor.tokenizer.backend.to_str(), editor.text_encoder.config
    with pytest.raises(ValueError, match=complaint) as error:
        add_embedding(editor, tmp_path / "bad.safetensors")
    assert str(error.value).startswith(str(tmp_path / "bad.safetensors")) and "\n" not in str(error.value)
    assert before == (editor.tokenizer.backend.to_str(), editor.text_encoder.config)


def test_a_pt_file_named_as_weights_is_said_to_be_an_embedding(tmp_path):
    web_ui(tmp_path / "cat.pt", vectors(2))
    with pytest.raises(ValueError, match="this is a textual inversion .name it with sample.py --embedding"):
        open_checkpoint(tmp_path / "cat.pt")


def test_a_pt_file_that_asks_for_code_runs_none(tiny, tmp_path):
    web_ui(tmp_path / "cat.pt", vectors(2))
    with zipfile.ZipFile(tmp_path / "cat.pt") as old, zipfile.ZipFile(tmp_path / "bad.pt", "w") as new:
        for name in old.namelist():
            content = b"cos\nsystem\n(Vtouch hacked\ntR." if name.endswith("data.pkl") else old.read(name)
            new.writestr(name, content)
    with pytest.raises(ValueError, match=r"bad.pt is damaged or no file of torch.save"):
        add_embedding(Editor.load(tiny, device="cpu"), tmp_path / "bad.pt")
