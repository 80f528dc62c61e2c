"""EVLF's training on tiny parts."""

import pytest
import tiny_diffusion
import torch

from rmdd.core.seeding import generator
from rmdd.generate.diffusion import Diffusion, as_signed
from rmdd.generate.evlf_tuning import FusionRule, FusionTrainer, fusion_of
from rmdd.generate.tuning import TUNED, tune

CAPTIONS = ["a red dog", "a dog", "two cats", "a blue ball", "the green tree", "one bird", "two cats", "some fish"]
IMAGE_OF = [0, 0, 1, 2, 3, 4, 5, 6]


def drawn_pictures(records, size):
    numbers = [IMAGE_OF[r] for r in records]
    return torch.cat(
        [
            torch.randint(256, (1, 3, size, size), generator=generator(0, "pixels", n), dtype=torch.uint8)
            for n in numbers
        ]
    )


@pytest.fixture(scope="module")
def diffusion():
    return Diffusion(tiny_diffusion.stable_diffusion())


@pytest.fixture
def make(diffusion):
    def make(size=16, **rule):
        usual = {"batch": 4, "width": 16, "reader_width": 8, "steps": 4, "checkpoint_every": 1}
        rule = FusionRule(**{**usual, **rule})
        return FusionTrainer(rule, diffusion, CAPTIONS, IMAGE_OF, drawn_pictures, size, seed=2)

    return make


def losses_on_all(trainer):
    trainer.fusion.eval()
    d = trainer.diffusion
    with torch.no_grad():
        texts = d.texts(CAPTIONS)
        latents = d.latents(as_signed(drawn_pictures(range(8), 16)))
        image = torch.tensor(IMAGE_OF)
        found = trainer.losses(latents, texts, texts.tokens, image[:, None] == image[None, :])
    trainer.fusion.train()
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("residual", [True, False])
def test_losses_go_down_and_frozen_parts_stay(make, residual):
    trainer = make(residual=residual, lr=3e-3, lr_reader=3e-3, steps=30, drop_text=0.0)
    first = losses_on_all(trainer)
    assert (first["rebuild"] == 0) == residual, "the identity at the start"
    frozen = [p.clone() for p in trainer.diffusion.vae.parameters()]
    for step in range(30):
        trainer.optimiser.zero_grad()
        trainer.gradient(step)
        trainer.optimiser.step()
    last = losses_on_all(trainer)
    assert last["align"] < 0.8 * first["align"]
    assert residual or last["rebuild"] < 0.8 * first["rebuild"]
    assert all(torch.equal(p, before) for p, before in zip(trainer.diffusion.vae.parameters(), frozen, strict=True))


def test_a_step_accumulates_batches_and_is_clipped(make):
    """Both terms with their weights, the mean over batches, the norm bounded at last."""
    trainer = make(accumulate=2, dropout=0.0, drop_text=0.0, drop_entries=0.0, text_noise=0.0, residual=False, clip=0.1)
    told = trainer.gradient(0)
    found = [p.grad.clone() for p in trainer.parameters.values()]
    d, total = trainer.diffusion, 0.0
    for number in range(2):
        records = trainer.drawn(number)
        with torch.no_grad():
            texts = d.texts([CAPTIONS[r] for r in records])
            latents = d.latents(as_signed(drawn_pictures(records, 16)))
        same = torch.tensor(
            [[IMAGE_OF[a] == IMAGE_OF[b] or CAPTIONS[a] == CAPTIONS[b] for b in records] for a in records]
        )
        parts = trainer.losses(latents, texts, texts.tokens, same)
        total = total + (0.1 * parts["align"] + 0.05 * parts["rebuild"]) / 2
    expected = list(torch.autograd.grad(total, list(trainer.parameters.values())))
    norm = torch.stack([g.norm() for g in expected]).norm()
    assert told["loss"] == pytest.approx(float(total.detach()), rel=1e-5) and norm > 0.1
    for g, e in zip(found, expected, strict=True):
        torch.testing.assert_close(g, e * 0.1 / norm, rtol=1e-3, atol=1e-6)
    assert told["rebuild_weight"] == 0.05 and trainer.gradient(2)["rebuild_weight"] == 1.0


def test_a_stopped_training_goes_on_with_the_same_bits(make, tmp_path):
    done = []
    assert tune(make(), tmp_path / "whole", "key", 1)
    assert not tune(make(), tmp_path / "parts", "key", 1, done.append, lambda: len(done) >= 2)
    assert tune(make(), tmp_path / "parts", "key", 1)
    a, b = ((tmp_path / name / TUNED).read_bytes() for name in ("whole", "parts"))
    assert a == b


def test_mirrored_pictures_come_in_the_share_asked_for(make):
    seen = []
    trainer = make(flip=1.0, accumulate=1)
    trainer.diffusion.latents, kept = lambda pixels: seen.append(pixels) or kept(pixels), trainer.diffusion.latents
    try:
        trainer.gradient(0)
    finally:
        del trainer.diffusion.latents
    assert torch.equal(seen[0], as_signed(drawn_pictures(trainer.drawn(0), 16)).flip(-1))


def test_what_cannot_be_trained_is_refused(make, diffusion):
    with pytest.raises(ValueError, match="found a train split of one picture"):
        FusionTrainer(FusionRule(), diffusion, ["a", "b"], [0, 0], drawn_pictures, 16, 0)
    with pytest.raises(ValueError, match=r"fusion.width 10 cannot be cut into 4 heads"):
        FusionRule(width=10)
    with pytest.raises(ValueError, match="latents of 3 x 3 are too small"):
        fusion_of(FusionRule(), diffusion, 6, 0)


def test_latents_are_unscaled_means_and_texts_end_at_their_first_end(diffusion):
    pixels = as_signed(drawn_pictures([0, 2], 16))
    with torch.no_grad():
        mean = diffusion.vae.encode(pixels).latent_dist.mean
        torch.testing.assert_close(diffusion.latents(pixels), mean)
        one, two = (diffusion.latents(pixels, generator(0, "posterior")) for _ in range(2))
    assert torch.equal(one, two) and not torch.allclose(one, mean)
    texts = diffusion.texts(["a", "a dog"])
    assert torch.equal(texts.pooled[0], texts.tokens[0, 2]) and texts.padding.sum(1).tolist() == [74, 71]
    assert diffusion.grid(16) == (8, 8)
