"""The editor against diffusers' StableDiffusionInstructPix2PixPipeline, and against itself."""

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from hertz import SCHEDULERS, open_scheduler
from PIL import Image
from tiny_editor import DEFAULTS, write_tiny_editor
from tqdm import tqdm

import nanoip2p
from nanoip2p.checkpoint import hub
from nanoip2p.common import files
from nanoip2p.common.device import pick_device
from nanoip2p.common.files import write_json
from nanoip2p.diffusion import NoiseSchedule
from nanoip2p.editor import Editor
from nanoip2p.pipeline import reporting

NANO = Path(__file__).parents[2] / "weights" / "nano-ip2p"
PUBLISHED = {  # scheduler_config.json of timbrooks/instruct-pix2pix
    "_class_name": "EulerAncestralDiscreteScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None}
TEXTS = ["make it night", "turn the red house into a blue boat"]


def picture(width, height, seed):
    """A smooth, colourful picture, another one for each seed."""
    low = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)


def difference(ours, theirs):
    """Largest difference of any pixel, in levels of 255."""
    assert ours.size == theirs.size and ours.mode == theirs.mode == "RGB"
    return int(np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_editor(tmp_path_factory.mktemp("weights") / "tiny")


@cache
def open_editor(folder):
    return Editor.load(folder, device="cpu")


@pytest.fixture(scope="module")
def editor(tiny):
    return open_editor(tiny)


def with_schedule(tiny, folder, scheduler_config):
    """A copy of the tiny weights with another schedule."""
    folder = shutil.copytree(tiny, folder / "weights")
    write_json(scheduler_config, folder / "scheduler" / "scheduler_config.json")
    return folder


@cache
def open_peer(networks):
    peer = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(
        networks, torch_dtype=torch.float32)
    peer.set_progress_bar_config(disable=True)
    return peer


def run_peer(networks, folder, sampler, images, texts, seeds, steps, cfg_text, cfg_image, negative):
    peer = open_peer(networks)
    peer.scheduler = open_scheduler(folder, sampler)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return peer(texts, images, num_inference_steps=steps, guidance_scale=cfg_text,
                image_guidance_scale=cfg_image, generator=generators,
                negative_prompt=[negative] * len(texts)).images


def compare(networks, folder, sampler, image, steps=6, cfg_text=7.5, cfg_image=1.5, negative="",
            changes=(1, 2, 3)):
    """Our pictures equal the reference's within 1/255. The reference reacts to text, picture and seed.

    networks: the reference takes them from this folder, which it reads once; they are those of `folder`.
    changes: which of the edits with another text (1), picture (2) and seed (3) are made beside the first.
    """
    turned, rows = image.transpose(Image.Transpose.ROTATE_180), (0, *changes)
    images = [[image, image, turned, image][i] for i in rows]
    texts = [[TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0]][i] for i in rows]
    seeds = [[7, 7, 7, 8][i] for i in rows]
    theirs = run_peer(networks, folder, sampler, images, texts, seeds, steps, cfg_text, cfg_image, negative)
    # With a trained editor, another seed may change the result less than another text or picture
    for change, changed in zip(changes, theirs[1:]):
        assert difference(changed, theirs[0]) > (5 if change == 3 else 20)
    clipped = np.isin(np.stack([np.asarray(image) for image in theirs]), (0, 255)).mean()
    assert clipped < 0.25, f"{clipped:.0%} of the reference's pixels are clipped, which would hide errors"

    ours = open_editor(folder).edit(
        images, texts, seed=seeds, steps=steps, cfg_text=cfg_text, cfg_image=cfg_image, sampler=sampler,
        resolution=max(image.size), negative=negative)
    levels = [difference(a, b) for a, b in zip(ours, theirs)]
    assert max(levels) <= 1, f"{sampler}: {levels} of 255 levels apart"


@pytest.mark.parametrize("sampler, scheduler_config", [
    *((sampler, None) for sampler in SCHEDULERS),
    *((sampler, PUBLISHED) for sampler in ("euler_ancestral", "ddim", "lcm"))])  # its end is for the last two
