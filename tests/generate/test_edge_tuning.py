"""EDGE's fine-tuning of tiny models: exact gradients, decreasing losses, and bit-identical results after a resume."""

import copy
import json

import pytest
import tiny_diffusion
import tiny_parts
import torch

from rmdd.core.seeding import generator
from rmdd.generate.diffusion import Diffusion
from rmdd.generate.edge_losses import contrastive, diversity
from rmdd.generate.edge_tuning import EdgeTrainer, EdgeTuning, draws
from rmdd.generate.tuning import LOG, TUNED, read_tuned, tune, use_tuned

CAPTIONS = ["a red dog", "two cats", "a blue ball", "the green tree", "a red dog", "one bird", "a hat", "some fish"]


def losses_of(folder):
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def drawn_pictures(records, size):
    return torch.cat(
        [
            torch.randint(256, (1, 3, size, size), generator=generator(0, "pixels", r), dtype=torch.uint8)
            for r in records
        ]
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from rmdd.models.clip import Clip

    return Clip(tiny_parts.clip(tmp_path_factory.mktemp("clip")), torch.device("cpu"))


@pytest.fixture(scope="module")
def tiny_pipeline():
    return tiny_diffusion.stable_diffusion()


@pytest.fixture
def make(clip, tiny_pipeline):
    def make(pipeline=None, **rule):
        pipeline = copy.deepcopy(pipeline or tiny_pipeline)
        rule = EdgeTuning(**{"batch": 4, "size": 16, "steps": 6, "lr": 0.01, "checkpoint_every": 2, **rule})
        return EdgeTrainer(
            rule, Diffusion(pipeline), clip.model, clip.processor.tokenizer, CAPTIONS, drawn_pictures, seed=1
        )

    return make


def gradients(trainer, step=0):
    trainer.optimiser.zero_grad()
    report = trainer.gradient(step)
    return report, {n: p.grad.clone() for n, p in trainer.parameters.items()}


def test_losses_decrease_and_only_the_selected_parameters_change(make):
    trainer = make(lr=0.05)
    unet = trainer.diffusion.unet
    before = {n: p.detach().clone() for n, p in unet.named_parameters()}
    first = None
    for _ in range(12):
        report, _ = gradients(trainer)
        first = first or report
        trainer.optimiser.step()
    last, _ = gradients(trainer)
    assert last["loss"] < first["loss"] and last["contrast"] < first["contrast"] and last["anchor"] < first["anchor"]
    changed_names = {n for n, p in unet.named_parameters() if not torch.equal(p, before[n])}
    assert changed_names and changed_names <= trainer.parameters.keys()
    frozen = [trainer.diffusion.vae, trainer.diffusion.text_encoder, trainer.clip]
    assert all(p.grad is None for part in frozen for p in part.parameters())


def test_the_gradient_equals_the_paper_formula_written_out(make):
    """Check the formula of `recipe: corrected`. The UNet gets noisy latents z_t, the VAE decodes the clean estimate z^
    divided by the VAE's scaling factor, and pixels are normalised as CLIP expects."""
    trainer = make(anchor=0.5, clamp=None, size=32)
    report, grads = gradients(trainer)
    batch, d = trainer.batch(0), trainer.diffusion
    signal = d.scheduler.alphas_cumprod[batch.times].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * batch.latents + (1 - signal).sqrt() * batch.noise
    eps = d.unet(noisy, batch.times, encoder_hidden_states=batch.tokens).sample
    pixels = d.vae.decode((noisy - (1 - signal).sqrt() * eps) / signal.sqrt() / 0.18215).sample
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    i = trainer.clip.get_image_features(pixel_values=((pixels + 1) / 2 - mean) / std).pooler_output
    loss = contrastive(i, batch.texts, 0.1, batch.captions) + diversity(i, batch.texts)
    loss = loss + 0.5 * ((eps - batch.noise) ** 2).mean()
    expected = torch.autograd.grad(loss, list(trainer.parameters.values()))
    assert report["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for (name, g), e in zip(grads.items(), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_have_the_same_gradient(make, micro):
    (full_batch, a), (parts, b) = gradients(make()), gradients(make(micro_batch=micro))
    assert parts == pytest.approx(full_batch, rel=1e-4)
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=2e-3, atol=1e-5, msg=name)


def test_recomputing_activations_has_the_same_gradient(make):
    (_, a), (_, b) = gradients(make()), gradients(make(save_memory=True))
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_recipe_weighting_and_unit_halves_change_the_gradient(make):
    _, reference = gradients(make(anchor=0))
    for changed in ({"recipe": "released"}, {"weighting": "alpha_bar"}, {"unit_halves": False}):
        _, other = gradients(make(anchor=0, **changed))
        assert any(not torch.allclose(other[n], g) for n, g in reference.items()), changed


def test_a_model_that_predicts_velocity_trains(make):
    trainer = make(tiny_diffusion.stable_diffusion(prediction="v_prediction"), lr=0.05)
    first, _ = gradients(trainer)
    for _ in range(8):
        trainer.optimiser.step()
        last, _ = gradients(trainer)
    assert last["anchor"] < first["anchor"]


def test_bfloat16_keeps_float32_parameters(make):
    (exact, _), (rough, grads) = gradients(make()), gradients(make(precision="bfloat16"))
    assert rough["loss"] == pytest.approx(exact["loss"], rel=0.05) and rough["loss"] != exact["loss"]
    assert {g.dtype for g in grads.values()} == {torch.float32}


def stop_after(steps):
    done = []
    return {"on_step": done.append, "should_stop": lambda: len(done) >= steps}


def test_a_stopped_training_resumes_bit_identically(make, tmp_path):
    assert tune(make(), tmp_path / "unbroken", "key", 2)
    assert not tune(make(), tmp_path / "resumed", "key", 2, **stop_after(3))
    assert tune(make(), tmp_path / "resumed", "key", 2)
    a, b = ((tmp_path / name / TUNED).read_bytes() for name in ("unbroken", "resumed"))
    assert a == b
    report = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in losses_of(tmp_path / n)]
        for n in ("unbroken", "resumed")
    ]
    assert report[0] == report[1] and [line["step"] for line in report[0]] == [1, 2, 3, 4, 5, 6]
    unet = tiny_diffusion.unet()
    use_tuned(unet, read_tuned(tmp_path / "unbroken"))
    assert all(torch.equal(unet.get_parameter(n), t) for n, t in read_tuned(tmp_path / "unbroken").items())
    with pytest.raises(ValueError, match="another configuration"):
        (tmp_path / "unbroken" / TUNED).unlink()
        tune(make(), tmp_path / "unbroken", "other", 2)


