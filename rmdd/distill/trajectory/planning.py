"""`phases: auto`: plan the phases of a run from the expert trajectories, before anything is distilled.

The rule for independent phases (`distill.plan` has its settings; `chain: false`):

1. endpoints   E_p, the endpoint of phase p, is the first epoch at which the teacher has reached the share
               `reach + p reach_step` of its total gain in val score. Later epochs gain little per unit of arc length,
               and their large gradients disagree. E_p is later than E_(p-1), with a higher val score. Epochs whose
               shortcut is less straight than `min_straightness` are excluded.
2. phases      The plan has as many phases as possible, at most `max_phases`. Each phase has a different endpoint, and
               if there are several phases, each needs at least `min_pairs` pairs and `min_iterations` updates. Students
               are trained on one phase after the other, so each phase must have enough pairs for training.
3. sizes       The pairs that the budget pays for (including the similarity) are split evenly, and so are the updates.
4. ranges      The first range begins at epoch 0, each later one in the middle of the range before it. A range has at
               least `min_starts` starts. It grows while the matching gradients at its last start and at the next
               epoch have a cosine of at least `agreement`.

With the published val curves of PTM-ST's teachers, the rule gives the published endpoints: 6 with one phase (100
pairs), 6 and 8 with two phases, and 6, 8 and 10 with three.

With `chain: true`, the default, several phases are chained (`rmdd.distill.chain`): later paths start at students of the
earlier phases, and all paths end at the first endpoint, with the first range of starts. Later endpoints gave worse
sets. The number of phases is limited by pairs and updates only. A plan with a single phase is the same in both cases.
While a chain is distilled, `rmdd.runs.gate` drops phases that do not raise the val score, and a plan with fewer phases
replaces this one. It also chooses the order in which students learn the subsets.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rmdd import config
from rmdd.config import budget, recipes
from rmdd.distill.chain import is_chained
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
    """Measurements of the experts that the planning rule needs, except for the matching gradients."""

    val: Float[np.ndarray, " m"]
    """Val R@mean of the teacher after each epoch, in percent; the first value was measured before training."""
    arc: Float[np.ndarray, " n"]
    """Euclidean length of the parameter change in each epoch."""
    straightness: dict[int, float]
    """Straightness of the shortcut to each possible endpoint, by epoch; 1 is a straight line."""

    @property
    def share(self) -> Float[np.ndarray, " m"]:
        return statistics.share_reached(self.val)


def measure(plan: config.Plan, store: Store, experts: int) -> Measured:
    """Measure the first `experts` experts; the straightness of paths only for the first `plan.experts` of them."""
    all_experts = [e for e in store.complete() if e < experts]
    few = all_experts[: plan.experts]
    candidates = plan.endpoints or store.kept_epochs[1:]
    straight = {e: statistics.straightness(store, few, e) for e in candidates}
    return Measured(statistics.val_curve(store, all_experts), statistics.arc_lengths(store, all_experts), straight)


def endpoints(rule: config.Distill, measured: Measured) -> list[int]:
    """Return the endpoints of up to `max_phases` phases in ascending order.

    Raises `ValueError` when no epoch is allowed as an endpoint.
    """
    plan = rule.plan
    min_straight = plan.min_straightness if rule.trajectory == "shortcut" else 0.0
    first_epoch = rule.match_epochs + _includes_stop(rule)
    allowed = sorted(e for e, value in measured.straightness.items() if e >= first_epoch and value >= min_straight)
    if not allowed:
        raise ValueError(
            f"no epoch of {sorted(measured.straightness)} may be an endpoint: it must be at least {first_epoch} and "
            f"the straightness of its shortcut at least {min_straight:g}; lower distill.plan.min_straightness, or keep "
            "more epochs of the experts (experts.keep: all)"
        )
    ends: list[int] = []
    for p in range(plan.max_phases):
        wanted = min(1.0, plan.reach + p * plan.reach_step)
        later = [e for e in allowed if not ends or measured.share[e] > measured.share[ends[-1]]]
        reached = [e for e in later if measured.share[e] >= wanted]
        if not later or (ends and not reached):
            break
        ends.append(reached[0] if reached else later[-1])
    return ends


def sizes(run: config.Run, text_width: int, most: int) -> tuple[int, ...]:
    """Return the number of pairs of each phase; `most` is the largest number of phases.

    There are as many phases as the budget and the number of updates allow. Raises `ValueError` when the
    budget is too small for one mini-batch.
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
    """Return the half-open range of start epochs of each phase.

    `agreement(phase, endpoint)` returns the cosines between the matching gradients at any two start epochs.
    """
    plan = rule.plan
    spans: list[tuple[int, int]] = []
    for p, end in enumerate(ends):
        last = end - rule.match_epochs - _includes_stop(rule)
        start = min(last, math.ceil(sum(spans[-1]) / 2)) if spans else 0
        cosines = agreement(p, end)
        reach = start
        while reach < last and (
            reach + 1 - start < plan.min_starts or float(cosines[reach, reach + 1]) >= plan.agreement
        ):
            reach += 1
        spans.append((start, reach + (rule.start_rule == "exclusive" or bool(_includes_stop(rule)))))
    return spans


