"""All settings of a run, as typed, frozen pydantic models: one model per section of the run file.

This package imports neither torch nor ray. Fields that cannot change a result (paths, retry limits, how often to save)
are not hashed; each such field is marked where it is declared (see `rmdd.config.hashing`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PrivateAttr

from rmdd.config import recipes
from rmdd.config.data import Annotations as Annotations
from rmdd.config.data import Captions as Captions
from rmdd.config.data import Data as Data
from rmdd.config.data import HuggingFace as HuggingFace
from rmdd.config.data import ImageFolder as ImageFolder
from rmdd.config.data import Parquet as Parquet
from rmdd.config.data import Scenes as Scenes
from rmdd.config.data import Splits as Splits
from rmdd.config.data import TableSource as TableSource
from rmdd.config.data import Tars as Tars
from rmdd.config.distill import OF_REACH
from rmdd.config.distill import Distill as Distill
from rmdd.config.distill import Guard as Guard
from rmdd.config.distill import Phase as Phase
from rmdd.config.distill import Similarity as Similarity
from rmdd.config.evaluate import Evaluate as Evaluate
from rmdd.config.evaluate import Runtime as Runtime
from rmdd.config.hashing import Purpose, hashed
from rmdd.config.hashing import hash_value as hash_value
from rmdd.config.model import NO_AUGMENT as NO_AUGMENT
from rmdd.config.model import Augment as Augment
from rmdd.config.model import Experts as Experts
from rmdd.config.model import ImageTower as ImageTower
from rmdd.config.model import Model as Model
from rmdd.config.model import Shuffle as Shuffle
from rmdd.config.model import TextTower as TextTower
from rmdd.config.model import WorkerGroup as WorkerGroup
from rmdd.config.plan import Plan as Plan
from rmdd.config.precedence import (
    SHAPING,
    Origins,
    combined,
    overridden,
    phases_of_budget,
    value_of,
    with_overrides,
)
from rmdd.config.presets import files_of
from rmdd.config.presets import preset_names as preset_names
from rmdd.config.presets import read as read
from rmdd.config.probes import ClassData as ClassData
from rmdd.config.probes import Classes as Classes
from rmdd.config.probes import CocoQa as CocoQa
from rmdd.config.probes import CocoQaData as CocoQaData
from rmdd.config.probes import Retrieval as Retrieval
from rmdd.config.probes import Vqa as Vqa
from rmdd.config.probes import ZeroShot as ZeroShot
from rmdd.config.probes import view_clashes
from rmdd.config.recipes import Recipe
from rmdd.config.runfile import Clash, apply, filled, validate
from rmdd.config.runfile import ConfigError as ConfigError
from rmdd.config.runfile import Section as Section
from rmdd.config.search import Dimension as Dimension
from rmdd.config.search import Search as Search


class Run(Section):
    """All settings of a run. `rmdd run FILE` computes a distilled set and a report from them."""

    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the run; the name of its results folder begins with it",
    )
    seed: int = Field(0, description="random seed of every section whose own seed is null")
    data: Data = Data()
    model: Model = Model()
    experts: Experts = Experts()
    distill: Distill = Distill()
    evaluate: Evaluate = Evaluate()
    search: Search = Search()
    runtime: Runtime = Runtime()

    def __repr__(self) -> str:
        return f"Run({self.folder_name}: method {self.distill.method}, source {self.data.source}, seed {self.seed})"

    __str__ = __repr__

    _origins: Origins | None = PrivateAttr(None)

    def __eq__(self, other: object) -> bool:
        """Return whether all fields are equal, wherever their values come from."""
        return isinstance(other, Run) and self.model_dump() == other.model_dump()

    __hash__ = Section.__hash__

    @property
    def origins(self) -> Origins | None:
        """Where the values come from; None for a run that was not loaded by `load`."""
        return self._origins

    def plain(self) -> dict[str, Any]:
        """Return all fields as JSON values; loading them gives the same run.

        The key `for_any_method` has the values that hold if the method is changed later. It is missing if it is unknown
        where the values come from.
        """
        fields = self.model_dump(mode="json")
        if self._origins is None:
            return fields
        values = self._origins.for_any_method
        return fields | {"for_any_method": {section: values[section] for section in SHAPING if section in values}}

    def overridden(self) -> list[dict[str, Any]]:
        """Return the own values of the method that the run does not use (see `rmdd.config.precedence`)."""
        return overridden(recipes.find(self.distill.method), self.model_dump(mode="json"), self._origins)

    def clashes(self) -> list[Clash]:
        mistakes = view_clashes(self.evaluate.probes, self.data)
        image = self.model.image
        d, recipe = self.distill, self.distill.recipe
        family_clashes = recipe.clashes_of_family(self.distill, self.experts, self.runtime) if recipe else []
        mistakes += [Clash(clash, "distill.method", *getattr(clash, "fields", ())) for clash in family_clashes]
        if self.stored_size > self.data.image_size:
            text = (
                f"distill.stored_size {self.stored_size} is larger than data.image_size {self.data.image_size}, the "
                "size at which a tower sees an image; lower distill.stored_size"
            )
            mistakes.append(Clash(text, "distill.stored_size", "data.image_size"))
        if not image.trainable and image.weights == "random":
            text = (
                "model.image.trainable is false and its weights are random: every expert and student would have "
                "a different frozen tower, so a set distilled with one tower would not fit the others; set "
                "model.image.weights to pretrained (a timm model), a weights file or random:SEED (the same for all), "
                "or set model.image.trainable to true"
            )
            mistakes.append(Clash(text, "model.image.trainable", "model.image.weights"))
        if image.name == "convnet" and image.weights == "pretrained":
            text = "convnet has no pretrained weights; set model.image.weights to random or to a weights file"
            mistakes.append(Clash(text, "model.image.name", "model.image.weights"))
        if image.name == "convnet" and self.data.normalise == "tower":
            text = "convnet defines no normalisation; set data.normalise to clip, imagenet or half"
            mistakes.append(Clash(text, "model.image.name", "data.normalise"))
        endpoint_fields = ("distill.method", "endpoint", "endpoint_rule", "trajectory", "experts.epochs", *OF_REACH)
        reach = max((self.endpoint_of(p) for p in range(len(d.phases))), default=0) if recipe else 0
        if reach > self.experts.epochs:
            text = (
                f"distill.phases need expert epoch {reach}, but experts are trained for {self.experts.epochs} epochs; "
                f"set experts.epochs to {reach} or lower the endpoints"
            )
            mistakes.append(Clash(text, *endpoint_fields))
        gpus, workers = self.runtime.gpus_per_worker, self.experts.worker_group.workers
        if workers > 1 and 0 < gpus < 1:
            text = (
                f"experts.worker_group.workers is {workers} and runtime.gpus_per_worker is below 1: two workers would "
                "share a GPU, which NCCL does not allow; set runtime.gpus_per_worker to 1, or "
                "experts.worker_group.workers to 1"
            )
            mistakes.append(Clash(text, "experts.worker_group.workers", "runtime.gpus_per_worker"))
        if d.plan.plans and self.experts.keep == "endpoints":
            text = (
                f"distill.phases: {d.plan.kind} chooses its endpoints among the stored epochs, and experts.keep: "
                "endpoints stores none of them; set experts.keep to all or to a list of epochs"
            )
            mistakes.append(Clash(text, "distill.phases", "distill.plan.kind", "experts.keep"))
        late = [e for e in d.plan.endpoints or () if d.plan.plans and e > self.experts.epochs]
        if late:
            text = f"distill.plan.endpoints {late} are after the last expert epoch {self.experts.epochs}; remove them"
            mistakes.append(Clash(text, "distill.plan.endpoints", "kind", "phases", "experts.epochs"))
        keep = self.experts.keep
        missing = [] if isinstance(keep, str) or not recipe else sorted(set(self.endpoints) - set(keep))
        if missing:
            text = f"experts.keep {list(keep)} lacks the epochs {missing}, which this run reads; add them"
            mistakes.append(Clash(text, "experts.keep", "distill.plan.endpoints", *endpoint_fields))
        if self.search.pruner != "none" and d.snapshots < 2:
            text = (
                f"search.pruner: {self.search.pruner} compares trials at their snapshots, and "
                f"distill.snapshots is {d.snapshots}; set distill.snapshots to 2 or more"
            )
            mistakes.append(Clash(text, "search.pruner", "distill.snapshots"))
        return mistakes

    def endpoint_of(self, phase: int) -> int:
        """Return the last expert epoch that the phase with the index `phase` reads."""
        return recipes.find(self.distill.method).endpoint_of(self.distill, self.experts.epochs, phase)

    @property
    def stored_size(self) -> int:
        """Side in pixels of the stored synthetic images."""
        return self.distill.stored_size or self.data.image_size

    @property
    def student_temperature(self) -> float:
        """Temperature by which the cosines of a student are divided when it is trained on the distilled set."""
        return self.evaluate.temperature or self.distill.temperature or self.model.temperature

    @property
    def endpoints(self) -> tuple[int, ...]:
        """Epochs, besides epoch 0, whose expert parameters an expert store must keep for this run.

        The last epoch is always among them, because its parameters give the score of training on the full data.
        """
        if self.distill.plan.plans:
            return tuple(sorted({*(self.distill.plan.endpoints or ()), self.experts.epochs}))
        return tuple(sorted({self.endpoint_of(p) for p in range(len(self.distill.phases))} | {self.experts.epochs}))

    def seed_of(self, section: Literal["experts", "distill", "evaluate"]) -> int:
        """Return the seed of a section, or that of the run if the section has none."""
        seed = getattr(self, section).seed
        return self.seed if seed is None else seed

    @property
    def folder_name(self) -> str:
        """Name of the folder with the run's results: the run's name and the first digits of its hash."""
        return f"{self.name}-{self.hash_of()[:8]}"

    def hash_of(self, *sections: str) -> str:
        """Return a hash of the given sections; by default, of all sections that can change a result.

        The hash depends on the seeds, but not on paths or other fields that cannot change a result.
        """
        names: Any = sections or ("data", "model", "experts", "distill", "evaluate")
        return hash_value({section: self.hashed(section, "run") for section in names})

    def hashed(self, section: Literal["data", "model", "experts", "distill", "evaluate"], purpose: Purpose) -> Any:
        """Return a section's fields that are hashed for `purpose`, with the seed that the section uses."""
        value = hashed(self._as_hashed(section, purpose), purpose)
        if section == "distill" and (recipe := self.distill.recipe) is not None:
            options = self.distill.options_as(recipe.Options)
            value |= {"options": hashed(options, purpose)} if options is not None else {}
        return value | {"seed": self.seed_of(section)} if "seed" in value else value  # type: ignore[arg-type]

    def _as_hashed(self, section: str, purpose: Purpose) -> Section:
        """Return a copy of a section in which fields that must not change the hash for `purpose` have a fixed value.

        These are the fields that a planned chain sets, so that a run keeps its hash when its phases are planned. If no
        chain is planned, `plan.chain` has no effect.
        """
        value, changes = getattr(self, section), dict[str, Any]()
        if section == "distill" and not self.distill.plans_chain:
            changes = {"plan": self.distill.plan.model_copy(update={"chain": False})}
        elif section == "distill" and purpose in ("run", "plan"):
            changes = {"path_start": "student", "path_order": None}
        elif section == "evaluate" and self.distill.plans_chain and purpose == "run":
            changes = {"order": "union"}
        fixed: Section = value.model_copy(update=changes)
        return fixed


