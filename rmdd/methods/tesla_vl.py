"""TESLA-VL: trajectory matching in constant memory (arXiv 2211.10586), adapted to image-text pairs.

TESLA-VL is LoRS with its loss and gradient estimator, but without a learned similarity: S stays the identity. The LoRS
authors introduced it as a baseline, and later papers quote it. The estimator approximates the gradient of the loss L in
the batch X_k of step k, with g_k = gradient of step k, eta = student learning rate, D = ||theta_0 - target||^2:

    dL/dX_k = 2 w/D . dg_k/dX_k,    w = eta (target - theta_0) + eta^2 sum_j g_j, held constant

The estimate ignores that the student's parameters after step k depend on X_k. The paper calls it exact, but it is exact
only for one step (K = 1); `distill.estimator: exact` gives the exact gradient for the same memory. Without a similarity
to store, the whole budget goes into pairs. No script was released, so we use the learning rates of LoRS.
"""

from rmdd.config.runfile import filled
from rmdd.methods.lors import LoRS


class TeslaVL(LoRS):
    card = "2211.10586"
    verified = (
        "Tests: the gradients equal those of a slow float64 implementation of TESLA's two passes. On emoji pairs, "
        "TESLA-VL scores lower than random pairs. Not verified: the published numbers, which need a GPU."
    )
    defaults = filled(
        {
            "distill": {
                "phases": [{"pairs": 100, "start": 0, "stop": 2, "iterations": 3000}],
                "similarity": {"kind": "identity"},
            }
        },
        LoRS.defaults,
    )
