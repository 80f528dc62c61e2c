"""`phases: auto`: phases from the trajectories themselves, before anything is distilled.

The rule, with `distill.plan` for its numbers:

1. endpoints   E_p is the first epoch in which the teacher has reached the share `reach + p reach_step` of its whole
               gain on val: what lies beyond brings little per unit of arc, by large gradients that disagree. It is
               later than E_(p-1), and the teacher has gained since. Ends whose shortcut is bent by more than
               `min_straightness` allows are left out.
2. phases      as many as have an endpoint of their own, `min_pairs` pairs and `min_iterations` updates each, at most
               `max_phases`, at least one. A student learns from the phases in turn, so each has to carry it alone.
3. sizes       the budget's pairs, the similarity paid for, spread evenly; the updates likewise.
4. ranges      the first begins at 0, each later one in the middle of the one before. A range has `min_starts` starts,
               and goes on while the matching gradient of the next start agrees with that of the last by `agreement`.

With the published val curves of PTM-ST's teachers the rule gives the published endpoints: 6 at 100 pairs, 6 and 8 in
two phases, 6, 8 and 10 in three.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rmdd import config
from rmdd.config import budget, recipes
from rmdd.distill.trajectory import statistics
from rmdd.distill.trajectory.matching import Matched, Matcher
from rmdd.experts.store import Store
from rmdd.experts.train import expert_model
from rmdd.models.prepared import PreparedSplit
from rmdd.models.text import text_width as width_of

SCHEMA = 1
PLAN = "plan.json"


@dataclass(frozen=True)
class Measured:
    """What the rule sees of the experts, but for matching gradients."""

    val: Float[np.ndarray, " m"]
    arc: Float[np.ndarray, " n"]
    straightness: dict[int, float]
    """Per epoch that may be an endpoint."""

    @property
    def share(self) -> Float[np.ndarray, " m"]:
        return statistics.share_reached(self.val)


def measure(plan: config.Plan, store: Store, experts: int) -> Measured:
    """Curves of the first `experts`, straightness of the first few at every epoch that may be an endpoint."""
    everyone = [e for e in store.complete() if e < experts]
    few = everyone[: plan.experts]
    candidates = plan.endpoints or store.kept_epochs[1:]
    straight = {e: statistics.straightness(store, few, e) for e in candidates}
    return Measured(statistics.val_curve(store, everyone), statistics.arc_lengths(store, everyone), straight)


def endpoints(rule: config.Distill, measured: Measured) -> list[int]:
    """An endpoint for each of up to `max_phases` phases, ascending.

    Raises `ValueError` when no epoch may be one.
    """
    plan = rule.plan
    bent = plan.min_straightness if rule.trajectory == "shortcut" else 0.0
    least = rule.match_epochs + _beyond(rule)
    able = sorted(e for e, straight in measured.straightness.items() if e >= least and straight >= bent)
    if not able:
        raise ValueError(
            f"no epoch of {sorted(measured.straightness)} may be an endpoint: it must be at least {least} and its "
            f"shortcut keep {bent:g} of its path; lower distill.plan.min_straightness, or keep more epochs of the "
            "experts (experts.keep: all)"
        )
    found: list[int] = []
    for p in range(plan.max_phases):
        wanted = min(1.0, plan.reach + p * plan.reach_step)
        after = [e for e in able if not found or measured.share[e] > measured.share[found[-1]]]
        reached = [e for e in after if measured.share[e] >= wanted]
        if not after or (found and not reached):
            break
        found.append(reached[0] if reached else after[-1])
    return found


def sizes(run: config.Run, text_width: int, most: int) -> tuple[int, ...]:
    """Pairs of each phase: as many phases, up to `most`, as have pairs and updates enough.

    Raises `ValueError` when the budget holds no phase that a mini-batch can be drawn from.
    """
    rule, plan = run.distill, run.distill.plan
    kind, rank = rule.similarity.kind, rule.similarity.rank
    least = max(2, rule.batch if rule.batches == "cycle" else 2, 2 * rank if kind == "low_rank" else 2)

    def even(phases: int) -> tuple[int, ...]:
        paid = (rule.budget, run.data.image_size, text_width, kind, rank)
        return budget.split(budget.largest(*paid, phases=phases, stored_size=run.stored_size), phases)

    for phases in range(most, 1, -1):
        enough = plan.iterations // phases >= plan.min_iterations
        if enough and min(even(phases)) >= max(least, plan.min_pairs):
            return even(phases)
    if even(1)[0] < least:
        raise ValueError(
            f"the budget of {rule.budget} holds {even(1)[0]} pairs and a phase needs {least}; raise distill.budget, or "
            "lower distill.batch or distill.similarity.rank"
        )
    return even(1)


def ranges(
    rule: config.Distill, ends: list[int], agreement: Callable[[int, int], Float[Tensor, "T T"]]
) -> list[tuple[int, int]]:
    """First start and exclusive last of each phase; `agreement(phase, endpoint)` gives the cosines between starts."""
    plan = rule.plan
    found: list[tuple[int, int]] = []
    for p, end in enumerate(ends):
        last = end - rule.match_epochs - _beyond(rule)
        start = min(last, math.ceil(sum(found[-1]) / 2)) if found else 0
        cosines = agreement(p, end)
        reach = start
        while reach < last and (
            reach + 1 - start < plan.min_starts or float(cosines[reach, reach + 1]) >= plan.agreement
        ):
            reach += 1
        found.append((start, reach + (rule.start_rule == "exclusive" or bool(_beyond(rule)))))
    return found


def without_a_phase(run: config.Run, text_width: int) -> str | None:
    """A message when the budget of a run that plans its phases holds none, else None."""
    try:
        sizes(run, text_width, 1)
    except ValueError as error:
        return str(error)
    return None


def _beyond(rule: config.Distill) -> int:
    """1 where a start may lie at, or anywhere up to, the exclusive end of its range."""
    return int(rule.real_starts)


def make_plan(method: Matched, store: Store, train: PreparedSplit, device: torch.device) -> dict[str, Any]:
    """The phases of a run, with the signals and reasons that led to them, as plain values."""
    run = method.run
    began, rule, plan = time.perf_counter(), run.distill, run.distill.plan
    measured = measure(plan, store, run.experts.num)
    ends = endpoints(rule, measured)
    pairs = sizes(run, train.texts.shape[1], len(ends))
    asked = len(ends)
    ends = ends[: len(pairs)]
    seen: list[statistics.Probe] = []

    def agreement(phase: int, end: int) -> Float[Tensor, "T T"]:
        seen.append(probe_start(method, store, train, device, pairs[phase], end))
        return seen[-1].agreement()

    spans = ranges(rule, ends, agreement)
    exclusive = rule.endpoint_rule == "exclusive"
    updates = budget.split(plan.iterations, len(pairs))
    phases = [
        config.Phase(pairs=m, start=low, stop=stop, endpoint=end + exclusive, iterations=count)
        for m, (low, stop), end, count in zip(pairs, spans, ends, updates, strict=True)
    ]
    share = measured.share
    fewer = f"; only {asked} of the epochs have a wanted share of the gain" if asked < plan.max_phases else ""
    reasons = [
        f"{len(phases)} of at most {plan.max_phases} phases: {'+'.join(map(str, pairs))} pairs fit the budget of "
        f"{rule.budget}, {'+'.join(map(str, updates))} updates; a phase wants {plan.min_pairs} and "
        f"{plan.min_iterations}{fewer}"
    ]
    for p, (phase, end, probe) in enumerate(zip(phases, ends, seen, strict=True)):
        beside = ", ".join(f"{c:.2f}" for c in probe.agreement().diagonal(1).tolist())
        reasons.append(
            f"phase {p} ends at epoch {end}, where the teacher has {share[end]:.2f} of its gain (wanted "
            f"{min(1.0, plan.reach + p * plan.reach_step):.2f}) and the shortcut {measured.straightness[end]:.2f} of "
            f"its path; starts [{phase.start}, {phase.stop}): neighbouring starts agree by {beside or 'none'} "
            f"(wanted {plan.agreement:.2f})"
        )
    return {
        "schema_version": SCHEMA,
        "key": key_of(run, store.path.name),
        "kind": plan.kind,
        "phases": [p.model_dump(mode="json") for p in phases],
        "endpoints": ends,
        "starts": [[p.start, p.stop - (rule.start_rule == "exclusive" and not _beyond(rule))] for p in phases],
        "reasons": reasons,
        "signals": {
            "val": measured.val.tolist(),
            "share": share.tolist(),
            "arc": measured.arc.tolist(),
            "gain_per_arc": statistics.gain_per_arc(measured.val, measured.arc).tolist(),
            "straightness": {str(e): s for e, s in measured.straightness.items()},
            "agreement": [p.agreement().tolist() for p in seen],
            "gradient_norm": [p.norms("images").tolist() for p in seen],
            "miss": [p.miss.mean(dim=1).tolist() for p in seen],
        },
        "seconds": round(time.perf_counter() - began, 2),
    }


def probe_start(
    method: Matched, store: Store, train: PreparedSplit, device: torch.device, pairs: int, end: int
) -> statistics.Probe:
    """Matching gradients of real pairs, as many as the phase has, at every start of its path."""
    run, rule, plan = method.run, method.run.distill, method.run.distill.plan
    probing = statistics.probing(run, end, rule.trajectory, pairs, experts=plan.experts)
    method = method.on(probing)
    synthetic = method.initial(0, train, method.records(0, train)).map(lambda t: t.to(device))
    matcher = Matcher(
        method,
        0,
        store,
        expert_model(run.model, run.data.image_size, run.seed_of("experts"), 0, train.texts.shape[1]),
        device,
    )
    return statistics.probe(matcher, synthetic, range(end - rule.match_epochs + 1), plan.draws, averaged=True)


def key_of(run: config.Run, store: str) -> str:
    """What a plan follows from: the experts and the recipe."""
    recipe = run.hashed("distill", "plan")
    return config.hash_value(
        {
            "store": store,
            "num": run.experts.num,
            "distill": recipe | {"version": recipes.find(run.distill.method).version},
        }
    )


def with_phases(run: config.Run, phases: list[dict[str, Any]]) -> config.Run:
    """`run` with the phases of a plan; its value and its folder stay what they are."""
    value = run.model_dump(mode="json")
    value["distill"]["phases"] = phases
    return config.Run.model_validate(value)


def stated(run: config.Run) -> config.Run:
    """The same run with its phases written by hand."""
    return run.model_copy(update={"distill": run.distill.model_copy(update={"plan": config.Plan()})})


def foreseen(run: config.Run, text_width: int) -> config.Run:
    """`run` with phases as they may come out, known without experts: number, sizes and updates are what cost."""
    epochs, plan = run.experts.epochs, run.distill.plan
    pairs = sizes(run, text_width, min(plan.max_phases, len(plan.endpoints or range(epochs))))
    updates = budget.split(plan.iterations, len(pairs))
    end = epochs + (run.distill.endpoint_rule == "exclusive")
    phases = [{"pairs": m, "stop": 1, "endpoint": end, "iterations": n} for m, n in zip(pairs, updates, strict=True)]
    return run.model_copy(
        update={"distill": run.distill.model_copy(update={"phases": tuple(config.Phase(**p) for p in phases)})}
    )


def over_budget(run: config.Run, width: int | None = None) -> str | None:
    """A message when the phases cost more than the budget, or it holds none that could be planned, else None.

    `width` is that of text embeddings if known.
    """
    rule, width = run.distill, width or width_of(run.model.text)
    if not rule.phases:
        return without_a_phase(run, width)
    return budget.check(
        [p.pairs for p in rule.phases],
        rule.budget,
        image_size=run.data.image_size,
        text_width=width,
        kind=rule.similarity.kind,
        rank=rule.similarity.rank,
        stored_size=run.stored_size,
    )