Source = str | Path | Mapping[str, Any] | Run
"""Where a run can be loaded from: the name of a preset, the path of a YAML file, a mapping, or a run."""


def load(source: Source, overrides: Iterable[str] = ()) -> Run:
    """Load a run from a preset name, a YAML file, a mapping or a run; apply overrides such as `a.b=c`, and check it.

    What a file of yours, a mapping or an override states itself takes precedence over the values of the method. What
    they inherit from a preset of another method does not: `distill.method` brings its own values instead. Other missing
    fields get the values of the file that a file `extends`, then the defaults of the method, then the general defaults.

    >>> rmdd.load_config("demo", ["distill.seed=1"])  # doctest: +SKIP

    Raises a `ConfigError` that lists all mistakes.
    """
    overrides = list(overrides)
    if isinstance(source, Run):
        if not overrides:
            return source
        source = source.plain()
    where, files = "run" if isinstance(source, Mapping) else str(source), files_of(source)
    mistakes: list[str] = []
    method, unknown = _method_of(combined(files, None)[0], overrides)
    raw, origins = combined(files, method)
    method_defaults = {} if method is None else dict(method.defaults)
    if method is not None and "distill.phases" in origins.gave_way and (phases := _scaled(method, raw, overrides)):
        method_defaults = filled({"distill": {"phases": phases}}, method_defaults)
        origins = replace(origins, names={"distill.phases": "distill.budget", **origins.names})
    defaults = filled(method_defaults, Run().model_dump(mode="json"))
    for override in overrides:
        apply(raw, override, defaults, mistakes)
    origins = with_overrides(origins, overrides, raw)
    if any(o.startswith("distill.phases=") for o in overrides):
        _drop_plan_kind(raw.get("distill"))
    run, invalid = validate(Run, _keep_possible_endpoints(filled(raw, method_defaults)))
    mistakes += unknown + invalid
    if run is not None and method is not None:
        mistakes += method.mistakes(run)
    if run is None or mistakes:
        raise ConfigError(mistakes, where)
    run = _resolved(run)
    run._origins = origins
    return run


