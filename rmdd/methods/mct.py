"""MCT: matching convexified trajectories (arXiv 2406.19827), on image-text pairs.

MCT replaces the trajectory of each expert by a straight line from its first checkpoint theta_0 to its last checkpoint
theta_n. For each parameter tensor l,

    theta_l(t) = theta_l(0) + beta_l(t) (theta_l(n) - theta_l(0)),
    beta_l(t)  = path length of l up to epoch t / path length of l up to epoch n, linear between epochs

Start epochs are real numbers, t ~ Uniform[0, T+). All other steps are those of LoRS. The paper describes a line between
two anchor checkpoints. The released code uses four anchors, each averaged with its neighbours; `options.anchors: 4` and
`options.smooth_anchors: true` reproduce that. The code moves targets past the last epoch back to the last epoch; we
reject run files with such targets. PTM-ST's shortcut is also a straight line, but has an endpoint per phase and integer
epochs; `rmdd.experts.shortcut` implements both lines.
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
        anchors: Annotated[int, Field(ge=2)] = Field(
            2, description="number of checkpoints that the path connects by straight lines"
        )
        smooth_anchors: bool = Field(
            False, description="replace each anchor by its mean with the checkpoints one epoch before and after it"
        )
        start_points: Literal["continuous", "integer"] = Field(
            "continuous", description="continuous: draw real-valued start epochs; integer: draw integer ones"
        )

        @property
        def bends(self) -> bool:
            """True if the path is not one straight line from the first to the last checkpoint."""
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
                "distill.options.start_points: continuous needs a straight path; set distill.trajectory to "
                "shortcut or convexified"
            )
        if options.bends and rule.trajectory != "convexified":
            mistakes.append("distill.options.anchors and smooth_anchors need distill.trajectory: convexified; set it")
        if options.bends and rule.trajectory == "convexified" and run.experts.keep == "endpoints":
            mistakes.append("distill.options.anchors above 2 and smooth_anchors read all epochs; set experts.keep: all")
        return mistakes

    def path(self, store: Store, expert: int, phase: int, path_start: Params | None = None) -> Path:
        if not self.options.bends:
            return super().path(store, expert, phase, path_start)
        return anchored(store, expert, self.options.anchors, smooth=self.options.smooth_anchors)


def anchored(store: Store, expert: int, anchors: int, *, smooth: bool) -> AnchoredPath:
    """Return the path of straight lines through `anchors` evenly spaced checkpoints, the first and last included."""
    last = store.epochs
    epochs = sorted({round(last * i / (anchors - 1)) for i in range(anchors)})
    anchor = functools.partial(_smoothed, store) if smooth else store.read
    return AnchoredPath({t: anchor(expert, t) for t in epochs}, store.norms(expert))


def _smoothed(store: Store, expert: int, epoch: int) -> Params:
    """Return the mean of three checkpoints: at `epoch`, one epoch before it, and one epoch after it.

    For epoch 0, return its checkpoint unchanged; for the last epoch, return the mean of the last two checkpoints.
    """
    near = [0] if epoch == 0 else [t for t in (epoch - 1, epoch, epoch + 1) if t <= store.epochs]
    checkpoints = [store.read(expert, t) for t in near]
    return {n: torch.stack([p[n] for p in checkpoints]).mean(dim=0) for n in checkpoints[0]}
