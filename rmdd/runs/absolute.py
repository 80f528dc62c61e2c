"""Make the paths in a run absolute, so that the run can be resumed from any working folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.config.probes import with_paths
from rmdd.data.inputs import absolute


def with_absolute_paths(run: config.Run) -> config.Run:
    """Return a copy of the run in which all paths are absolute.

    A run can have paths of data, data of probes (extra evaluations), weights, a text encoder and method options.
    """
    data, image, text = run.data, run.model.image, run.model.text
    if data.root is not None:
        data = data.model_copy(update={"root": _absolute_address(data.root)})
    if image.weights != "pretrained" and not image.is_random:
        image = image.model_copy(update={"weights": _absolute(image.weights)})
    if Path(text.name).expanduser().is_dir():
        text = text.model_copy(update={"name": _absolute(text.name)})
    model = run.model.model_copy(update={"image": image, "text": text})
    probes = {name: with_paths(probe, _absolute_address) for name, probe in run.evaluate.probes.items()}
    evaluate = run.evaluate.model_copy(update={"probes": probes})
    distill = run.distill.model_copy(update={"options": _parts(run.distill.options)})
    return run.model_copy(update={"data": data, "model": model, "distill": distill, "evaluate": evaluate})


def _parts(options: Mapping[str, Any]) -> dict[str, Any]:
    def moved(value: Any) -> Any:
        return _parts(value) if isinstance(value, Mapping) else _part(value) if isinstance(value, str) else value

    return {name: moved(value) for name, value in options.items()}


def _part(option: str) -> str:
    """Return an option such as `./model` or `clip:./model` with an absolute path, if that folder exists."""
    kind, colon, path = option.rpartition(":")
    return f"{kind}{colon}{_absolute(path)}" if "/" in path and Path(path).expanduser().is_dir() else option


def _absolute_address(path: str) -> str:
    return absolute(os.path.expanduser(path))


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