def _scaled(method: Recipe, raw: Mapping[str, Any], overrides: Iterable[str]) -> list[dict[str, Any]] | None:
    """Return the default phases of a method, scaled to the budget of the run; None if the budget is the usual one."""
    draft = copy.deepcopy(dict(raw))
    for override in overrides:
        if override.startswith("distill.budget="):
            apply(draft, override, {}, [])
    return phases_of_budget(method, value_of(draft, "distill.budget"))


def _resolved(run: Run) -> Run:
    """Return `run` with all options of its method in `distill.options`, including those at their defaults."""
    options = run.distill.options_as(recipes.find(run.distill.method).Options)
    values = {} if options is None else options.model_dump(mode="json")
    return run.model_copy(update={"distill": run.distill.model_copy(update={"options": values})})


def _drop_plan_kind(distill: Any) -> None:
    """If `phases` is a list, delete `plan.kind` from the section `distill`, in place: listed phases need no plan."""
    if isinstance(distill, dict) and isinstance(distill.get("phases"), list) and isinstance(distill.get("plan"), dict):
        distill["plan"].pop("kind", None)


def _keep_possible_endpoints(raw: dict[str, Any]) -> dict[str, Any]:
    """Return `raw` with `experts.keep: endpoints` replaced by the epochs that can be endpoints of planned phases.

    Runs whose phases are listed, or whose `experts.keep` is something else, are returned as they are.
    """

    def section(mapping: Mapping[Any, Any], name: str) -> dict[Any, Any]:
        value = mapping.get(name)
        return value if isinstance(value, dict) else {}

    distill, experts = section(raw, "distill"), section(raw, "experts")
    plan = section(distill, "plan")
    plans = distill.get("phases") in ("auto", "adaptive") or plan.get("kind", "stated") != "stated"
    if not plans or experts.get("keep", "endpoints") != "endpoints":
        return raw
    original = distill.get("trajectory") == "original"
    endpoints, last = None if original else plan.get("endpoints"), experts.get("epochs", Experts().epochs)
    epochs = [*endpoints, last] if isinstance(endpoints, list | tuple) else []
    keep = sorted(set(epochs)) if epochs and all(isinstance(e, int) for e in epochs) else "all"
    return {**raw, "experts": {**experts, "keep": keep}}


def _method_of(raw: Mapping[str, Any], overrides: Iterable[str]) -> tuple[Recipe | None, list[str]]:
    """Return the class of the method that an override or the run file names, or None and an error message."""
    draft = copy.deepcopy(dict(raw))
    for override in overrides:
        if override.startswith(("distill.method=", "distill=")):
            apply(draft, override, {}, [])
    section = draft.get("distill")
    name = section.get("method") if isinstance(section, Mapping) else None
    try:
        return recipes.find(Distill().method if name is None else str(name)), []
    except ValueError as error:
        return None, [f"distill.method: {error}"]


def dump(run: Run) -> str:
    """Return the run as YAML with all its fields; loading this YAML gives the same run."""
    return as_yaml(run.plain())


def as_yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, width=110, allow_unicode=True)
