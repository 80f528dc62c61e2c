"""Resolved run files of the release before, with every field where it is now."""

from __future__ import annotations

import copy
from typing import Any

from rmdd.config import recipes

OPTIONS = {
    "blend": 0.0,
    "anchors": 2,
    "smooth_anchors": False,
    "start_points": "integer",
    "ranges": "stated",
    "starts": "together",
    "rate_branches": "same",
}
"""Fields of `distill` that are options of a method now, and their defaults then."""


def upgraded(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw`, as `rmdd.config.dump` wrote it, with moved fields at their new place.

    A field that the method of the run does not have is left out where it had its default; any other value stays where
    it is, so that loading the file names it.
    """
    raw = copy.deepcopy(raw)
    experts, distill = raw.get("experts", {}), raw.get("distill", {})
    if "gang" in experts:
        experts["worker_group"] = experts.pop("gang")
    if not distill.keys() & OPTIONS.keys():
        return raw
    try:
        fields = recipes.find(distill.get("method", "ptm_st")).Options.model_fields
    except ValueError:  # a method that is not installed here
        fields = {}
    for name, default in OPTIONS.items():
        moved = name in fields and isinstance(fields[name].default, type(default))  # not an option of the same name
        if name in distill and moved:
            distill.setdefault("options", {})[name] = distill.pop(name)
        elif distill.get(name) == default:
            del distill[name]
    return raw
