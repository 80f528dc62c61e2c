"""The cost of a distilled set is a count of all its stored numbers, including those of learned similarity matrices.

The unit of a budget is one pair, an image and a text embedding of width F: `3 * size^2 + F` numbers. Images stored at a
smaller size cost less. A phase of M pairs also costs `M^2` numbers for a full similarity, `M + 2 M R` for one of rank
R, and none for the identity. The two learning rates of a phase are counted only if it has a learned similarity, as in
the published tables. So a set without a learned similarity has as many pairs as its budget.
"""

from collections.abc import Sequence
from typing import Literal

SimilarityKind = Literal["full", "low_rank", "identity"]

RATES = 2
"""Number of learned inner learning rates per phase: one for the image side, one for the text side."""


def pair_parameters(image_size: int, text_width: int) -> int:
    """Return how many numbers the image and the text embedding of one pair have together: the unit of a budget."""
    return 3 * image_size**2 + text_width


def similarity_parameters(pairs: int, kind: SimilarityKind, rank: int = 0) -> int:
    """Return how many learned numbers the similarity matrix of a phase with `pairs` pairs has."""
    if kind == "full":
        return pairs**2
    if kind == "low_rank":
        return pairs + 2 * pairs * rank
    return 0


def cost(pairs: Sequence[int], stored_size: int, text_width: int, kind: SimilarityKind, rank: int = 0) -> int:
    """Return how many numbers a distilled set has: its pairs, similarities and learning rates.

    Phase p has `pairs[p]` pairs, and images are stored with sides of `stored_size` pixels.
    """
    learned = sum(similarity_parameters(m, kind, rank) for m in pairs) + rate_parameters(len(pairs), kind)
    return sum(pairs) * pair_parameters(stored_size, text_width) + learned


def rate_parameters(phases: int, kind: SimilarityKind) -> int:
    """Return how many learning rates count towards the budget: none without a learned similarity."""
    return 0 if kind == "identity" else RATES * phases


def split(total: int, phases: int) -> tuple[int, ...]:
    """Split `total` pairs over `phases` phases as evenly as possible; the first phases get the larger parts."""
    return tuple(total // phases + (p < total % phases) for p in range(phases))


def largest(
    budget: int,
    image_size: int,
    text_width: int,
    kind: SimilarityKind,
    rank: int = 0,
    phases: int = 1,
    stored_size: int | None = None,
) -> int:
    """Return the largest number of pairs, split evenly over `phases` phases, that a budget of `budget` pairs allows.

    Returns 0 if no pair fits.
    """
    stored = stored_size or image_size
    limit = budget * pair_parameters(image_size, text_width)
    fits, over = 0, limit // pair_parameters(stored, text_width) + 1
    while over - fits > 1:
        middle = (fits + over) // 2
        if cost(split(middle, phases), stored, text_width, kind, rank) <= limit:
            fits = middle
        else:
            over = middle
    return fits


def check(
    pairs: Sequence[int],
    budget: int,
    image_size: int,
    text_width: int,
    kind: SimilarityKind,
    rank: int = 0,
    stored_size: int | None = None,
) -> str | None:
    """Return an error message if phases with as many pairs as `pairs` says cost more than `budget` pairs, or None."""
    unit = pair_parameters(image_size, text_width)
    needed = cost(pairs, stored_size or image_size, text_width, kind, rank)
    if needed <= budget * unit:
        return None
    similarity = sum(similarity_parameters(m, kind, rank) for m in pairs)
    name = f"{kind} similarity" + (f" of rank {rank}" if kind == "low_rank" else "")
    total = largest(budget, image_size, text_width, kind, rank, len(pairs), stored_size)
    if min(split(total, len(pairs))) < 2:
        advice = "the budget is too small for this number of phases; use fewer phases or similarity.kind: low_rank"
    elif len(pairs) == 1:
        advice = f"at most {total} pairs fit; set phases.0.pairs to {total}"
    else:
        even = _sum(split(total, len(pairs)))
        advice = f"at most {total} pairs fit in {len(pairs)} equal phases; set the pairs of the phases to {even}"
    return (
        f"budget {budget} allows {budget * unit:,} numbers ({unit:,} per pair), but phases of {_sum(pairs)} pairs need "
        f"{needed:,}, with {similarity:,} for the {name} and {rate_parameters(len(pairs), kind)} for learning rates; "
        f"over by {needed - budget * unit:,}; {advice}"
    )


def _sum(pairs: Sequence[int]) -> str:
    total = f" = {sum(pairs)}" if len(pairs) > 1 else ""
    return "+".join(str(m) for m in pairs) + total
