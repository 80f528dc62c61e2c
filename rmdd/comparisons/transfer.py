"""`rmdd transfer`: train students with different towers on a distilled set (cross-architecture generalisation).

Image towers give pooled features; their classifiers are removed. A set's text embeddings belong to its own encoder. A
different encoder embeds real captions instead: the set stores the real caption nearest to each of its embeddings. The
learning rates were learned for the set's towers, so each tower has two rows: one uses these rates, the other rates
chosen on val.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.comparisons import results, tables
from rmdd.comparisons.compare import (
    DESCRIPTION,
    RESULTS,
    SCHEMA_VERSION,
    SPREAD,
    Load,
    protocol_of,
    rate,
    unbuildable,
    words_of,
)
from rmdd.comparisons.engine import FOLDER, ComparedRun, Row, ScoredRow, score
from rmdd.comparisons.entries import Entry, misfits, open_entries, with_planned_phases
from rmdd.comparisons.tables import ResultTable
from rmdd.core.files import write_json
from rmdd.core.progress import Progress
from rmdd.core.storage import root_of
from rmdd.execution.backend import Backend, hold_folders, open_backend

POOLINGS = ("cls", "mean")


@dataclass(frozen=True, repr=False)
class TransferResult:
    """The result of a transfer: its folder, its rows of scores, and their means."""

    folder: Path
    """Folder that holds the tables and `results.json`."""
    rows: list[dict[str, Any]]
    """Rows of scores as JSON values; rows for the towers that the set was made for come first."""
    mean: dict[str, dict[str, Any]]
    """Mean scores over the target towers, for learning rates learned with the set and for rates chosen on val."""
    tables: tuple[ResultTable, ...]

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "error" in row]

    def __repr__(self) -> str:
        return f"TransferResult({self.folder}: {len(self.rows)} rows, {len(self.failed)} failed)"


@dataclass(frozen=True)
class Transfer:
    """A transfer of one distilled set to different towers; its arguments were checked."""

    entry: Entry
    run: config.Run
    """Run with the towers that the set was made for."""
    to: tuple[str, ...]
    """Arguments that name the target towers, as the user wrote them."""
    targets: tuple[config.Run, ...]
    """A copy of `run` for each target, with the towers of that target."""
    random: bool = False
    """Whether to train every tower on random pairs too."""
    full: bool = False
    """Whether to train every tower on all pairs too."""

    @property
    def folder(self) -> Path:
        """The folder of this transfer; its name ends in a hash of the set, the towers and the options."""
        runs = [run.hash_of() for run in (self.run, *self.targets)]
        value = config.hash_value([self.entry.value, runs, self.random, self.full, "transfer"])[:8]
        return root_of(self.run.runtime) / FOLDER / f"{self.run.name}-transfer-{value}"

    def write_description(self) -> Path:
        """Write `comparison.json`, so that the transfer can be resumed from its folder; return the folder."""
        description = {
            "verb": "transfer",
            "words": words_of([self.entry]),
            "to": list(self.to),
            "run": self.run.model_dump(mode="json"),
            "random": self.random,
            "full": self.full,
        }
        write_json(self.folder / DESCRIPTION, {"schema_version": SCHEMA_VERSION} | description)
        return self.folder

    def execute(self, progress: Progress | None = None) -> TransferResult:
        """Train the missing students and write the tables. After an interruption, call it again to resume."""
        progress = progress or Progress()
        runtime, folder = self.run.runtime, self.folder
        with hold_folders(runtime, folder), open_backend(runtime, folder / "events.jsonl", progress) as backend:
            self.write_description()
            rows = [
                row
                for k, run in enumerate((self.run, *self.targets))
                for row in self._rows(run, folder / "towers" / f"{k:02d}", backend, progress)
            ]
            return self._write_results(rows, score(rows, backend, progress))

    def _rows(self, run: config.Run, folder: Path, backend: Backend, progress: Progress) -> list[Row]:
        pipeline = ComparedRun(run, backend, progress, folder)
        if wrong := pipeline.check([self.entry]):
            raise config.ConfigError(wrong, "transfer")
        pipeline.embed()
        tower = towers(run.model)
        kinds = ("learned", "tuned") if self.entry.rates == "learned" else ("tuned",)
        rows = [pipeline.row(f"{tower}, {rates} rates", self.entry, rates) for rates in kinds]  # type: ignore[arg-type]
        for requested, word in ((self.random, "random"), (self.full, "full")):
            if requested:
                rows.append(pipeline.row(f"{tower}, {results.NAMES[word]}", Entry(word, word, word, address=word)))  # type: ignore[arg-type]
        return rows

    def _write_results(self, rows: Sequence[Row], scored: Sequence[ScoredRow]) -> TransferResult:
        values = [
            results.row_values(row, s)
            | {
                "tower": row.run.model.image.name,
                "text": row.run.model.text.name,
                "source": row.pipeline.run.model == self.run.model,
            }
            for row, s in zip(rows, scored, strict=True)
        ]
        for pipeline in dict.fromkeys(row.pipeline for row in rows):
            same_towers = [k for k, row in enumerate(rows) if row.pipeline is pipeline]
            results.add_ratio_to_full([values[k] for k in same_towers])
            for base in (k for k in same_towers if values[k]["kind"] == "random"):
                for k in same_towers:
                    if k != base:
                        pair = (values[k], scored[k]), (values[base], scored[base])
                        values[k]["difference"] = results.difference(*pair)
        mean = means(values)
        shown = matrix(self.run.evaluate, values, mean)
        tables.write(self.folder, f"transfer: {self.entry.name}", shown, [tables.flat(row) for row in values])
        facts = {"schema_version": SCHEMA_VERSION, "set": self.entry.address, "transfer_mean": mean, "rows": values}
        write_json(self.folder / RESULTS, facts)
        return TransferResult(self.folder, values, mean, shown)


def means(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the mean scores over all target towers, for learned learning rates and for rates chosen on val."""
    mean: dict[str, dict[str, Any]] = {}
    for rates in ("learned", "tuned"):
        used = [r for r in rows if r["kind"] == "set" and r["rates"] == rates and not r["source"] and "error" not in r]
        if used:
            mean[rates] = {
                split: {m: statistics.fmean(r[split][m]["mean"] for r in used) for m in ("R@mean", *results.RECALLS)}
                for split in results.SPLITS
            } | {"towers": len(used)}
    return mean