def planned_budget_error(run: config.Run, text_width: int) -> str | None:
    """Return an error message if the budget is too small for a plan with a single phase, otherwise None."""
    try:
        sizes(run, text_width, 1)
    except ValueError as error:
        return str(error)
    return None


def _includes_stop(rule: config.Distill) -> int:
    """Return 1 if start epochs are real numbers, which come arbitrarily close to the end of a range; otherwise 0."""
    return int(rule.real_starts)


def make_plan(
    method: Matched, store: Store, train: PreparedSplit, device: torch.device, most: int | None = None
) -> dict[str, Any]:
    """Plan the phases of a run; return the phases as JSON values, with the measurements and the reasons in words.

    `most` is the largest number of phases that the gate allows; None: `max_phases`.
    """
    run = method.run
    began, rule, plan = time.perf_counter(), run.distill, run.distill.plan
    measured = measure(plan, store, run.experts.num)
    ends = endpoints(rule, measured)
    num_endpoints = len(ends)
    at_most = min(plan.max_phases, most or plan.max_phases) if rule.plans_chain else num_endpoints
    pairs = sizes(run, train.texts.shape[1], at_most)
    chained = rule.plans_chain and len(pairs) > 1
    ends = ends[:1] if chained else ends[: len(pairs)]
    probes: list[statistics.Probe] = []

    def agreement(phase: int, end: int) -> Float[Tensor, "T T"]:
        probes.append(probe_starts(method, store, train, device, pairs[phase], end))
        return probes[-1].agreement()

    spans = ranges(rule, ends, agreement)
    if chained:
        ends, spans = ends * len(pairs), spans * len(pairs)
    exclusive = rule.endpoint_rule == "exclusive"
    updates = budget.split(plan.iterations, len(pairs))
    phases = [
        config.Phase(pairs=m, start=low, stop=stop, endpoint=end + exclusive, iterations=count)
        for m, (low, stop), end, count in zip(pairs, spans, ends, updates, strict=True)
    ]
    share = measured.share
    few_ends = num_endpoints < plan.max_phases and not rule.plans_chain
    fewer = f"; only {num_endpoints} epochs have the wanted share of the gain" if few_ends else ""
    fewer += f"; the gate allowed at most {most}" if most else ""
    reasons = [
        f"{len(phases)} of at most {plan.max_phases} phases: {'+'.join(map(str, pairs))} pairs fit the budget of "
        f"{rule.budget}, with {'+'.join(map(str, updates))} updates; a phase needs at least {plan.min_pairs} pairs and "
        f"{plan.min_iterations} updates{fewer}"
    ]
    for p, probe in enumerate(probes):
        phase, end = phases[p], ends[p]
        name = "every phase" if chained else f"phase {p}"
        cosines = ", ".join(f"{c:.2f}" for c in probe.agreement().diagonal(1).tolist())
        reasons.append(
            f"{name} ends at epoch {end}, where the teacher has {share[end]:.2f} of its gain (wanted "
            f"{min(1.0, plan.reach + p * plan.reach_step):.2f}) and the shortcut has straightness "
            f"{measured.straightness[end]:.2f}; starts [{phase.start}, {phase.stop}): cosines of neighbouring starts "
            f"are {cosines or 'not defined'} (wanted {plan.agreement:.2f})"
        )
    if chained:
        reasons.append(
            "the paths of later phases start at students of the earlier phases; a phase that does not raise the val "
            "score is dropped, and its pairs and updates go to the others"
        )
    return {
        "schema_version": SCHEMA,
        "key": key_of(run, store.path.name),
        "kind": plan.kind,
        "phases": [p.model_dump(mode="json") for p in phases],
        **(_of_chain(len(phases)) if chained else {}),
        "endpoints": ends,
        "starts": [[p.start, p.stop - (rule.start_rule == "exclusive" and not _includes_stop(rule))] for p in phases],
        "reasons": reasons,
        "signals": {
            "val": measured.val.tolist(),
            "share": share.tolist(),
            "arc": measured.arc.tolist(),
            "gain_per_arc": statistics.gain_per_arc(measured.val, measured.arc).tolist(),
            "straightness": {str(e): s for e, s in measured.straightness.items()},
            "agreement": [p.agreement().tolist() for p in probes],
            "gradient_norm": [p.norms("images").tolist() for p in probes],
            "miss": [p.miss.mean(dim=1).tolist() for p in probes],
        },
        "seconds": round(time.perf_counter() - began, 2),
    }


