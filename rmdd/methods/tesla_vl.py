"""TESLA-VL: trajectory matching in constant memory (arXiv 2211.10586), in its image-text form.

The estimator of TESLA with LoRS's loss and a similarity fixed at the identity: the baseline of the LoRS authors that
later tables quote. Let w = eta (target - theta_0) + eta^2 sum_k g_k, constant; then dL/dX_k is taken for
2 w/D . dg_k/dX_k, as if theta_j did not depend on X_k for j > k. The paper calls this exact; it is exact for one step,
and a truncation for more (`distill.estimator: exact` has the same memory). It stores no similarity, so it keeps as many
pairs as the budget. Its rates are LoRS's, for no script was released.
"""

from rmdd.config.runfile import filled
from rmdd.methods.lors import LoRS


class TeslaVL(LoRS):
    card = "2211.10586"
    verified = "gradients equal its two passes in float64; below random pairs on emoji. Open: published figures"
    defaults = filled(
        {
            "distill": {
                "phases": [{"pairs": 100, "start": 0, "stop": 2, "iterations": 3000}],
                "similarity": {"kind": "identity"},
            }
        },
        LoRS.defaults,
    )