def matrix(rule: config.Evaluate, rows: Sequence[dict[str, Any]], mean: Mapping[str, Any]) -> tuple[ResultTable, ...]:
    """Return two tables of scores: one for the target towers with their mean, one for the towers of the set."""
    extra = [name for name in ("interval", "difference", "of_full") if any(row.get(name) for row in rows)]
    heads = {"interval": "95 % interval", "difference": "against random pairs", "of_full": "of full data"}
    columns = ["image tower", "text encoder", "choice", "val R@mean", "test R@mean", *results.RECALLS]
    columns += [heads[name] for name in extra] + ["duplicate captions"]

    def cells(row: dict[str, Any]) -> list[str]:
        shown = {
            "interval": tables.between(row.get("interval")),
            "difference": tables.gain(row.get("difference")),
            "of_full": "" if row.get("of_full") is None else f"{row['of_full']:.0f} %",
        }
        words = f"{rate(row)} rates" if row["kind"] == "set" and "chosen" not in row else rate(row)
        words = words if row["kind"] == "set" else f"{row['method']}, {words}"
        duplicates = tables.count(row["costs"].get("duplicates"))
        return [row["tower"], row["text"], words, *tables.recalls(row), *(shown[n] for n in extra), duplicates]

    others = [cells(row) for row in rows if not row["source"]]
    for rates, over_towers in mean.items():
        scores = [
            f"{over_towers['val']['R@mean']:.1f}",
            *(f"{over_towers['test_last'][m]:.1f}" for m in ("R@mean", *results.RECALLS)),
        ]
        over = f"mean of {over_towers['towers']}"
        others.append([over, "", f"{rates} rates", *scores, *[""] * (len(extra) + 1)])
    notes = [
        f"Recall in %, {SPREAD}. Each student reads test once, after its last pass; all choices use val.",
        "Image towers give pooled features without a classifier. Learned learning rates suit the towers of the set; a "
        "rate chosen on val is one of `evaluate.baseline_lrs` and is used for both towers.",
        "For a different text encoder, the nearest real caption of each distilled text (by cosine) is "
        "embedded again; `duplicate captions` counts pairs with the same caption as an earlier pair.",
        "The mean is over the towers of this table, without the towers of the set.",
    ]
    of_source = [cells(row) for row in rows if row["source"]]
    words = f"{rule.students} students, {rule.epochs} passes per subset, batch {rule.batch}"
    remarks = tables.remarks(rows)
    return (
        ResultTable(f"other towers; {words}", columns, others, [*notes, *remarks]),
        ResultTable("towers of the set", columns, of_source),
    )