def probe_starts(
    method: Matched, store: Store, train: PreparedSplit, device: torch.device, pairs: int, end: int
) -> statistics.Probe:
    """Compute the matching gradients of `pairs` real pairs at every start epoch on the path to epoch `end`."""
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
    """Return a hash of everything that a plan depends on: the experts and the distillation settings."""
    recipe = run.hashed("distill", "plan")
    return config.hash_value(
        {
            "store": store,
            "num": run.experts.num,
            "distill": recipe | {"version": recipes.find(run.distill.method).version},
        }
    )


def _of_chain(phases: int) -> dict[str, Any]:
    """Return the fields of a run, besides `phases`, that a plan of chained phases sets.

    The gate chooses `evaluate.order` when the phases are distilled, so `path_order` is set if it has an effect.
    """
    return {"path_start": "student", "path_order": "cumulative" if phases > 2 else None, "order": "cumulative"}


def with_plan(run: config.Run, plan: Mapping[str, Any]) -> config.Run:
    """Return a copy of `run` that has the phases of a plan. The copy keeps the hash and the folder of `run`."""
    value = run.model_dump(mode="json")
    for section, names in (("distill", ("phases", "path_start", "path_order")), ("evaluate", ("order",))):
        value[section] |= {name: plan[name] for name in names if name in plan}
    return config.Run.model_validate(value)


def with_explicit_phases(run: config.Run) -> config.Run:
    """Return a copy of `run` whose phases are marked as explicit instead of planned.

    If the phases are not chained, the settings of chained phases are reset.
    """
    unchained = {} if is_chained(run.distill) else {"path_start": "theta_0", "path_epochs": None}
    rule = run.distill.model_copy(update={"plan": config.Plan(), **unchained})
    return run.model_copy(update={"distill": rule})


def with_estimated_phases(run: config.Run, text_width: int) -> config.Run:
    """Return a copy of `run` with an estimate of its phases, so that costs can be estimated before experts exist."""
    epochs, plan, chained = run.experts.epochs, run.distill.plan, run.distill.plans_chain
    ends = plan.max_phases if chained else len(plan.endpoints or range(epochs))
    pairs = sizes(run, text_width, min(plan.max_phases, ends))
    updates = budget.split(plan.iterations, len(pairs))
    end = epochs + (run.distill.endpoint_rule == "exclusive")
    phases = [{"pairs": m, "stop": 1, "endpoint": end, "iterations": n} for m, n in zip(pairs, updates, strict=True)]
    return with_plan(run, {"phases": phases, **(_of_chain(len(pairs)) if chained and len(pairs) > 1 else {})})


def budget_error(run: config.Run, width: int | None = None) -> str | None:
    """Return an error message when the phases, planned or explicit, cost more than the budget; otherwise None.

    `width` is the width of the text embeddings, if known.
    """
    rule, width = run.distill, width or width_of(run.model.text)
    if not rule.phases:
        return planned_budget_error(run, width)
    return budget.check(
        [p.pairs for p in rule.phases],
        rule.budget,
        image_size=run.data.image_size,
        text_width=width,
        kind=rule.similarity.kind,
        rank=rule.similarity.rank,
        stored_size=run.stored_size,
    )
