"""All kinds of folders that `rmdd verify` can check, in the order in which they are checked."""

from rmdd.comparisons.verify import COMPARISONS, STUDENTS
from rmdd.core.checks import Findings
from rmdd.retrieval import model
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
    model.FORMAT,
)


def verify(address: str) -> Findings:
    """Check all files below a path or URI; return the faults found. Raises `ValueError` if rmdd wrote nothing there."""
    return walk.verify(address, FORMATS)
