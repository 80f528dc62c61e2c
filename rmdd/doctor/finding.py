"""The result of one check of `rmdd doctor`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What one check found: `ok`, a `warning` (runs work, or some of them), or a `problem` (runs will fail)."""

    check: str
    """Name of what was checked."""
    state: Literal["ok", "warning", "problem"]
    found: str
    cure: str = ""
    """What to do, in one sentence; empty if all is well."""


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def by_amount(check: str, amount: int | float, enough: int, least: int, found: str, cure: str) -> Finding:
    """Return a problem if `amount` is below `least`, a warning if it is below `enough`, and else that all is well."""
    if amount >= enough:
        return ok(check, found)
    return Finding(check, "problem" if amount < least else "warning", found, cure)
