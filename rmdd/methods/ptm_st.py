"""PTM-ST: phased teacher models with shortcut trajectories (arXiv 2603.25388).

Late expert epochs give large, inconsistent gradients, so matching them directly makes students worse. PTM-ST adds three
ideas to trajectory matching with a learned similarity; each can be used alone:

    PTM  phased teacher models: split the pairs into P phases. Phase p distils a subset from start epochs in
         [T-_p, T+_p); later phases use later epochs. Students are trained on the subsets in order.
    ST   shortcut trajectory: starts and targets lie on the straight path from theta_0 to theta_{t_p}, the endpoint of
         phase p (`rmdd.experts.shortcut`, eq. 4-5).
    EMA  each exported tensor is the exponential moving average of its values over the outer iterations (eq. 7).

All three are settings of the matching loop: `distill.phases`, `distill.trajectory: shortcut` and `distill.ema`. With
one phase, the original trajectory and `ema: 0`, the method is LoRS with a full similarity matrix. Where paper and
released code differ we follow the paper: endpoints are inclusive, a phase makes exactly I_p updates, and the exported
student learning rates are moving averages, too. Unlike in the code, both passes use the same dropout mask.
"""

from typing import Any

from rmdd import config
from rmdd.methods.trajectory import Method


def without(run: config.Run, *, ptm: bool = False, st: bool = False, ema: bool = False) -> config.Run:
    """Return a copy of `run` without the ideas (PTM, ST, EMA) whose argument is True: the ablations of Table 4.

    Without PTM, one phase distils all pairs. It has the start range and endpoint of the first phase, because the paper
    does not say which ones it used. Without ST, all expert epochs are needed, so `experts.keep` becomes `all`.
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
    reference = "ptm_st"
    card = "2603.25388"
    verified = (
        "Tests: the paths, gradients and averages equal those of a slow float64 implementation; all ablations of Table "
        "4 run. On emoji pairs, PTM-ST scores higher than all other methods. Not verified: the published numbers, "
        "which need a GPU."
    )
    defaults = {
        "distill": {
            "phases": [{"pairs": 99, "start": 0, "stop": 2, "endpoint": 6, "iterations": 2000}],
            "trajectory": "shortcut",
            "estimator": "first_order",
            "loss": "wbce",
            "similarity": {"kind": "full"},
            "lr_image": 1000.0,
            "lr_text": 1000.0,
            "lr_similarity": 10.0,
            "ema": 0.99,
        },
    }
