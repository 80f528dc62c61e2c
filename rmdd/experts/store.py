"""The expert store: trajectories on disk.

    store.json                      schema version, parameter names and shapes, protocol, config and data hash
    theta-0.safetensors             parameters that all experts start from: a pretrained image tower
    expert-003/epoch-0006.safetensors
    expert-003/expert.json          per-epoch metrics, step norms, size and SHA-256 of each file; written at the end
    expert-003/forgetting.safetensors  counts of forgetting events, if experts.forgetting is set
    expert-003/running.safetensors  the last finished epoch of an expert in training

Every file is written under a temporary name and then renamed. To read a checkpoint, only its file is opened, and the
file of epoch 0 if the experts share epoch 0 or if the store saves differences from epoch 0.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from rmdd.core.checks import DiskCheck, Format
from rmdd.core.files import atomic_path, is_temporary, read_json, remove, sha256_file, write_json
from rmdd.core.tensors import Damaged, load_checked, save_checked
from rmdd.coresets import forgetting
from rmdd.models.dual import Params, check_same_shapes

SCHEMA = 1
START = "theta-0.safetensors"


class Store:
    """A folder of expert trajectories; use `Store.open` to open one and `Store.create` to make one."""

    def __init__(self, path: Path, spec: dict[str, Any]):
        self.path = path
        self.spec = spec
        self.shapes = {name: tuple(shape) for name, shape in spec["parameters"].items()}
        self._shared: Params = {}
        self._theta_0: dict[int, Params] = {}
        self._checked: set[Path] = set()

    @classmethod
    def create(
        cls,
        path: Path,
        shapes: Mapping[str, Sequence[int]],
        *,
        shared: Params,
        epochs: int,
        keep: Iterable[int] | None,
        dtype: str,
        facts: Mapping[str, Any],
    ) -> "Store":
        """Create a store, or open the existing one if it has the same description.

        `shared` are the epoch-0 parameters that all experts have in common. `keep` lists the epochs to keep; None keeps
        all. `facts` (protocol, encoders, hashes) are added to `store.json`. Raises `ValueError` when the store at
        `path` has a different description.
        """
        spec = {
            "schema_version": SCHEMA,
            "parameters": {name: list(shape) for name, shape in shapes.items()},
            "shared": sorted(shared),
            "epochs": epochs,
            "keep": "all" if keep is None else sorted(set(keep) | {0, epochs}),
            "dtype": dtype,
            **facts,
        }
        if (path / "store.json").is_file():
            store = cls.open(path)
            if {k: v for k, v in store.spec.items() if k != "shared_sha256"} != json.loads(json.dumps(spec)):
                raise ValueError(
                    f"the store at {path} holds other experts (its store.json differs); use another storage folder"
                )
            return store
        path.mkdir(parents=True, exist_ok=True)
        if shared:
            start = path / START
            with atomic_path(start) as temporary:
                save_file({n: t.contiguous() for n, t in shared.items()}, temporary)
            spec["shared_sha256"] = sha256_file(start)
        write_json(path / "store.json", spec)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path | str) -> "Store":
        """Open a store. Raises `ValueError` if the folder holds no store, or one with a different schema version."""
        path = Path(path)
        if not (path / "store.json").is_file():
            raise ValueError(f"no expert store at {path} (no store.json); train experts first with `rmdd experts`")
        spec = read_json(path / "store.json")
        if spec.get("schema_version") != SCHEMA:
            raise ValueError(
                f"the store at {path} has schema version {spec.get('schema_version')}, this version of rmdd "
                f"reads {SCHEMA}"
            )
        return cls(path, spec)

    @property
    def epochs(self) -> int:
        epochs: int = self.spec["epochs"]
        return epochs

    @property
    def start(self) -> Path:
        """The file with the epoch-0 parameters that all experts share; it is missing if they share none."""
        return self.path / START

    def keeps(self, epoch: int) -> bool:
        """Return whether the store keeps checkpoints of epoch `epoch`."""
        return self.spec["keep"] == "all" or epoch in self.spec["keep"]

    @property
    def kept_epochs(self) -> list[int]:
        """Epochs whose checkpoints can be read, in ascending order; includes epoch 0."""
        return [e for e in range(self.epochs + 1) if self.keeps(e)]

    def folder(self, expert: int) -> Path:
        return self.path / f"expert-{expert:03d}"

    def is_complete(self, expert: int) -> bool:
        return (self.folder(expert) / "expert.json").is_file()

    def complete(self) -> list[int]:
        """Return the numbers of the finished experts in ascending order."""
        return sorted(int(p.parent.name.removeprefix("expert-")) for p in self.path.glob("expert-*/expert.json"))

    def record(self, expert: int) -> dict[str, Any]:
        """Return the metrics per epoch, the step norms and the files of a finished expert.

        Raises `ValueError` when its `expert.json` is damaged.
        """
        path = self.folder(expert) / "expert.json"
        try:
            record: dict[str, Any] = read_json(path)
            version = record["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from error
        if version != SCHEMA:
            raise ValueError(f"{path} has schema version {version}, this version of rmdd reads {SCHEMA}")
        return record

    def norms(self, expert: int) -> dict[str, np.ndarray]:
        """Return the step length of each parameter tensor in each epoch, float64 (n,), by tensor name."""
        return {name: np.asarray(steps, dtype=np.float64) for name, steps in self.record(expert)["step_norms"].items()}

    def read(self, expert: int, epoch: int) -> Params:
        """Return copies of all trained parameters after `epoch` epochs, in float32.

        Raises `ValueError` when the epoch was not kept or its file is damaged.
        """
        if not self.keeps(epoch):
            raise ValueError(
                f"expert {expert} keeps only epochs {self.spec['keep']}, not {epoch}; train with experts.keep: all "
                "or use a kept epoch"
            )
        if epoch == 0:
            return {n: t.clone() for n, t in self._start(expert).items()}
        params = self._load(self._file(expert, epoch))
        if self.spec["dtype"] == "bfloat16-delta":
            start = self._start(expert)
            params = {n: start[n] + t.float() for n, t in params.items()}
        check_same_shapes(self.shapes, {n: tuple(params[n].shape) for n in self.shapes if n in params})
        self._check(self._file(expert, epoch))
        return {n: params[n] for n in self.shapes}

    def _start(self, expert: int) -> Params:
        if expert not in self._theta_0:
            stored = self._load(self._file(expert, 0))
            self._shared = self._shared or self.shared()
            params = {**self._shared, **stored}
            check_same_shapes(self.shapes, {n: tuple(params[n].shape) for n in self.shapes if n in params})
            self._check(self._file(expert, 0))
            self._theta_0[expert] = {n: params[n] for n in self.shapes}
        return self._theta_0[expert]

    def shared(self) -> Params:
        """Return the epoch-0 parameters that all experts share. Raises `ValueError` when their file is damaged."""
        if not self.spec["shared"]:
            return {}
        listed = self.spec.get("shared_sha256")  # stores of earlier versions record no SHA-256
        if listed is not None and self.start.is_file() and sha256_file(self.start) != listed:
            raise ValueError(
                f"{self.start} is damaged (its SHA-256 is not the one in store.json); copy it again, or delete the "
                "store and train the experts again"
            )
        return self._load(self.start)

    def _file(self, expert: int, epoch: int) -> Path:
        return self.folder(expert) / f"epoch-{epoch:04d}.safetensors"

    def _load(self, path: Path) -> Params:
        try:
            return load_file(path)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing from the store; train that expert again") from None
        except Exception as error:
            raise _damaged(path, error) from error

    def _check(self, path: Path) -> None:
        """Check the SHA-256 of a file before its first use, if the `expert.json` of a finished expert lists it."""
        if path in self._checked or not (path.parent / "expert.json").is_file():
            return
        listed = self._files(int(path.parent.name.removeprefix("expert-"))).get(path.name)
        if listed is not None and sha256_file(path) != listed["sha256"]:
            raise _damaged(path, "its SHA-256 is not the one in expert.json")
        self._checked.add(path)

    def size(self) -> int:
        """Return the size of all files of the store in bytes."""
        return stored_bytes(self.path)

    def _files(self, expert: int) -> dict[str, dict[str, Any]]:
        files: dict[str, dict[str, Any]] = self.record(expert).get("files", {})
        return files


def stored_bytes(path: Path) -> int:
    """Return the size of a store in bytes; files that are not on this machine count with their recorded size."""
    sizes = {p: p.stat().st_size for p in path.rglob("*") if p.is_file()}
    for record in path.glob("expert-*/expert.json"):
        sizes |= {record.parent / n: file["bytes"] for n, file in read_json(record).get("files", {}).items()}
    return sum(sizes.values())


def _damaged(path: Path, error: Exception | str) -> ValueError:
    return ValueError(f"{path} is damaged ({error}); delete its expert's folder and train that expert again")


def _without_prefix(tensors: Params, prefix: str) -> Params:
    """Return the tensors whose names begin with `prefix`, with the prefix removed from the names."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


