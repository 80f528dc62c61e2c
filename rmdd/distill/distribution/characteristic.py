"""Characteristic functions of feature sets, and the network that chooses the frequencies where two sets differ most.

    Phi_A(t)  = mean over a in A of exp(i <t, a>),  a modulus |Phi| and an angle
    Chf(t)    = w_a (|Phi_r| - |Phi_s|)^2 + w_p 2 (|Phi_r||Phi_s| - Re_r Re_s - Im_r Im_s)
    NCFD(r,s) = mean over t of sqrt(Chf(t))

The first term is said to carry diversity, the second realism. Their sum is |Phi_r - Phi_s|^2, so equal weights need no
modulus, whose derivative is undefined at zero. n real and m synthetic rows, D features, T frequencies.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

FLOOR = 1e-8
"""Added under roots: values and gradients stay finite for equal sets, and for a modulus of zero."""
REPEATS = 16
"""Frequencies that a row of the network makes."""

Norm = Literal["layer", "batch"]


def characteristic(points: Float[Tensor, "n D"], frequencies: Float[Tensor, "T D"]) -> Float[Tensor, "T 2"]:
    """Real and imaginary part of Phi at each frequency."""
    angle = points @ frequencies.T
    return torch.stack([angle.cos().mean(dim=0), angle.sin().mean(dim=0)], dim=1)


def ncfd(
    real: Float[Tensor, "n D"],
    synthetic: Float[Tensor, "m D"],
    frequencies: Float[Tensor, "T D"],
    w_amplitude: float = 0.5,
    w_phase: float = 0.5,
) -> Float[Tensor, ""]:
    """The discrepancy of two sets; differentiable in all of them. Not for half precision: angles are large."""
    a, b = characteristic(real, frequencies), characteristic(synthetic, frequencies)
    if w_amplitude == w_phase:
        return (w_phase * (a - b).square().sum(dim=1) + FLOOR).sqrt().mean()
    amplitude, phase = terms(a, b)
    return (w_amplitude * amplitude + w_phase * phase + FLOOR).sqrt().mean()


def terms(a: Float[Tensor, "T 2"], b: Float[Tensor, "T 2"]) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """What two characteristic functions differ by in amplitude and in phase; neither is negative."""
    left, right = ((c.square().sum(dim=1) + FLOOR).sqrt() for c in (a, b))
    return (left - right).square(), 2 * (left * right - (a * b).sum(dim=1)).clamp(min=0)


class FrequencyNet(nn.Module):
    """psi: rows of N(0, I) to frequencies. Three linear layers, each normalised, LeakyReLU(0.2) twice and tanh.

    A row is a component of a mixture of Gaussians: its outputs scale fresh noise per coordinate, for `REPEATS`
    frequencies. The released code only repeats it (`repeat`). tanh bounds the scales, so a network alone cannot reach
    high frequencies; `learned_scale` adds one factor for all of them.
    """

    def __init__(self, width: int, norm: Norm, *, repeat: bool = False, learned_scale: bool = False):
        super().__init__()
        layers: list[nn.Module] = []
        for end in (nn.LeakyReLU(0.2), nn.LeakyReLU(0.2), nn.Tanh()):
            own = nn.LayerNorm(width) if norm == "layer" else nn.BatchNorm1d(width, track_running_stats=False)
            layers += [nn.Linear(width, width), own, end]
        self.layers = nn.Sequential(*layers)
        self.log_scale = nn.Parameter(torch.zeros(()), requires_grad=learned_scale)
        self.width, self.repeat = width, repeat

    def forward(self, frequencies: int, random: torch.Generator) -> Float[Tensor, "T D"]:
        """As many frequencies, a multiple of `REPEATS`, drawn by `random`."""
        rows = torch.randn(frequencies // REPEATS, self.width, generator=random).to(self.log_scale)
        scales = self.layers(rows).repeat_interleave(REPEATS, dim=0) * self.log_scale.exp()
        if self.repeat:
            return scales
        return scales * torch.randn(scales.shape, generator=random).to(scales)


def wrong_count(frequencies: int, norm: Norm) -> str | None:
    """Why a network cannot make so many frequencies, or None. Batch statistics need two rows."""
    least = 2 * REPEATS if norm == "batch" else REPEATS
    if frequencies % REPEATS or frequencies < least:
        return f"{frequencies} frequencies; a network with {norm} norm makes multiples of {REPEATS} from {least} on"
    return None
