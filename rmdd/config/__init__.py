"""The run file as typed, frozen models: every number of a run is decided here.

This package imports neither torch nor ray. Fields that say where things are, how far to go or how often to save, and
not what is computed, enter no hash: each says so where it is declared (`rmdd.config.hashing`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from rmdd.config import recipes
from rmdd.config.data import Annotations as Annotations
from rmdd.config.data import Captions as Captions
from rmdd.config.data import Data as Data
from rmdd.config.data import Parquet as Parquet
from rmdd.config.data import Scenes as Scenes
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
from rmdd.config.presets import extended
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
    """A whole run. `rmdd run FILE` turns it into a distilled set and a report."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder under runtime.storage")
    seed: int = Field(0, description="seed of every section that has none of its own")
    data: Data = Data()
    model: Model = Model()
    experts: Experts = Experts()
    distill: Distill = Distill()
    evaluate: Evaluate = Evaluate()
    search: Search = Search()
    runtime: Runtime = Runtime()

    def clashes(self) -> list[Clash]:
        mistakes = view_clashes(self.evaluate.probes, self.data)
        image = self.model.image
        d, recipe = self.distill, self.distill.recipe
        of_family = recipe.clashes_of_family(self.distill, self.experts, self.runtime) if recipe else []
        mistakes += [Clash(clash, "distill.method", *getattr(clash, "fields", ())) for clash in of_family]
        if self.stored_size > self.data.image_size:
            text = (
                f"distill.stored_size {self.stored_size} is larger than data.image_size {self.data.image_size}, which "
                "is all that a tower sees; lower it"
            )
            mistakes.append(Clash(text, "distill.stored_size", "data.image_size"))
        if not image.trainable and image.weights == "random":
            text = (
                "model.image.trainable is false and its weights are drawn anew for every expert and student, so what "
                "is matched to one fits no other; set model.image.weights to pretrained (a timm model), a weights file "
                "or random:SEED (drawn once for all), or trainable: true"
            )
            mistakes.append(Clash(text, "model.image.trainable", "model.image.weights"))
        if image.name == "convnet" and image.weights == "pretrained":
            text = "convnet has no pretrained weights; set model.image.weights to random or a weights file"
            mistakes.append(Clash(text, "model.image.name", "model.image.weights"))
        if image.name == "convnet" and self.data.normalise == "tower":
            text = "convnet has no normalisation of its own; set data.normalise to clip, imagenet or half"
            mistakes.append(Clash(text, "model.image.name", "data.normalise"))
        of_ends = ("distill.method", "endpoint", "endpoint_rule", "trajectory", "experts.epochs", *OF_REACH)
        reach = max((self.endpoint_of(p) for p in range(len(d.phases))), default=0) if recipe else 0
        if reach > self.experts.epochs:
            text = (
                f"distill.phases ask for epoch {reach} but experts are trained for {self.experts.epochs}; "
                f"set experts.epochs to {reach} or lower the endpoints"
            )
            mistakes.append(Clash(text, *of_ends))
        gpus, workers = self.runtime.gpus_per_worker, self.experts.worker_group.workers
        if workers > 1 and 0 < gpus < 1:
            text = (
                f"experts.worker_group.workers {workers} on shares of a GPU would put two on one, which NCCL "
                "refuses; set runtime.gpus_per_worker to 1, or experts.worker_group.workers to 1"
            )
            mistakes.append(Clash(text, "experts.worker_group.workers", "runtime.gpus_per_worker"))
        if d.plan.plans and self.experts.keep == "endpoints":
            text = f"distill.phases: {d.plan.kind} looks for its endpoints; set experts.keep: all, or a list"
            mistakes.append(Clash(text, "distill.phases", "distill.plan.kind", "experts.keep"))
        late = [e for e in d.plan.endpoints or () if d.plan.plans and e > self.experts.epochs]
        if late:
            text = f"distill.plan.endpoints {late} lie past the last expert epoch {self.experts.epochs}; leave them out"
            mistakes.append(Clash(text, "distill.plan.endpoints", "kind", "phases", "experts.epochs"))
        keep = self.experts.keep
        missing = [] if isinstance(keep, str) or not recipe else sorted(set(self.endpoints) - set(keep))
        if missing:
            text = f"experts.keep {list(keep)} leaves out {missing}, which this run reads; add them"
            mistakes.append(Clash(text, "experts.keep", "distill.plan.endpoints", *of_ends))
        if self.search.pruner != "none" and d.snapshots < 2:
            text = (
                f"search.pruner: {self.search.pruner} compares trials at their snapshots, and distill.snapshots keeps "
                f"{d.snapshots}; raise it"
            )
            mistakes.append(Clash(text, "search.pruner", "distill.snapshots"))
        return mistakes

    def endpoint_of(self, phase: int) -> int:
        """The last expert epoch that a phase reads."""
        return recipes.find(self.distill.method).endpoint_of(self.distill, self.experts.epochs, phase)

    @property
    def stored_size(self) -> int:
        """Side of the synthetic pictures as stored."""
        return self.distill.stored_size or self.data.image_size

    @property
    def student_temperature(self) -> float:
        """What a student of the distilled set divides its cosines by."""
        return self.evaluate.temperature or self.distill.temperature or self.model.temperature

    @property
    def endpoints(self) -> tuple[int, ...]:
        """Epochs a store must keep for this run, beside epoch 0; the last one gives the full-data bound."""
        if self.distill.plan.plans:
            return tuple(sorted({*(self.distill.plan.endpoints or ()), self.experts.epochs}))
        return tuple(sorted({self.endpoint_of(p) for p in range(len(self.distill.phases))} | {self.experts.epochs}))

    def seed_of(self, section: Literal["experts", "distill", "evaluate"]) -> int:
        own = getattr(self, section).seed
        return self.seed if own is None else own

    @property
    def folder_name(self) -> str:
        """Of its results: the name and the hash of its value."""
        return f"{self.name}-{self.hash_of()[:8]}"

    def hash_of(self, *sections: str) -> str:
        """Hash of the named sections (all that matter when none is named), seeds resolved, places left out."""
        named: Any = sections or ("data", "model", "experts", "distill", "evaluate")
        return hash_value({section: self.hashed(section, "run") for section in named})

    def hashed(self, section: Literal["data", "model", "experts", "distill", "evaluate"], purpose: Purpose) -> Any:
        """The fields of a section that shape `purpose`, its seed resolved."""
        value = hashed(getattr(self, section), purpose)
        if section == "distill" and (recipe := self.distill.recipe) is not None:
            options = self.distill.options_as(recipe.Options)
            value |= {"options": hashed(options, purpose)} if options is not None else {}
        return value | {"seed": self.seed_of(section)} if "seed" in value else value  # type: ignore[arg-type]


