"""The student's loss in one inner step, as a function of its parameters."""

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
    """The inner loss of `model` under `rule`; a dropout seed for every inner step.

    `mix(features, step)` changes what both encoders give, before the projections.
    Pictures that are stored smaller than `image_size` are enlarged to it; features are taken as they are.

    With `same_mask` dropout (and any other noise of a tower, such as timm's stochastic depth) draws by step, so both
    passes of the engine see one mask; `fresh_mask` draws another in the second pass, as the released code does.
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
