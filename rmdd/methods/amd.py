"""AMD: asynchronous matching with dynamic sampling (ICLR 2026), on a LoRS loop.

Text heads move most in the first epochs, image towers later, so one start epoch for both is wrong for one of them.
Starts are drawn independently, t_V ~ U{0..R_V} and t_L ~ U{0..R_L}, from ranges found in the experts:

    drift   D_m(t) = | mean over experts of theta_m(t) - the same at t - 1 |,  m = image V, text L
    ratio   r(t) = D_V(t) / D_L(t), threshold T its median;  R_V = min{t: r(t) > T},  R_L = max{t: r(t) <= T}

and the set starts from prototypes: pairs nearest to the k-means centres of image and text embeddings side by side. From
notes on the paper, which has no code; its rule for R_V is an odd one, and `ranges: stated` takes ranges by hand. Ranges
and prototypes are computed in `rmdd.distill.starts`.
"""

from rmdd.config.runfile import filled
from rmdd.methods.lors import LoRS


class AMD(LoRS):
    card = "ICLR 2026"
    verified = (
        "ranges of planted drifts, prototypes and steps equal slow float64 ones; as LoRS on emoji. "
        "Open: published figures"
    )
    defaults = filled({"distill": {"starts": "independent", "ranges": "drift", "init": "prototypes"}}, LoRS.defaults)
