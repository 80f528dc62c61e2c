"""The recipe of a run as `rmdd check` prints it: its method, and which of the method's own values are replaced."""

from typing import Any

from rmdd import config, methods
from rmdd.config.distill import RATES
from rmdd.config.presets import counterpart

FIELDS = ("trajectory", "estimator", "loss", "ema", "optimiser")
SHOWN = 8
"""Largest number of fields that a remark lists."""


def recipe_of(run: config.Run) -> dict[str, Any]:
    """Return the method of a run and the fields that it reads, as JSON values.

    `overridden` lists the method's own values that the run does not use: field, both values, and the file (or `--set`)
    that states the other value. `gave_way` lists the fields of a preset of another method that are not used.
    """
    rule, method, origins = run.distill, methods.find(run.distill.method), run.origins
    idle = method.idle_fields()
    kind = rule.similarity.kind
    of_students = ["inner_lr", "inner_lr_text"] if method.learns_rates else []
    rates = [name for name in (*RATES, *of_students) if name not in idle]
    return {
        "method": rule.method,
        **{name: getattr(rule, name) for name in FIELDS if name not in idle},
        "similarity": rule.similarity.model_dump(include={"kind", *(("rank", "alpha") if kind == "low_rank" else ())}),
        "rates": {name: getattr(rule, name) for name in rates if kind != "identity" or name != "lr_similarity"},
        "phases": [phase.model_dump(include=set(method.phase_fields)) for phase in rule.phases],
        "overridden": run.overridden(),
        "gave_way": list(origins.gave_way) if origins else [],
    }


def remarks_of(run: config.Run) -> list[str]:
    """Return remarks for a run that extends a preset of another method.

    They name the values of that preset that are not used and, if there is one, a preset of the run's own method.
    """
    origins, method = run.origins, run.distill.method
    if origins is None or origins.preset is None or not origins.gave_way:
        return []
    (name, other), fields = origins.preset, origins.gave_way
    listed = ", ".join(fields[:SHOWN]) + (f" and {len(fields) - SHOWN} more" if len(fields) > SHOWN else "")
    remarks = [f"these values of {name} were tuned for {other} and are not used with {method}: {listed}"]
    if better := counterpart(name, other, method):
        remarks.append(f"the preset {better} has values that were chosen for {method} on this data")
    return remarks
