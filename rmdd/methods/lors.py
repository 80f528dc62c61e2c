"""LoRS: low-rank similarity mining (arXiv 2406.03793), the baseline of the field.

With M pairs it distils the M x M target similarity between every image and every text, so that M pairs carry M^2 soft
relations. Stored as S = diag(omega) + alpha/R L R^T it costs less than one pair. L M images x R rank, R likewise for
texts; omega starts at ones, L normal, R zero, so S starts at the identity.

    student   K SGD steps on batches cut from permutations, loss `wbce` against the block S[I, I]
    targets   the experts' own epochs: start s ~ Uniform{0, ..., T+ - 1}, target s + 1
    gradient  `first_order`: how a step moves the next is left out (TESLA's two passes)
    step      SGD, momentum 0.5, on images, texts, omega, L, R and both inner rates; no average

Where paper and code differ we follow the code's vector omega, factor 1/2 and floor 1e-6 of the loss and its exclusive
T+; and we keep the dropout mask in both passes, start from plain pictures, and weigh the rates' branches alike.
`similarity.diagonal`, `inner_dropout`, `init_augment` and `options.rate_branches` give the code's way back.
"""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from rmdd import config
from rmdd.distill.unroll import MetaGradient, squared_distance
from rmdd.methods.trajectory import Method
from rmdd.models.dual import TOWERS, Params


class LoRS(Method):
    class Options(Method.Options):
        rate_branches: Literal["same", "separate"] = Field(
            "same", description="separate keeps one ratio per tower for the inner rates of merged branches, as released"
        )

    options: Options
    reference = "lors"
    card = "2406.03793"
    verified = "gradients and steps equal slow float64 ones; above random pairs on emoji. Open: published figures"
    defaults = {
        "experts": {"keep": "all"},
        "distill": {
            "phases": [{"pairs": 99, "start": 0, "stop": 2, "iterations": 3000}],
            "trajectory": "original",
            "estimator": "first_order",
            "similarity": {"kind": "low_rank", "rank": 10, "alpha": 3.0},
            "lr_image": 100.0,
            "lr_text": 100.0,
            "lr_similarity": 10.0,
            "ema": 0.0,
        },
    }

    @classmethod
    def clashes(cls, run: config.Run) -> list[str]:
        mistakes, rule = super().clashes(run), run.distill
        separate = cls.Options(**rule.options).rate_branches == "separate"
        if separate and (rule.branches, rule.estimator) != ("merged", "first_order"):
            mistakes.append(
                "distill.options.rate_branches: separate is for distill.branches: merged with estimator: first_order"
            )
        return mistakes

    def corrected(self, found: MetaGradient, start: Params, target: Params) -> MetaGradient:
        return _separate_rates(found, start, target) if self.options.rate_branches == "separate" else found


def _separate_rates(found: MetaGradient, start: Params, target: Params) -> MetaGradient:
    """Undo the shared denominator of merged branches for the inner rates, as the released code has it."""
    scale = {tower: squared_distance(start, target, tower) for tower in TOWERS}
    both = scale["image"] + scale["text"]
    old = found.gradient
    gradient = replace(old, lr_image=old.lr_image * both / scale["image"], lr_text=old.lr_text * both / scale["text"])
    return replace(found, gradient=gradient)
