"""How students are trained and scored, and where a run goes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rmdd.config.numbers import NonNegativeFloat, PositiveFloat, PositiveInt
from rmdd.runfile import Section


class Evaluate(Section):
    """How students are trained and scored. Choices are made on val; test is read once."""

    students: Annotated[int, Field(ge=1)] = Field(
        5, description="fresh models trained on the set; mean and spread are over them"
    )
    epochs: PositiveInt = Field(50, description="passes per subset")
    batch: Annotated[int, Field(ge=2)] = Field(128, description="pairs per step; a smaller subset is one batch")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of SGD")
    weight_decay: NonNegativeFloat = Field(5e-4, description="of SGD, on every parameter")
    lr_drop: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="factor applied after half of a subset's passes"
    )
    schedule: Literal["per_subset", "shared"] = Field(
        "per_subset", description="shared: one optimiser for all subsets, one drop"
    )
    lr: Literal["own", "last"] = Field("own", description="each subset's learned rates, or the last subset's for all")
    text_lr: Literal["own", "image"] = Field(
        "own", description="image trains the text head at the image rate, as MTT-VL's code does"
    )
    temperature: PositiveFloat | None = Field(None, description="of the students' cosines; null: as distilled with")
    eval_every: PositiveInt = Field(10, description="passes between scorings on val")
    reference: bool = Field(True, description="also score the papers' protocol, labelled test_best_reference")
    selection: Literal["last", "val_best"] = Field("last", description="which snapshot of the distillation is exported")
    selection_students: PositiveInt = Field(
        2, description="students per snapshot, and random draws per rate and loss, that a choice on val is made by"
    )
    baseline_lrs: tuple[PositiveFloat, ...] = Field(
        (0.01, 0.03, 0.1, 0.3, 1.0), description="rates tried for the random pairs, chosen on val"
    )
    baseline_losses: tuple[Literal["wbce", "infonce", "bce", "cwcl", "kl", "mse"], ...] = Field(
        ("wbce", "infonce"), description="losses tried likewise"
    )
    baseline_draws: PositiveInt = Field(5, description="different random subsets, one per student")
    chunk: PositiveInt = Field(256, description="queries scored at once")
    seed: int | None = Field(None, description="null: the run's seed")


class Runtime(Section):
    """Where and how wide a run goes; in no hash. Only `threads` and a GPU change bits, by rounding alone."""

    storage: str = Field("runs", description="folder of all runs, stores and caches")
    ray: Literal["on", "off"] = Field("on", description="off: everything in turn in this process, with the same bits")
    address: str | None = Field(None, description="cluster to join; null: RAY_ADDRESS if set, else a local cluster")
    num_cpus: PositiveInt | None = Field(None, description="CPUs of a local cluster; null: all")
    workers: PositiveInt | None = Field(
        None, description="experts, phases or students side by side; null: one per CPU or GPU"
    )
    threads: PositiveInt = Field(1, description="CPU threads per worker; the same bits need the same number")
    reader_cpus: PositiveFloat = Field(1.0, description="CPUs that each reader of an ingest takes; a half: two per CPU")
    object_store_mb: Annotated[int, Field(ge=75)] = Field(256, description="object store of a local Ray, in MiB")
    loader_workers: Annotated[int, Field(ge=0)] = Field(0, description="processes per expert that decode and augment")
    gpus_per_worker: NonNegativeFloat = Field(0.0, description="share of a GPU that each worker gets; 0: CPUs")
    keep_parameters: Literal["device", "cpu", "recompute"] = Field(
        "device", description="where a step's K parameter vectors wait: there, on the CPU, or rebuilt from 2 sqrt(K)"
    )
    max_restarts: Annotated[int, Field(ge=0)] = Field(3, description="times a dead worker is started again")
    track: Literal["tensorboard", "none"] = Field(
        "tensorboard", description="where the curves of a distillation go, beside metrics.jsonl"
    )
