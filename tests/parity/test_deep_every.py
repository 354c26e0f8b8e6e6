"""deep_every (DeepCache) against a slow loop: whole networks of diffusers, whose deep features are exchanged.

In each step the slow loop runs every block, branch by branch. The input of the last block but one has two
halves: deep features and a skip connection. Every N-th step stores the deep half; the other steps reuse it.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from comparing import relative_error
from test_prompt_to_prompt import CAPTIONS, GUIDANCE, SEEDS, SHARES, STEPS, folders, make, painters  # noqa: F401
from test_unet import CONFIGS, pair
from tiny_editor import write_tiny_editor

from nanoip2p import prompt_to_prompt
from nanoip2p.diffusion import NoiseSchedule, plan
from nanoip2p.editor import Editor
from nanoip2p.guidance import guided_denoiser, text_guided_denoiser
from nanoip2p.samplers import SAMPLERS
from nanoip2p.text_to_image import TextToImage
from nanoip2p.unet import UNet

CASES = [(sampler, 2, 7.5, 1.5, (7, 5)) for sampler in SAMPLERS] + [  # with three, two and one branches
    ("euler", 3, 3.0, 1.0, (9, 10)), ("ddim", STEPS + 1, 1.0, 1.0, (8, 8)), ("euler", 1, 7.5, 1.5, (8, 8))]


def exchange(network, kept: dict, is_whole):
    """Hook on `network`: store the deep features in `kept` if is_whole(), else take those in `kept`."""
    def hook(_, given):
        deep, skip = given[0].split([given[0].shape[1] - width, width], dim=1)
        if is_whole():
            kept["deep"] = deep
        return (torch.cat([kept["deep"], skip], dim=1), *given[1:])

    width, blocks = network.config.block_out_channels[0], network.up_blocks[-1].resnets
    return blocks[len(blocks) - 2].register_forward_pre_hook(hook)


def slow(theirs, sampler, levels, x, branches, every):
    """Latents from noise x, guided by branches (weight, picture, text). Each branch has its own features."""
    numbers, kept = {sigma: i for i, sigma in enumerate(levels.sigmas[:, 0].tolist())}, [{} for _ in branches]

    def denoise(x, sigma):
        z, noise, step = x / (sigma**2 + 1) ** 0.5, 0, numbers[sigma]
        for (weight, image, text), own in zip(branches, kept):
            hook = exchange(theirs, own, lambda: step % every == 0)
            z_in = z if image is None else torch.cat([z, image], dim=1)
            noise = noise + weight * theirs(z_in, levels.timesteps[step], text).sample
            hook.remove()
        return x - sigma * noise

    return SAMPLERS[sampler](denoise, x, levels.sigmas, torch.Generator().manual_seed(1))


def inputs(config, size, batch=2):
    g = torch.Generator().manual_seed(sum(size))
    noise, image = torch.randn(2, batch, 4, *size, generator=g)
    text, null = torch.randn(2, batch, 7, config.cross_attention_dim, generator=g)
    return noise, image, text, null


@torch.no_grad()
@pytest.mark.parametrize("sampler, every, cfg_text, cfg_image, size", CASES)
def test_an_editor_equals_the_slow_loop(sampler, every, cfg_text, cfg_image, size):
    ours, theirs = pair("editor, attention below")
    levels = plan(NoiseSchedule(), sampler, STEPS)
    noise, image, text, null = inputs(ours.config, size)
    x = noise * levels.start_scale
    branches = [(cfg_text, image, text), (cfg_image - cfg_text, image, null),
                (1 - cfg_image, torch.zeros_like(image), null)]
    branches = [branch for branch in branches if branch[0]]
    wanted = slow(theirs, sampler, levels, x, branches, every)
    for low_memory in (False, True):
        made, whole = (SAMPLERS[sampler](
            guided_denoiser(ours, levels, image, text, null, cfg_text, cfg_image, low_memory, n),
            x, levels.sigmas, torch.Generator().manual_seed(1)) for n in (every, 1))
        assert relative_error(made, wanted) < 1e-5
        assert torch.equal(made, whole) if every == 1 else relative_error(made, whole) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("size, every", [((8, 8), 2), ((7, 5), 3)], ids=str)
@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name].out_channels == 4
                                  and CONFIGS[name].in_channels == 4])
def test_every_network_equals_the_slow_loop(name, size, every):
    """Also networks with cross-attention in the first level. Before it, both branches share the latents."""
    ours, theirs = pair(name)
    levels = plan(NoiseSchedule(), "euler", STEPS)
    noise, _, text, null = inputs(ours.config, size)
    x, scales = noise * levels.start_scale, torch.tensor([3.0, 1.5])
    made = SAMPLERS["euler"](text_guided_denoiser(ours, levels, text, null, scales, every), x, levels.sigmas)
    weights = scales[:, None, None, None]
    wanted = slow(theirs, "euler", levels, x, [(weights, None, text), (1 - weights, None, null)], every)
    assert relative_error(made, wanted) < 1e-5


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    return Editor.load(write_tiny_editor(tmp_path_factory.mktemp("weights")))


@pytest.mark.parametrize("every, whole", [(1, 7), (2, 4), (3, 3), (100, 1)])
@pytest.mark.parametrize("low_memory", [False, True])
def test_whole_steps_and_bits(editor, every, whole, low_memory):
    """The lowest blocks run in the first and in every N-th step. N = 1 changes nothing."""
    calls = []
    hook = editor.unet.mid_block.resnets[0].register_forward_hook(lambda *_: calls.append(1))
    given = {"steps": 7, "seed": 3, "low_memory": low_memory, "callback": lambda _, z: seen.append(z)}
    picture, seen = torch.rand(3, 24, 32), []
    editor.edit(picture, "make it night", deep_every=every, **given)
    hook.remove()
    assert len(calls) == whole * (3 if low_memory else 1)
    often, seen = seen, []
    editor.edit(picture, "make it night", **given)
    assert torch.equal(torch.stack(often), torch.stack(seen)) == (every == 1)


def test_one_picture_keeps_no_features_for_the_next(editor):
    pictures, texts = [torch.rand(3, 24, 32), torch.rand(3, 24, 32)], ["make it night", "red"]
    given = {"steps": 5, "deep_every": 3, "batch": 1}
    both = editor.edit(pictures, texts, seed=[3, 4], **given)
    assert editor.edit(pictures[1], texts[1], seed=4, **given).tobytes() == both[1].tobytes()


@pytest.mark.parametrize("strength", [None, 0.7])
def test_a_painter_begins_with_a_whole_step(tmp_path, strength):
    """SDEdit starts at a later step, whose number may be no multiple of N."""
    painter = TextToImage.load(write_tiny_editor(tmp_path, in_channels=4))
    given = {"steps": 8, "seed": 3, "strength": strength, "images": strength and torch.rand(3, 48, 48)}
    whole, calls = painter.generate("a boat", **given), []
    painter.unet.mid_block.resnets[0].register_forward_hook(lambda *_: calls.append(1))
    kept = painter.generate("a boat", deep_every=3, **given)
    assert len(calls) == (3 if strength is None else 2) and kept.tobytes() != whole.tobytes()


@pytest.mark.parametrize("net", ["deep", "flat"])
@pytest.mark.parametrize("inject, every", [("self", 2), ("cross", 2), ("both", 2), ("both", STEPS + 1)])
def test_pairs_and_heat_equal_the_slow_loop(painters, net, inject, every, monkeypatch):  # noqa: F811
    """The heat maps sum over the steps with the whole UNet. Injection and blend act in every step."""
    given = {"blend": ("house", "boat"), "deep_every": every}
    painter, captions = painters[net], CAPTIONS["swap"][:2]
    model = make(painter, captions, inject, **given)
    latents, heat = model.sample(SEEDS, SHARES, GUIDANCE)

    steps, kept, forward = itertools.count(), {}, UNet.forward
    state = SimpleNamespace(whole=True)

    def run(unet, *inputs):
        state.whole = next(steps) % every == 0
        return forward(unet, *inputs)

    add_heat = prompt_to_prompt.Injection.add_heat
    monkeypatch.setattr(UNet, "forward", run)
    monkeypatch.setattr(prompt_to_prompt.Injection, "add_heat",
                        lambda *given: add_heat(*given) if state.whole else None)
    slow_model = make(painter, captions, inject, **given | {"deep_every": 1})
    hook = exchange(painter.unet, kept, lambda: state.whole)
    wanted, wanted_heat = slow_model.sample(SEEDS, SHARES, GUIDANCE)
    hook.remove()
    assert relative_error(latents, wanted) < 1e-5 and relative_error(heat, wanted_heat) < 1e-5


def test_none_is_two_runs_with_kept_features(painters):  # noqa: F811
    model = make(painters["flat"], CAPTIONS["swap"][:2], "none", deep_every=3)
    [(source, _)] = model.paint([5], [0.5], [3.0])
    wanted = painters["flat"].generate(seed=5, cfg_text=3.0,
                                       **model.settings | {"captions": CAPTIONS["swap"][0]})
    assert model.settings["deep_every"] == 3
    assert source.tobytes() == wanted.tobytes()


@torch.no_grad()
def test_features_outlive_the_memory_of_a_cuda_graph():
    """A replayed graph overwrites its last output."""
    ours, _ = pair("editor, attention below")
    levels = plan(NoiseSchedule(), "euler", STEPS)
    noise, image, text, null = inputs(ours.config, (8, 8))
    memory = {}

    class Graphed(torch.nn.Module):
        project_context, project_timesteps = ours.project_context, ours.project_timesteps

        def forward(self, *given, deep):
            for old in memory.values():
                old.fill_(float("nan"))
            outputs = ours(*given, deep=deep)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            memory.update(enumerate(output.clone() for output in outputs))
            return tuple(memory.values()) if len(outputs) == 2 else memory[0]

    runs = [SAMPLERS["euler"](guided_denoiser(unet, levels, image, text, null, 7.5, 1.5, deep_every=2),
                              noise * levels.start_scale, levels.sigmas) for unet in (ours, Graphed())]
    assert torch.equal(*runs)
