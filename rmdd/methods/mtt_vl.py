"""MTT-VL: bi-trajectory matching (arXiv 2308.07545), the first trajectory matching for pairs.

Images and text embeddings are learned, the pairing is fixed: no similarity. A student starts from an expert's epoch s,
takes K steps of InfoNCE, each on an independent draw of B pairs, and should end near epoch s + 1 in both towers:

    L = |theta_K - theta*|^2 / |theta_0 - theta*|^2, for the image tower plus for the text head

differentiated through the whole unroll (`estimator: exact`; we hold one step's graph at a time, and get the same
numbers). The released inner loop multiplies cosines by log(1/0.07) = 2.66 where experts and students divide by 0.07;
we divide, and `distill.temperature: 0.376` gives theirs. Their students train the text head at the image rate:
`evaluate.text_lr: image`.
"""

from rmdd.methods.trajectory import Method


class MTTVL(Method):
    reference = "mtt_vl"
    card = "2308.07545"
    verified = (
        "gradients equal the whole unroll in float64; at the level of random pairs on emoji. Open: published figures"
    )
    defaults = {
        "experts": {"keep": "all"},
        "distill": {
            "phases": [{"pairs": 100, "start": 0, "stop": 2, "iterations": 2000}],
            "trajectory": "original",
            "estimator": "exact",
            "loss": "infonce",
            "similarity": {"kind": "identity"},
            "batch": 100,
            "batches": "independent",
            "ema": 0.0,
        },
    }
