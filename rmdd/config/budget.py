"""Memory-fair accounting: a learned similarity is paid for in pairs.

One pair is an image and a text embedding, 3 * size^2 + F numbers, the unit of a budget. Pictures stored smaller cost
less. On top of its pairs a phase of M costs M^2 numbers (full similarity), M + 2 M R (low rank) or none (identity). Its
two learning rates are counted with a similarity and not without one, as the published tables do: a set of plain pairs
has as many as its budget.
"""

from collections.abc import Sequence
from typing import Literal

SimilarityKind = Literal["full", "low_rank", "identity"]

RATES = 2


def pair_parameters(image_size: int, text_width: int) -> int:
    """Numbers in one pair, the unit of a budget."""
    return 3 * image_size**2 + text_width


def similarity_parameters(pairs: int, kind: SimilarityKind, rank: int = 0) -> int:
    """Numbers in the similarity of one phase."""
    if kind == "full":
        return pairs**2
    if kind == "low_rank":
        return pairs + 2 * pairs * rank
    return 0


def cost(pairs: Sequence[int], stored_size: int, text_width: int, kind: SimilarityKind, rank: int = 0) -> int:
    """Numbers in a set with `pairs[p]` pairs in phase p, pictures of side `stored_size`: pairs, similarities, rates."""
    learned = sum(similarity_parameters(m, kind, rank) for m in pairs) + rate_parameters(len(pairs), kind)
    return sum(pairs) * pair_parameters(stored_size, text_width) + learned


def rate_parameters(phases: int, kind: SimilarityKind) -> int:
    """Learning rates that count."""
    return 0 if kind == "identity" else RATES * phases


def split(total: int, phases: int) -> tuple[int, ...]:
    """`total` pairs over `phases` as evenly as can be, the larger ones first."""
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
    """The most pairs, spread evenly over `phases`, that fit a budget of `budget` pairs; 0 when none do."""
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
    """What is wrong when phases of `pairs` pairs cost more than `budget` pairs, else None."""
    unit = pair_parameters(image_size, text_width)
    needed = cost(pairs, stored_size or image_size, text_width, kind, rank)
    if needed <= budget * unit:
        return None
    similarity = sum(similarity_parameters(m, kind, rank) for m in pairs)
    what = f"{kind} similarity" + (f" of rank {rank}" if kind == "low_rank" else "")
    total = largest(budget, image_size, text_width, kind, rank, len(pairs), stored_size)
    if min(split(total, len(pairs))) < 2:
        advice = "no such phases fit; use fewer phases or similarity.kind: low_rank"
    elif len(pairs) == 1:
        advice = f"at most {total} pairs fit; set phases.0.pairs to {total}"
    else:
        even = _sum(split(total, len(pairs)))
        advice = f"at most {total} pairs fit in {len(pairs)} even phases; set phases to {even}"
    return (
        f"budget {budget} is {budget * unit:,} numbers at {unit:,} a pair, but phases of {_sum(pairs)} pairs need "
        f"{needed:,}: {similarity:,} for the {what} and {rate_parameters(len(pairs), kind)} for learning rates; "
        f"over by {needed - budget * unit:,}; {advice}"
    )


def _sum(pairs: Sequence[int]) -> str:
    total = f" = {sum(pairs)}" if len(pairs) > 1 else ""
    return "+".join(str(m) for m in pairs) + total
