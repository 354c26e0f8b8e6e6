"""Prompt-to-Prompt without stored maps, against a reference that stores them (hertz.py), and by property."""

from collections import defaultdict

import hertz
import pytest
import torch
import torch.nn.functional as F
from comparing import randomise, relative_error
from test_editor import difference
from tiny_editor import write_tiny_editor
from torch.utils._python_dispatch import TorchDispatchMode

from nanoip2p import prompt_to_prompt
from nanoip2p.diffusion import NoiseSchedule
from nanoip2p.prompt_to_prompt import PairPainter, attended, blend_locally, hot_words
from nanoip2p.text_to_image import TextToImage
from nanoip2p.unet import UNet, UNetConfig, attend

D, CD, U, CU = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
DEEP = UNetConfig(  # the levels of Stable Diffusion 1.x
    block_out_channels=(8, 16, 24, 24), down_block_types=(CD, CD, CD, D), up_block_types=(U, CU, CU, CU),
    layers_per_block=1, attention_head_dim=2, cross_attention_dim=32, norm_num_groups=4)
SIDE = {"deep": (64, 4), "flat": (48, 6)}  # resolution; side of the heat maps (16 in SD 1.x)
STEPS = 5  # then the local blend leaves out the first
CAPTIONS = {  # each word is one token, except castle and small
    "swap": ("turn the red house into a boat", "turn the blue house into a boat", hertz.replace),
    "swaps": ("the red house and a boat", "a blue boat and the boat", hertz.replace),
    "longer word": ("the red house into a boat", "the red castle into a boat", hertz.replace),
    "shorter word": ("the red castle into a boat", "the red house into a boat", hertz.replace),
    "more words": ("a red house", "make a small red house blue", hertz.refine),
    "fewer words": ("make a small red house blue", "a red house", hertz.refine),
    "same": ("a red house into a boat", "a red house into a boat", hertz.refine),
}
SHARES, GUIDANCE, SEEDS = [0.3, 1.0, 0.6], [7.5, 1.0, 3.0], [5, 6, 7]  # of the three pairs in a batch


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random text-to-image models: one with the levels of SD 1.x, one with two levels."""
    found = {}
    for name in SIDE:
        folder = tmp_path_factory.mktemp("weights") / name
        found[name] = write_tiny_editor(folder, NoiseSchedule(steps_offset=1).to_json(), in_channels=4)
    peer = hertz.diffusers.UNet2DConditionModel.from_config(DEEP.to_json())
    randomise(peer, 3).save_pretrained(found["deep"] / "unet")
    return found


@pytest.fixture(scope="module")
def painters(folders):
    return {name: TextToImage.load(folder, "cpu") for name, folder in folders.items()}


@pytest.fixture(scope="module")
def peers(folders):
    return {name: hertz.open_peer(folder, "euler_ancestral") for name, folder in folders.items()}


def make(painter, captions, inject, **settings):
    net = "deep" if len(painter.unet.config.block_out_channels) == 4 else "flat"
    return PairPainter(painter, *captions, inject, resolution=SIDE[net][0],
                       **{"steps": STEPS, "sampler": "euler_ancestral"} | settings)


def watch_attention(network, run):
    """The result of run(), and for each attention layer the list of its outputs, one per step."""
    outputs, hooks = defaultdict(list), []
    for name, module in network.named_modules():
        if name.endswith((".attn1", ".attn2")):
            hooks.append(module.register_forward_hook(
                lambda _, __, output, name=name: outputs[name].append(output.clone())))
    try:
        return run(), outputs
    finally:
        for hook in hooks:
            hook.remove()


def rows_of(pairs):
    """Our rows as (pair, row of the reference), in the order of PairPainter.sample."""
    return [(j, 2 * text + is_edit) for text in (True, False) for is_edit in (True, False)
            for j in range(pairs)]


def compare(painter, peer, kind, inject, sampler="euler_ancestral", weights=None, windows=None, blend=None,
            negative="", shares=(0.3, 1.0), steps=None):
    """We run all pairs in one batch, the reference runs one by one. Layers, latents and pictures agree.

    The pairs inject in different numbers of steps: one and three of four.
    """
    source, edit, edit_text = CAPTIONS[kind]
    net = "deep" if len(painter.unet.config.block_out_channels) == 4 else "flat"
    resolution, side = SIDE[net]
    steps, seeds = steps or (STEPS if blend else 4), SEEDS[: len(shares)]
    peer.scheduler = hertz.SCHEDULERS[sampler].from_config(peer.scheduler.config)
    equalizer = torch.ones(77)
    for word, factor in (weights or {}).items():
        equalizer[hertz.places(peer.tokenizer, edit, word)] = factor

    model = make(painter, (source, edit), inject, sampler=sampler, steps=steps, negative=negative,
                 reweight=weights, windows=windows, blend=blend)
    (latents, _), ours = watch_attention(
        painter.unet, lambda: model.sample(seeds, shares, GUIDANCE[: len(shares)]))
    wanted, layers, controls = [], [], []
    for j, seed in enumerate(seeds):
        controls.append(hertz.Control(
            inject, shares[j], steps, side * side, edit_text(peer.tokenizer, source, edit), equalizer,
            [(hertz.places(peer.tokenizer, edit, word), *window) for word, window in (windows or {}).items()],
            blend and tuple(hertz.places(peer.tokenizer, text, word)
                            for text, word in zip((source, edit), blend)), prompt_to_prompt.BLEND_THRESHOLD))
        found = watch_attention(peer.unet, lambda: hertz.sample(  # noqa: B023
            peer, source, edit, seed, GUIDANCE[j], resolution, controls[-1], negative))  # noqa: B023
        wanted.append(found[0])
        layers.append(found[1])

    rows = rows_of(len(shares))
    assert set(ours) == set(layers[0]) and len(ours) >= 6
    first = next(iter(ours))
    for name, steps_of_layer in ours.items():
        assert len(steps_of_layer) == steps
        for step, output in enumerate(steps_of_layer):
            given = rows
            if name == first and model.share_prefix:  # rows with and without caption are still equal
                given = [(j, row) for j, row in rows if row >= 2]
                alike = [layers[j][name][step] for j in range(len(shares))]
                assert all(relative_error(maps[:2], maps[2:]) < 1e-6 for maps in alike)
            reference = torch.stack([layers[j][name][step][row] for j, row in given])
            assert relative_error(output, reference) < 1e-5, (name, step)
    edits, sources = latents.chunk(2)
    for j, reference in enumerate(wanted):
        assert relative_error(torch.stack([sources[j], edits[j]]), reference) < 1e-5, j
        painted = hertz.pictures(peer, reference)
        for a, b in zip(model.painter.decode(torch.stack([sources[j], edits[j]])), painted):
            assert difference(a, b) <= 1
    if blend:
        blended = torch.stack([(source == edit).all(0).float().mean() for source, edit in wanted])
        assert blended.max() > 0.1 and blended.min() < 0.9, blended


@pytest.mark.parametrize("kind, inject", [
    *((kind, "cross") for kind in CAPTIONS), ("more words", "self"), ("longer word", "both"),
    ("more words", "both"), ("same", "both")])
def test_equals_the_maps_of_hertz(painters, peers, kind, inject):
    """The mapping of tokens acts on cross-attention only, and in the same way for "cross" and "both"."""
    compare(painters["deep"], peers["deep"], kind, inject)


@pytest.mark.parametrize("inject", ["self", "cross", "both"])
def test_equals_the_maps_of_hertz_in_another_network(painters, peers, inject):
    compare(painters["flat"], peers["flat"], "longer word", inject, shares=SHARES)


@pytest.mark.parametrize("inject", ["self", "both"])
def test_equals_the_maps_of_hertz_with_v_prediction(tmp_path, inject):
    schedule = NoiseSchedule(steps_offset=1, prediction_type="v_prediction").to_json()
    folder = write_tiny_editor(tmp_path, schedule, in_channels=4)
    compare(TextToImage.load(folder, "cpu"), hertz.open_peer(folder, "euler_ancestral"), "swap", inject)


@pytest.mark.parametrize("settings", [
    {"sampler": "euler"}, {"sampler": "ddim"}, {"sampler": "dpmpp_2m"},
    {"sampler": "lcm"}, {"negative": "a boat at night"},
    {"weights": {"blue": 3.0, "house": 0.5}}, {"weights": {"blue": -2.0, "small": 0.0}},
    {"windows": {"small": (0.2, 0.8)}}, {"windows": {"red": (0.0, 0.9), "house": (0.5, 2.0)}},
    {"windows": {"make": (0.5, 1.1)}, "shares": [0.0, 0.2]},
    {"blend": ("house", "house")}, {"blend": ("red", "blue"), "sampler": "euler"},
    {"weights": {"small": 4.0}, "windows": {"red": (0.2, 0.8)}, "blend": ("red", "make")},
    {"steps": 1}, {"shares": [0.0, 0.0]}, {"shares": [0.5, 0.5, 0.51], "steps": 5}, {"shares": [1.1, 1.1]},
], ids=str)
def test_equals_the_maps_of_hertz_with_every_setting(painters, peers, settings, monkeypatch):
    if "blend" in settings:  # in random networks, all heat exceeds 0.3 of the maximum
        monkeypatch.setattr(prompt_to_prompt, "BLEND_THRESHOLD", 0.9)
    compare(painters["flat"], peers["flat"], "more words", "both", **settings)


@pytest.mark.parametrize("kind, inject, settings", [
    ("longer word", "cross", {"weights": {"castle": 2.0}, "windows": {"castle": (0.0, 0.6)}}),
    ("swap", "self", {"blend": ("house", "boat")}), ("swaps", "cross", {"blend": ("house", "boat")}),
], ids=str)
def test_equals_the_maps_of_hertz_with_settings_in_a_deep_network(
        painters, peers, kind, inject, settings, monkeypatch):
    monkeypatch.setattr(prompt_to_prompt, "BLEND_THRESHOLD", 0.9)
    compare(painters["deep"], peers["deep"], kind, inject, **settings)


@pytest.mark.parametrize("inject", ["self", "both"])
def test_heat_is_the_sum_of_the_maps(painters, peers, inject):
    """With more words than the width of a head, so that several calls are needed."""
    source, edit, edit_text = CAPTIONS["more words"]
    resolution, side = SIDE["deep"]
    model, peer = make(painters["deep"], (source, edit), inject, sampler="euler"), peers["deep"]
    peer.scheduler = hertz.SCHEDULERS["euler"].from_config(peer.scheduler.config)
    columns = [model.columns([[i] for i in range(1, 30)])] * 2
    _, heat = model.sample([4, 5], [0.5, 0.8], [3.0, 2.0], columns)
    assert heat.shape == (4, 29, side, side)
    for j, (seed, share, cfg_text) in enumerate(((4, 0.5, 3.0), (5, 0.8, 2.0))):
        control = hertz.Control(inject, share, STEPS, side**2, edit_text(peer.tokenizer, source, edit))
        hertz.sample(peer, source, edit, seed, cfg_text, resolution, control)
        maps = control.maps[..., 1:30].transpose(1, 2).unflatten(2, (side, side))
        assert relative_error(heat[[2 + j, j]], maps) < 1e-5
        assert maps.std(dim=(2, 3)).min() > 0.01


def test_the_reference_reacts(peers):
    """Otherwise, two models that inject nothing or ignore the text would count as equal."""
    peer, (resolution, side) = peers["deep"], SIDE["deep"]
    peer.scheduler = hertz.SCHEDULERS["euler_ancestral"].from_config(peer.scheduler.config)
    red, blue, castle = "a red house", "a blue house", "a castle house"

    def run(mode, p=0.6, edit=blue, seed=3, coarse=side * side, source=red, **settings):
        control = hertz.Control(
            mode, p, 4, coarse, hertz.replace(peer.tokenizer, source, edit), **settings)
        return hertz.sample(peer, source, edit, seed, 3.0, resolution, control)

    none = run("none")
    assert relative_error(none[1], none[0]) > 0.1 and relative_error(run("none", seed=4), none) > 0.5
    assert relative_error(run("none", edit=castle)[1], none[1]) > 0.05
    both, heavy = run("both"), torch.ones(77)
    heavy[2] = 3.0
    others = {
        "nothing": none, "self": run("self"), "cross": run("cross"), "p": run("both", 0.8),
        "layers": run("both", coarse=4 * side * side), "word": run("both", edit=castle),
        "weights": run("both", equalizer=heavy), "windows": run("both", windows=[([2], 0.2, 0.4)]),
        "blend": run("both", blend=([3], [2]), threshold=0.9)}
    for name, other in others.items():
        assert torch.equal(other[0], both[0]), name
        assert relative_error(other[1], both[1]) > 1e-3, name
    assert relative_error(run("self", 1.1, edit=red), none[[0, 0]]) < 1e-5


@pytest.fixture(params=["self", "cross", "both"])
def any_mode(request):
    return request.param


@pytest.mark.parametrize("net", SIDE)
def test_shared_rows_and_projected_texts_change_nothing(painters, any_mode, net, monkeypatch):
    """4 B rows of latents, with the plain text in every step, give the same result.

    In the flat network, "both" injects before the first cross-attention, only in rows with a caption. So rows
    cannot be shared there.
    """
    settings = {} if any_mode == "self" else {
        "reweight": {"blue": 2.0}, "windows": {"small": (0.1, 0.6), "red": (0.5, 2.0)}}
    model = make(painters[net], CAPTIONS["more words"][:2], any_mode, blend=("house", "blue"), steps=3,
                 **settings)
    given, texts, forward = [], [], UNet.forward

    def watch(self, z, *rest):
        given.append(len(z))
        return forward(self, z, *rest)

    def plain_forward(self, z, timestep, text, inject):
        return forward(self, z.repeat(12 // len(z), 1, 1, 1), timestep, text, inject)

    monkeypatch.setattr(UNet, "forward", watch)
    shared = model.sample(SEEDS, SHARES, GUIDANCE)
    assert given == [6 if (net, any_mode) != ("flat", "both") else 12] * 3
    monkeypatch.setattr(UNet, "forward", plain_forward)
    monkeypatch.setattr(UNet, "project_context", lambda self, text, rows=None: (texts.append(text), text)[1])
    plain = model.sample(SEEDS, SHARES, GUIDANCE)
    assert [len(text) for text in texts] == [12]
    for a, b in zip(shared, plain):
        assert relative_error(a, b) < 1e-5


def test_sources_are_untouched_and_no_share_is_no_injection(painters, any_mode, monkeypatch):
    model = make(painters["deep"], CAPTIONS["more words"][:2], any_mode, steps=3)
    injected, _ = model.sample(SEEDS, SHARES, GUIDANCE)
    without, _ = model.sample(SEEDS, [0.0] * 3, GUIDANCE)
    forward = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, z, t, text, inject=None: forward(self, z, t, text))
    plain, _ = model.sample(SEEDS, [0.0] * 3, GUIDANCE)
    assert torch.equal(without, plain)
    assert torch.equal(injected[3:], plain[3:])
    assert min(relative_error(a, b) for a, b in zip(injected[:3], plain[:3])) > 1e-3


def test_a_step_without_injection_is_an_ordinary_one(painters, any_mode, monkeypatch):
    """It uses plain attention, which speed/fast.py can replace."""
    given, forward = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, z, t, text, given_attend: (
        given.append(given_attend is not attend), forward(self, z, t, text, given_attend))[1])
    model = make(painters["deep"], CAPTIONS["more words"][:2], any_mode)
    model.sample(SEEDS[:2], [0.5, 0.0], GUIDANCE[:2])
    assert given == [step / (STEPS - 1) < 0.5 for step in range(STEPS)] and any(given)


def test_pairs_do_not_depend_on_each_other(painters, any_mode):
    model = make(painters["deep"], CAPTIONS["longer word"][:2], any_mode, blend=("house", "castle"), steps=3)
    together, _ = model.sample(SEEDS, SHARES, GUIDANCE)
    order = [2, 0, 1]
    turned, _ = model.sample(*([given[j] for j in order] for given in (SEEDS, SHARES, GUIDANCE)))
    assert relative_error(turned, together[order + [3 + j for j in order]]) < 1e-5
    for j in range(3):
        alone, _ = model.sample([SEEDS[j]], [SHARES[j]], [GUIDANCE[j]])
        assert relative_error(alone, together[[j, 3 + j]]) < 1e-5


def test_none_is_two_plain_runs(painters):
    model = make(painters["flat"], CAPTIONS["swap"][:2], "none", negative="a boat")
    pairs = model.paint(SEEDS, SHARES, GUIDANCE)
    plain = [painters["flat"].generate(
        [caption] * 3, steps=STEPS, cfg_text=GUIDANCE, seed=SEEDS, sampler="euler_ancestral",
        resolution=SIDE["flat"][0], negative="a boat") for caption in CAPTIONS["swap"][:2]]
    for pair, wanted in zip(pairs, zip(*plain)):
        assert max(map(difference, pair, wanted)) <= 1 < difference(*pair)


def test_same_captions_are_same_pictures(painters, any_mode):
    for source, edit in make(painters["flat"], ["a red house"] * 2, any_mode).paint(SEEDS, SHARES, GUIDANCE):
        assert difference(source, edit) <= 1


def test_paint_gives_source_and_edit_in_the_order_of_seeds(painters, any_mode):
    model = make(painters["flat"], CAPTIONS["swap"][:2], any_mode)
    with hertz.torch.no_grad():
        latents, _ = model.sample(SEEDS, SHARES, GUIDANCE)
    edits, sources = (painters["flat"].decode(half) for half in latents.chunk(2))
    assert model.paint(SEEDS, SHARES, GUIDANCE) == list(zip(sources, edits))


class Operations(TorchDispatchMode):
    """Records every operation and the shapes of its results."""

    def __init__(self):
        super().__init__()
        self.names, self.shapes = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.names.add(function.overloadpacket.__name__)
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tuple(tensor.shape))
        return made


def test_no_map_is_formed(painters, peers, any_mode):
    """Latents of 24 x 24: no number of positions is also the width of a layer or the side of a map."""
    settings = {"blend": ("house", "boat"), "steps": 2, "sampler": "euler", "resolution": 96}
    source, edit, edit_text = CAPTIONS["swaps"]
    model = PairPainter(painters["deep"], source, edit, any_mode, **settings)
    sample = PairPainter.sample.__wrapped__  # inference mode hides operations inside attention
    with torch.no_grad(), Operations() as ours:
        sample(model, SEEDS[:2], [0.5, 0.9], GUIDANCE[:2], model.blend)
    with Operations() as theirs:
        hertz.sample(peers["deep"], source, edit, 1, 3.0, 96, hertz.Control(
            any_mode, 0.5, 2, 36, edit_text(peers["deep"].tokenizer, source, edit)))
    positions = [(24 * 24), (12 * 12), (6 * 6), (3 * 3)]
    maps = {(rows, keys) for rows in positions for keys in (rows, 77)}
    assert {shape[-2:] for shape in theirs.shapes} >= maps  # the reference's maps are recorded
    assert not {shape[-2:] for shape in ours.shapes} & maps
    assert "_scaled_dot_product_flash_attention_for_cpu" in ours.names
    assert not any("softmax" in name for name in ours.names)


def test_a_text_is_projected_once_and_not_in_every_step(painters):
    model, calls = make(painters["flat"], CAPTIONS["swap"][:2], "both"), defaultdict(int)
    hooks = []
    for name, layer in painters["flat"].unet.named_modules():
        if name.endswith((".to_q", ".to_k", ".to_v")):
            hooks.append(layer.register_forward_hook(
                lambda *_, name=name: calls.update({name[-10:]: calls[name[-10:]] + 1})))
    model.sample(SEEDS, [0.0, 0.0, 1.1], [3.0] * 3)
    for hook in hooks:
        hook.remove()
    layers = calls["attn2.to_k"]
    assert layers == calls["attn2.to_v"] == 4 and calls["attn2.to_q"] == calls["attn1.to_k"] == 4 * STEPS


def test_blend_by_hand():
    """Each picture has one hot spot: the edit in a corner, the source beside it. Heat below 0.3 is cold."""
    heat = torch.zeros(2, 1, 8, 8)
    heat[0, 0, 0, 0], heat[0, 0, 7, 7], heat[1, 0, 4, 4], heat[1, 0, 0, 7] = 1.0, 0.29, 10.0, 2.9
    x = torch.stack([torch.ones(3, 16, 16), torch.zeros(3, 16, 16)])
    blended = blend_locally(x, heat)
    wanted = torch.zeros(16, 16)
    wanted[:4, :4] = wanted[6:12, 6:12] = 1
    assert torch.equal(blended[0], wanted.expand(3, 16, 16)) and torch.equal(blended[1], x[1])
    heat[0, 0, 7, 7] = 0.31
    wanted[12:, 12:] = 1
    assert torch.equal(blend_locally(x, heat)[0, 0], wanted)


def test_a_blend_of_several_words_is_the_union_of_those_that_point_somewhere():
    """Words of both captions count. A word that is hot in more than `most` is ignored. No word: no blend."""
    heat = torch.zeros(4, 3, 8, 8)  # two pairs, three words
    heat[0, 0, 0, 0], heat[2, 1, 7, 7], heat[0, 2], heat[3, 2, :, :4] = 1, 1, 1, 1
    x = torch.cat([torch.ones(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)])
    wanted = torch.zeros(16, 16)
    wanted[:4, :4] = wanted[12:, 12:] = 1
    left = F.pad(torch.ones(16, 10), (0, 6))
    for most, first, second in ((0.5, wanted, 1), (0.9, wanted, left), (0.05, 1, 1)):
        blended = blend_locally(x, heat, most)
        assert torch.equal(blended[0], first * x[0]) and torch.equal(blended[1], second * x[1])
        assert torch.equal(blended[2:], x[2:])
    assert torch.equal(blend_locally(x, heat)[0], x[0])


def test_the_maps_of_a_blend_follow_those_of_the_words(painters):
    model = make(painters["flat"], CAPTIONS["swap"][:2], "both", blend=([[3], []], [[3], [4]]))
    words = [model.columns([[1], [2], [5]]) for _ in range(2)]
    (alone, blend), (latents, maps) = (model.sample(SEEDS, SHARES, GUIDANCE, given)
                                       for given in (None, words))
    assert relative_error(latents, alone) < 1e-5
    assert maps.shape[1] == 3 + blend.shape[1] and relative_error(maps[:, 3:], blend) < 1e-5


def test_a_blend_works_without_injection(painters, monkeypatch):
    monkeypatch.setattr("nanoip2p.prompt_to_prompt.BLEND_THRESHOLD", 0.9)  # random maps are flat
    plain, blended = (make(painters["flat"], CAPTIONS["swap"][:2], "none", blend=blend)
                      for blend in (None, ([[3], []], [[3], [4]])))
    (before, _), (after, heat) = (
        model.sample(SEEDS, SHARES, GUIDANCE) for model in (plain, blended))
    hot = attended(hot_words(heat), before.shape[2:])
    assert torch.equal(before[3:], after[3:]) and not torch.equal(before[:3], after[:3])
    assert torch.equal(torch.where(hot, 0, after[:3]), torch.where(hot, 0, after[3:]))


@pytest.mark.parametrize("wrong, message", [
    ({"inject": "all"}, "unknown mode 'all' of injection; take one of self, cross, both, none"),
    ({"inject": "self", "reweight": {"blue": 2}}, "reweighting and windows need"),
    ({"inject": "none", "windows": {"blue": (0, 1)}}, "reweighting and windows need"),
    ({"blend": ("red", "blue"), "sampler": "ddim"}, "a local blend needs the sampler euler"),
    ({"inject": "cross", "reweight": {"red": 2}}, "'red' is not in 'turn the blue house into a boat'"),
    ({"inject": "cross", "windows": {"": (0, 1)}}, "'' is not in"),
    ({"blend": ("blue", "blue")}, "'blue' is not in 'turn the red house into a boat'"),
    ({"blend": ("red", "red")}, "'red' is not in 'turn the blue house into a boat'"),
    ({"sampler": "heun"}, "unknown sampler 'heun'"), ({"resolution": 36}, "take a multiple of 8"),
    ({"steps": 0}, "cannot take 0 steps"),
], ids=str)
def test_mistakes_are_value_errors(painters, wrong, message):
    with pytest.raises(ValueError, match=message):
        PairPainter(painters["flat"], *CAPTIONS["swap"][:2], **{"inject": "self"} | wrong)


def test_a_window_includes_its_beginning_and_not_its_end(painters):
    model = PairPainter(painters["flat"], "a red house", "a blue house", "cross", steps=5,
                        windows={"blue": (0.25, 0.75)})

    def injecting(step):
        """The tokens that use the source's maps. With p = 0: only the word with a window."""
        own = model.injection(step / 4, torch.tensor([False])).own_weights[0].tolist()
        return [token for token, share in enumerate(own) if share == 0]

    assert [injecting(step) for step in range(5)] == [[], [2], [2], [], []]  # [2]: start token, "a", word
