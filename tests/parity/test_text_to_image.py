"""TextToImage against diffusers' StableDiffusionPipeline, and against itself."""

from functools import cache

import hertz
import pytest
import torch
from test_editor import PUBLISHED, difference, with_schedule
from tiny_editor import write_tiny_editor

from nanoip2p.diffusion import NoiseSchedule
from nanoip2p.editor import Editor
from nanoip2p.text_to_image import TextToImage

CAPTIONS = ["a red house at night", "turn the boat blue", "a red house at night", ""]
SEEDS = [3, 3, 4, 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_editor(
        tmp_path_factory.mktemp("weights") / "tiny", NoiseSchedule(steps_offset=1).to_json(), in_channels=4)


@cache
def open_painter(folder):
    return TextToImage.load(folder, "cpu")


@pytest.fixture(scope="module")
def painter(folder):
    return open_painter(folder)


@pytest.fixture(scope="module")
def peer(folder):
    return hertz.open_peer(folder, "euler")


def compare(peer, folder, sampler, cfg_text, steps=5, negative=""):
    """Our pictures equal the reference's within 1/255. The reference reacts to text and seed.

    The reference takes from `folder` only the schedule. Its networks are the same.
    """
    peer.scheduler = hertz.open_scheduler(folder, sampler)
    theirs = peer(
        CAPTIONS, height=32, width=32, num_inference_steps=steps, guidance_scale=cfg_text,
        negative_prompt=[negative] * 4,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS]).images
    for other in theirs[1:]:
        assert difference(theirs[0], other) > 4
    ours = open_painter(folder).generate(
        CAPTIONS, steps, cfg_text, SEEDS, sampler, resolution=32, negative=negative)
    levels = [difference(a, b) for a, b in zip(ours, theirs)]
    assert max(levels) <= 1, f"{levels} of 255 levels apart"
    return ours


@pytest.mark.parametrize("cfg_text", [7.5, 1.0])
@pytest.mark.parametrize("sampler", hertz.SCHEDULERS)
def test_equals_diffusers(peer, folder, sampler, cfg_text):
    compare(peer, folder, sampler, cfg_text)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "ddim"])
def test_equals_diffusers_with_the_published_schedule(peer, folder, sampler, tmp_path):
    compare(peer, with_schedule(folder, tmp_path, PUBLISHED), sampler, 3.0)


@pytest.mark.parametrize("sampler", hertz.SCHEDULERS)
def test_equals_diffusers_with_v_prediction(peer, folder, sampler, tmp_path):
    schedule = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True,
                             timestep_spacing="trailing")
    compare(peer, with_schedule(folder, tmp_path, schedule.to_json()), sampler, 5.0)


def test_equals_diffusers_with_a_negative_prompt(peer, folder):
    ours = compare(peer, folder, "euler_ancestral", 5.0, negative="a blue boat")
    assert difference(ours[0], compare(peer, folder, "euler_ancestral", 5.0)[0]) > 5


def test_a_picture_does_not_depend_on_its_batch(painter):
    guidance = [1.0, 3.0, 7.5, 0.0]
    together = painter.generate(CAPTIONS, cfg_text=guidance, seed=SEEDS, resolution=32)
    assert together == painter.generate(CAPTIONS, cfg_text=guidance, seed=SEEDS, resolution=32)
    for batch in (1, 3):
        apart = painter.generate(CAPTIONS, cfg_text=guidance, seed=SEEDS, resolution=32, batch=batch)
        assert max(difference(a, b) for a, b in zip(together, apart)) <= 1
    for i in range(4):
        [alone] = painter.generate([CAPTIONS[i]], cfg_text=guidance[i], seed=SEEDS[i], resolution=32)
        assert difference(alone, together[i]) <= 1
    counted = painter.generate(CAPTIONS[:2], seed=5, resolution=32)
    assert counted == painter.generate(CAPTIONS[:2], seed=[5, 6], resolution=32)


def test_branches_without_weight_are_not_computed(painter, monkeypatch):
    rows, forward = [], type(painter.unet).forward
    monkeypatch.setattr(type(painter.unet), "forward", lambda self, z, t, text, attend: (
        rows.append(len(text.rows)), forward(self, z, t, text, attend))[1])
    for guidance in (1.0, 0.0, 3.0, [1.0, 3.0, 1.0]):
        painter.generate(CAPTIONS[:3], steps=1, cfg_text=guidance, resolution=32)
    painter.generate(CAPTIONS[:3], steps=2, cfg_text=3.0, resolution=32, batch=2)
    assert rows == [3, 3, 6, 6, 4, 4, 2, 2]


def test_defaults_come_from_the_weights_and_can_be_overridden(painter):
    default = painter.generate(CAPTIONS[0], seed=0)
    assert default.size == (48, 48)
    assert painter.generate(CAPTIONS[:1], 6, 3.0, 0, "euler_ancestral", 48) == [default]
    others = {"resolution": 32, "steps": 7, "cfg_text": 3.5, "sampler": "euler", "negative": "a", "seed": 1}
    for key, value in others.items():
        assert painter.generate(CAPTIONS[0], **{"seed": 0, key: value}) != default, key
    assert painter.generate([]) == []


def test_an_editor_and_a_painter_are_told_apart(folder, tmp_path):
    editor = write_tiny_editor(tmp_path)
    with pytest.raises(ValueError, match=r"8 channels, a text-to-image model 4; this is an editor.*\.py$"):
        TextToImage.load(editor, "cpu")
    with pytest.raises(ValueError, match="4 channels, an editor 8; this is a text-to-image model"):
        Editor.load(folder, "cpu")


@pytest.mark.parametrize("wrong, message", [
    ({"sampler": "heun"}, "unknown sampler 'heun'; take one of euler_ancestral"), ({"steps": 0}, "0 steps"),
    ({"resolution": 36}, "these weights cannot use a resolution of 36; take a multiple of 8$"),
    ({"resolution": 0}, "resolution = 0 should"), ({"resolution": -8}, "resolution = -8 should be a whole"),
    ({"seed": [1]}, "2 captions, 1 seed: give lists of equal length, or a single value"),
    ({"cfg_text": [1.0] * 3}, "2 captions, 3 cfg_text: give lists of equal length"),
    ({"captions": 3}, "captions = 3 should be a text or a list, each item a text"),
    ({"strength": 0.5}, "SDEdit needs both images and strength"), ({"images": []}, "SDEdit needs both"),
], ids=str)
def test_mistakes_are_value_errors(painter, wrong, message):
    with pytest.raises(ValueError, match=message):
        painter.generate(**{"captions": CAPTIONS[:2]} | wrong)


def test_single_values_and_lists(painter):
    settings = {"steps": 1, "seed": 5, "resolution": 32}
    single, [listed] = painter.generate("a", **settings), painter.generate(["a"], **settings)
    assert single == listed
    for many in (painter.generate(["a", "a"], **settings), painter.generate("a", cfg_text=[3, 3], **settings),
                 painter.generate("a", **settings | {"seed": [5, 6]})):
        assert len(many) == 2 and difference(many[0], single) <= 1 and difference(many[1], single) > 1


def test_a_random_seed_is_kept_and_a_callback_sees_every_step(painter):
    steps = []
    first = painter.generate("a", resolution=32, callback=lambda step, latents: steps.append(step))
    assert steps == [0, 1, 2, 3, 4, 5]
    seed = painter.last_seed
    assert first == painter.generate("a", resolution=32, seed=seed) != painter.generate("a", resolution=32)
