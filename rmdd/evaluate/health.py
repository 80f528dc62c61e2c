"""Embedding health: statistics that show whether the embeddings of a distilled set have collapsed.

All sets go through the same fixed encoder, so values of different iterations can be compared. Random real pairs give
reference values, because healthy models also have a modality gap and embeddings in a narrow cone.
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
"""Up to this many embeddings, the statistics use all pairs of embeddings; beyond it, `SAMPLE` random pairs."""

SAMPLE = 1_000_000
MAX_PROBE_PAIRS = 2_000
"""Largest number of image-text pairs on which the linear probe of `separability` is trained."""

NEIGHBOURS = 10
CHUNK = 1024

COSINE_LIMIT, RANK_LIMIT = 0.5, 0.5
"""Limits of the warnings by `collapsed`, our choice. It warns if the mean cosine is above c + `COSINE_LIMIT` * (1 - c),
where c is the mean cosine of random pairs. It also warns if the effective rank is below `RANK_LIMIT` times that of
random pairs."""


def health(images: Float[Tensor, "N D"], texts: Float[Tensor, "N D"], seed: int = 0) -> dict[str, float]:
    """Return health statistics of N pairs; `images[i]` belongs to `texts[i]`, and rows need not be normalised.

    Pairs with a zero or non-finite row are counted as `unusable` and excluded. With fewer than two usable pairs, only
    the counts are returned. In the list, "collapsed" means that all rows are equal:

    - `cosine_image`, `cosine_text`: mean cosine of different rows, with percentiles `_p05`, `_p50`, `_p95`; 1 if
      collapsed
    - `centroid_image`, `centroid_text`: norm of the mean row
    - `gap`: distance between image mean and text mean; `gap_share`: `gap` squared, divided by `alignment`
    - `alignment`: mean squared distance between the image and the text of a pair (Wang and Isola 2020)
    - `uniformity_image`, `_text`, `_cross`: log of the mean of exp(-2 d^2), d the distance of two rows; 0 if collapsed
    - `margin`: mean cosine of matching pairs minus that of mismatched pairs
    - `separability`: five-fold accuracy of a linear probe that separates images from texts; 0.5 is chance
    - `rank_image`, `rank_text`: effective rank, exp of the entropy of the normalised singular values of the centred
      rows; 0 if collapsed
    - `hubness_image`, `hubness_text`: a row is counted once for each row of the other modality that has it among its
      nearest 10; hubness is the skewness of these counts
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
    """Return the share of the variance of a similarity matrix that its row means and column means explain.

    The diagonal is excluded. The share is 1 if an entry depends only on its row or only on its column (stripes, as in
    RepBlend's Figure 1), and 0 for a constant matrix.
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
    """Compare the statistics of a set (`row`) with those of random pairs (`real`); return warnings of a collapse."""
    warnings = []
    if row["unusable"]:
        warnings.append(f"{row['unusable']:.0f} of {row['pairs']:.0f} pairs have a zero or non-finite embedding")
    for side in ("image", "text"):
        cosine, rank = f"cosine_{side}", f"rank_{side}"
        if cosine not in row or cosine not in real:
            continue
        if row[cosine] > real[cosine] + COSINE_LIMIT * (1 - real[cosine]):
            warnings.append(
                f"{side} embeddings have a mean cosine of {row[cosine]:.3f}, those of random pairs have "
                f"{real[cosine]:.3f}"
            )
        if row[rank] < RANK_LIMIT * real[rank]:
            warnings.append(
                f"{side} embeddings have an effective rank of {row[rank]:.1f}, those of random pairs have "
                f"{real[rank]:.1f}"
            )
    return warnings


def _unit(rows: Tensor) -> Tensor:
    rows = rows.detach().double()
    rows = rows / rows.abs().amax(1, keepdim=True)  # scaling by the largest entry keeps the norm from underflow
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


def _random_pairs(n: int, seed: int, purpose: str) -> tuple[Tensor, Tensor]:
    """Draw `SAMPLE` random pairs (i, j) with i != j and both in 0..n-1."""
    draw = generator(seed, f"health {purpose}")
    first = torch.randint(n, (SAMPLE,), generator=draw)
    return first, (first + torch.randint(1, n, (SAMPLE,), generator=draw)) % n


def _some_pairs(a: Tensor, b: Tensor, seed: int) -> np.ndarray:
    """Return the cosines of row i of `a` and row j of `b` for all i != j, or for a sample of pairs if n is large."""
    n = len(a)
    if n * (n - 1) <= SAMPLE:
        return (a @ b.T)[~torch.eye(n, dtype=torch.bool, device=a.device)].cpu().numpy()
    first, second = (index.to(a.device) for index in _random_pairs(n, seed, "percentiles"))
    return (a[first] * b[second]).sum(1).cpu().numpy()


def _uniformity(a: Tensor, b: Tensor, seed: int) -> float:
    """Return the log of the mean of exp(-2 d^2) over i != j; d is the distance of the unit rows `a[i]` and `b[j]`."""
    n = len(a)
    if n > EXACT:
        first, second = (index.to(a.device) for index in _random_pairs(n, seed, "uniformity"))
        return math.log(float((4 * (a[first] * b[second]).sum(1) - 4).exp().mean()))
    total = sum(float((4 * (a[i : i + CHUNK] @ b.T) - 4).exp().sum()) for i in range(0, n, CHUNK))
    matched = float((4 * (a * b).sum(1) - 4).exp().sum())
    return math.log(max((total - matched) / (n * (n - 1)), 1e-300))


def _effective_rank(rows: Tensor) -> float:
    """Return the effective rank (Roy and Vetterli 2007) of `rows` minus the mean row; 0 if all rows are equal."""
    values = torch.linalg.svdvals(rows - rows.mean(0))
    values = values[values > 1e-9 * math.sqrt(len(rows))]
    if not len(values):
        return 0.0
    p = values / values.sum()
    return float(torch.exp(-(p * p.log()).sum()))


def _hubness(queries: Tensor, candidates: Tensor) -> float:
    """Count for each candidate the queries that have it among their ten nearest; return the counts' skewness."""
    from scipy.stats import skew  # importing scipy at the top would slow down every start by a second

    k, n = min(NEIGHBOURS, len(candidates)), len(candidates)
    counts = torch.zeros(n, dtype=torch.int64, device=candidates.device)
    for i in range(0, len(queries), CHUNK):
        nearest = (queries[i : i + CHUNK] @ candidates.T).topk(k, dim=1).indices
        counts += torch.bincount(nearest.flatten(), minlength=n)
    return 0.0 if int(counts.min()) == int(counts.max()) else float(skew(counts.cpu().numpy()))


def _separability(u: Tensor, v: Tensor, seed: int) -> float:
    """Return the share of held-out embeddings whose modality (image or text) a ridge classifier predicts correctly."""
    if len(u) > MAX_PROBE_PAIRS:
        chosen = torch.randperm(len(u), generator=generator(seed, "health probe"))[:MAX_PROBE_PAIRS].to(u.device)
        u, v = u[chosen], v[chosen]
    rows = torch.cat([u, v]).cpu().numpy()
    sides = np.repeat([0, 1], len(u))
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    folds = StratifiedKFold(5, shuffle=True, random_state=derive(seed, "health folds") % 2**32)
    return float(cross_val_score(RidgeClassifier(alpha=1e-3), rows, sides, cv=folds).mean())
