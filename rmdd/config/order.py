"""The order in which students learn the subsets of a distilled set.

Students learn one stage after the other. A stage is a list of subsets that are joined to one training set.
"""

from collections.abc import Sequence
from typing import Literal

Order = Literal["sequence", "cumulative", "union"]
Between = Literal["zeros", "masked"]


def stages(order: str, subsets: int) -> tuple[tuple[int, ...], ...]:
    """Return the subsets of each stage, for a set with the given number of subsets.

    >>> stages("sequence", 3), stages("cumulative", 3), stages("union", 3)
    (((0,), (1,), (2,)), ((0,), (0, 1), (0, 1, 2)), ((0, 1, 2),))
    """
    if order == "sequence":
        return tuple((p,) for p in range(subsets))
    return tuple(tuple(range(p + 1)) for p in range(subsets) if order == "cumulative" or p == subsets - 1)


def pairs_of_stages(order: str, pairs: Sequence[int]) -> list[int]:
    """Return the number of pairs of each stage, for subsets with `pairs` pairs each."""
    return [sum(pairs[p] for p in stage) for stage in stages(order, len(pairs))]


def in_words(order: str, between: str) -> str:
    """Return the end of the sentence "Students train on ...", which says in which order they learn the subsets."""
    if order == "sequence":
        return "one subset after the other"
    sets = "all subsets at once" if order == "union" else "the first subset, then on the first two at once, and so on"
    if between == "masked":
        return f"{sets}; images and texts of different subsets are not compared"
    return f"{sets}; the similarity of images and texts of different subsets is 0"
