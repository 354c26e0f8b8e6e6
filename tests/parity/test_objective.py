"""Section 3.2: the random numbers of a sample, the order of the samples, the UNet's input, the loss."""

import math
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comparing import randomise, relative_error
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from PIL import Image
from tiny_configs import tiny_unet
from tiny_editor import write_tiny_painter
from torch.utils.data import DataLoader

from nanoip2p.checkpoint.load import load_model, open_checkpoint, widen
from nanoip2p.dataset.layouts import Pair
from nanoip2p.diffusion import NoiseSchedule
from nanoip2p.objective import learning_rate, loss_weight, model_input, prediction_losses
from nanoip2p.training.config import DROP
from nanoip2p.training.samples import (
    Samples,
    collate,
    draw,
    load_pair,
    order,
    sample_numbers,
    validation_batches,
)
from nanoip2p.unet import UNet

ALPHAS = NoiseSchedule().alphas_cumprod()
SHAPE = (4, 2, 2)


class Names:
    """A source that gives names in place of pictures. Names that begin with "bad" are broken pictures."""

    def get(self, pair, flip):
        if pair.edit.startswith("bad"):
            raise ValueError(f"{pair.before} is broken")
        return str(pair.before), str(pair.after), f"{pair.edit}{' mirrored' * flip}"


def items_of(*sizes, bad=()):
    """Items with these numbers of pairs. The edit of pair j of item i is "i.j"."""
    return [tuple(Pair(Path(f"{i}.{j}_0"), f"{'bad ' * (i in bad)}{i}.{j}", Path(f"{i}.{j}_1"))
                  for j in range(size)) for i, size in enumerate(sizes)]


def samples_of(items, seed=0, flips=False, skip_bad=False):
    return Samples(items, Names().get, seed, flips, SHAPE, 1000, skip_bad)


def together(drawn):
    return {key: torch.stack([one[key] for one in drawn]) for key in drawn[0]}


# Random numbers

@pytest.fixture(scope="module")
def many():
    return together([draw(3, number, SHAPE, 1000) for number in range(4000)])


def test_draws_are_a_function_of_seed_and_number_alone():
    torch.manual_seed(1)
    first = draw(5, 17, SHAPE, 1000)
    torch.manual_seed(2)
    torch.rand(3)
    draw(5, 18, SHAPE, 1000)
    again = draw(5, 17, SHAPE, 1000)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("seed, number", [(5, 18), (6, 17), (51, 7), (17, 5), (5, 10**9 + 17)])
def test_draws_differ_between_numbers_and_seeds(seed, number):
    first, other = draw(5, 17, SHAPE, 1000), draw(seed, number, SHAPE, 1000)
    assert all(not torch.equal(first[key], other[key]) for key in first)


def test_noise_has_the_moments_of_unit_normal_numbers_and_is_not_correlated(many):
    for key in ("posterior", "noise"):
        numbers = many[key].double().flatten()
        bound = 5 / len(numbers) ** 0.5
        assert abs(numbers.mean()) < bound and abs(numbers.var() - 1) < bound * 2**0.5
        assert abs((numbers**4).mean() - 3) < bound * 96**0.5
    flat = torch.cat([many[key].flatten(1) for key in ("posterior", "noise")], 1).double()
    flat = torch.cat([flat[:-1], flat[1:]], 1)                  # each sample with the next one
    between = torch.corrcoef(flat.T) - torch.eye(flat.shape[1])
    assert between.abs().max() < 5.5 / len(flat) ** 0.5


