"""The characteristic function discrepancy of NCFM, and the network that learns at which frequencies two sets differ.

    Phi_A(t)  = mean over a in A of exp(i <t, a>),  a complex number with modulus |Phi|
    Chf(t)    = w_a (|Phi_r| - |Phi_s|)^2 + w_p 2 (|Phi_r||Phi_s| - Re_r Re_s - Im_r Im_s)
    NCFD(r,s) = mean over t of sqrt(Chf(t))

The set r is real, the set s synthetic. According to the paper, the first term of Chf measures diversity and the second
realism. If w_a = w_p = w, then Chf(t) = w |Phi_r - Phi_s|^2. The code then uses this formula, because |Phi| has no
derivative at zero. Symbols: n real and m synthetic rows, D features, T frequencies.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

FLOOR = 1e-8
"""Small number added before each square root; without it, gradients are infinite for equal sets and zero moduli."""
REPEATS = 16
"""Number of frequencies that the frequency network draws from each of its output rows."""

Norm = Literal["layer", "batch"]


def characteristic(points: Float[Tensor, "n D"], frequencies: Float[Tensor, "T D"]) -> Float[Tensor, "T 2"]:
    """Return the real and imaginary part of the characteristic function Phi at each frequency."""
    angle = points @ frequencies.T
    return torch.stack([angle.cos().mean(dim=0), angle.sin().mean(dim=0)], dim=1)


def ncfd(
    real: Float[Tensor, "n D"],
    synthetic: Float[Tensor, "m D"],
    frequencies: Float[Tensor, "T D"],
    w_amplitude: float = 0.5,
    w_phase: float = 0.5,
) -> Float[Tensor, ""]:
    """Return the discrepancy NCFD of two sets, differentiable in all tensors. Half precision is too coarse for it."""
    a, b = characteristic(real, frequencies), characteristic(synthetic, frequencies)
    if w_amplitude == w_phase:
        return (w_phase * (a - b).square().sum(dim=1) + FLOOR).sqrt().mean()
    amplitude, phase = terms(a, b)
    return (w_amplitude * amplitude + w_phase * phase + FLOOR).sqrt().mean()


def terms(a: Float[Tensor, "T 2"], b: Float[Tensor, "T 2"]) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """Return the amplitude and phase terms of the discrepancy at each frequency, not yet weighted; all are >= 0."""
    left, right = ((c.square().sum(dim=1) + FLOOR).sqrt() for c in (a, b))
    return (left - right).square(), 2 * (left * right - (a * b).sum(dim=1)).clamp(min=0)


class FrequencyNet(nn.Module):
    """The frequency network psi: maps rows drawn from N(0, I) to frequencies.

    The network has three normalised linear layers. LeakyReLU(0.2) follows the first two layers, tanh the last. Each
    output row is multiplied, coordinate by coordinate, by fresh normal noise; this gives `REPEATS` frequencies per row.
    With `repeat`, as in the released code, all these frequencies equal the row itself. Because tanh bounds the rows,
    high frequencies cannot be reached. `learned_scale` removes this bound: a learned factor multiplies all frequencies.
    """

    def __init__(self, width: int, norm: Norm, *, repeat: bool = False, learned_scale: bool = False):
        super().__init__()
        layers: list[nn.Module] = []
        for activation in (nn.LeakyReLU(0.2), nn.LeakyReLU(0.2), nn.Tanh()):
            normed = nn.LayerNorm(width) if norm == "layer" else nn.BatchNorm1d(width, track_running_stats=False)
            layers += [nn.Linear(width, width), normed, activation]
        self.layers = nn.Sequential(*layers)
        self.log_scale = nn.Parameter(torch.zeros(()), requires_grad=learned_scale)
        self.width, self.repeat = width, repeat

    def forward(self, frequencies: int, random: torch.Generator) -> Float[Tensor, "T D"]:
        """Draw `frequencies` frequencies (a multiple of `REPEATS`) with the random generator `random`."""
        rows = torch.randn(frequencies // REPEATS, self.width, generator=random).to(self.log_scale)
        scales: Tensor = self.layers(rows).repeat_interleave(REPEATS, dim=0) * self.log_scale.exp()
        if self.repeat:
            return scales
        return scales * torch.randn(scales.shape, generator=random).to(scales)


def frequency_count_error(frequencies: int, norm: Norm) -> str | None:
    """Return an error message if a frequency network cannot produce this number of frequencies, otherwise None."""
    smallest = 2 * REPEATS if norm == "batch" else REPEATS  # batch norm needs two rows to compute a variance
    if frequencies % REPEATS or frequencies < smallest:
        return f"found {frequencies} frequencies; {norm} norm needs a multiple of {REPEATS}, at least {smallest}"
    return None
