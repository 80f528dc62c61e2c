"""The student's loss in one inner step, as a function of its parameters."""

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call

from rmdd import config
from rmdd.distill.phases import Blend
from rmdd.distill.synthetic import enlarged
from rmdd.distill.unroll import StudentLoss
from rmdd.models.dual import DualEncoder, Params
from rmdd.models.losses import LOSSES


def blend(features: Float[Tensor, "B D"], weight: float, partner: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
    """Each row mixed with that of its partner: `weight` of its own (`rmdd.methods.repblend`)."""
    return weight * features + (1 - weight) * features[partner.to(features.device, non_blocking=True)]


def student_loss(
    model: DualEncoder,
    rule: config.Distill,
    dropout_seeds: Sequence[int],
    blends: Sequence[Blend] | None = None,
    image_size: int | None = None,
) -> StudentLoss:
    """The inner loss of `model` under `rule`; a dropout seed and a blend for every inner step.

    Pictures that are stored smaller than `image_size` are enlarged to it; features are taken as they are.

    With `same_mask` dropout (and any other noise of a tower, such as timm's stochastic depth) draws by step, so both
    passes of the engine see one mask; `fresh_mask` draws another in the second pass, as the released code does.
    """
    model.train(rule.inner_dropout != "off")
    loss = LOSSES[rule.loss]
    sharper = 1.0 if rule.temperature is None else model.temperature / rule.temperature
    calls = [0] * len(dropout_seeds)

    def value(params: Params, images: Tensor, texts: Tensor, target: Tensor, step: int) -> Tensor:
        mixing = None
        if blends is not None:
            mixing = functools.partial(blend, weight=blends[step].weight, partner=blends[step].partner)
        if image_size is not None and images.ndim == 4:
            images = enlarged(images, image_size)
        return loss(functional_call(model, params, (images, texts, mixing)) * sharper, target)

    def compute(params: Params, images: Tensor, texts: Tensor, target: Tensor, step: int) -> Tensor:
        if rule.inner_dropout == "off":
            return value(params, images, texts, target, step)
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            torch.manual_seed(dropout_seeds[step] + (calls[step] if rule.inner_dropout == "fresh_mask" else 0))
            calls[step] += 1
            return value(params, images, texts, target, step)

    return compute