def load(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Run:
    """Read a run from a preset's name, a YAML file or a mapping, apply `a.b=c` overrides, check all of it.

    What the run file leaves open takes the values of the file that it `extends`, then those of its `distill.method`,
    then the defaults. An override that names another method brings that method's values.

    >>> load("demo", ["distill.budget=20"])  # doctest: +SKIP

    Raises `ConfigError` with every mistake found.
    """
    if isinstance(source, Mapping):
        where, raw = "run", extended(copy.deepcopy(dict(source)), Path(), "run")
    else:
        where, raw = str(source), read(source)
    mistakes: list[str] = []
    overrides = list(overrides)
    method, unknown = _method_of(raw, overrides)
    usual = {} if method is None else method.defaults
    if method is not None and method is not _method_of(raw, [])[0]:
        # else the file's method would run under another's name; of its options, those that both have stay
        raw = filled(method.defaults, _with_options_of(method, raw))
    defaults = filled(usual, Run().model_dump(mode="json"))
    for override in overrides:
        apply(raw, override, defaults, mistakes)
    if any(o.startswith("distill.phases=") for o in overrides):
        _listed(raw.get("distill"))
    run, wrong = validate(Run, _kept(filled(raw, usual)))
    mistakes += unknown + wrong
    if run is not None and method is not None:
        mistakes += method.mistakes(run)
    if run is None or mistakes:
        raise ConfigError(mistakes, where)
    return _resolved(run)


def _resolved(run: Run) -> Run:
    """`run` with every option of its method, defaults included."""
    options = run.distill.options_as(recipes.find(run.distill.method).Options)
    stated = {} if options is None else options.model_dump(mode="json")
    return run.model_copy(update={"distill": run.distill.model_copy(update={"options": stated})})


def _with_options_of(method: Recipe, raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` without the options that `method` does not have."""
    distill = raw.get("distill")
    options = distill.get("options") if isinstance(distill, dict) else None
    if not isinstance(distill, dict) or not isinstance(options, dict):
        return raw
    kept = {name: value for name, value in options.items() if name in method.Options.model_fields}
    return {**raw, "distill": {**distill, "options": kept}}


def _listed(distill: Any) -> None:
    """Let phases that are listed hold where the file says, as that of a run that planned its phases does, `kind: auto`;
    in place."""
    if isinstance(distill, dict) and isinstance(distill.get("phases"), list) and isinstance(distill.get("plan"), dict):
        distill["plan"].pop("kind", None)


def _kept(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw`, whose experts keep every epoch that a plan may make an endpoint, where it leaves it to the endpoints."""

    def section(of: Mapping[Any, Any], name: str) -> dict[Any, Any]:
        found = of.get(name)
        return found if isinstance(found, dict) else {}

    distill, experts = section(raw, "distill"), section(raw, "experts")
    plan = section(distill, "plan")
    plans = distill.get("phases") in ("auto", "adaptive") or plan.get("kind", "stated") != "stated"
    if not plans or experts.get("keep", "endpoints") != "endpoints":
        return raw
    original = distill.get("trajectory") == "original"
    few, last = None if original else plan.get("endpoints"), experts.get("epochs", Experts().epochs)
    named = [*few, last] if isinstance(few, list | tuple) else []
    keep = sorted(set(named)) if named and all(isinstance(e, int) for e in named) else "all"
    return {**raw, "experts": {**experts, "keep": keep}}


def _method_of(raw: Mapping[str, Any], overrides: Iterable[str]) -> tuple[Recipe | None, list[str]]:
    """The recipe that a run file or an override names, or what is wrong with the name."""
    draft = copy.deepcopy(dict(raw))
    for override in overrides:
        if override.startswith("distill.method="):
            apply(draft, override, {}, [])
    section = draft.get("distill")
    name = section.get("method") if isinstance(section, Mapping) else None
    try:
        return recipes.find(Distill().method if name is None else str(name)), []
    except ValueError as error:
        return None, [f"distill.method: {error}"]


def dump(run: Run) -> str:
    """The resolved run as YAML; `load` of it gives the same run."""
    return as_yaml(run.model_dump(mode="json"))


def as_yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, width=110, allow_unicode=True)
