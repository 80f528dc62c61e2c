"""Chained phases (`distill.path_start: student`): which phase runs when, and which students its paths start from.

A student reaches phase p from where the earlier subsets took it, not from theta_0. So the paths of phase p start at
phi_p(e), a student that learned the subsets of the phases before p, from theta_0 of expert e. Phase p therefore needs
the sets of the earlier phases. With a lag of N updates, phase p need not wait until they are finished:

    The updates of a phase are cut into segments of N. Segment k of phase p runs in wave k + p, so all phases of a wave
    can run at the same time, and P phases of I updates take the time of I + (P - 1) N updates.
    The paths of segment k of phase p start at students of the set that phase q < p had after (k + p - q) N updates, or
    after its last update. These are the newest sets of the waves before.

Without a lag, each phase is one segment, and the phases run one after the other. The schedule alone decides which
sets are used, so the results do not depend on the number of workers.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rmdd import config
from rmdd.core.tensors import Damaged, load_checked, save_checked


def is_chained(rule: config.Distill) -> bool:
    """Return whether phases depend on the sets of earlier phases."""
    return rule.path_start == "student" and len(rule.phases) > 1


def waves(rule: config.Distill) -> int:
    """Return the number of waves; independent phases all run in a single wave."""
    if not is_chained(rule):
        return 1
    return max(p + -(-phase.iterations // _lag(rule)) for p, phase in enumerate(rule.phases))


def updates_after(rule: config.Distill, phase: int, wave: int) -> int:
    """Return the number of updates that `phase` has made after wave number `wave`, counted from 0."""
    total = rule.phases[phase].iterations
    return min(total, max(0, wave - phase + 1) * _lag(rule)) if is_chained(rule) else total


def segment_ends(rule: config.Distill, phase: int) -> list[int]:
    """Return the numbers of updates at which the segments of `phase` end."""
    return sorted({updates_after(rule, phase, wave) for wave in range(waves(rule))} - {0})


def iterations_of_earlier_phases(rule: config.Distill, phase: int, iteration: int) -> tuple[int, ...]:
    """Return which sets the students learn at which the paths of `phase` start: the iteration of each earlier phase.

    `iteration` is the number of updates that `phase` has made. The result is empty if paths start at theta_0.
    """
    if not is_chained(rule):
        return ()
    wave = iteration // _lag(rule) + phase
    return tuple(updates_after(rule, q, wave - 1) for q in range(phase))


def students_of_paths(rule: config.Distill, phase: int) -> set[tuple[int, ...]]:
    """Return the `iterations_of_earlier_phases` of all segments of `phase`; each expert has one student per entry."""
    begins = (0, *segment_ends(rule, phase)[:-1])
    return {iterations_of_earlier_phases(rule, phase, begin) for begin in begins} - {()}


def path_start_file(folder: Path, expert: int, iterations: tuple[int, ...]) -> Path:
    """Return the file of the student at which the paths of one expert start; `folder` is that of the phase.

    `iterations` are the `iterations_of_earlier_phases`: the student learned the sets of these iterations.
    """
    return folder / "path-starts" / f"expert-{expert:03d}" / f"{'-'.join(map(str, iterations))}.safetensors"


def write_path_start(path: Path, params: Mapping[str, Tensor]) -> None:
    """Write the parameters of a student from which a path starts."""
    save_checked(path, params, "path start", {})


def read_path_start(path: Path) -> dict[str, Tensor]:
    """Read the parameters of a student from which a path starts.

    Raises `ValueError` if the file is missing or damaged.
    """
    if not path.is_file():
        raise ValueError(f"the path start {path} is missing; run again to train this student")
    try:
        return load_checked(path, "path start")[0]
    except Damaged as error:
        raise ValueError(f"the path start {path} is damaged ({error}); delete it and run again") from error


def _lag(rule: config.Distill) -> int:
    return rule.path_lag or max(phase.iterations for phase in rule.phases)
