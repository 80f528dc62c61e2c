"""Embedding health: how far the embeddings of a set have collapsed, beside those of real pairs.

All sets go through one fixed encoder, so numbers of different iterations can be compared. Random real pairs give the
scale of a number, because healthy models also have a modality gap and a narrow cone.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rmdd.core.seeding import derive, generator

EXACT = 10_000
"""Most rows whose pairs of rows are all looked at; of more, `SAMPLE` pairs are drawn."""

SAMPLE = 1_000_000
PROBED = 2_000
"""Most pairs that the linear probe is fitted on."""

NEIGHBOURS = 10
CHUNK = 1024

NARROWER, POORER = 0.5, 0.5
"""A set is called collapsed when its mean cosine went this share of the way from that of random pairs to 1, or its
effective rank fell below this share of theirs. Both are ours."""


def health(images: Float[Tensor, "N D"], texts: Float[Tensor, "N D"], seed: int = 0) -> dict[str, float]:
    """Health of N pairs, rows of any length; `images[i]` belongs to `texts[i]`.

    Pairs with a zero row or one that is not finite are counted (`unusable`) and left out. Of fewer than two usable
    pairs nothing else is told.

    - `cosine_image`, `cosine_text`: mean off-diagonal cosine, and its percentiles `_p05`, `_p50`, `_p95`; 1 is a point
    - `centroid_image`, `centroid_text`: norm of the mean row
    - `gap`: distance of the two means; `gap_share`: its square as a part of the mean squared distance of pairs
    - `alignment`: mean squared distance of pairs (Wang and Isola 2020)
    - `uniformity_image`, `_text`, `_cross`: log mean exp(-2 d^2) over pairs of rows; 0 is a point
    - `margin`: mean cosine of pairs less that of mismatched ones
    - `separability`: accuracy of a linear probe that tells images from texts, five folds; 0.5 is chance
    - `rank_image`, `rank_text`: exp of the entropy of the normalised singular values of the centred rows; 0 for a point
    - `hubness_image`, `hubness_text`: skewness of how often one is among the ten nearest of the other side's rows
    """
    usable = images.isfinite().all(1) & texts.isfinite().all(1) & (images != 0).any(1) & (texts != 0).any(1)
    row = {"pairs": float(len(images)), "unusable": float((~usable).sum())}
    if int(usable.sum()) < 2:
        return row
    u, v = _unit(images[usable]), _unit(texts[usable])
    n = len(u)
    for side, rows in (("image", u), ("text", v)):
        total = rows.sum(0)
        row[f"cosine_{side}"] = (float(total @ total) - n) / (n * (n - 1))
        cosines = _some_pairs(rows, rows, seed)
        for p in (5, 50, 95):
            row[f"cosine_{side}_p{p:02d}"] = float(np.percentile(cosines, p))
        row[f"centroid_{side}"] = float(total.norm()) / n
        row[f"uniformity_{side}"] = _uniformity(rows, rows, seed)
        row[f"rank_{side}"] = _effective_rank(rows)
    delta, distances = u.mean(0) - v.mean(0), (u - v).square().sum(1)
    matched = float((u * v).sum())
    row["gap"] = float(delta.norm())
    row["alignment"] = float(distances.mean())
    row["gap_share"] = float(delta @ delta) / row["alignment"] if row["alignment"] > 0 else 0.0
    row["uniformity_cross"] = _uniformity(u, v, seed)
    row["margin"] = matched / n - (float(u.sum(0) @ v.sum(0)) - matched) / (n * (n - 1))
    row["hubness_image"], row["hubness_text"] = _hubness(v, u), _hubness(u, v)
    if n >= 5:
        row["separability"] = _separability(u, v, seed)
    return row


def stripes(similarity: Float[Tensor, "M M"]) -> float:
    """Variance of the row means and of the column means of a similarity, off the diagonal, over that of its entries.

    1 where rows alone or columns alone decide (the visible stripes of RepBlend's Figure 1); 0 of a constant.
    """
    m = len(similarity)
    if m < 2:
        return 0.0
    others = ~torch.eye(m, dtype=torch.bool, device=similarity.device)
    s = similarity.double() * others
    total = float(similarity.double()[others].var(correction=0))
    means = [s.sum(axis) / (m - 1) for axis in (0, 1)]
    return sum(float(each.var(correction=0)) for each in means) / total if total > 0 else 0.0


def collapsed(row: Mapping[str, Any], real: Mapping[str, Any]) -> list[str]:
    """What makes a set look collapsed beside as many random real pairs; empty for a healthy one."""
    warnings = []
    if row["unusable"]:
        warnings.append(f"{row['unusable']:.0f} of {row['pairs']:.0f} pairs have a zero embedding or one not finite")
    for side in ("image", "text"):
        cosine, rank = f"cosine_{side}", f"rank_{side}"
        if cosine not in row or cosine not in real:
            continue
        if row[cosine] > real[cosine] + NARROWER * (1 - real[cosine]):
            warnings.append(
                f"{side} embeddings have a mean cosine of {row[cosine]:.3f}, those of random pairs {real[cosine]:.3f}"
            )
        if row[rank] < POORER * real[rank]:
            warnings.append(
                f"{side} embeddings have an effective rank of {row[rank]:.1f}, those of random pairs {real[rank]:.1f}"
            )
    return warnings


def _unit(rows: Tensor) -> Tensor:
    rows = rows.detach().double()
    rows = rows / rows.abs().amax(1, keepdim=True)  # so that no norm under- or overflows
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


def _drawn(n: int, seed: int, of: str) -> tuple[Tensor, Tensor]:
    """`SAMPLE` ordered pairs of different rows of n."""
    draw = generator(seed, f"health {of}")
    first = torch.randint(n, (SAMPLE,), generator=draw)
    return first, (first + torch.randint(1, n, (SAMPLE,), generator=draw)) % n


def _some_pairs(a: Tensor, b: Tensor, seed: int) -> np.ndarray:
    """Cosines of different rows: all of them, or as many as are drawn."""
    n = len(a)
    if n * (n - 1) <= SAMPLE:
        return (a @ b.T)[~torch.eye(n, dtype=torch.bool, device=a.device)].cpu().numpy()
    first, second = (index.to(a.device) for index in _drawn(n, seed, "percentiles"))
    return (a[first] * b[second]).sum(1).cpu().numpy()


def _uniformity(a: Tensor, b: Tensor, seed: int) -> float:
    """log of the mean of exp(-2 d^2) over rows i of a and j of b, i != j; d^2 = 2 - 2 cosine."""
    n = len(a)
    if n > EXACT:
        first, second = (index.to(a.device) for index in _drawn(n, seed, "uniformity"))
        return math.log(float((4 * (a[first] * b[second]).sum(1) - 4).exp().mean()))
    total = sum(float((4 * (a[i : i + CHUNK] @ b.T) - 4).exp().sum()) for i in range(0, n, CHUNK))
    matched = float((4 * (a * b).sum(1) - 4).exp().sum())
    return math.log(max((total - matched) / (n * (n - 1)), 1e-300))


def _effective_rank(rows: Tensor) -> float:
    """Roy and Vetterli 2007; 0 where all rows are equal."""
    values = torch.linalg.svdvals(rows - rows.mean(0))
    values = values[values > 1e-9 * math.sqrt(len(rows))]
    if not len(values):
        return 0.0
    p = values / values.sum()
    return float(torch.exp(-(p * p.log()).sum()))


def _hubness(queries: Tensor, candidates: Tensor) -> float:
    """Skewness of the number of queries that have a candidate among their nearest."""
    from scipy.stats import skew  # here, and sklearn below: they take a second to import, which workers do not need

    k, n = min(NEIGHBOURS, len(candidates)), len(candidates)
    counts = torch.zeros(n, dtype=torch.int64, device=candidates.device)
    for i in range(0, len(queries), CHUNK):
        nearest = (queries[i : i + CHUNK] @ candidates.T).topk(k, dim=1).indices
        counts += torch.bincount(nearest.flatten(), minlength=n)
    return 0.0 if int(counts.min()) == int(counts.max()) else float(skew(counts.cpu().numpy()))


def _separability(u: Tensor, v: Tensor, seed: int) -> float:
    """Share of held-out rows that a ridge classifier puts on the right side."""
    if len(u) > PROBED:
        chosen = torch.randperm(len(u), generator=generator(seed, "health probe"))[:PROBED].to(u.device)
        u, v = u[chosen], v[chosen]
    rows = torch.cat([u, v]).cpu().numpy()
    sides = np.repeat([0, 1], len(u))
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    folds = StratifiedKFold(5, shuffle=True, random_state=derive(seed, "health folds") % 2**32)
    return float(cross_val_score(RidgeClassifier(alpha=1e-3), rows, sides, cv=folds).mean())
