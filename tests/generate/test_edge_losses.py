"""Compare EDGE's losses with simple float64 implementations, and with known results of special inputs."""

import math

import pytest
import tiny_diffusion
import torch

from rmdd.core.seeding import generator
from rmdd.generate.edge_losses import biases_and_norms, clean_estimate, contrastive, diversity, noised, target_of


def features(count=5, width=7, seed=0):
    random = generator(seed, "features")
    return [torch.randn(count, width, generator=random, dtype=torch.float64) for _ in range(2)]


def cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


@pytest.mark.parametrize("captions", [None, [0, 1, 0, 2, 1]])
def test_contrastive_loss_against_a_double_loop(captions):
    images, texts = features()
    total = 0.0
    for p in range(5):
        for anchor, others in ((images[p], texts), (texts[p], images)):
            terms = [
                math.exp(cosine(anchor, others[q]) / 0.1)
                for q in range(5)
                if captions is None or q == p or captions[q] != captions[p]
            ]
            total -= math.log(math.exp(cosine(anchor, others[p]) / 0.1) / sum(terms))
    same = None if captions is None else torch.tensor(captions)
    assert float(contrastive(images, texts, 0.1, same)) == pytest.approx(total / 10, rel=1e-12)


def test_contrastive_loss_of_equal_features_is_the_log_of_the_batch_size():
    equal = torch.ones(6, 4, dtype=torch.float64)
    assert float(contrastive(equal, equal, 0.1)) == pytest.approx(math.log(6), rel=1e-12)


def test_images_of_the_same_caption_are_not_negatives():
    images, texts = features(2)
    texts = texts[:1].expand(2, -1)
    assert float(contrastive(images, texts, 0.1, torch.tensor([0, 0]))) == 0
    assert float(contrastive(images, texts, 0.1)) > 0


@pytest.mark.parametrize("unit_halves", [True, False])
def test_diversity_against_a_double_loop(unit_halves):
    images, texts = features()
    joint = []
    for i, w in zip(images, texts, strict=True):
        halves = [i / i.norm(), w / w.norm()] if unit_halves else [i, w]
        joint.append(torch.cat(halves))
    total = sum(cosine(joint[p], joint[q]) for p in range(5) for q in range(5) if p != q)
    assert float(diversity(images, texts, unit_halves=unit_halves)) == pytest.approx(total / 20, rel=1e-12)


def test_diversity_of_equal_orthogonal_and_simplex_rows():
    equal, eye = torch.ones(4, 3, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    simplex = eye - 1 / 4  # the rows are four directions with the largest possible angles
    assert float(diversity(equal, equal)) == pytest.approx(1)
    assert float(diversity(eye, eye)) == pytest.approx(0)
    assert float(diversity(simplex, simplex)) == pytest.approx(-1 / 3)
    with pytest.raises(ValueError, match="found 1; give at least 2"):
        diversity(equal[:1], equal[:1])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_gives_the_clean_latent(kind):
    random = generator(1, "latents")
    clean, noise = (torch.randn(3, 4, 5, 5, generator=random, dtype=torch.float64) for _ in range(2))
    signal = torch.tensor([0.9, 0.3, 0.0047], dtype=torch.float64)
    noisy, target = noised(clean, noise, signal), target_of(clean, noise, signal, kind)
    torch.testing.assert_close(clean_estimate(noisy, target, signal, kind), clean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_estimates_and_targets_equal_those_of_the_scheduler(kind):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**tiny_diffusion.BETAS, prediction_type=kind, clip_sample=False)
    random = generator(2, "latents")
    clean, noise, predicted = (torch.randn(1, 4, 5, 5, generator=random) for _ in range(3))
    t = torch.tensor([321])
    signal = scheduler.alphas_cumprod[t]
    noisy = scheduler.add_noise(clean, noise, t)
    torch.testing.assert_close(noised(clean, noise, signal), noisy)
    scheduler.set_timesteps(1000)
    stepped = scheduler.step(predicted, 321, noisy, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(clean_estimate(noisy, predicted, signal, kind), stepped.pred_original_sample)
    if kind == "v_prediction":
        torch.testing.assert_close(target_of(clean, noise, signal, kind), scheduler.get_velocity(clean, noise, t))


def test_biases_and_norms_selects_the_published_parameters():
    unet = tiny_diffusion.unet()
    published = {n for n, _ in unet.named_parameters() if any(w in n for w in ("bias", "norm", "gamma", "y_embed"))}
    selected = biases_and_norms(unet)
    assert set(selected) == published and len(selected) == 125
    assert sum(p.numel() for p in selected.values()) == 7300
