"""`phases: adaptive`: move the range of start epochs and the endpoint of a phase while it is distilled.

Phases begin as `phases: auto` plans them, but start epochs are real numbers. Every `distill.plan.every` updates, the
first-order matching gradients are computed at five epochs: in the middle of the range, at both bounds, and `pace`
epochs outside each bound. Each is compared with the gradient in the middle by its cosine:

    A bound moves outwards by `pace` if the gradient outside it has a cosine of at least `agreement`.
    A bound moves inwards by `pace` if the gradient at it has a cosine below 0; the range stays one epoch wide or wider.
    The endpoint becomes the first stored epoch that lies beyond all targets of the range. It never moves before the
    planned endpoint, and never to an epoch whose shortcut is less straight than `min_straightness`.

The first phase keeps its lower bound, because its student begins at epoch 0. A move depends only on the set and on the
window (range and endpoint) before the move. Both are in every checkpoint, so a killed phase resumes with bit-identical
results. The numbers of pairs and updates stay as planned, and so does the budget.
"""

import functools
from dataclasses import replace

from rmdd.config import Plan
from rmdd.distill.loop import State
from rmdd.distill.phases import Window
from rmdd.distill.trajectory.matching import Matcher
from rmdd.distill.trajectory.statistics import probe, straightness
from rmdd.experts.store import Store

NARROWEST = 1.0
"""Smallest width of a range of start epochs, in epochs; ranges on a very short path can be narrower."""


def adapted(matcher: Matcher, state: State) -> State:
    """Return `state` with the window (start epochs, endpoint) of its next update; also set this window in `matcher`."""
    phase, rule = matcher.run.distill.phases[matcher.phase], matcher.run.distill.plan
    window = state.window or Window(float(phase.start), float(phase.stop), phase.endpoint)
    matcher.set_window(window)
    if state.iteration and state.iteration % rule.every == 0:
        window = _moved(matcher, state, window)
        matcher.set_window(window)
    return replace(state, window=window)


def _moved(matcher: Matcher, state: State, now: Window) -> Window:
    rule, planned = matcher.run.distill, matcher.run.distill.phases[matcher.phase]
    plan, ahead = rule.plan, rule.match_epochs
    ends = _endpoints(matcher.store, tuple(matcher.experts[: plan.experts]), plan, planned.endpoint)
    middle = (now.low + now.stop) / 2
    above = min(now.stop + plan.pace, float(ends[-1] - ahead))
    below = now.low if matcher.phase == 0 else max(0.0, now.low - plan.pace)
    matcher.set_window(Window(now.low, now.stop, _end(ends, above + ahead)))
    starts = [middle, now.low, below, now.stop, above]
    cosines = probe(matcher, state.raw, starts, experts=plan.experts, averaged=True).agreement()[0].tolist()
    agree = dict(zip(("low", "below", "stop", "above"), cosines[1:], strict=True))

    low, stop = now.low, now.stop
    if above > stop and agree["above"] >= plan.agreement:
        stop = above
    elif agree["stop"] < 0:
        stop = max(stop - plan.pace, min(stop, low + NARROWEST))
    if below < low and agree["below"] >= plan.agreement:
        low = below
    elif matcher.phase > 0 and agree["low"] < 0:
        low = min(low + plan.pace, max(low, stop - NARROWEST))
    return Window(low, stop, _end(ends, stop + ahead))


@functools.lru_cache(maxsize=8)
def _endpoints(store: Store, experts: tuple[int, ...], plan: Plan, planned: int) -> list[int]:
    """Return the epochs at which a phase may end: the planned one, and later ones with a straight enough shortcut."""
    later = [e for e in plan.endpoints or store.kept_epochs if e > planned]
    return [planned, *(e for e in sorted(later) if straightness(store, experts, e) >= plan.min_straightness)]


def _end(ends: list[int], needed: float) -> int:
    """Return the first of the endpoints `ends` that is not before epoch `needed`; if all are before, the last."""
    return next((e for e in ends if e >= needed), ends[-1])
