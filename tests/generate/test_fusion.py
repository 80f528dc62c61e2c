"""EVLF's fusion module: it starts as the identity, ignores padding, and its losses are exact in float64."""

import math

import pytest
import torch
from tiny_parts import clip_tokenizer
from torch import nn

from rmdd.core.seeding import generator
from rmdd.generate.fusion import Fusion, Projector, alignment, augment_text, first_end, positions_after, positives, ramp

GRID, LENGTH, WIDTH = (4, 6), 7, 5


def fusion(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Fusion(WIDTH, GRID, **{"width": 8, "heads": 2, "dropout": 0.5, **options}).eval()


def inputs(seed=0):
    random = generator(seed, "inputs")
    latents = torch.randn(3, 4, *GRID, generator=random)
    tokens = torch.randn(3, LENGTH, WIDTH, generator=random)
    return latents, tokens, positions_after(torch.tensor([2, 6, 4]), LENGTH)


@pytest.mark.parametrize("keys", ["both", "text"])
def test_an_untrained_fusion_changes_nothing(keys):
    latents, tokens, padding = inputs()
    for mode in (True, False):
        assert torch.equal(fusion(keys=keys).train(mode)(latents, tokens, padding), latents)
    assert not torch.equal(fusion(keys=keys, residual=False)(latents, tokens, padding), latents)


@pytest.mark.parametrize("keys", ["both", "text"])
def test_the_fused_latent_depends_on_text_but_not_on_padding(keys):
    latents, tokens, padding = inputs()
    module = fusion(keys=keys, residual=False)
    fused = module(latents, tokens, padding)
    behind = tokens + padding[..., None] * 100.0
    assert torch.equal(module(latents, behind, padding), fused)
    assert not torch.allclose(module(latents, tokens + ~padding[..., None], padding), fused)


def test_the_layers_equal_the_formula_written_out():
    """Compare the layers with a version of attention that does not use torch's attention module."""
    latents, tokens, padding = inputs()
    module = fusion(residual=False).double()
    latents, tokens = latents.double(), tokens.double()
    x = module.image_in(latents).flatten(2).transpose(1, 2) + module.position
    keys = torch.cat([x, module.text_in(tokens)], dim=1)
    hidden = torch.cat([torch.zeros(3, 24, dtype=torch.bool), padding], dim=1)
    for layer in module.layers:
        a = layer.attention
        q, k, v = (
            (rows @ w.T + b).view(3, -1, 2, 4).transpose(1, 2)
            for rows, w, b in zip((x, keys, keys), a.in_proj_weight.chunk(3), a.in_proj_bias.chunk(3), strict=True)
        )
        score = (q @ k.transpose(2, 3) / 2).masked_fill(hidden[:, None, None], -math.inf)
        attended = a.out_proj((score.softmax(-1) @ v).transpose(1, 2).reshape(3, 24, 8))
        x = layer.norm_attention(x + attended)
        x = layer.norm_feed(x + layer.feed[3](layer.feed[0](x).relu()))
    expected = module.image_out(x.transpose(1, 2).reshape(3, 8, *GRID))
    torch.testing.assert_close(module(latents, tokens, padding), expected)


def test_another_latent_size_is_refused():
    _, tokens, padding = inputs()
    with pytest.raises(ValueError, match="built for latents of 4 x 6, found 4 x 4"):
        fusion()(torch.zeros(3, 4, 4, 4), tokens, padding)
    with pytest.raises(ValueError, match="2 x 2 are too small"):
        Projector(WIDTH, (2, 2))


def test_the_modules_have_the_published_number_of_parameters():
    def count(m):
        return sum(p.numel() for p in m.parameters())

    assert count(Fusion(768, (32, 32))) == pytest.approx(1.5e6, rel=0.05)
    assert count(Projector(768, (32, 32))) == pytest.approx(0.8e6, rel=0.05)


def test_alignment_against_a_double_loop():
    random = generator(3, "alignment")
    read, texts = (torch.randn(5, 6, generator=random, dtype=torch.float64) for _ in range(2))
    pictures, captions = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([0, 1, 2, 3, 2])
    positive = positives(pictures, captions)
    total = 0.0
    for a, b in ((read, texts), (texts, read)):
        for i in range(5):
            logits = [float(a[i] @ b[j] / (a[i].norm() * b[j].norm())) / 0.07 for j in range(5)]
            weights = [math.exp(x) for x in logits]
            matching = [j for j in range(5) if pictures[i] == pictures[j] or captions[i] == captions[j]]
            total -= math.log(sum(weights[j] for j in matching) / sum(weights) / len(matching))
    assert float(alignment(read, texts, positive, 0.07)) == pytest.approx(total / 10, rel=1e-12)


def test_alignment_is_cross_entropy_for_distinct_pairs_and_constant_for_one_image():
    random = generator(4, "alignment")
    read, texts = (torch.randn(6, 8, generator=random, dtype=torch.float64) for _ in range(2))
    logits = nn.functional.normalize(read) @ nn.functional.normalize(texts).T / 0.07
    labels = torch.arange(6)
    expected = (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(alignment(read, texts, torch.eye(6, dtype=torch.bool), 0.07), expected)
    read.requires_grad_(True)
    flat = alignment(read, texts, torch.ones(6, 6, dtype=torch.bool), 0.07)  # all pairs are positive: constant loss
    flat.backward()
    assert float(flat.detach()) == pytest.approx(math.log(6)) and float(read.grad.abs().max()) < 1e-12


def test_ends_of_the_ramp():
    assert ramp(0, 100, 0.05, 1.0) == 0.05
    assert ramp(25, 100, 0.05, 1.0) == pytest.approx(0.525)
    assert ramp(50, 100, 0.05, 1.0) == ramp(99, 100, 0.05, 1.0) == 1.0


def test_the_pooled_state_is_that_of_the_first_end_of_text():
    tokenizer = clip_tokenizer()
    ids = tokenizer(["a", "a dog runs"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    ends = first_end(ids, tokenizer.eos_token_id)
    assert ends.tolist() == [2, 9] and ids[0, 76] == tokenizer.eos_token_id
    assert positions_after(ends, 77).sum(1).tolist() == [74, 67]
    assert first_end(torch.zeros(1, 5, dtype=torch.long), 9).tolist() == [4]


def test_text_is_dropped_with_its_probability_and_augmented_otherwise():
    tokens = torch.ones(2, 40, 25)
    attended = [augment_text(tokens, generator(0, "blur", i), drop_all=0.2, drop=0.1, noise=0.01) for i in range(200)]
    texts = [s for s in attended if s.any()]
    assert 140 < len(texts) < 180
    entries = torch.cat(texts)
    assert float((entries < 0.5).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert float(entries.mean()) == pytest.approx(1, abs=0.01)
    assert torch.equal(augment_text(tokens, generator(0, "x"), drop_all=0.0, drop=0.0, noise=0.0), tokens)
