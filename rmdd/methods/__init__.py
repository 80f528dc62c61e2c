"""Methods: one file for each published one. Which there are, and those of other packages: `rmdd.config.recipes`."""

from __future__ import annotations

from typing import cast

from rmdd import config
from rmdd.config import recipes
from rmdd.methods.base import BaseMethod
from rmdd.methods.trajectory import Method as Method


def find(name: str) -> type[BaseMethod]:
    """The method called `name`. Raises `ValueError` when there is none."""
    return cast(type[BaseMethod], recipes.find(name))


def method_of(run: config.Run) -> BaseMethod:
    """The method of a run."""
    return find(run.distill.method)(run)


def matching_method(run: config.Run) -> Method:
    """The method of a run that matches trajectories. Raises `ValueError` for another one."""
    method = method_of(run)
    if not isinstance(method, Method):
        raise ValueError(
            f"method {run.distill.method} matches no trajectories; name one that does (see `rmdd methods`)"
        )
    return method
