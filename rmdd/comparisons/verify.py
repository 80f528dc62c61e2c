"""Checks of `rmdd verify` for comparisons and transfers."""

from pathlib import Path

from rmdd.core.checks import DiskCheck, Format
from rmdd.evaluate import records


def verify_comparison(path: Path, check: DiskCheck) -> None:
    """Check the files of a comparison or a transfer."""
    if not check.begin(path):
        return
    for file in sorted(path.glob("*.json")):
        check.json(file, "run the comparison again; finished students are not trained again")
    check.lines(path / "events.jsonl")
    if not (path / "results.json").is_file():
        check.unfinished(path)


def _student(record: Path, check: DiskCheck) -> None:
    records.verify(record, check, "resume its comparison")


STUDENTS = Format((), "comparisons/students/*/*.json", _student)
COMPARISONS = Format(("comparison.json",), "comparisons/*", verify_comparison)