def test_equals_diffusers_on_random_weights(tiny, sampler, scheduler_config, tmp_path):
    folder = with_schedule(tiny, tmp_path, scheduler_config) if scheduler_config else tiny
    compare(tiny, folder, sampler, picture(48, 32, 0))


@pytest.mark.parametrize("settings", [
    {"timestep_spacing": "trailing"}, {"timestep_spacing": "leading", "steps_offset": 1},
    {"use_karras_sigmas": True}], ids=str)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_equals_diffusers_with_other_spacings(tiny, sampler, settings, tmp_path):
    folder = with_schedule(tiny, tmp_path, NoiseSchedule(**settings).to_json())
    compare(tiny, folder, sampler, picture(32, 32, 0))


@pytest.mark.parametrize("sampler, zero_snr", [
    *((sampler, True) for sampler in SCHEDULERS), ("euler_ancestral", False), ("dpmpp_2m", False)])
def test_equals_diffusers_with_v_prediction(tiny, sampler, zero_snr, tmp_path):
    schedule = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr,
                             timestep_spacing="trailing" if zero_snr else None)
    compare(tiny, with_schedule(tiny, tmp_path, schedule.to_json()), sampler, picture(48, 32, 0))


@pytest.mark.parametrize("cfg_image", [1.5, 1.0])
def test_equals_diffusers_with_a_negative_prompt(tiny, cfg_image):
    compare(tiny, tiny, "euler_ancestral", picture(32, 48, 0), cfg_image=cfg_image, negative="a red boat")


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_equals_diffusers_on_the_shipped_nano_weights(sampler):
    """All steps for the sampler of the defaults, fewer for the others. Each changes one input."""
    defaults = json.loads((NANO / "defaults.json").read_text())
    steps = defaults["steps"] if sampler == defaults["sampler"] else 5
    change = list(SCHEDULERS).index(sampler) % 3 + 1
    example = Image.open(sorted((NANO / "examples").glob("*.png"))[0]).convert("RGB")
    assert max(example.size) == defaults["resolution"]
    compare(NANO, NANO, sampler, example, steps, defaults["cfg_text"], defaults["cfg_image"],
            changes=[change])


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
    monkeypatch.setattr(type(editor.unet), "forward", lambda self, z, t, text, attend: (
        batches.append((len(text.rows), *z.shape[1:])), forward(self, z, t, text, attend))[1])
    images = [picture(48, 32, 0), picture(32, 48, 1), picture(48, 32, 2)]
    editor.edit(images, ["a", "b", "a"], steps=1)
    assert batches == [(6, 8, 8, 12), (3, 8, 12, 8)]
    batches.clear()
    editor.edit(images, ["a", "b", "a"], steps=2, cfg_image=1, low_memory=True)
    assert batches == [(2, 8, 8, 12)] * 4 + [(1, 8, 12, 8)] * 4
    batches.clear()
    editor.edit(images[:1] * 5, ["a"] * 5, steps=1, batch=2)
    assert batches == [(6, 8, 8, 12), (6, 8, 8, 12), (3, 8, 8, 12)]


def test_each_text_is_encoded_once(editor, monkeypatch):
    encoded = []
    forward = type(editor.text_encoder).forward
    monkeypatch.setattr(type(editor.text_encoder), "forward", lambda self, ids: (
        encoded.append(len(ids)), forward(self, ids))[1])
    editor.edit([picture(32, 32, i) for i in range(3)], ["a", "b", "a"], steps=1, batch=1)
    assert encoded == [1, 1, 1]  # "", "a" and "b", one by one: no text depends on the others


def test_a_picture_is_encoded_once(editor, monkeypatch):
    """Also if it occurs in several batches of a call."""
    images = [picture(48, 32, 0), picture(32, 48, 1), picture(48, 32, 2)]
    places, encoded, encode = [0, 1, 0, 2, 0, 0], [], type(editor.vae).encode
    monkeypatch.setattr(type(editor.vae), "encode", lambda self, pixels: (
        encoded.append(len(pixels)), encode(self, pixels))[1])
    settings = {"instructions": [*TEXTS, TEXTS[1], *TEXTS, TEXTS[0]], "steps": 2, "seed": 0}
    together = editor.edit([images[i] for i in places], batch=2, **settings)
    assert encoded == [1, 1, 1]
    apart = editor.edit([images[i].copy() for i in places], batch=1, **settings)
    assert encoded == [1] * 9
    assert max(difference(a, b) for a, b in zip(together, apart)) <= 1


