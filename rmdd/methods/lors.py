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
`similarity.diagonal`, `inner_dropout`, `init_augment` and `rate_branches` give the code's way back.
"""

from rmdd.methods.trajectory import Method


class LoRS(Method):
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
