"""Diffusion sampling near given latents: mode guidance (MGD3) for any denoiser and for DDPM and DDIM schedulers.

    x_{k-1} = step(x_k) - [k > k_stop] s sigma_k (x0^ - m)

k counts steps down to 0, s is the strength of the guidance, `x0^` the scheduler's estimate of the clean latent, m the
mode (the given latent), and sigma_k the deviation of the noise that step k adds. A deterministic step adds no noise.
Because sigma_k = 0 would disable the guidance, sqrt(1 - abar_t) then replaces sigma_k. Shapes: B latents of C channels
and h x w positions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""A function (scaled latents, time step) -> model prediction, including classifier-free guidance."""


def step_deviation(scheduler: Any, t: Tensor, predicted: Tensor, channels: int, eta: float) -> Tensor:
    """Return sigma_k: one value, or one for each entry of the latents if the model predicts variances."""
    if _is_ddim(scheduler):
        if not eta:
            return (1 - scheduler.alphas_cumprod[t.cpu()]).sqrt().to(predicted.device)
        before = t.cpu() - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        return (eta * scheduler._get_variance(t.cpu(), before).sqrt()).to(predicted.device)
    learned = scheduler.variance_type in ("learned", "learned_range")
    variance = scheduler._get_variance(t.cpu(), predicted_variance=predicted[:, channels:] if learned else None)
    if scheduler.variance_type == "fixed_small_log":
        return variance.to(predicted.device)
    if scheduler.variance_type in ("learned_range", "fixed_large_log"):
        variance = variance.exp()
    return variance.sqrt().to(predicted.device)


def _is_ddim(scheduler: Any) -> bool:
    from diffusers import DDIMScheduler

    return isinstance(scheduler, DDIMScheduler)


def guided(
    denoise: Denoise,
    scheduler: Any,
    latents: Float[Tensor, "B C h w"],
    modes: Float[Tensor, "B C h w"],
    *,
    steps: int,
    strength: float,
    stop: int,
    generators: Sequence[torch.Generator] | None = None,
    eta: float = 0.0,
) -> Float[Tensor, "B C h w"]:
    """Denoise `latents`; the steps `steps - 1` down to `stop + 1` are guided towards the latents `modes`.

    `strength` 0 disables the guidance. `scheduler` is DDPM or DDIM without clipping of latents. Only DDIM uses `eta`,
    which scales the noise of a step.
    """
    scheduler.set_timesteps(steps, device=latents.device)
    x, channels = latents * scheduler.init_noise_sigma, latents.shape[1]
    options: dict[str, Any] = {"generator": list(generators) if generators is not None else None}
    if _is_ddim(scheduler):
        options["eta"] = eta
    for k, t in zip(range(steps - 1, -1, -1), scheduler.timesteps, strict=True):
        predicted = denoise(scheduler.scale_model_input(x, t), t)
        stepped = scheduler.step(predicted, t, x, **options)
        x = stepped.prev_sample
        if strength and k > stop:
            sigma = step_deviation(scheduler, t, predicted, channels, eta)
            x = x - strength * sigma * (stepped.pred_original_sample - modes)
    return x


def text_denoiser(unet: Any, texts: Tensor, empty: Tensor | None, scale: float) -> Denoise:
    """Return a denoiser for a text-conditioned UNet with classifier-free guidance.

    `texts` (B,L,F) are encoded captions; `empty` (B,L,F) is the encoded empty caption.
    """
    both = torch.cat([empty, texts]) if empty is not None and scale > 1 else texts

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if scale <= 1:
            return unet(x, t, encoder_hidden_states=both, return_dict=False)[0]
        predicted = unet(torch.cat([x, x]), t, encoder_hidden_states=both, return_dict=False)[0]
        unconditional, conditional = predicted.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return denoise


def class_denoiser(transformer: Any, classes: Tensor, scale: float, *, guided_channels: int | None = None) -> Denoise:
    """Return a denoiser for a class-conditioned `DiTTransformer2DModel` with classifier-free guidance.

    `classes` (B,) are class numbers. The published sampler guides only three of four latent channels
    (`guided_channels=3`); None guides all channels. A learned variance is taken from the conditional prediction.
    """
    null = transformer.config.num_embeds_ada_norm
    labels = torch.cat([classes, torch.full_like(classes, null)]) if scale > 1 else classes
    channels = transformer.config.in_channels
    count = channels if guided_channels is None else guided_channels

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if scale <= 1:
            return transformer(x, timestep=t.expand(len(x)), class_labels=labels).sample
        out = transformer(torch.cat([x, x]), timestep=t.expand(2 * len(x)), class_labels=labels).sample
        conditional, unconditional = out.chunk(2)
        moved = unconditional[:, :count] + scale * (conditional[:, :count] - unconditional[:, :count])
        return torch.cat([moved, conditional[:, count:]], dim=1)

    return denoise


def scheduler_for(kind: str, config: Any) -> Any:
    """Build a DDPM or DDIM scheduler from the scheduler configuration of a pipeline, without clipping of latents."""
    from diffusers import DDIMScheduler, DDPMScheduler

    scheduler: Any = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[kind]
    return scheduler.from_config(config, clip_sample=False)