class Writer:
    """Writes one expert to the store, epoch by epoch; resumes a half-trained expert after its last finished epoch.

    Raises `ValueError` if the expert is already complete.
    """

    def __init__(self, store: Store, expert: int):
        self.store = store
        self.expert = expert
        self.folder = store.folder(expert)
        self.running = self.folder / "running.safetensors"
        self.epoch = -1
        self.norms: dict[str, list[float]] = {n: [] for n in store.shapes}
        self.metrics: list[dict[str, Any]] = []
        self.files: dict[str, dict[str, Any]] = {}
        self._previous: Params = {}
        self.momentum: Params = {}
        self.counts: Params = {}
        """Tensors of forgetting counts after the last finished epoch; empty unless experts.forgetting is set."""
        if store.is_complete(expert):
            raise ValueError(
                f"expert {expert} of the store at {store.path} is complete; delete {self.folder} to train it again"
            )
        if self.running.is_file():
            self._resume()
        elif self.folder.exists():
            remove(self.folder)

    def _resume(self) -> None:
        try:
            tensors, state = load_checked(self.running, "state")
        except Damaged as error:
            raise _damaged(self.running, error) from error
        self.epoch, self.norms, self.metrics = state["epoch"], state["norms"], state["metrics"]
        self.files = state.get("files", {})
        self._previous = {n: tensors[n] for n in self.store.shapes}
        self.momentum = _without_prefix(tensors, "momentum/")
        self.counts = _without_prefix(tensors, "counts/")

    @property
    def params(self) -> Params:
        """Parameters of the expert after its last finished epoch."""
        return self._previous

    def add(
        self,
        params: Params,
        metrics: Mapping[str, Any],
        momentum: Params | None = None,
        counts: Params | None = None,
    ) -> None:
        """Write the parameters after the next epoch; the first call writes the initial parameters.

        Raises `ValueError` for parameters that are not finite, before anything is written.
        """
        check_same_shapes(self.store.shapes, {n: tuple(p.shape) for n, p in params.items()})
        self.check_finite(params)
        epoch = self.epoch + 1
        params = {n: p.detach().to("cpu", torch.float32).contiguous().clone() for n, p in params.items()}
        for name, steps in self.norms.items() if epoch else ():
            steps.append(torch.linalg.vector_norm((params[name] - self._previous[name]).double()).item())
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.store.keeps(epoch):
            self._write(epoch, params)
        self.metrics.append({"epoch": epoch, **metrics})
        self.epoch, self._previous, self.momentum = epoch, params, dict(momentum or {})
        self.counts = dict(counts or {})
        state = {"epoch": epoch, "norms": self.norms, "metrics": self.metrics, "files": self.files}
        buffers = {f"momentum/{n}": t for n, t in self.momentum.items()}
        counters = {f"counts/{n}": t for n, t in self.counts.items()}
        save_checked(self.running, {**params, **buffers, **counters}, "state", state)

    def check_finite(self, params: Params) -> None:
        """Raise `ValueError` when `params` contain NaN or infinite values."""
        bad = [n for n, p in params.items() if not torch.isfinite(p).all()]
        if bad:
            raise ValueError(
                f"expert {self.expert} diverged in epoch {self.epoch + 1}: {len(bad)} parameter tensors are not finite "
                f"(first: {bad[0]}); lower experts.lr_image and experts.lr_text"
            )

    def _write(self, epoch: int, params: Params) -> None:
        if epoch == 0:
            self._check_shared(params)
            params = {n: p for n, p in params.items() if n not in self.store.spec["shared"]}
        elif self.store.spec["dtype"] == "bfloat16-delta":
            start = self.store._start(self.expert)
            params = {n: (p - start[n]).to(torch.bfloat16) for n, p in params.items()}
        path = self.store._file(self.expert, epoch)
        with atomic_path(path) as temporary:
            save_file(params, temporary)
        self.list_file(path)

    def list_file(self, path: Path) -> None:
        """Add a file of the expert, with its size and SHA-256, to the expert's record."""
        self.files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}

    def _check_shared(self, params: Params) -> None:
        changed = [n for n, p in self.store.shared().items() if not torch.equal(p, params[n])]
        if changed:
            raise ValueError(
                f"the weights of the pretrained tower differ from those in the store at {self.store.path} (first: "
                f"{changed[0]}); they changed since the store was made; use another storage folder"
            )

    def finish(self) -> None:
        """Mark the expert as complete by writing its `expert.json`; a complete expert is not trained again."""
        assert self.epoch == self.store.epochs, "an expert is complete only after its last epoch"
        write_json(
            self.folder / "expert.json",
            {
                "schema_version": SCHEMA,
                "expert": self.expert,
                "epochs": self.epoch,
                "metrics": self.metrics,
                "step_norms": self.norms,
                "files": self.files,
            },
        )
        remove(self.running)


