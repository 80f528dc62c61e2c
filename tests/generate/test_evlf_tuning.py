"""EVLF's training of the fusion module, with tiny models."""

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
        defaults = {"batch": 4, "width": 16, "reader_width": 8, "steps": 4, "checkpoint_every": 1}
        rule = FusionRule(**{**defaults, **rule})
        return FusionTrainer(rule, diffusion, CAPTIONS, IMAGE_OF, drawn_pictures, size, seed=2)

    return make


def losses_on_all(trainer):
    trainer.fusion.eval()
    d = trainer.diffusion
    with torch.no_grad():
        texts = d.texts(CAPTIONS)
        latents = d.latents(as_signed(drawn_pictures(range(8), 16)))
        image = torch.tensor(IMAGE_OF)
        losses = trainer.losses(latents, texts, texts.tokens, image[:, None] == image[None, :])
    trainer.fusion.train()
    return {name: float(value) for name, value in losses.items()}


@pytest.mark.parametrize("residual", [True, False])
def test_losses_decrease_and_frozen_parts_do_not_change(make, residual):
    trainer = make(residual=residual, lr=3e-3, lr_reader=3e-3, steps=30, drop_text=0.0)
    first = losses_on_all(trainer)
    assert (first["rebuild"] == 0) == residual, "with a residual, the untrained fusion must be the identity"
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
    """Check the weights of both losses, the mean over accumulated batches, and the clipping of the gradient norm."""
    trainer = make(accumulate=2, dropout=0.0, drop_text=0.0, drop_entries=0.0, text_noise=0.0, residual=False, clip=0.1)
    report = trainer.gradient(0)
    clipped = [p.grad.clone() for p in trainer.parameters.values()]
    d, total = trainer.diffusion, 0.0
    for number in range(2):
        records = trainer.batch_records(number)
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
    assert report["loss"] == pytest.approx(float(total.detach()), rel=1e-5) and norm > 0.1
    for g, e in zip(clipped, expected, strict=True):
        torch.testing.assert_close(g, e * 0.1 / norm, rtol=1e-3, atol=1e-6)
    assert report["rebuild_weight"] == 0.05 and trainer.gradient(2)["rebuild_weight"] == 1.0


def test_a_stopped_training_resumes_bit_identically(make, tmp_path):
    done = []
    assert tune(make(), tmp_path / "unbroken", "key", 1)
    assert not tune(make(), tmp_path / "resumed", "key", 1, done.append, lambda: len(done) >= 2)
    assert tune(make(), tmp_path / "resumed", "key", 1)
    a, b = ((tmp_path / name / TUNED).read_bytes() for name in ("unbroken", "resumed"))
    assert a == b


def test_flip_one_mirrors_all_images(make):
    encoded = []
    trainer = make(flip=1.0, accumulate=1)
    trainer.diffusion.latents, latents = (
        lambda pixels: encoded.append(pixels) or latents(pixels),
        trainer.diffusion.latents,
    )
    try:
        trainer.gradient(0)
    finally:
        del trainer.diffusion.latents
    assert torch.equal(encoded[0], as_signed(drawn_pictures(trainer.batch_records(0), 16)).flip(-1))


def test_unusable_data_and_settings_are_refused(make, diffusion):
    with pytest.raises(ValueError, match="found a train split of one"):
        FusionTrainer(FusionRule(), diffusion, ["a", "b"], [0, 0], drawn_pictures, 16, 0)
    with pytest.raises(ValueError, match=r"fusion.width 10 is not divisible by 4 heads"):
        FusionRule(width=10)
    with pytest.raises(ValueError, match="latents of 3 x 3 are too small"):
        fusion_of(FusionRule(), diffusion, 6, 0)


def test_latents_are_unscaled_means_and_texts_end_at_the_first_end_token(diffusion):
    pixels = as_signed(drawn_pictures([0, 2], 16))
    with torch.no_grad():
        mean = diffusion.vae.encode(pixels).latent_dist.mean
        torch.testing.assert_close(diffusion.latents(pixels), mean)
        first, second = (diffusion.latents(pixels, generator(0, "posterior")) for _ in range(2))
    assert torch.equal(first, second) and not torch.allclose(first, mean)
    texts = diffusion.texts(["a", "a dog"])
    assert torch.equal(texts.pooled[0], texts.tokens[0, 2]) and texts.padding.sum(1).tolist() == [74, 71]
    assert diffusion.grid(16) == (8, 8)
