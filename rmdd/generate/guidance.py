"""Samplers that draw near given latents: mode guidance (MGD3) over any denoiser and scheduler of diffusers.

    x_{k-1} = step(x_k) - [k > k_stop] s sigma_k (x0^ - m)

`x0^` is the scheduler's own clean estimate and sigma_k the deviation of the noise that its step adds. A deterministic
step adds none, so there sqrt(1 - abar_t) stands in for sigma_k, without which guided and unguided samples are equal.
B samples, C h w a latent.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(latents as the model sees them, time step) to what the model predicts; classifier-free guidance is in there."""


def step_deviation(scheduler: Any, t: Tensor, predicted: Tensor, channels: int, eta: float) -> Tensor:
    """sigma_k, a number or one per entry where the model has learned it."""
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
    """Denoise `latents`, pulled to `modes` in the steps `steps - 1` down to `stop + 1`; `strength` 0 is the plain
    sampler. `scheduler` is a DDPM or DDIM scheduler without clipping; `eta` is for the latter."""
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
    """A text-conditioned UNet with classifier-free guidance; `texts` (B,L,F), `empty` those of the empty caption."""
    both = torch.cat([empty, texts]) if empty is not None and scale > 1 else texts

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if scale <= 1:
            return unet(x, t, encoder_hidden_states=both, return_dict=False)[0]
        predicted = unet(torch.cat([x, x]), t, encoder_hidden_states=both, return_dict=False)[0]
        unconditional, conditional = predicted.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return denoise


def class_denoiser(transformer: Any, classes: Tensor, scale: float, *, guided_channels: int | None = None) -> Denoise:
    """A class-conditioned DiT (`DiTTransformer2DModel`) with classifier-free guidance; classes (B).

    `guided_channels: 3` is the quirk of the published sampler, which guides three of four latent channels; None
    guides all. A learned variance stays as the conditioned half predicts it.
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
    """A DDPM or DDIM scheduler by the configuration of a pipeline's own; latents are not clipped."""
    from diffusers import DDIMScheduler, DDPMScheduler

    scheduler: Any = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[kind]
    return scheduler.from_config(config, clip_sample=False)
