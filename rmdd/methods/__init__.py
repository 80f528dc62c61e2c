"""Distillation methods, one file per paper. `rmdd.config.recipes` lists all names, also those of plug-in methods."""

from __future__ import annotations

from typing import cast

from rmdd import config
from rmdd.config import recipes
from rmdd.methods.base import BaseMethod
from rmdd.methods.trajectory import Method as Method


def find(name: str) -> type[BaseMethod]:
    """Return the class of the distillation method `name`. Raise `ValueError` for an unknown name."""
    return cast(type[BaseMethod], recipes.find(name))


def method_of(run: config.Run) -> BaseMethod:
    """Return the distillation method named in `distill.method` of `run`, configured for `run`."""
    return find(run.distill.method)(run)


def matching_method(run: config.Run) -> Method:
    """Return the distillation method of `run`; raise `ValueError` if that method does not match trajectories."""
    method = method_of(run)
    if not isinstance(method, Method):
        raise ValueError(
            f"method {run.distill.method} does not match trajectories; choose one that does (see `rmdd methods`)"
        )
    return method
