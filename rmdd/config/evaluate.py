"""The sections `evaluate` (how students are trained and scored) and `runtime` (where and with which resources)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from rmdd.config.hashing import Purpose, no_hash
from rmdd.config.numbers import NonNegativeFloat, PositiveFloat, PositiveInt
from rmdd.config.order import Between, Order
from rmdd.config.probes import Probe
from rmdd.config.probes import clashes as clashes_of_probes
from rmdd.config.runfile import Clash, Section


class Evaluate(Section):
    """Training and scoring of students. All choices are made on val; test is read only for the final scores."""

    students: Annotated[int, Field(ge=1)] = Field(
        5,
        description="number of students trained on the distilled set; scores are their mean and standard deviation",
        json_schema_extra=no_hash("baseline", "learned"),
    )
    epochs: PositiveInt = Field(
        50, description="number of training epochs on each subset of the set", json_schema_extra=no_hash("baseline")
    )
    order: Order = Field(
        "sequence",
        description="sequence: students learn one subset after the other; cumulative: the first, then the first two "
        "joined, and so on; union: all joined; joined subsets are trained on as one",
        json_schema_extra=no_hash("baseline", "learned"),
    )
    between: Between = Field(
        "zeros",
        description="zeros: images and texts of different joined subsets have similarity 0; masked: they take no part "
        "in the loss, which is the mean over the subsets in a batch, weighted by their pairs",
        json_schema_extra=no_hash("baseline", "learned"),
    )
    batch: Annotated[int, Field(ge=2)] = Field(
        128, description="number of pairs per training step; a subset with fewer pairs is one batch"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="momentum of SGD")
    weight_decay: NonNegativeFloat = Field(5e-4, description="weight decay of SGD, on every parameter")
    lr_drop: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="factor by which the learning rate is multiplied after half of the epochs on a subset"
    )
    schedule: Literal["per_subset", "shared"] = Field(
        "per_subset",
        description="per_subset: a new optimiser per subset; shared: one for all, whose learning rate drops once",
        json_schema_extra=no_hash("baseline"),
    )
    lr: Literal["own", "last"] = Field(
        "own",
        description="own: each subset's learned learning rates, or the mean of joined subsets, weighted by pairs; "
        "last: those of the last subset for all subsets",
        json_schema_extra=no_hash("baseline"),
    )
    text_lr: Literal["own", "image"] = Field(
        "own",
        description="learning rate of the text projection: its own, or that of the image side, as in MTT-VL's code",
        json_schema_extra=no_hash("baseline"),
    )
    temperature: PositiveFloat | None = Field(
        None,
        description="temperature by which the students' cosines are divided; null: as in distillation",
        json_schema_extra=no_hash("baseline"),
    )
    eval_every: PositiveInt = Field(
        10, description="number of epochs between two scores of a student on val", json_schema_extra=no_hash("baseline")
    )
    augment: Literal["none", "dsa", "randaugment"] = Field(
        "none",
        description="augmentation of the images of the distilled set that students are trained on, and of the random "
        "pairs that the set is compared with; randaugment: the default augmentation of the experts",
    )
    reference: Literal["auto", "none", "lors", "ptm_st", "repblend", "mtt_vl", "mdm", "pds", "edge"] = Field(
        "auto",
        description="also report test_best_reference, by a paper's released protocol; auto: the paper of the method, "
        "with the loss, batch, momentum and weight decay of this run; a name: exactly as in that paper's code",
        json_schema_extra=no_hash("baseline", "learned"),
    )
    scores: bool = Field(
        False,
        description="also compute HLR, IOR, LRS and ARS, which compare the set with random pairs and with full data "
        "under the same training",
        json_schema_extra=no_hash("baseline", "learned"),
    )
    selection: Literal["last", "val_best"] = Field(
        "last",
        description="snapshot that is exported as the distilled set: the last one, or that with the best val score",
        json_schema_extra=no_hash("baseline", "learned"),
    )
    selection_students: PositiveInt = Field(
        2,
        description="number of students scored on val per snapshot, and per value of baseline_lrs and baseline_losses",
        json_schema_extra=no_hash("learned"),
    )
    baseline_lrs: tuple[PositiveFloat, ...] = Field(
        (0.01, 0.03, 0.1, 0.3, 1.0),
        description="learning rates tried for the random pairs; the best one on val is used",
        json_schema_extra=no_hash("learned"),
    )
    baseline_losses: tuple[Literal["wbce", "infonce", "bce", "cwcl", "kl", "mse"], ...] = Field(
        ("wbce", "infonce"),
        description="losses tried for the random pairs; the best one on val is used",
        json_schema_extra=no_hash("learned"),
    )
    baseline_draws: PositiveInt = Field(
        5,
        description="number of different draws of random pairs, with one student each",
        json_schema_extra=no_hash("learned"),
    )
    chunk: PositiveInt = Field(
        256, description="number of retrieval queries scored at once", json_schema_extra=no_hash("baseline", "learned")
    )
    probes: dict[str, Probe] = Field(
        {},
        description="further tests of the final students, each under a name you choose: zero_shot, vqa or retrieval",
        json_schema_extra=no_hash(),
    )
    seed: int | None = Field(None, description="random seed of the students; null: the run's seed")

    @field_validator("reference", mode="before")
    @classmethod
    def _bool_of_old_files(cls, value: Any) -> Any:
        """Turn true and false, as older run files have them, into `auto` and `none`."""
        return {True: "auto", False: "none"}.get(value, value) if isinstance(value, bool) else value

    def clashes(self) -> list[Clash]:
        return clashes_of_probes(self.probes)

    def not_hashed(self, purpose: Purpose) -> tuple[str, ...]:
        """Leave out fields that have no effect, so that hashes older than these fields stay valid."""
        without = {
            "augment": purpose == "baseline" and self.augment == "none",
            "order": self.order == "sequence",
            "between": self.order == "sequence" or self.between == "zeros",
        }
        return tuple(name for name, no_effect in without.items() if no_effect)


class Runtime(Section):
    """Place and resources of a run; not hashed. Only `threads` and the use of a GPU change results (by rounding)."""

    storage: str = Field(
        "runs", description="folder or URI (s3://, gs://, abfs://, file://, ...) of all runs, expert stores and caches"
    )
    scratch: str | None = Field(
        None, description="local folder for copies of the files at a URI; null: folder rmdd in the user's cache folder"
    )
    ray: Literal["on", "off"] = Field(
        "on", description="off: do all work sequentially in this process, with identical results"
    )
    address: str | None = Field(None, description="Ray cluster to join; null: RAY_ADDRESS if set, else a local cluster")
    num_cpus: PositiveInt | None = Field(None, description="CPUs of a local Ray cluster; null: all")
    workers: PositiveInt | None = Field(
        None,
        description="number of experts, phases or students that run in parallel; null: as many as the cluster has "
        "room for; set it for an autoscaling cluster, which then adds nodes for them",
    )
    threads: PositiveInt = Field(
        1, description="number of CPU threads per worker; results are identical only for the same number of threads"
    )
    reader_cpus: PositiveFloat = Field(1.0, description="CPUs per reading process of an ingest; 0.5: two share a CPU")
    object_store_mb: Annotated[int, Field(ge=75)] = Field(
        256, description="size in MiB of the object store of a local Ray cluster"
    )
    loader_workers: Annotated[int, Field(ge=0)] = Field(
        0, description="number of processes per expert that decode and augment images"
    )
    fleet: Literal["pool", "train"] = Field(
        "pool",
        description="how experts are trained: on a pool of actors, or in one run of Ray Train (always if several "
        "workers train one expert)",
    )
    min_workers: PositiveInt = Field(
        1, description="smallest number of workers of a Ray Train run, which grows up to `workers` as nodes are added"
    )
    cache_gb: NonNegativeFloat = Field(
        20.0,
        description="GB of disk (and page cache) for the decoded images that experts train on; a larger dataset is "
        "streamed from its shards in every epoch, with identical results",
    )
    gpus_per_worker: NonNegativeFloat = Field(
        0.0, description="number of GPUs per worker, or the share of one GPU; 0: workers compute on CPUs"
    )
    cpus_per_worker: NonNegativeFloat | None = Field(
        None, description="CPUs (or share of one) that Ray reserves per worker; null: as `threads`, or 0 with a GPU"
    )
    keep_parameters: Literal["device", "cpu", "recompute"] = Field(
        "device",
        description="where the parameters of the K inner steps are kept for the backward pass: on the device, on the "
        "CPU, or recomputed from 2 sqrt(K) of them",
    )
    max_restarts: Annotated[int, Field(ge=0)] = Field(
        3, description="how often a dead worker or a failed expert is started again"
    )
    time_limit: PositiveFloat | None = Field(
        None, description="minutes after which a run saves its state and stops, as on Ctrl-C; null: no limit"
    )
    stall_limit: PositiveFloat | None = Field(
        60.0,
        description="minutes without progress after which a worker is killed and restarted; null: no limit; it does "
        "not apply to workers of Ray Train",
    )
    track: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        ("tensorboard",),
        description="tools that show the training curves, or none; wandb and mlflow need `pip install rmdd[track]`",
    )

    @field_validator("track", mode="before")
    @classmethod
    def _word_for_track(cls, value: Any) -> Any:
        """Turn a single word into a list of that word, and the word `none` into an empty list."""
        return ([] if value == "none" else [value]) if isinstance(value, str) else value

    @property
    def share(self) -> tuple[float, float]:
        """Number of CPUs and of GPUs that Ray reserves for one worker."""
        default = 0.0 if self.gpus_per_worker else float(self.threads)
        return default if self.cpus_per_worker is None else self.cpus_per_worker, self.gpus_per_worker

    def clashes(self) -> list[Clash]:
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            text = (
                f"runtime.gpus_per_worker is {self.gpus_per_worker:g}: above 1, only whole numbers are possible; set "
                "a share up to 1, or a whole number"
            )
            return [Clash(text, "runtime.gpus_per_worker")]
        scheme, is_uri, rest = self.storage.partition("://")
        user = rest.partition("/")[0].rpartition("@")[0]
        if is_uri and (":" in user or "?" in rest or "#" in rest):
            text = (
                f"runtime.storage is a {scheme}:// URI that contains a password or settings, which would be written to "
                "files and logs; remove them, and set them in the environment of every machine (such as "
                "AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS)"
            )
            return [Clash(text, "runtime.storage")]
        if is_uri and not rest.strip("/"):
            text = f"runtime.storage '{self.storage}' has no bucket or folder; set it to {scheme}://BUCKET/FOLDER"
            return [Clash(text, "runtime.storage")]
        return []