def test_defaults_come_from_the_weights_and_can_be_overridden(editor):
    image, text = picture(48, 48, 0), TEXTS[0]
    default = editor.edit(image, text, seed=0)
    assert editor.edit(image, text, seed=0, **DEFAULTS) == default
    others = {"resolution": 32, "steps": 7, "cfg_text": 3.5, "cfg_image": 1.6, "sampler": "euler"}
    for key, value in others.items():
        assert editor.edit(image, text, seed=0, **{key: value}) != default, key


def test_sizes_are_fitted(editor):
    assert editor.multiple == 8
    [edited] = editor.edit([picture(300, 200, 0)], [TEXTS[0]], steps=1)
    assert edited.size == (48, 32)


def test_half_precision_stays_near_single(editor, tiny):
    image, text = picture(48, 32, 0), TEXTS[0]
    settings = {"steps": 3, "cfg_text": 1.5, "cfg_image": 1.0, "sampler": "euler", "seed": 0}
    [single] = editor.edit([image], [text], **settings)
    [other] = editor.edit([image], [TEXTS[1]], **settings)
    [half] = Editor.load(tiny, "cpu", torch.bfloat16).edit([image], [text], **settings)
    near, far = (np.abs(np.asarray(single, float) - np.asarray(b, float)).mean() for b in (half, other))
    assert near < 0.5 * far, f"bfloat16 moves the picture by {near:.1f} levels, another text by {far:.1f}"


@pytest.mark.parametrize("wrong, message", [
    ({"sampler": "heun"}, "sampler 'heun'"), ({"steps": 0}, "steps"), ({"resolution": 4}, "resolution"),
    ({"seed": [1, 2]}, "1 images, 1 instructions, 2 seed: give lists of equal length"),
    ({"instructions": []}, "0 instructions"),
    ({"instructions": [3]}, r"instructions = \[3\] should be a text or a list, each item a text"),
    ({"instructions": None}, "instructions = None should be a text"),
    ({"negative": None}, "negative = None should be a text"),
    ({"seed": "7"}, "seed = '7' should be a whole number .* or a list, each item a whole number"),
    ({"images": 5}, "images = 5 should be a path"),
    ({"images": [Image.new("F", (32, 32))]}, "floating-point pixels"),
    ({"steps": "5"}, "steps = '5' should be a whole number"), ({"cfg_text": "a"}, "'a' should be a number"),
    ({"resolution": True}, "resolution = True should be a whole number from 1 to 32768"),
    ({"images": np.zeros((32, 32), np.uint8)}, r"images = ndarray \(32, 32\) should be"),
    ({"images": np.full((8, 8, 3), 200.0)}, r"array \(H, W, 3\).* floats in \[0, 1\]"),
    ({"images": torch.zeros(1, 3, 8, 8)}, r"Tensor \(1, 3, 8, 8\) should be"),
    ({"images": "absent.png"}, "there is no picture absent.png")],
    ids=lambda value: value[:40] if isinstance(value, str) else next(iter(value)))
def test_mistakes_are_value_errors(editor, wrong, message):
    arguments = {"images": [picture(32, 32, 0)], "instructions": ["a"]} | wrong
    with pytest.raises(ValueError, match=message):
        editor.edit(**arguments)


def test_single_values_and_lists(editor):
    """A single value is for every picture. The result is a single picture only if no argument is a list."""
    images, settings = [picture(48, 32, 0), picture(48, 32, 1)], {"steps": 1, "seed": 3}
    both = editor.edit(images, TEXTS, **settings)
    single = editor.edit(images[0], TEXTS[0], **settings)
    [listed] = editor.edit(images[:1], TEXTS[0], **settings)
    assert single == listed and difference(single, both[0]) <= 1
    alike = [editor.edit(images[0], TEXTS, **settings), editor.edit(images, TEXTS[0], **settings),
             editor.edit(images[0], TEXTS[0], steps=1, seed=[3, 4])]
    assert [len(edited) for edited in alike] == [2, 2, 2]
    assert len({edited[1].tobytes() for edited in [both, *alike]}) == 4
    for edited in alike:
        assert difference(edited[0], both[0]) <= 1


