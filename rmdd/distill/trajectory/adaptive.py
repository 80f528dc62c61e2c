"""`phases: adaptive`: the range of starts and the endpoint of a phase move while it is distilled.

Phases begin as `auto` plans them, with real-valued starts. Every `distill.plan.every` updates the first-order matching
gradients of the set as it is now are taken at the bounds of the range, a `pace` beyond them and in its middle:

    a bound moves out by `pace` where the gradient beyond it agrees with the middle's (cosine at least `agreement`),
    and in by `pace` where its own opposes the middle's (cosine below 0), down to a range of one epoch;
    the endpoint is the first kept epoch that the targets of the range fit below, never one before the planned, nor one
    whose shortcut is bent by more than `min_straightness` allows.

The first phase keeps its lower bound, for its student begins at epoch 0. A move is a function of the set and of the
window before it, which is part of every checkpoint, so that a phase that was killed goes on with the same bits. Pairs
and updates stay as planned, and with them the budget.
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
"""Epochs of a range at least, but for a path that has no room for them."""


def adapted(matcher: Matcher, state: State) -> State:
    """`state` with the window that its next update draws from, to which `matcher` is set."""
    phase, rule = matcher.run.distill.phases[matcher.phase], matcher.run.distill.plan
    window = state.window or Window(float(phase.start), float(phase.stop), phase.endpoint)
    matcher.look_through(window)
    if state.iteration and state.iteration % rule.every == 0:
        window = _moved(matcher, state, window)
        matcher.look_through(window)
    return replace(state, window=window)


def _moved(matcher: Matcher, state: State, now: Window) -> Window:
    rule, planned = matcher.run.distill, matcher.run.distill.phases[matcher.phase]
    plan, ahead = rule.plan, rule.match_epochs
    ends = _endpoints(matcher.store, tuple(matcher.experts[: plan.experts]), plan, planned.endpoint)
    middle = (now.low + now.stop) / 2
    above = min(now.stop + plan.pace, float(ends[-1] - ahead))
    below = now.low if matcher.phase == 0 else max(0.0, now.low - plan.pace)
    matcher.look_through(Window(now.low, now.stop, _end(ends, above + ahead)))
    starts = [middle, now.low, below, now.stop, above]
    seen = probe(matcher, state.raw, starts, experts=plan.experts, averaged=True).agreement()[0].tolist()
    agree = dict(zip(("low", "below", "stop", "above"), seen[1:], strict=True))

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
    """Where a phase may end: the planned epoch, and those after it that the plan allows."""
    later = [e for e in plan.endpoints or store.kept_epochs if e > planned]
    return [planned, *(e for e in sorted(later) if straightness(store, experts, e) >= plan.min_straightness)]


def _end(ends: list[int], needed: float) -> int:
    """The first endpoint that is far enough."""
    return next((e for e in ends if e >= needed), ends[-1])
