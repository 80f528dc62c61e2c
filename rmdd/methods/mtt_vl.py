"""MTT-VL: bi-trajectory matching (arXiv 2308.07545), the first trajectory matching for image-text pairs.

MTT-VL learns images and text embeddings; image i always belongs to text i, and no similarity is learned. A student
starts from an expert's epoch s and takes K SGD steps on InfoNCE, each on an independent draw of B pairs. The student
should end near theta*, the expert's epoch s + 1, in both towers:

    L = sum over m of ||theta_K,m - theta*_m||^2 / ||theta_0,m - theta*_m||^2,    m = image tower, text head

The gradient goes through all K steps (`estimator: exact`). We keep the autograd graph of one step at a time and get the
same gradient. In the released code, the student loop multiplies cosines by log(1/0.07) = 2.66, but experts and
evaluation divide cosines by 0.07. We always divide; `distill.temperature: 0.376` reproduces that student loop. The
code's evaluation trains the text head at the learning rate of the image tower; `evaluate.text_lr: image` does the same.
"""

from rmdd.methods.trajectory import Method


class MTTVL(Method):
    reference = "mtt_vl"
    card = "2308.07545"
    verified = (
        "Tests: the gradients equal those of a full unroll in float64. On emoji pairs, MTT-VL scores like random "
        "pairs. Not verified: the published numbers, which need a GPU."
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
