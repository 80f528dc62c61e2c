"""PTM-ST: phased teacher models with shortcut trajectories (arXiv 2603.25388).

Late teacher epochs give large, inconsistent gradients, so matching them directly makes students worse. Three
switches, each usable alone, on top of trajectory matching with a learned similarity:

    PTM  the budget is split over P phases; phase p matches starts in [T-_p, T+_p) and students are trained on the
         subsets in order. Ranges move on by `shift` epochs a phase, endpoints t_p as given.
    ST   starts and targets lie on the shortcut from theta_0 to theta_{t_p} (`rmdd.experts.shortcut`, eq. 4-5).
    EMA  the exported set is the exponential average over outer iterations (eq. 7).

All three are plain settings of the matching loop; with one phase, the original trajectory and `ema: 0` it is LoRS
with a full similarity. We differ from the released code where it differs from the paper: endpoints are inclusive,
a phase makes exactly I_p updates, exported rates are averaged, and dropout keeps its mask in both passes.
"""

from typing import Any

from rmdd import config
from rmdd.methods.trajectory import Method


def without(run: config.Run, *, ptm: bool = False, st: bool = False, ema: bool = False) -> config.Run:
    """`run` with the named switches off: the rows of the paper's Table 4.

    Without PTM all pairs go to one phase with the first phase's range and endpoint (the paper does not state
    which). Without ST the experts must keep every epoch, so `experts.keep` becomes `all`.
    """
    changes: dict[str, Any] = run.model_dump(mode="json")
    if ptm:
        first = run.distill.phases[0]
        changes["distill"]["phases"] = [{**first.model_dump(), "pairs": sum(p.pairs for p in run.distill.phases)}]
    if st:
        changes["distill"]["trajectory"] = "original"
        changes["experts"]["keep"] = "all"
    if ema:
        changes["distill"]["ema"] = 0.0
    return config.load(changes)


class PTMST(Method):
    """The defaults of `distill` are PTM-ST's, but for the exact gradient; presets named after the paper set its own."""

    reference = "ptm_st"
    card = "2603.25388"
    verified = (
        "paths, gradients and averages equal slow float64 ones; best on emoji, all rows of Table 4 run. "
        "Open: published figures"
    )