def test_timesteps_are_uniform(many):
    timestep = many["timestep"]
    assert timestep.min() >= 0 and timestep.max() <= 999 and timestep.dtype == torch.int64
    counts = torch.bincount(timestep // 50, minlength=20).double()
    assert ((counts - 200) ** 2 / 200).sum() < 45               # 19 degrees of freedom: 43.8 at 0.1%
    seen = set(together([draw(0, number, (1, 1, 1), 3) for number in range(64)])["timestep"].tolist())
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("key", ["which", "flip", "drop"])
def test_the_other_draws_are_uniform_and_independent(many, key):
    counts = torch.bincount((many[key] * 20).long(), minlength=20).double()
    assert len(counts) == 20 and ((counts - 200) ** 2 / 200).sum() < 45
    others = torch.stack([many[key], *(many[name] for name in ("which", "flip", "drop") if name != key),
                          many["timestep"].float(), many["noise"][:, 0, 0, 0]])
    assert torch.corrcoef(others)[0, 1:].abs().max() < 5 / 4000**0.5


# The order of the samples

@pytest.mark.parametrize("count", [1, 2, 24, 25])
def test_every_epoch_visits_every_item_exactly_once_in_another_order(count):
    orders = [order(seed, epoch, count) for seed in (0, 1) for epoch in range(4)]
    assert all(sorted(one.tolist()) == list(range(count)) for one in orders)
    if count > 2:
        assert len({tuple(one.tolist()) for one in orders}) == len(orders)


def test_a_seed_of_any_size_has_an_order():
    assert sorted(order(2**63 - 1, 3, 7).tolist()) == list(range(7))
    assert not torch.equal(order(2**62, 3, 70), order(2**62 + 1, 3, 70))


@pytest.mark.parametrize("batch, accumulate, ranks", [(4, 1, 1), (2, 3, 1), (4, 1, 2), (1, 2, 3), (5, 1, 1)])
def test_numbers_of_all_ranks_and_micro_batches_are_those_of_the_step(batch, accumulate, ranks):
    total, steps = batch * accumulate * ranks, 5
    theirs = [list(sample_numbers(0, steps, accumulate, batch, rank, ranks)) for rank in range(ranks)]
    for own in theirs:
        assert len(own) == steps * accumulate and all(len(numbers) == batch for numbers in own)
    for step in range(steps):
        taken = [n for own in theirs for micro in own[step * accumulate : (step + 1) * accumulate]
                 for n in micro]
        assert sorted(taken) == list(range(step * total, (step + 1) * total))
    for rank, own in enumerate(theirs):                         # a resumed run takes the same samples
        assert list(sample_numbers(2, steps, accumulate, batch, rank, ranks)) == own[2 * accumulate :]


def test_visits_do_not_depend_on_batch_ranks_workers_or_where_a_run_went_on():
    samples = samples_of(items_of(*[2] * 7), flips=True)

    def visited(accumulate, batch, ranks, workers=0, first=0):
        found = {}
        for rank in range(ranks):
            steps = 24 // (accumulate * batch * ranks)
            numbers = sample_numbers(first, steps, accumulate, batch, rank, ranks)
            for one in DataLoader(samples, batch_sampler=numbers, num_workers=workers, collate_fn=collate):
                what = zip(one["text"], one["noise"].flatten(1).tolist())
                found |= dict(zip([int(name.split()[0]) for name in one["name"]], what))
        return found

    plain = visited(1, 4, 1)
    assert sorted(plain) == list(range(24))
    assert plain == visited(3, 2, 2) == visited(1, 3, 4) == visited(2, 6, 1, workers=2)
    assert visited(1, 4, 1, first=2) == {number: plain[number] for number in range(8, 24)}


def test_each_epoch_draws_one_pair_of_each_item_and_in_the_end_all_of_them():
    items, epochs = items_of(1, 2, 4), 200
    samples = samples_of(items, seed=4)
    seen = Counter()
    for epoch in range(epochs):
        texts = [samples[number]["text"] for number in range(3 * epoch, 3 * epoch + 3)]
        assert sorted(text[0] for text in texts) == ["0", "1", "2"]
        seen.update(texts)
    assert sorted(seen) == sorted(pair.edit for item in items for pair in item)
    for edit, count in seen.items():
        wanted = epochs / len(items[int(edit[0])])
        assert abs(count - wanted) < 5 * wanted**0.5
    assert samples_of(items, seed=4)[17]["text"] == samples[17]["text"]


def test_half_of_the_pairs_are_mirrored_when_it_is_asked_for():
    items = items_of(*[1] * 10)
    seen = [samples_of(items, flips=True)[number] for number in range(2000)]
    for some in (seen, [one for one in seen if one["drop"] < 0.15]):    # independent of `drop`
        flips = sum(one["text"].endswith("mirrored") for one in some)
        assert abs(flips - len(some) / 2) < 5 * (len(some) / 4) ** 0.5
    assert not any(samples_of(items)[number]["text"].endswith("mirrored") for number in range(200))


def test_a_broken_picture_is_named_or_the_next_item_takes_its_place():
    bad = (1, 3)
    items, clean = items_of(*[2] * 5, bad=bad), items_of(*[2] * 5)
    strict, lenient = samples_of(items), samples_of(items, skip_bad=True)
    met = 0
    for number in range(20):
        wanted, got = samples_of(clean)[number]["text"], lenient[number]
        place = order(0, number // 5, 5).tolist()
        if int(wanted[0]) not in bad:
            assert got["text"] == wanted == strict[number]["text"] and got["skipped"] == []
            continue
        met += 1
        assert strict[number].keys() == {"error"}
        assert f"{wanted}_0 is broken" in strict[number]["error"] and "--skip-bad" in strict[number]["error"]
        around = place.index(int(wanted[0]))
        following = next(i for i in (place * 2)[around + 1 :] if i not in bad)
        assert got["text"][0] == str(following) and f"{wanted}_0 is broken" == got["skipped"][0]
        assert torch.equal(got["noise"], draw(0, number, SHAPE, 1000)["noise"])
    assert met == 8
    assert collate([lenient[n] for n in range(5)])["skipped"] != []
    assert collate([strict[n] for n in range(5)]).keys() == {"error"}
    assert samples_of(items_of(1, 1, bad=(0, 1)), skip_bad=True)[0].keys() == {"error"}


def test_pictures_are_opened_as_the_network_wants_them(tmp_path):
    for name, red in (("a.png", 0), ("b.png", 255)):
        image = Image.new("RGB", (16, 8), (red, 0, 0))
        image.putpixel((4, 0), (0, 255, 0))                     # the corner of the square crop
        image.save(tmp_path / name)
    get = partial(load_pair, 8, lambda texts: torch.tensor([[len(text) for text in texts]]))
    pair = Pair(tmp_path / "a.png", "four", tmp_path / "b.png")
    before, after, text = get(pair, False)
    assert before.shape == after.shape == (3, 8, 8) and text.tolist() == [4]
    assert before[:, 7, 7].tolist() == [-1, -1, -1] and after[:, 7, 7].tolist() == [1, -1, -1]
    for plain, mirrored in zip((before, after), get(pair, True)):
        assert torch.equal(mirrored, plain.flip(-1)) and not torch.equal(mirrored, plain)


def test_validation_is_the_same_every_time_and_spreads_its_timesteps():
    samples = samples_of(items_of(1, 3, 2), seed=0)
    first, again = (list(validation_batches(samples, 10, 4)) for _ in range(2))
    assert [len(batch["drop"]) for batch in first] == [4, 4, 2]
    for one, other in zip(first, again):
        assert one["text"] == other["text"]
        assert all(torch.equal(one[key], other[key]) for key in ("noise", "posterior", "timestep", "drop"))
    assert torch.cat([batch["timestep"] for batch in first]).tolist() == list(range(50, 1000, 100))
    assert all((batch["drop"] >= 0.15).all() for batch in first)                # no condition is dropped
    whole = next(validation_batches(samples, 10, 10))           # in one batch: the same
    assert torch.equal(whole["noise"], torch.cat([batch["noise"] for batch in first]))


# The UNet's input

def batch_of(count, logvar, seed=0):
    """Moments with mean 1 + i/count before and 2 + i/count after the edit; texts filled with 1 + i."""
    drawn = together([draw(seed, number, SHAPE, 1000) for number in range(count)])
    mean = 1 + torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, *SHAPE) / count
    spread = torch.full_like(mean, logvar)
    text = torch.arange(1.0, count + 1).view(-1, 1, 1).expand(-1, 3, 2)
    return drawn | {"before": torch.cat([mean, spread], 1), "after": torch.cat([mean + 1, spread], 1),
                    "text": text}


def seen(batch, scale=0.5, shares=DROP):
    return model_input(batch, torch.zeros(3, 2), scale, ALPHAS, shares)


def test_text_and_picture_are_dropped_for_five_percent_each_and_both_for_five():
    given = seen(batch_of(4000, -60.0))
    text, image = given["context"].flatten(1), given["z_in"][:, 4:].flatten(1)
    no_text, no_image = (text == 0).all(1), (image == 0).all(1)
    assert torch.equal(no_text, (text == 0).any(1)) and torch.equal(no_image, (image == 0).any(1))
    for dropped in (no_text & ~no_image, no_image & ~no_text, no_text & no_image):
        assert abs(dropped.sum() - 200) < 5 * (4000 * 0.05 * 0.95) ** 0.5
    assert (given["z_in"][:, :4].flatten(1) != 0).any(1).all()  # the noised latents are never dropped


def test_each_share_of_what_is_dropped_may_be_another():
    given = seen(batch_of(4000, -60.0), shares=(0.2, 0.0, 0.1))
    no_text, no_image = ((part == 0).flatten(1).all(1) for part in (given["context"], given["z_in"][:, 4:]))
    assert not (no_text & no_image).any()
    for dropped, share in ((no_text, 0.2), (no_image, 0.1)):
        assert abs(dropped.sum() - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5


def test_the_condition_is_the_mode_unscaled_and_the_target_the_scaled_sample_noised():
    batch = batch_of(400, math.log(0.09))                       # standard deviation 0.3
    given, mean = seen(batch, 0.18215), batch["after"][:, :4]
    kept = batch["drop"] >= 0.15
    assert torch.equal(given["z_in"][kept, 4:], batch["before"][kept, :4])
    target = 0.18215 * (mean + 0.3 * batch["posterior"])
    a = ALPHAS[batch["timestep"]].view(-1, 1, 1, 1)
    z_t = a.sqrt() * target + (1 - a).sqrt() * batch["noise"]
    assert relative_error(given["z_in"][:, :4], z_t) < 1e-6
    assert torch.equal(given["target"], batch["noise"])


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_target_of_v_prediction_is_diffusers_velocity(zero_snr):
    schedule = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr)
    batch, a = batch_of(400, math.log(0.09)), schedule.alphas_cumprod()
    batch["timestep"][0] = 999
    given = model_input(batch, torch.zeros(3, 2), 0.18215, a, DROP, prediction_type="v_prediction")
    latents = 0.18215 * (batch["after"][:, :4] + 0.3 * batch["posterior"])
    peer = DDPMScheduler.from_config(schedule.to_json())
    velocity = peer.get_velocity(latents, batch["noise"], batch["timestep"])
    assert relative_error(given["target"], velocity) < 1e-5
    noised = peer.add_noise(latents, batch["noise"], batch["timestep"])
    assert relative_error(given["z_in"][:, :4], noised) < 1e-5
    if zero_snr:  # noise alone, from which the model predicts -z_0
        assert torch.equal(given["z_in"][0, :4], batch["noise"][0])
        assert relative_error(given["target"][0], -latents[0]) < 1e-6
    plain = model_input(batch, torch.zeros(3, 2), 0.18215, a, DROP)
    assert torch.equal(plain["z_in"], given["z_in"]) and torch.equal(plain["target"], batch["noise"])


def test_min_snr_weights_are_those_of_diffusers():
    timestep = torch.arange(1000)
    snr = compute_snr(SimpleNamespace(alphas_cumprod=ALPHAS), timestep)
    assert torch.equal(loss_weight(timestep, ALPHAS, 0.0), torch.ones(1000))
    for gamma in (1.0, 5.0):
        theirs = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0] / snr
        assert relative_error(loss_weight(timestep, ALPHAS, gamma), theirs) < 1e-6
        assert theirs.min() < 0.1 and theirs.max() == 1
        # The lines of examples/text_to_image/train_text_to_image.py of diffusers 0.42 for v_prediction
        theirs = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0] / (snr + 1)
        assert relative_error(loss_weight(timestep, ALPHAS, gamma, "v_prediction"), theirs) < 1e-6
    zero = NoiseSchedule(rescale_betas_zero_snr=True).alphas_cumprod()[-1:]
    assert loss_weight(torch.tensor([0]), zero, 5.0) == 1
    assert loss_weight(torch.tensor([0]), zero, 5.0, "v_prediction") == 0