def verify(path: Path, check: DiskCheck, experts: int | None = None) -> None:
    """Check the checkpoint of every kept epoch of every expert.

    `experts` is the expected number of experts; None checks all experts up to the last one that exists.
    """
    if not check.begin(path):
        return
    with check.errors_as_faults(path / "store.json", "delete the store and train the experts again"):
        store = Store.open(path)
        shared = store.spec["shared"]
        if shared:
            listed, remedy = store.spec.get("shared_sha256"), "copy it again, or delete the store and retrain experts"
            if listed and store.start.is_file() and sha256_file(store.start) != listed:
                check.fault(store.start, "has another SHA-256 than store.json says", remedy)
            else:
                _verify_shapes(store.start, {n: store.shapes[n] for n in shared}, remedy, check)
        numbers = [int(p.name.removeprefix("expert-")) for p in path.glob("expert-*") if _is_folder(p)]
        for number in range(experts if experts is not None else max(numbers, default=-1) + 1):
            _verify_expert(store, number, experts is not None, check)


def _verify_expert(store: Store, number: int, finished: bool, check: DiskCheck) -> None:
    folder = store.folder(number)
    remedy = f"delete {check.storage.address(folder)} and train that expert again with `rmdd experts`"
    if not store.is_complete(number):
        if (running := folder / "running.safetensors").is_file():
            check.tensors(running, "state", remedy)
        if finished or not folder.is_dir():
            check.fault(folder, "expert is missing or not finished", "train it with `rmdd experts`")
        else:
            check.unfinished(folder)
        return
    with check.errors_as_faults(folder / "expert.json", remedy):
        files = store.record(number).get("files", {})
        for epoch in (e for e in range(store.epochs + 1) if store.keeps(e)):
            file = folder / f"epoch-{epoch:04d}.safetensors"
            listed = files.get(file.name)
            if not file.is_file():
                check.fault(file, "is missing", remedy)
            elif listed and file.stat().st_size != listed["bytes"]:
                check.fault(file, f"has {file.stat().st_size} bytes, expert.json says {listed['bytes']}", remedy)
            elif listed and sha256_file(file) != listed["sha256"]:
                check.fault(file, "has another SHA-256 than expert.json says", remedy)
            else:
                names = set(store.shapes) - (set(store.spec["shared"]) if epoch == 0 else set())
                _verify_shapes(file, {n: store.shapes[n] for n in names}, remedy, check)
        if forgetting.FILE in files:
            check.tensors(folder / forgetting.FILE, "forgetting", remedy)


def _verify_shapes(path: Path, shapes: dict[str, tuple[int, ...]], todo: str, check: DiskCheck) -> None:
    try:
        tensors = load_file(path)
    except Exception as error:
        check.fault(path, f"cannot be read: {error}", todo)
        return
    stored = {name: tuple(t.shape) for name, t in tensors.items()}
    wrong = sorted(n for n in stored.keys() | shapes.keys() if stored.get(n) != shapes.get(n))
    if wrong:
        n = wrong[0]
        check.fault(path, f"{n} has shape {stored.get(n, '(missing)')}, store.json says {shapes.get(n, 'none')}", todo)
    check.finite(path, tensors, todo)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not is_temporary(path.name)


FORMAT = Format(("store.json",), "experts/*", verify, always_marked=False)
