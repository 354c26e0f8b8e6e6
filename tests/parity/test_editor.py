"""The editor against diffusers' StableDiffusionInstructPix2PixPipeline, and against itself."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_editor import DEFAULTS, write_tiny_editor

from nanoip2p import editor as editing
from nanoip2p.checkpoint.load import load_model
from nanoip2p.common.device import pick_device
from nanoip2p.diffusion import NoiseSchedule
from nanoip2p.editor import Editor

NANO = Path(__file__).parents[2] / "weights" / "nano-ip2p"
SCHEDULERS = {
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "ddim": diffusers.DDIMScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}
PUBLISHED = {  # scheduler_config.json of timbrooks/instruct-pix2pix
    "_class_name": "EulerAncestralDiscreteScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None}
TEXTS = ["make it night", "turn the red house into a blue boat"]


def picture(width, height, seed):
    """Smooth, colourful and its own for each seed."""
    low = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)


def difference(ours, theirs):
    """Largest difference of any pixel, in levels of 255."""
    assert ours.size == theirs.size and ours.mode == theirs.mode == "RGB"
    return int(np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_editor(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def editor(tiny):
    return Editor.load(tiny, device="cpu")


def run_peer(folder, sampler, images, texts, seeds, steps, cfg_text, cfg_image, negative):
    peer = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    peer.scheduler = SCHEDULERS[sampler].from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return peer(texts, images, num_inference_steps=steps, guidance_scale=cfg_text,
                image_guidance_scale=cfg_image, generator=generators,
                negative_prompt=[negative] * len(texts)).images


def compare(folder, sampler, image, steps=12, cfg_text=7.5, cfg_image=1.5, negative=""):
    """Same pictures within 1/255, from a reference that is shown to react to text, picture and seed."""
    images = [image, image, image.transpose(Image.Transpose.ROTATE_180), image]
    texts = [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0]]
    seeds = [7, 7, 7, 8]
    theirs = run_peer(folder, sampler, images, texts, seeds, steps, cfg_text, cfg_image, negative)
    # A trained editor leaves little to chance, so another seed may change less than another text or picture
    for changed, at_least in zip(theirs[1:], (20, 20, 5)):
        assert difference(changed, theirs[0]) > at_least
    clipped = np.isin(np.stack([np.asarray(image) for image in theirs]), (0, 255)).mean()
    assert clipped < 0.25, f"{clipped:.0%} of the reference's pixels are clipped, which would hide errors"

    ours = Editor.load(folder, device="cpu").edit(
        images, texts, seed=seeds, steps=steps, cfg_text=cfg_text, cfg_image=cfg_image, sampler=sampler,
        resolution=max(image.size), negative=negative)
    levels = [difference(a, b) for a, b in zip(ours, theirs)]
    assert max(levels) <= 1, f"{sampler}: {levels} of 255 levels apart"


@pytest.mark.parametrize("scheduler_config", [None, PUBLISHED], ids=["ours", "published"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_equals_diffusers_on_random_weights(sampler, scheduler_config, tmp_path):
    folder = write_tiny_editor(tmp_path, scheduler_config)
    compare(folder, sampler, picture(48, 32, 0))


@pytest.mark.parametrize("settings", [
    {"timestep_spacing": "trailing"}, {"timestep_spacing": "leading", "steps_offset": 1},
    {"use_karras_sigmas": True}], ids=str)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_equals_diffusers_with_other_spacings(sampler, settings, tmp_path):
    folder = write_tiny_editor(tmp_path, NoiseSchedule(**settings).to_json())
    compare(folder, sampler, picture(32, 32, 0))


@pytest.mark.parametrize("cfg_image", [1.5, 1.0])
def test_equals_diffusers_with_a_negative_prompt(tiny, cfg_image):
    compare(tiny, "euler_ancestral", picture(32, 48, 0), cfg_image=cfg_image, negative="a red boat")


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_equals_diffusers_on_the_shipped_nano_weights(sampler):
    defaults = load_model(NANO).defaults
    example = Image.open(sorted((NANO / "examples").glob("*.png"))[0]).convert("RGB")
    assert max(example.size) == defaults["resolution"]
    compare(NANO, sampler, example, 20, defaults["cfg_text"], defaults["cfg_image"])


def test_a_picture_does_not_depend_on_its_batch(editor):
    images = [picture(48, 32, 0), picture(32, 48, 1), picture(48, 32, 2), picture(48, 32, 3)]
    texts = [*TEXTS, "", TEXTS[0]]
    together = editor.edit(images, texts, seed=[3, 4, 5, 6])
    assert [image.size for image in together] == [image.size for image in images]
    assert together == editor.edit(images, texts, seed=[3, 4, 5, 6])
    for settings in ({"batch": 1}, {"batch": 2}, {"low_memory": True}):
        for a, b in zip(together, editor.edit(images, texts, seed=3, **settings)):
            assert difference(a, b) <= 1
    for i in range(4):
        [alone] = editor.edit([images[i]], [texts[i]], seed=3 + i)
        assert difference(alone, together[i]) <= 1
    assert difference(together[0], editor.edit(images[:1], texts[:1], seed=99)[0]) > 20


def test_pictures_of_one_size_share_a_forward(editor, monkeypatch):
    batches = []
    forward = type(editor.unet).forward
    monkeypatch.setattr(type(editor.unet), "forward", lambda self, latents, timestep, text: (
        batches.append((len(text.rows), *latents.shape[1:])), forward(self, latents, timestep, text))[1])
    images = [picture(48, 32, 0), picture(32, 48, 1), picture(48, 32, 2)]
    editor.edit(images, ["a", "b", "a"], steps=1)
    assert batches == [(6, 8, 8, 12), (3, 8, 12, 8)]
    batches.clear()
    editor.edit(images, ["a", "b", "a"], steps=2, cfg_image=1, low_memory=True)
    assert batches == [(2, 8, 8, 12)] * 4 + [(1, 8, 12, 8)] * 4
    batches.clear()
    editor.edit(images[:1] * 5, ["a"] * 5, steps=1, batch=2)
    assert batches == [(6, 8, 8, 12), (6, 8, 8, 12), (3, 8, 8, 12)]


def test_each_text_is_encoded_once(tiny, monkeypatch):
    editor, encoded = Editor.load(tiny, "cpu"), []
    forward = type(editor.text_encoder).forward
    monkeypatch.setattr(type(editor.text_encoder), "forward", lambda self, ids: (
        encoded.append(len(ids)), forward(self, ids))[1])
    editor.edit([picture(32, 32, i) for i in range(3)], ["a", "b", "a"], steps=1, batch=1)
    assert encoded == [1, 1, 1]  # "", "a" and "b"; alone, so that company does not matter
    editor.edit([picture(32, 32, 0)] * 3, ["a", "b", ""], steps=1, negative="c")
    assert encoded == [1] * 4  # "c"
    monkeypatch.setattr(editing, "KEPT", 1)
    editor.edit([picture(32, 32, 0)] * 2, ["a", "d"], steps=1, negative="")
    assert encoded == [1] * 5 and list(editor.kept_texts) == [""]
    editor.edit([picture(32, 32, 0)], ["a"], steps=1)
    assert encoded == [1] * 6  # "a" had to go, but never ""


def test_a_picture_is_encoded_once(tiny, monkeypatch):
    """However often it comes, in whatever batch; and what is edited is each time what came."""
    editor = Editor.load(tiny, "cpu")
    images = [picture(48, 32, 0), picture(32, 48, 1), picture(48, 32, 2)]
    places, encoded, encode = [0, 1, 0, 2, 0, 0], [], type(editor.vae).encode
    monkeypatch.setattr(type(editor.vae), "encode", lambda self, pixels: (
        encoded.append(len(pixels)), encode(self, pixels))[1])
    settings = {"instructions": [*TEXTS, TEXTS[1], *TEXTS, TEXTS[0]], "steps": 2, "batch": 2}
    together = editor.edit([images[i] for i in places], **settings)
    assert encoded == [1, 1, 1]
    assert editor.edit([images[i].copy() for i in places], **settings) == together
    assert encoded == [1, 1, 1]  # nor are copies, in another call
    monkeypatch.setattr(editing, "KEPT", 1)
    apart = editor.edit([images[i] for i in places], **settings | {"batch": 1})
    assert len(editor.kept_pictures) == 1 and len(encoded) > 3
    assert max(difference(a, b) for a, b in zip(together, apart)) <= 1
    smaller = editor.edit([images[0]], TEXTS[:1], steps=2, resolution=32)
    assert smaller[0].size != together[0].size  # another resolution is another picture


def test_equal_bytes_of_another_shape_are_another_picture(tiny):
    wide, tall = (Image.new("RGB", size, "white") for size in ((48, 32), (32, 48)))
    edited = Editor.load(tiny, "cpu").edit([wide, tall], TEXTS, steps=1, seed=[0, 0])
    assert [image.size for image in edited] == [wide.size, tall.size]
    assert edited[1] == Editor.load(tiny, "cpu").edit([tall], TEXTS[1:], steps=1, seed=[0])[0]


def test_what_low_memory_encodes_is_for_low_memory_only(tiny, monkeypatch):
    """Tiles are not exact, and a picture must not depend on what was asked before it."""
    monkeypatch.setattr(type(Editor.load(tiny, "cpu").vae), "encode_small",
                        lambda self, pixels: self.encode(pixels)[0] + 1)
    fresh, used = Editor.load(tiny, "cpu"), Editor.load(tiny, "cpu")
    given = {"images": [picture(48, 32, 0)], "instructions": TEXTS[:1], "steps": 1}
    assert used.edit(**given, low_memory=True) != used.edit(**given) == fresh.edit(**given)


@pytest.mark.parametrize("settings", [
    {}, {"low_memory": True}, {"cfg_image": 1.0}, {"cfg_text": 1.2}], ids=str)
def test_reuse_changes_nothing(editor, settings):
    images = [picture(48, 32, 0), picture(48, 32, 1)]
    reused, plain = (editor.edit(images, TEXTS, reuse=reuse, **settings) for reuse in (True, False))
    assert max(difference(a, b) for a, b in zip(reused, plain)) <= 1


def test_defaults_come_from_the_weights_and_can_be_overridden(editor):
    image, text = picture(48, 48, 0), TEXTS[0]
    [default] = editor.edit([image], [text])
    assert editor.edit([image], [text], **DEFAULTS) == [default]
    others = {"resolution": 32, "steps": 7, "cfg_text": 3.5, "cfg_image": 1.6, "sampler": "euler"}
    for key, value in others.items():
        assert editor.edit([image], [text], **{key: value}) != [default], key


def test_sizes_are_fitted(editor):
    assert editor.multiple == 8
    [edited] = editor.edit([picture(300, 200, 0)], [TEXTS[0]], steps=1)
    assert edited.size == (48, 32)


def test_half_precision_stays_near_single(editor, tiny):
    image, text = picture(48, 32, 0), TEXTS[0]
    settings = {"steps": 3, "cfg_text": 1.5, "cfg_image": 1.0, "sampler": "euler"}
    [single] = editor.edit([image], [text], **settings)
    [other] = editor.edit([image], [TEXTS[1]], **settings)
    [half] = Editor.load(tiny, "cpu", torch.bfloat16).edit([image], [text], **settings)
    near, far = (np.abs(np.asarray(single, float) - np.asarray(b, float)).mean() for b in (half, other))
    assert near < 0.5 * far, f"bfloat16 moves the picture by {near:.1f} levels, another text by {far:.1f}"


@pytest.mark.parametrize("wrong, message", [
    ({"sampler": "heun"}, "no sampler 'heun'"), ({"steps": 0}, "steps"), ({"resolution": 4}, "resolution"),
    ({"seed": [1, 2]}, "2 seeds"), ({"instructions": []}, "0 instructions"),
    ({"images": [Image.new("RGBA", (32, 32))]}, "open_image")], ids=str)
def test_mistakes_are_value_errors(editor, wrong, message):
    arguments = {"images": [picture(32, 32, 0)], "instructions": ["a"]} | wrong
    with pytest.raises(ValueError, match=message):
        editor.edit(**arguments)


def test_nothing_to_do_is_no_mistake(editor):
    assert editor.edit([], []) == []


def test_devices(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="gpu"):
        pick_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")