def test_learning_rate_rises_stays_and_falls():
    rates = [learning_rate(step, 100, 1.0, 10, 0.2) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)]) and rates[9:81] == [1.0] * 72
    assert rates[80:] == pytest.approx([1 - 0.05 * i for i in range(20)])
    assert [learning_rate(step, 100, 2.0, 0, 0.0) for step in (0, 50, 99)] == [2.0] * 3


@pytest.fixture(scope="module")
def unet():
    return randomise(UNet(tiny_unet()), 1)


def given_to(unet, count=3):
    c = unet.config
    generator = torch.Generator().manual_seed(0)
    z_in = torch.randn(count, c.in_channels, 8, 8, generator=generator)
    return {"z_in": z_in, "context": torch.randn(count, 5, c.cross_attention_dim, generator=generator),
            "target": torch.randn(count, c.out_channels, 8, 8, generator=generator)}


def test_the_loss_is_the_mean_squared_error_of_each_sample(unet):
    given, timestep = given_to(unet), torch.tensor([5, 500, 999])
    losses = prediction_losses(unet, unet.config.in_channels, given, timestep, torch.float32)
    with torch.no_grad():
        for i in range(3):
            alone = unet(given["z_in"][i : i + 1], timestep[i : i + 1], given["context"][i : i + 1])
            wanted = ((alone - given["target"][i]) ** 2).sum() / alone.numel()
            assert losses[i].item() == pytest.approx(wanted.item(), rel=1e-5)
    narrow = prediction_losses(unet, unet.config.in_channels, given, timestep, torch.bfloat16)
    assert narrow.dtype == torch.float32 and 1e-6 < relative_error(narrow, losses) < 0.05