def test_non_finite_steps_are_skipped_and_too_many_stop_the_training(make, tmp_path, caplog):
    trainer = make(steps=30)
    before = {n: p.detach().clone() for n, p in trainer.parameters.items()}
    trainer.gradient = lambda step: {"loss": float("nan")}
    with pytest.raises(RuntimeError, match="20 consecutive steps up to 20 had non-finite numbers"):
        tune(trainer, tmp_path, "key", 2)
    assert all(torch.equal(p, before[n]) for n, p in trainer.parameters.items())
    assert "step 1 of" in caplog.text and losses_of(tmp_path)[0]["loss"] is None


def test_each_caption_occurs_once_per_epoch(make):
    trainer = make(steps=None, epochs=2)
    assert trainer.total == 4
    assert (
        sorted(trainer.batch_records(0) + trainer.batch_records(1))
        == list(range(8))
        == sorted(trainer.batch_records(2) + trainer.batch_records(3))
    )
    assert make(steps=None, epochs=1, fraction=0.5).total == 1


def test_too_late_time_steps_and_odd_sizes_are_refused(make):
    with pytest.raises(ValueError, match="max_step 2000 exceeds this model's 1000 time steps"):
        make(max_step=2000)
    with pytest.raises(ValueError, match="cannot halve images of side 33 1 times"):
        make(size=33)


def test_phases_share_one_random_order_of_captions():
    assert draws(0, 20, 6) + draws(0, 20, 5, start=6) == draws(0, 20, 11)
    assert len(set(draws(0, 20, 20))) == 20 and draws(1, 20, 6) != draws(0, 20, 6)
    with pytest.raises(ValueError, match="21 images need different captions.*the train split has 20"):
        draws(0, 20, 6, start=15)
