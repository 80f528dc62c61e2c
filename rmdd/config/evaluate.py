"""How students are trained and scored, and where a run goes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from rmdd.config.hashing import Purpose, no_hash
from rmdd.config.numbers import NonNegativeFloat, PositiveFloat, PositiveInt
from rmdd.config.probes import Probe
from rmdd.config.probes import clashes as clashes_of_probes
from rmdd.config.runfile import Clash, Section


class Evaluate(Section):
    """How students are trained and scored. Choices are made on val; test is read once."""

    students: Annotated[int, Field(ge=1)] = Field(
        5,
        description="fresh models trained on the set; mean and spread are over them",
        json_schema_extra=no_hash("baseline", "learned"),
    )
    epochs: PositiveInt = Field(50, description="passes per subset", json_schema_extra=no_hash("baseline"))
    batch: Annotated[int, Field(ge=2)] = Field(128, description="pairs per step; a smaller subset is one batch")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of SGD")
    weight_decay: NonNegativeFloat = Field(5e-4, description="of SGD, on every parameter")
    lr_drop: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="factor applied after half of a subset's passes"
    )
    schedule: Literal["per_subset", "shared"] = Field(
        "per_subset",
        description="shared: one optimiser for all subsets, one drop",
        json_schema_extra=no_hash("baseline"),
    )
    lr: Literal["own", "last"] = Field(
        "own",
        description="each subset's learned rates, or the last subset's for all",
        json_schema_extra=no_hash("baseline"),
    )
    text_lr: Literal["own", "image"] = Field(
        "own",
        description="image trains the text head at the image rate, as MTT-VL's code does",
        json_schema_extra=no_hash("baseline"),
    )
    temperature: PositiveFloat | None = Field(
        None, description="of the students' cosines; null: as distilled with", json_schema_extra=no_hash("baseline")
    )
    eval_every: PositiveInt = Field(
        10, description="passes between scorings on val", json_schema_extra=no_hash("baseline")
    )
    augment: Literal["none", "dsa", "randaugment"] = Field(
        "none", description="of the students' pictures, of random pairs too; randaugment: as experts train by default"
    )
    reference: Literal["auto", "none", "lors", "ptm_st", "repblend", "mtt_vl", "mdm", "pds", "edge"] = Field(
        "auto",
        description="also score by a paper's released protocol, as test_best_reference; auto: that of the method, at "
        "the loss, batch, momentum and decay of this run; a name: exactly as coded",
        json_schema_extra=no_hash("baseline", "learned"),
    )
    scores: bool = Field(
        False,
        description="also HLR, IOR, LRS and ARS: what the recipe adds, and random pairs by the same recipe",
        json_schema_extra=no_hash("baseline", "learned"),
    )
    selection: Literal["last", "val_best"] = Field(
        "last",
        description="which snapshot of the distillation is exported",
        json_schema_extra=no_hash("baseline", "learned"),
    )
    selection_students: PositiveInt = Field(
        2,
        description="students per snapshot, and random draws per rate and loss, that a choice on val is made by",
        json_schema_extra=no_hash("learned"),
    )
    baseline_lrs: tuple[PositiveFloat, ...] = Field(
        (0.01, 0.03, 0.1, 0.3, 1.0),
        description="rates tried for the random pairs, chosen on val",
        json_schema_extra=no_hash("learned"),
    )
    baseline_losses: tuple[Literal["wbce", "infonce", "bce", "cwcl", "kl", "mse"], ...] = Field(
        ("wbce", "infonce"), description="losses tried likewise", json_schema_extra=no_hash("learned")
    )
    baseline_draws: PositiveInt = Field(
        5, description="different random subsets, one per student", json_schema_extra=no_hash("learned")
    )
    chunk: PositiveInt = Field(
        256, description="queries scored at once", json_schema_extra=no_hash("baseline", "learned")
    )
    probes: dict[str, Probe] = Field(
        {},
        description="what else the final students are asked, by a free name: zero_shot, vqa or retrieval",
        json_schema_extra=no_hash(),
    )
    seed: int | None = Field(None, description="null: the run's seed")

    @field_validator("reference", mode="before")
    @classmethod
    def _once_a_switch(cls, value: Any) -> Any:
        return {True: "auto", False: "none"}.get(value, value) if isinstance(value, bool) else value

    def clashes(self) -> list[Clash]:
        return clashes_of_probes(self.probes)

    def not_hashed(self, purpose: Purpose) -> tuple[str, ...]:
        """Plain pictures leave the students of random pairs as they were before there was a choice."""
        return ("augment",) if purpose == "baseline" and self.augment == "none" else ()


class Runtime(Section):
    """Where and how wide a run goes; in no hash. Only `threads` and a GPU change bits, by rounding alone."""

    storage: str = Field(
        "runs", description="folder of all runs, stores and caches, or a URI (s3://, gs://, abfs://, file://, ...)"
    )
    scratch: str | None = Field(
        None, description="local folder for copies of what lies at a URI; null: rmdd in the user's cache folder"
    )
    ray: Literal["on", "off"] = Field("on", description="off: everything in turn in this process, with the same bits")
    address: str | None = Field(None, description="cluster to join; null: RAY_ADDRESS if set, else a local cluster")
    num_cpus: PositiveInt | None = Field(None, description="CPUs of a local cluster; null: all")
    workers: PositiveInt | None = Field(
        None,
        description="experts, phases or students side by side; null: one per CPU or GPU there is; "
        "a cluster that grows is asked for as many",
    )
    threads: PositiveInt = Field(1, description="CPU threads per worker; the same bits need the same number")
    reader_cpus: PositiveFloat = Field(1.0, description="CPUs that each reader of an ingest takes; a half: two per CPU")
    object_store_mb: Annotated[int, Field(ge=75)] = Field(256, description="object store of a local Ray, in MiB")
    loader_workers: Annotated[int, Field(ge=0)] = Field(0, description="processes per expert that decode and augment")
    fleet: Literal["pool", "train"] = Field(
        "pool",
        description="who trains experts: a pool of actors, or one run of Ray Train, which worker groups always take",
    )
    min_workers: PositiveInt = Field(
        1, description="workers that a run of Ray Train starts or goes on with; it grows up to `workers` as nodes come"
    )
    cache_gb: NonNegativeFloat = Field(
        20.0,
        description="GB of disk and page cache for the pictures experts train on; what is larger is streamed from the "
        "shards in every epoch, with the same bits",
    )
    gpus_per_worker: NonNegativeFloat = Field(0.0, description="share of a GPU that each worker gets; 0: CPUs")
    cpus_per_worker: NonNegativeFloat | None = Field(
        None, description="CPUs, or a share of one, that Ray keeps for each worker; null: `threads`, none beside a GPU"
    )
    keep_parameters: Literal["device", "cpu", "recompute"] = Field(
        "device", description="where a step's K parameter vectors wait: there, on the CPU, or rebuilt from 2 sqrt(K)"
    )
    max_restarts: Annotated[int, Field(ge=0)] = Field(
        3, description="times a dead worker or a failed expert is tried again"
    )
    time_limit: PositiveFloat | None = Field(
        None, description="minutes after which a run saves and stops, to be resumed, as on Ctrl-C; null: none"
    )
    stall_limit: PositiveFloat | None = Field(
        60.0,
        description="minutes without a sign of life after which a worker is killed and started again; null: none; "
        "workers of a run of Ray Train are not watched",
    )
    track: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        ("tensorboard",),
        description="where curves go beside the JSON lines; wandb and mlflow: `pip install rmdd[track]`",
    )

    @field_validator("track", mode="before")
    @classmethod
    def _one_or_none(cls, value: Any) -> Any:
        return ([] if value == "none" else [value]) if isinstance(value, str) else value

    @property
    def share(self) -> tuple[float, float]:
        """CPUs and GPUs of one worker."""
        usual = 0.0 if self.gpus_per_worker else float(self.threads)
        return usual if self.cpus_per_worker is None else self.cpus_per_worker, self.gpus_per_worker

    def clashes(self) -> list[Clash]:
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            text = (
                f"runtime.gpus_per_worker {self.gpus_per_worker:g} is neither a share of one GPU nor a number of them; "
                "give a share up to 1, or a whole number"
            )
            return [Clash(text, "runtime.gpus_per_worker")]
        scheme, is_uri, rest = self.storage.partition("://")
        user = rest.partition("/")[0].rpartition("@")[0]
        if is_uri and (":" in user or "?" in rest or "#" in rest):
            text = (
                f"runtime.storage is a {scheme}:// URI with a password or settings in it, which would end up in files "
                "and logs; give a bare URI, and the rest by the environment of every machine (such as "
                "AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS)"
            )
            return [Clash(text, "runtime.storage")]
        if is_uri and not rest.strip("/"):
            text = f"runtime.storage '{self.storage}' names no bucket or folder; give {scheme}://BUCKET/FOLDER"
            return [Clash(text, "runtime.storage")]
        return []
