"""LoRS: low-rank similarity mining (arXiv 2406.03793), the baseline of the field.

LoRS learns M pairs together with an M x M matrix S. S holds a target similarity for every image with every text. It is
stored in low-rank form, which costs less memory than one pair:

    S = diag(omega) + alpha/r A B^T,    omega (M,) = one scale per pair,  A (M, r), B (M, r) = image and text factors

omega starts at ones, A at normal draws and B at zero, so S starts as the identity. An outer iteration trains a student
on the set and compares it with an expert:

    student   K SGD steps on batches cut from permutations; loss `wbce` against the block S[I, I] of the batch I
    target    start at an expert's epoch s ~ Uniform{0, ..., T+ - 1}, end at its epoch s + 1
    gradient  `first_order`: ignores how one student step changes the gradient of the next (TESLA's two passes)
    update    SGD with momentum 0.5 on images, texts, omega, A, B and both student learning rates; no moving average

Paper and released code differ. We follow the code for the vector omega, the factor 1/2 and the floor 1e-6 of the loss,
and the exclusive bound T+. We differ from the code in three points: both passes use the same dropout mask, initial
images are not augmented, and the gradients of the student learning rates have the same denominator as all other
gradients. The options `inner_dropout`, `init_augment` and `options.rate_branches` restore the code's behaviour, and
`similarity.diagonal` restores the paper's scalar omega.
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
            "same",
            description="squared distance by which the gradient of a student learning rate is divided, with branches: "
            "merged; same: sum over both towers; separate: distance of the tower with that rate, as released",
        )

    options: Options
    reference = "lors"
    card = "2406.03793"
    verified = (
        "Tests: the gradients and updates equal those of a slow float64 implementation. On emoji pairs, "
        "distilled pairs score higher than random pairs. Not verified: the published numbers, which need a GPU."
    )
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
                "distill.options.rate_branches: separate needs distill.branches: merged and "
                "distill.estimator: first_order; set both"
            )
        return mistakes

    def corrected(self, result: MetaGradient, start: Params, target: Params) -> MetaGradient:
        return _separate_rates(result, start, target) if self.options.rate_branches == "separate" else result


def _separate_rates(result: MetaGradient, start: Params, target: Params) -> MetaGradient:
    """Return `result` with the gradients of the student learning rates rescaled as in the released code.

    In `result` (`branches: merged`), both gradients are divided by the sum of both towers' squared distances. In the
    returned value, the gradient of a tower's learning rate is divided by the squared distance of that tower only.
    """
    scale = {tower: squared_distance(start, target, tower) for tower in TOWERS}
    both = scale["image"] + scale["text"]
    old = result.gradient
    gradient = replace(old, lr_image=old.lr_image * both / scale["image"], lr_text=old.lr_text * both / scale["text"])
    return replace(result, gradient=gradient)
