"""The loss of the student in one inner step, as a function of its parameters."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from rmdd import config
from rmdd.distill.synthetic import enlarged
from rmdd.distill.unroll import StudentLoss
from rmdd.models.dual import DualEncoder, Params
from rmdd.models.losses import LOSSES


def student_loss(
    model: DualEncoder,
    rule: config.Distill,
    dropout_seeds: Sequence[int],
    image_size: int | None = None,
    mix: Callable[[Tensor, int], Tensor] | None = None,
) -> StudentLoss:
    """Return the inner loss of `model` for the settings `rule`, with one dropout seed per inner step.

    `mix(features, step)` changes the outputs of both encoders before the projections. Images smaller than
    `image_size` are enlarged to this size. Features (of a frozen tower) in place of images are used unchanged.

    With `same_mask`, dropout and similar noise (such as timm's stochastic depth) is seeded by step, so both passes of
    the engine use the same mask. With `fresh_mask`, the second pass draws a new mask, as in the released code.
    """
    model.train(rule.inner_dropout != "off")
    loss = LOSSES[rule.loss]
    sharper = 1.0 if rule.temperature is None else model.temperature / rule.temperature
    calls = [0] * len(dropout_seeds)

    def value(params: Params, images: Tensor, texts: Tensor, target: Tensor, step: int) -> Tensor:
        mixing = None if mix is None else lambda features: mix(features, step)
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
