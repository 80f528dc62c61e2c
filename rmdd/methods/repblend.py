"""RepBlend: representation blending and symmetric projection matching (arXiv 2505.14705).

Distilled images drift together, and so do texts, while the two modalities drift apart. Two changes to LoRS:

    blending    each inner step mixes what the encoders give, a' = lam a + (1 - lam) a[q] for images and b' likewise for
                texts, with one lam ~ Beta(1, 1) and one permutation q of the batch for both, before the projections;
                targets are not mixed, and the students that use the set do not blend
    projection  both encoders are frozen, and a projection on each is trained and matched; pixels get their gradient
                through the frozen tower

lam and q are drawn per step and the same in both passes. The paper prints one ratio over both projections
(`branches: merged`, as its COCO scripts); its Flickr30k scripts take one per projection. Blending alone is
`model.image.trainable: true`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from rmdd.config.numbers import PositiveFloat
from rmdd.config.runfile import filled
from rmdd.core.seeding import derive, generator
from rmdd.distill.phases import Draw
from rmdd.distill.trajectory.inner import student_loss
from rmdd.distill.unroll import StudentLoss
from rmdd.methods.lors import LoRS
from rmdd.models.dual import DualEncoder


@dataclass(frozen=True)
class Blend:
    """How the pairs of a mini-batch are mixed: `weight` of their own, the rest of the pair at `partner`."""

    weight: float
    partner: Int[Tensor, " B"]

    def of(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Each row mixed with that of its partner."""
        return (
            self.weight * features + (1 - self.weight) * features[self.partner.to(features.device, non_blocking=True)]
        )


@dataclass(frozen=True)
class BlendedDraw(Draw):
    blends: tuple[Blend, ...]
    """One per inner step."""


class RepBlend(LoRS):
    class Options(LoRS.Options):
        blend: PositiveFloat = Field(
            1.0, description="mix encoder outputs within a batch with a weight from Beta(blend, blend)"
        )

    options: Options
    reference = "repblend"
    card = "2505.14705"
    verified = "blended steps equal slow float64 ones; above random pairs on emoji. Open: published figures"
    defaults = filled({"model": {"image": {"trainable": False, "projection": "block"}}}, LoRS.defaults)

    def draw(
        self, phase: int, iteration: int, experts: int, ranges: Mapping[str, tuple[int | float, int | float]]
    ) -> BlendedDraw:
        drawn = super().draw(phase, iteration, experts, ranges)
        blends = tuple(self._blend(phase, iteration, step, len(index)) for step, index in enumerate(drawn.batches))
        return BlendedDraw(**vars(drawn), blends=blends)

    def _blend(self, phase: int, iteration: int, step: int, pairs: int) -> Blend:
        """A weight from Beta(blend, blend) and a permutation of the batch."""
        partner = torch.randperm(pairs, generator=generator(self.seed, "blend", phase, iteration, step))
        weights = np.random.default_rng(derive(self.seed, "blend weight", phase, iteration, step))
        return Blend(float(weights.beta(self.options.blend, self.options.blend)), partner)

    def student_loss(self, model: DualEncoder, drawn: Draw) -> StudentLoss:
        assert isinstance(drawn, BlendedDraw)
        blends, size = drawn.blends, self.run.data.image_size
        return student_loss(
            model, self.rule, drawn.dropout_seeds, size, lambda features, step: blends[step].of(features)
        )