def test_pictures_are_paths_arrays_or_tensors(editor, tmp_path):
    image = picture(48, 32, 0)
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    tensor = torch.tensor(array).permute(2, 0, 1)
    given = [str(tmp_path / "a.png"), tmp_path / "a.png", array, array / 255, tensor, tensor / 255]
    edited = editor.edit([image, *given], TEXTS[0], steps=1, seed=[5] * 7)
    assert max(difference(other, edited[0]) for other in edited[1:]) <= 1
    assert difference(editor.edit(array[::-1], TEXTS[0], steps=1, seed=5), edited[0]) > 20


def test_low_memory_moves_each_network_back_after_its_use(editor, monkeypatch):
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to",
                        lambda self, device: moved.append((type(self).__name__, device)))
    editor.edit(picture(32, 32, 0), TEXTS[0], steps=1, seed=5, low_memory=True)
    assert moved == [(name, "cpu") for name in ("UNet", "VAE", "TextEncoder", "VAE", "UNet", "VAE")]


def test_a_random_seed_is_kept(editor):
    image = picture(32, 32, 0)
    first, second = editor.edit(image, TEXTS[0]), editor.edit(image, TEXTS[0])
    assert first != second == editor.edit(image, TEXTS[0], seed=editor.last_seed)


def test_a_callback_sees_every_step(editor):
    """Its latents are estimates of the result. Samplers that end at sigma = 0 return the last one."""
    seen = []
    images = [picture(48, 32, 0), picture(32, 48, 1), picture(48, 32, 2)]
    edited = editor.edit(images, TEXTS[0], steps=4, sampler="euler", seed=0,
                         callback=lambda step, latents: seen.append((step, latents)))
    assert [step for step, _ in seen] == [0, 1, 2, 3] * 2
    assert [latents.shape for _, latents in seen] == [(2, 4, 8, 12)] * 4 + [(1, 4, 12, 8)] * 4
    last, first = (editor.decode(seen[i][1])[0] for i in (3, 0))
    assert difference(last, edited[0]) <= 1 and difference(first, edited[0]) > 5
    reporting(lambda x, sigma: x * sigma, tqdm(disable=True), lambda *given: seen.append(given))(1.0, 3.0)
    assert seen[-1] == (0, 3.0)


def test_a_model_says_what_it_is_and_moves(editor):
    assert re.fullmatch(r"Editor\(UNet of 0\.\d M, torch.float32, cpu; resolution=48, steps=6, cfg_text=3.0, "
                        r"cfg_image=1.2, sampler='euler_ancestral'\)", repr(editor))
    assert editor.to("cpu") is editor and editor.device == torch.device("cpu")
    with pytest.raises(ValueError, match="gpu"):
        editor.to("gpu")


def test_the_nano_weights_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "fetch_weights", lambda name: pytest.fail(f"{name} was looked for on the Hub"))
    assert nanoip2p.Editor.load(device="cpu").side == nanoip2p.TextToImage.load(device="cpu").side == 64
    assert Editor.load("weights/nano-ip2p-paper", "cpu").defaults["cfg_image"] > 1
    monkeypatch.setattr(files, "CHECKOUT", tmp_path / "installed")
    with pytest.raises(ValueError, match="no weights/nano-ip2p here or in .*installed; .*--weights"):
        Editor.load()
    assert not hasattr(nanoip2p, "Painter")


def test_importing_the_package_is_quick():
    code = "import sys, nanoip2p; assert 'torch' not in sys.modules; nanoip2p.Editor"
    subprocess.run([sys.executable, "-c", code], cwd=NANO.parents[1], check=True)


def test_nothing_to_do_is_no_mistake(editor):
    assert editor.edit([], []) == []


def test_devices(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="gpu"):
        pick_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")
