"""All file formats that `rmdd verify` checks, in the order in which it checks a storage."""

from rmdd.comparisons.verify import COMPARISONS, STUDENTS
from rmdd.core.checks import Findings
from rmdd.runs import verify as walk
from rmdd.searches.verify import SEARCHES, SWEEPS

FORMATS = (
    walk.DATASETS,
    walk.STORES,
    walk.SETS,
    walk.PHASES,
    walk.BASELINES,
    SEARCHES,
    walk.CORESETS,
    walk.RUNS,
    SWEEPS,
    STUDENTS,
    COMPARISONS,
)


def verify(address: str) -> Findings:
    """Check a folder that rmdd wrote, or its URI. Raises `ValueError` if it holds no files of rmdd."""
    return walk.verify(address, FORMATS)
