"""A text encoder learns wordings from itself: new sentences mean what known ones do, and those stay."""

import copy
import shutil
from pathlib import Path

import pytest
import teach_wordings
import torch

from nanoip2p.checkpoint.folder import load_network
from nanoip2p.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig, TextEncoder
from nanoip2p.tokenizer import load_tokenizer
from nanoip2p.world.wordings import HELD_OUT, PHRASINGS

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"


def test_texts_are_known_ones_and_new_ones_of_equal_meaning():
    reworded, plain, known = teach_wordings.draw_texts(torch.Generator().manual_seed(3), 200)
    assert (reworded, plain, known) == teach_wordings.draw_texts(torch.Generator().manual_seed(3), 200)
    firsts = [phrases[0].split("{")[0] for phrases in PHRASINGS.values()]
    assert all(any(text.startswith(first) for first in firsts) for text in plain)
    assert 50 < sum(a != b for a, b in zip(reworded, plain))
    polite = [phrase for phrases in PHRASINGS.values() for phrase in phrases[teach_wordings.FIRST:-1]]
    assert not [text for text in known if "please" in text] and [text for text in polite if "please" in text]
    held = [phrases[-HELD_OUT].split("{")[0] for phrases in PHRASINGS.values()]
    asked = [text for text in reworded if text.endswith(", please?") and "weather" not in text]
    assert not [text for text in asked if text.startswith(tuple(held))]  # ("can you make the weather ...")


def test_only_end_tokens_and_common_padding_are_compared():
    asked, ends, asked_ends = torch.randn(2, 9, 4), torch.tensor([3, 6]), torch.tensor([5, 2])
    got = torch.randn(2, 9, 4)
    for row, begin in ((0, 5), (1, 6)):                     # both texts have ended
        got[row, begin:] = asked[row, begin:]
        got[row, ends[row]] = asked[row, asked_ends[row]]
    end, padding = teach_wordings.distances(got, asked, ends, asked_ends)
    assert end == 0 and padding == pytest.approx(float((got - asked)[1, 6].square().sum() / (7 * 4)))
    got[0, 3] += 1
    assert teach_wordings.distances(got, asked, ends, asked_ends) == (pytest.approx(0.5), padding)


def test_no_sentence_is_longer_than_the_short_steps():
    tokenizer = load_tokenizer(WEIGHTS / "nano-clip")
    texts = [text for seed in range(30) for part in
             teach_wordings.draw_texts(torch.Generator().manual_seed(seed), 40) for text in part]
    assert (tokenizer(texts)[:, teach_wordings.SHORT - 1] == tokenizer([""])[0, -1]).all()


def test_teaching_moves_new_wordings_and_keeps_known_ones(tmp_path):
    tokenizer = load_tokenizer(WEIGHTS / "nano-clip")
    torch.manual_seed(0)
    end = load_network(CLIP, WEIGHTS / "nano-clip").config.text_config.eos_token_id
    text = CLIPTextConfig(end + 1, 32, 64, 1, 2, 77, projection_dim=32, eos_token_id=end)
    clip = CLIP(CLIPConfig(text, CLIPVisionConfig(16, 8, 3, 32, 64, 1, 2, projection_dim=32), 32))
    before = copy.deepcopy(clip)
    teach_wordings.teach(clip, tokenizer, "cpu", 150, tmp_path, batch=8)

    def distance(model, texts, others):
        states, wanted = model.text_model(tokenizer(texts)), before.text_model(tokenizer(others))
        return float((states - wanted)[:, 40:].square().mean())  # the padding

    with torch.no_grad():
        reworded, plain, known = teach_wordings.draw_texts(torch.Generator().manual_seed(10**6), 32)
        learned, first = (distance(model, reworded, plain) for model in (clip, before))
        assert learned < 0.8 * first, (learned, first)
        assert distance(clip, known, known) < 0.3 * learned, (distance(clip, known, known), learned)
    pairs = zip(before.vision_model.parameters(), clip.vision_model.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)  # only the text encoder learns


@pytest.mark.parametrize("links", [True, False])
def test_shipping_replaces_the_text_encoders_and_leaves_links(links, tmp_path):
    shutil.copytree(WEIGHTS, tmp_path / "w", symlinks=links, ignore=shutil.ignore_patterns("*.png", "*.webp"))
    clip = load_network(CLIP, WEIGHTS / "nano-clip")
    with torch.no_grad():
        clip.text_model.final_layer_norm.bias += 1
    teach_wordings.ship(clip, tmp_path / "w")
    for name in ("nano-ip2p", "nano-sd", "nano-ip2p-paper"):
        encoder = load_network(TextEncoder, tmp_path / "w" / name / "text_encoder")
        bias = clip.text_model.final_layer_norm.bias
        assert (encoder.text_model.final_layer_norm.bias - bias).abs().max() < 2e-3  # stored as fp16
    assert all((tmp_path / "w" / name / "text_encoder/model.safetensors").is_symlink() == links
               for name in ("nano-sd", "nano-ip2p-paper"))
    old, new = (load_network(CLIP, folder / "nano-clip").vision_model for folder in (WEIGHTS, tmp_path / "w"))
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters()))
