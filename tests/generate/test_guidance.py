"""Sampling: without guidance, results equal those of diffusers bit for bit; with guidance, they are nearer the mode."""

import pytest
import tiny_diffusion
import torch

from rmdd.core.seeding import generator
from rmdd.generate.guidance import class_denoiser, guided, scheduler_for, step_deviation, text_denoiser

CAPTIONS = ["a red dog", "two cats on a mat"]


@pytest.fixture(scope="module")
def pipeline():
    return tiny_diffusion.stable_diffusion()


@pytest.fixture(scope="module")
def dit():
    return tiny_diffusion.dit()


def randoms():
    return [generator(0, "picture", i) for i in range(2)]


def start(size=16):
    return torch.cat([torch.randn(1, 4, size, size, generator=r) for r in randoms()])


@torch.no_grad()
def near(pipeline, kind, strength, *, eta=0.0, steps=6, stop=2, modes=None):
    texts, empty = pipeline.encode_prompt(CAPTIONS, torch.device("cpu"), 1, True, ["", ""])
    return guided(
        text_denoiser(pipeline.unet, texts, empty, 7.5),
        scheduler_for(kind, pipeline.scheduler.config),
        start(),
        torch.zeros(2, 4, 16, 16) if modes is None else modes,
        steps=steps,
        strength=strength,
        stop=stop,
        generators=randoms(),
        eta=eta,
    )


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_without_guidance_the_sampler_equals_diffusers_bit_for_bit(kind):
    pipeline = tiny_diffusion.stable_diffusion()
    pipeline.scheduler = scheduler_for(kind, pipeline.scheduler.config)
    plain = pipeline(CAPTIONS, num_inference_steps=6, latents=start(), generator=randoms(), output_type="latent").images
    assert torch.equal(near(pipeline, kind, 0.0), plain)
    assert torch.equal(near(pipeline, kind, 0.5, stop=5), plain), "with stop=5 no step is guided"


@pytest.mark.parametrize(("kind", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
def test_guided_samples_are_nearer_to_the_mode(pipeline, kind, eta):
    modes = torch.full((2, 4, 16, 16), 3.0)
    far = (near(pipeline, kind, 0.0, eta=eta, modes=modes) - modes).norm()
    assert (near(pipeline, kind, 0.3, eta=eta, modes=modes) - modes).norm() < 0.8 * far


def test_one_guided_step_equals_the_equation(pipeline):
    """Check x_{k-1} = step(x_k) - s sigma_k (x0^ - m), where sigma_k^2 is the posterior variance of DDPM."""
    scheduler = scheduler_for("ddpm", pipeline.scheduler.config)
    modes = torch.ones(2, 4, 16, 16)
    both = []
    for strength in (0.0, 0.5):
        scheduler.set_timesteps(4)
        t = scheduler.timesteps[0]
        x = start()
        with torch.no_grad():
            predicted = pipeline.unet(x, t, torch.zeros(2, 5, 32)).sample
        stepped = scheduler.step(predicted, t, x, generator=randoms())
        now, before = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[t - 250]
        sigma = ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
        clean = (x - (1 - now).sqrt() * predicted) / now.sqrt()
        expected = stepped.prev_sample - strength * sigma * (clean - modes)
        calls = iter([predicted])
        first = []

        def denoise(x, t, calls=calls, first=first):
            first.append(x)
            prediction = next(calls, None)
            if prediction is None:
                raise StopIteration
            return prediction

        with pytest.raises(StopIteration):
            guided(denoise, scheduler, x, modes, steps=4, strength=strength, stop=0, generators=randoms())
        torch.testing.assert_close(first[1], expected)
        both.append(first[1])
    assert not torch.allclose(*both)


def test_a_learned_variance_interpolates_between_its_bounds(dit):
    scheduler = dit.scheduler
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist()[:2] + scheduler.timesteps.tolist()[-2:] == [999, 979, 20, 0]
    t = scheduler.timesteps[10]
    now, before = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[scheduler.timesteps[11]]
    beta = 1 - now / before
    small = (1 - before) / (1 - now) * beta
    for output, variance in ((-1.0, small), (1.0, beta), (0.0, (small * beta).sqrt())):
        predicted = torch.full((1, 8, 2, 2), output)
        sigma = step_deviation(scheduler, t, predicted, 4, 0.0)
        torch.testing.assert_close(sigma, variance.sqrt().expand(1, 4, 2, 2))


def test_class_sampling_without_guidance_equals_diffusers_bit_for_bit():
    pipeline = tiny_diffusion.dit(learned=False)
    scheduler = pipeline.scheduler
    random = generator(0, "classes")
    plain = pipeline([3, 7], guidance_scale=4.0, generator=random, num_inference_steps=4, output_type="pt").images
    first = torch.randn(2, 4, 8, 8, generator=generator(0, "classes"))
    denoise = class_denoiser(pipeline.transformer, torch.tensor([3, 7]), 4.0)
    with torch.no_grad():
        x = guided(lambda x, t: denoise(x, t)[:, :4], scheduler, first, first, steps=4, strength=0.0, stop=0)
        decoded = pipeline.vae.decode(1 / pipeline.vae.config.scaling_factor * x).sample
    assert torch.equal((decoded / 2 + 0.5).clamp(0, 1), plain)


def test_guidance_works_with_a_learned_variance_and_with_three_guided_channels(dit):
    first, modes = start(8), torch.full((2, 4, 8, 8), 2.0)
    classes = torch.tensor([3, 7])
    with torch.no_grad():
        ends = [
            guided(
                class_denoiser(dit.transformer, classes, 4.0),
                scheduler_for("ddpm", dit.scheduler.config),
                first,
                modes,
                steps=10,
                strength=s,
                stop=4,
                generators=randoms(),
            )
            for s in (0.0, 0.1)
        ]
        all_four, three = (
            class_denoiser(dit.transformer, classes, 4.0, guided_channels=n)(first, torch.tensor(500))
            for n in (None, 3)
        )
        conditional = dit.transformer(first, timestep=torch.tensor([500, 500]), class_labels=classes).sample
    assert all(e.isfinite().all() for e in ends)
    assert (ends[1] - modes).norm() < (ends[0] - modes).norm()
    assert torch.equal(all_four[:, :3], three[:, :3])
    torch.testing.assert_close(three[:, 3:], conditional[:, 3:])
