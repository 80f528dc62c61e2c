"""MCT: matching convexified trajectories (arXiv 2406.19827), on image-text pairs.

Each expert's path is replaced by a straight one, tensor by tensor, from theta_0 to the last checkpoint theta_n:

    theta_l(t) = theta_l(0) + beta_l(t) (theta_l(n) - theta_l(0)),   beta_l(t) = share of its way that l had gone by t

and starts are real numbers, t ~ Uniform[0, T+), with beta linear between epochs. The paper describes two anchors; its
code goes through four, smoothed over their neighbours: `distill.anchors: 4`, `distill.smooth_anchors: true`. Targets
past the last epoch are refused where the code clamps them. All else is LoRS; PTM-ST's shortcut differs by an endpoint
of its own per phase and whole epochs (`rmdd.experts.shortcut` holds both).
"""

from rmdd.config.runfile import filled
from rmdd.methods.lors import LoRS


class MCT(LoRS):
    card = "2406.19827"
    defaults = filled(
        {
            "experts": {"keep": "endpoints"},
            "distill": {"trajectory": "convexified", "start_points": "continuous"},
        },
        LoRS.defaults,
    )
