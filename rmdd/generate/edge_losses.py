"""The losses with which EDGE fine-tunes a diffusion model, and the estimate of the clean latent that the losses use.

    L_C = 1/2 [CE(Z, arange) + CE(Z^T, arange)],  Z = i w^T / tau, i: image, w: text features of unit length
    L_D = 1/(B(B-1)) sum_{p != q} <j_p, j_q>,     j = [i ; w] / ||[i ; w]||
    z^  the estimate of the clean latent, computed from the noisy latent z_t and the prediction of the UNet

Shapes: B pairs of a batch, D features of an image or text, latents of C channels and h x w positions.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Prediction = Literal["epsilon", "v_prediction", "sample"]

NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm)


def contrastive(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    temperature: float,
    captions: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, ""]:
    """Compute the contrastive loss L_C; pairs with equal numbers in `captions` are not negatives of each other."""
    logits = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T / temperature
    if captions is not None:
        logits = logits.masked_fill(_others(captions), torch.finfo(logits.dtype).min)
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _others(captions: Int[Tensor, " B"]) -> Bool[Tensor, "B B"]:
    """Return a mask that is True where two different pairs have the same caption."""
    same = captions[:, None] == captions[None, :]
    return same & ~torch.eye(len(captions), dtype=torch.bool, device=captions.device)


def diversity(
    images: Float[Tensor, "B D"], texts: Float[Tensor, "B D"], *, unit_halves: bool = True
) -> Float[Tensor, ""]:
    """Return the diversity loss L_D, a number between -1 and 1; a lower loss means more diverse pairs.

    `unit_halves` scales i and w to unit length before they are joined; the released code does not scale them. Raises
    `ValueError` for a batch of one pair.
    """
    count = len(images)
    if count < 2:
        raise ValueError(f"the diversity loss compares the pairs of a batch, found {count}; give at least 2 pairs")
    halves = [F.normalize(h, dim=1) for h in (images, texts)] if unit_halves else [images, texts]
    joint = F.normalize(torch.cat(halves, dim=1), dim=1)
    products = joint @ joint.T
    return (products.sum() - products.diagonal().sum()) / (count * (count - 1))


def per_sample(values: Float[Tensor, " B"], like: Tensor) -> Tensor:
    """Reshape `values` (B,) so that they broadcast over all other dimensions of `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def noised(
    clean: Float[Tensor, "B C h w"], noise: Float[Tensor, "B C h w"], alpha_bar: Float[Tensor, " B"]
) -> Float[Tensor, "B C h w"]:
    """Return the noisy latents z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps of clean latents z_0 and noise eps."""
    signal = per_sample(alpha_bar, clean)
    return signal.sqrt() * clean + (1 - signal).sqrt() * noise


def clean_estimate(
    noisy: Float[Tensor, "B C h w"],
    predicted: Float[Tensor, "B C h w"],
    alpha_bar: Float[Tensor, " B"],
    kind: Prediction,
) -> Float[Tensor, "B C h w"]:
    """Return z^, the clean latents computed from noisy latents and a UNet prediction of type `kind`."""
    signal = per_sample(alpha_bar, noisy)
    if kind == "sample":
        return predicted
    if kind == "v_prediction":
        return signal.sqrt() * noisy - (1 - signal).sqrt() * predicted
    return (noisy - (1 - signal).sqrt() * predicted) / signal.sqrt()


def target_of(
    clean: Float[Tensor, "B C h w"],
    noise: Float[Tensor, "B C h w"],
    alpha_bar: Float[Tensor, " B"],
    kind: Prediction,
) -> Float[Tensor, "B C h w"]:
    """Return what a UNet with prediction type `kind` should predict: the noise, the velocity or the clean latents."""
    signal = per_sample(alpha_bar, clean)
    if kind == "sample":
        return clean
    return signal.sqrt() * noise - (1 - signal).sqrt() * clean if kind == "v_prediction" else noise


def biases_and_norms(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return all biases and all parameters of normalisation layers, by name (DiffFit tunes these parameters)."""
    parameters = {}
    for where, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            if name == "bias" or isinstance(part, NORMS):
                parameters[f"{where}.{name}" if where else name] = parameter
    return parameters
