"""Convert resolved run files of the previous release: move each field to its present place."""

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
"""Former fields of `distill` that are now options of a method, with their former defaults."""


def upgraded(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a run file written by `rmdd.config.dump` of the previous release, with moved fields at their new place.

    A field that is not an option of the run's method is removed if it has its former default. With a different value
    the field stays, so that loading the file raises an error about it.
    """
    raw = copy.deepcopy(raw)
    experts, distill = raw.get("experts", {}), raw.get("distill", {})
    if "gang" in experts:
        experts["worker_group"] = experts.pop("gang")
    if not distill.keys() & OPTIONS.keys():
        return raw
    try:
        fields = recipes.find(distill.get("method", "ptm_st")).Options.model_fields
    except ValueError:  # the method is not installed on this machine
        fields = {}
    for name, default in OPTIONS.items():
        # A method can have a different option of the same name; the type of the default tells the two apart.
        is_option = name in fields and isinstance(fields[name].default, type(default))
        if name in distill and is_option:
            distill.setdefault("options", {})[name] = distill.pop(name)
        elif distill.get(name) == default:
            del distill[name]
    return raw