def towers(model: config.Model) -> str:
    return f"{model.image.name} + {model.text.name}"


def target(run: config.Run, word: str) -> config.Run:
    """Return a copy of `run` with different towers: `IMAGE[@WEIGHTS]`, `text:ENCODER[@POOLING]`, or both joined by `+`.

    Without `@WEIGHTS`, an image tower starts like that of `run`: random with the same seed, or pretrained. Raises
    `ValueError` if `word` has a different form.
    """
    first, joined, second = ("", "+", word[5:]) if word.startswith("text:") else word.partition("+text:")
    name, _, weights = first.partition("@")
    if not (name or word.startswith("text:")) or bool(joined) != bool(second):
        raise ValueError("write a tower as IMAGE, IMAGE@WEIGHTS, text:ENCODER or IMAGE+text:ENCODER")
    image, text = run.model.image, run.model.text
    if name:
        default = image.weights if image.is_random else "random" if name == "convnet" else "pretrained"
        image = config.ImageTower(**image.model_dump() | {"name": name, "weights": _absolute(weights) or default})
    if second:
        encoder, _, pooling = second.rpartition("@")
        changed = {"name": encoder, "pooling": pooling} if pooling in POOLINGS else {"name": second}
        text = config.TextTower(**text.model_dump() | changed | {"name": _absolute(changed["name"])})
    return config.Run.model_validate(
        run.model_copy(update={"model": run.model.model_copy(update={"image": image, "text": text})}).model_dump()
    )


def _absolute(word: str) -> str:
    """Return the absolute path if `word` is an existing file or folder, otherwise `word`."""
    path = Path(word).expanduser()
    return str(path.absolute()) if word and path.exists() else word


def transfer(
    set_: str | Path,
    to: Iterable[str],
    source: config.Source | None = None,
    overrides: Iterable[str] = (),
    *,
    random: bool = False,
    full: bool = False,
    progress: Progress | None = None,
) -> TransferResult:
    """Train students with different towers on a set, with its learned rates and with rates chosen on val.

    `to` lists towers: `IMAGE[@WEIGHTS]`, `text:ENCODER[@POOLING]`, or both joined by `+`. `source` gives protocol and
    data as in `rmdd.compare`. `random` and `full` add rows for random pairs and for all pairs with every tower.

    >>> rmdd.transfer("runs/demo-0123abcd", ["resnet18@random", "text:hashing"])  # doctest: +SKIP

    Raises `ConfigError` with all mistakes before any training starts.
    """
    return prepare_transfer(str(set_), list(to), source, list(overrides), random=random, full=full).execute(progress)


def prepare_transfer(
    word: str,
    to: Sequence[str],
    source: config.Source | None,
    overrides: list[str],
    *,
    random: bool = False,
    full: bool = False,
    load: Load = config.load,
) -> Transfer:
    """Open the set of a transfer and check its target towers. Raises `ConfigError` that lists all mistakes."""
    (entry,) = open_entries([word])
    if entry.distilled is None:
        raise config.ConfigError([f"{word} is no distilled set; give the folder of a set or of its run"], "transfer")
    run = with_planned_phases(protocol_of([entry], source, overrides, load), "transfer")
    wrong = unbuildable(run) or misfits(entry, run.model, run.data.image_size, reencode=False)
    wrong += [] if to else ["no target tower; give --to TOWER, such as --to resnet18"]
    targets: list[config.Run] = []
    for name in to:
        try:
            other = target(run, name)
        except ValueError as error:
            message = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
            wrong.append(f"--to {name}: {message.removeprefix('Value error, ')}")
            continue
        same_image = other.model.model_copy(update={"image": run.model.image})  # ignores a different image tower
        unfit = unbuildable(other) or misfits(entry, same_image, run.data.image_size, reencode=True)
        wrong += [f"--to {name}: {mistake}" for mistake in unfit]
        if other.model == run.model:
            wrong.append(f"--to {name}: the set was made for these towers, so their row is always included; remove it")
        elif other.model in [t.model for t in targets]:
            wrong.append(f"--to {name}: given twice; remove one")
        targets.append(other)
    if wrong:
        raise config.ConfigError(wrong, "transfer")
    return Transfer(entry, run, tuple(to), tuple(targets), random, full)