def test_recomputing_activations_changes_neither_loss_nor_gradients(unet):
    given, timestep = given_to(unet), torch.tensor([5, 500, 999])
    unet.train()

    def backward(recompute):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            losses = prediction_losses(unet, unet.config.in_channels, given, timestep, torch.float32,
                                       recompute)
        gradients = torch.autograd.grad(losses.mean(), list(unet.parameters()))
        return losses, gradients, sum(kept)

    (plain, gradients, much), (again, others, little) = backward(False), backward(True)
    unet.eval()
    assert torch.equal(plain, again) and little < 0.5 * much
    for one, other in zip(gradients, others):
        assert relative_error(other, one) < 1e-5


def test_before_training_a_widened_model_is_the_model_it_came_from(tmp_path):
    checkpoint = open_checkpoint(write_tiny_painter(tmp_path))
    narrow, wide = load_model(checkpoint, edits=False).unet, load_model(widen(checkpoint)).unet
    z, given = given_to(wide)["z_in"], given_to(wide)
    timestep = torch.tensor([0, 500, 999])
    assert wide.config.in_channels == 8 and narrow.config.in_channels == 4
    with torch.no_grad():
        assert relative_error(wide(z, timestep, given["context"]),
                              narrow(z[:, :4], timestep, given["context"])) < 1e-6
    assert all(torch.equal(weight, wide.state_dict()[name]) for name, weight in narrow.state_dict().items()
               if name != "conv_in.weight")
