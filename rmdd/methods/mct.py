"""MCT: matching convexified trajectories (arXiv 2406.19827), on image-text pairs.

Each expert's path is replaced by a straight one, tensor by tensor, from theta_0 to the last checkpoint theta_n:

    theta_l(t) = theta_l(0) + beta_l(t) (theta_l(n) - theta_l(0)),   beta_l(t) = share of its way that l had gone by t

and starts are real numbers, t ~ Uniform[0, T+), with beta linear between epochs. The paper describes two anchors; its
code goes through four, smoothed over their neighbours: `options.anchors: 4`, `options.smooth_anchors: true`. Targets
past the last epoch are refused where the code clamps them. All else is LoRS; PTM-ST's shortcut differs by an endpoint
of its own per phase and whole epochs (`rmdd.experts.shortcut` holds both).
"""

import functools
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from rmdd import config
from rmdd.config.runfile import filled
from rmdd.experts.shortcut import AnchoredPath, Path
from rmdd.experts.store import Store
from rmdd.methods.lors import LoRS
from rmdd.models.dual import Params


class MCT(LoRS):
    class Options(LoRS.Options):
        anchors: Annotated[int, Field(ge=2)] = Field(2, description="checkpoints that the path goes through")
        smooth_anchors: bool = Field(False, description="anchors are means of neighbouring checkpoints")
        start_points: Literal["continuous", "integer"] = Field(
            "continuous", description="continuous draws real-valued epochs of a straight path"
        )

        @property
        def bends(self) -> bool:
            """Whether the path goes through more than the first and the last checkpoint as they are."""
            return self.anchors > 2 or self.smooth_anchors

    options: Options
    plain_options: ClassVar[dict[str, Any]] = {"start_points": "integer", "anchors": 2, "smooth_anchors": False}
    card = "2406.19827"
    defaults = filled(
        {
            "experts": {"keep": "endpoints"},
            "distill": {"trajectory": "convexified"},
        },
        LoRS.defaults,
    )

    @classmethod
    def real_starts(cls, rule: config.Distill) -> bool:
        options = rule.options_as(cls.Options) or cls.Options()
        return options.start_points == "continuous" or super().real_starts(rule)

    @classmethod
    def clashes(cls, run: config.Run) -> list[str]:
        mistakes, rule = super().clashes(run), run.distill
        options = cls.Options(**rule.options)
        if options.start_points == "continuous" and rule.trajectory == "original":
            mistakes.append(
                "distill.options.start_points: continuous needs a path between the epochs; set distill.trajectory to "
                "shortcut or convexified"
            )
        if options.bends and rule.trajectory != "convexified":
            mistakes.append("distill.options.anchors and smooth_anchors belong to distill.trajectory: convexified")
        if options.bends and rule.trajectory == "convexified" and run.experts.keep == "endpoints":
            mistakes.append(
                "distill.options.anchors between the ends and smooth_anchors read every epoch; set experts.keep: all"
            )
        return mistakes

    def path(self, store: Store, expert: int, phase: int) -> Path:
        if not self.options.bends:
            return super().path(store, expert, phase)
        return anchored(store, expert, self.options.anchors, smooth=self.options.smooth_anchors)


def anchored(store: Store, expert: int, anchors: int, *, smooth: bool) -> AnchoredPath:
    """Straight lines through so many evenly spaced checkpoints of an expert, first and last among them."""
    last = store.epochs
    epochs = sorted({round(last * i / (anchors - 1)) for i in range(anchors)})
    anchor = functools.partial(_smoothed, store) if smooth else store.read
    return AnchoredPath({t: anchor(expert, t) for t in epochs}, store.norms(expert))


def _smoothed(store: Store, expert: int, epoch: int) -> Params:
    """The mean of a checkpoint and its neighbours; the first stays, the last is the mean of the last two."""
    near = [0] if epoch == 0 else [t for t in (epoch - 1, epoch, epoch + 1) if t <= store.epochs]
    read = [store.read(expert, t) for t in near]
    return {n: torch.stack([p[n] for p in read]).mean(dim=0) for n in read[0]}
