"""`rmdd transfer`: what a set is worth to students with other towers than those that it was made for.

Image towers are always pooled features: a classifier is taken off. Texts of a set lie in the space of its own encoder,
so for another one the nearest real caption of each (cosine in the source space, kept with the set) is encoded anew.
Learned rates belong to the source architecture, so every row stands twice: with them, and with rates chosen on val.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.comparisons import results, tables
from rmdd.comparisons.compare import (
    BEGUN,
    RESULTS,
    SCHEMA_VERSION,
    SPREAD,
    Load,
    Source,
    protocol_of,
    rate,
    unbuildable,
    worded,
)
from rmdd.comparisons.engine import FOLDER, ComparedRun, Row, Scored, score
from rmdd.comparisons.entries import Entry, misfits, open_entries, planned
from rmdd.comparisons.tables import ResultTable
from rmdd.core.files import write_json
from rmdd.core.progress import Progress
from rmdd.core.storage import root_of
from rmdd.execution.backend import Backend, hold_folders, open_backend

POOLINGS = ("cls", "mean")


@dataclass(frozen=True)
class Transferred:
    """What a transfer leaves: its folder with tables and `results.json`, its rows (the source's first), and the mean
    test R@mean over the other towers, per kind of rates."""

    folder: Path
    rows: list[dict[str, Any]]
    mean: dict[str, dict[str, Any]]
    tables: tuple[ResultTable, ...]

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "error" in row]


@dataclass(frozen=True)
class Transfer:
    """A set, the run of its own towers, and runs that differ from it in towers alone."""

    entry: Entry
    run: config.Run
    to: tuple[str, ...]
    targets: tuple[config.Run, ...]
    random: bool = False
    full: bool = False

    @property
    def folder(self) -> Path:
        """Named by all that the matrix says."""
        runs = [run.hash_of() for run in (self.run, *self.targets)]
        value = config.hash_value([self.entry.value, runs, self.random, self.full, "transfer"])[:8]
        return root_of(self.run.runtime) / FOLDER / f"{self.run.name}-transfer-{value}"

    def begin(self) -> Path:
        """Keep what it is, so that it can be resumed by its folder; returns the folder."""
        plain = {
            "verb": "transfer",
            "words": worded([self.entry]),
            "to": list(self.to),
            "run": self.run.model_dump(mode="json"),
            "random": self.random,
            "full": self.full,
        }
        write_json(self.folder / BEGUN, {"schema_version": SCHEMA_VERSION} | plain)
        return self.folder

    def go(self, progress: Progress | None = None) -> Transferred:
        """Train what is missing and write the matrix. Going on after an interruption is calling it again."""
        progress = progress or Progress()
        runtime, folder = self.run.runtime, self.folder
        with hold_folders(runtime, folder), open_backend(runtime, folder / "events.jsonl", progress) as backend:
            self.begin()
            rows = [
                row
                for k, run in enumerate((self.run, *self.targets))
                for row in self._rows(run, folder / "towers" / f"{k:02d}", backend, progress)
            ]
            return self._written(rows, score(rows, backend, progress))

    def _rows(self, run: config.Run, folder: Path, backend: Backend, progress: Progress) -> list[Row]:
        compared = ComparedRun(run, backend, progress, folder)
        if wrong := compared.check([self.entry]):
            raise config.ConfigError(wrong, "transfer")
        compared.embed()
        tower = towers(run.model)
        kinds = ("learned", "tuned") if self.entry.rates == "learned" else ("tuned",)
        rows = [compared.row(f"{tower}, {rates} rates", self.entry, rates) for rates in kinds]  # type: ignore[arg-type]
        for wanted, word in ((self.random, "random"), (self.full, "full")):
            if wanted:
                rows.append(compared.row(f"{tower}, {results.NAMES[word]}", Entry(word, word, word, address=word)))  # type: ignore[arg-type]
        return rows

    def _written(self, rows: Sequence[Row], scored: Sequence[Scored]) -> Transferred:
        plain = [
            results.plain(row, s)
            | {
                "tower": row.run.model.image.name,
                "text": row.run.model.text.name,
                "source": row.compared.run.model == self.run.model,
            }
            for row, s in zip(rows, scored, strict=True)
        ]
        for compared in dict.fromkeys(row.compared for row in rows):
            mine = [k for k, row in enumerate(rows) if row.compared is compared]
            results.of_full([plain[k] for k in mine])
            for base in (k for k in mine if plain[k]["kind"] == "random"):
                for k in mine:
                    if k != base:
                        plain[k]["difference"] = results.against((plain[k], scored[k]), (plain[base], scored[base]))
        mean = means(plain)
        shown = matrix(self.run.evaluate, plain, mean)
        tables.write(self.folder, f"transfer: {self.entry.name}", shown, [tables.flat(row) for row in plain])
        facts = {"schema_version": SCHEMA_VERSION, "set": self.entry.address, "transfer_mean": mean, "rows": plain}
        write_json(self.folder / RESULTS, facts)
        return Transferred(self.folder, plain, mean, shown)


def means(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per kind of rates the mean over towers of their mean scores, the source architecture left out."""
    mean: dict[str, dict[str, Any]] = {}
    for rates in ("learned", "tuned"):
        mine = [r for r in rows if r["kind"] == "set" and r["rates"] == rates and not r["source"] and "error" not in r]
        if mine:
            mean[rates] = {
                split: {m: statistics.fmean(r[split][m]["mean"] for r in mine) for m in ("R@mean", *results.RECALLS)}
                for split in results.SPLITS
            } | {"towers": len(mine)}
    return mean


def matrix(rule: config.Evaluate, rows: Sequence[dict[str, Any]], mean: Mapping[str, Any]) -> tuple[ResultTable, ...]:
    """The source architecture apart from the others."""
    extra = [name for name in ("interval", "difference", "of_full") if any(row.get(name) for row in rows)]
    heads = {"interval": "95 % interval", "difference": "against random pairs", "of_full": "of full data"}
    columns = ["image tower", "text encoder", "choice", "val R@mean", "test R@mean", *results.RECALLS]
    columns += [heads[name] for name in extra] + ["captions twice"]

    def cells(row: dict[str, Any]) -> list[str]:
        shown = {
            "interval": tables.between(row.get("interval")),
            "difference": tables.gain(row.get("difference")),
            "of_full": "" if row.get("of_full") is None else f"{row['of_full']:.0f} %",
        }
        words = f"{rate(row)} rates" if row["kind"] == "set" and "chosen" not in row else rate(row)
        words = words if row["kind"] == "set" else f"{row['method']}, {words}"
        twice = tables.count(row["costs"].get("duplicates"))
        return [row["tower"], row["text"], words, *tables.recalls(row), *(shown[n] for n in extra), twice]

    others = [cells(row) for row in rows if not row["source"]]
    for rates, over_towers in mean.items():
        scores = [
            f"{over_towers['val']['R@mean']:.1f}",
            *(f"{over_towers['test_last'][m]:.1f}" for m in ("R@mean", *results.RECALLS)),
        ]
        over = f"mean of {over_towers['towers']}"
        others.append([over, "", f"{rates} rates", *scores, *[""] * (len(extra) + 1)])
    notes = [
        f"Recall in %, {SPREAD}; test is read once per student after its last pass, val makes every choice.",
        "Image towers are pooled features without a classifier. Learned rates belong to the source architecture; rates "
        "by val are one for both sides, out of `evaluate.baseline_lrs`.",
        "For another text encoder the nearest real caption of each distilled text (cosine in the source space) is "
        "encoded anew; `captions twice` counts those that an earlier pair has too.",
        "The mean is over the towers of this table; the source architecture is not in it.",
    ]
    own = [cells(row) for row in rows if row["source"]]
    words = f"{rule.students} students, {rule.epochs} passes per subset, batch {rule.batch}"
    remarks = tables.remarks(rows)
    return (
        ResultTable(f"other towers; {words}", columns, others, [*notes, *remarks]),
        ResultTable("the towers that it was made for", columns, own),
    )


def towers(model: config.Model) -> str:
    return f"{model.image.name} + {model.text.name}"


def target(run: config.Run, word: str) -> config.Run:
    """`run` with the towers of a word: `IMAGE[@WEIGHTS]`, `text:ENCODER[@POOLING]`, or both joined by `+`.

    An image tower named without weights starts as the source's does: at random (with its seed) or pretrained.
    Raises ValueError for a word that names neither.
    """
    first, joined, second = ("", "+", word[5:]) if word.startswith("text:") else word.partition("+text:")
    name, _, weights = first.partition("@")
    if not (name or word.startswith("text:")) or bool(joined) != bool(second):
        raise ValueError("write a tower as IMAGE, IMAGE@WEIGHTS, text:ENCODER or IMAGE+text:ENCODER")
    image, text = run.model.image, run.model.text
    if name:
        usual = image.weights if image.is_random else "random" if name == "convnet" else "pretrained"
        image = config.ImageTower(**image.model_dump() | {"name": name, "weights": _placed(weights) or usual})
    if second:
        encoder, _, pooling = second.rpartition("@")
        changed = {"name": encoder, "pooling": pooling} if pooling in POOLINGS else {"name": second}
        text = config.TextTower(**text.model_dump() | changed | {"name": _placed(changed["name"])})
    return config.Run.model_validate(
        run.model_copy(update={"model": run.model.model_copy(update={"image": image, "text": text})}).model_dump()
    )


def _placed(word: str) -> str:
    """A file or folder of this machine by its absolute path; other words as they are."""
    path = Path(word).expanduser()
    return str(path.absolute()) if word and path.exists() else word


def transfer(
    set_: str | Path,
    to: Iterable[str],
    source: Source | None = None,
    overrides: Iterable[str] = (),
    *,
    random: bool = False,
    full: bool = False,
    progress: Progress | None = None,
) -> Transferred:
    """Train students with other towers on a set and write the matrix: with its learned rates and with rates by val.

    `to` are towers as `target` takes them; `source` gives protocol and data as in `rmdd.compare`; `random` and `full`
    add random pairs and all pairs for every tower.

    >>> rmdd.transfer("runs/demo-0123abcd", ["resnet18@random", "text:hashing"])  # doctest: +SKIP

    Raises `ConfigError` with all that cannot be had, before anything starts.
    """
    return begin(str(set_), list(to), source, list(overrides), random=random, full=full).go(progress)


def begin(
    word: str,
    to: Sequence[str],
    source: Source | None,
    overrides: list[str],
    *,
    random: bool = False,
    full: bool = False,
    load: Load = config.load,
) -> Transfer:
    """A transfer, checked. Raises `ConfigError` with all that is wrong."""
    (entry,) = open_entries([word])
    if entry.distilled is None:
        raise config.ConfigError([f"{word} is no distilled set; give the folder of one, or of its run"], "transfer")
    run = planned(protocol_of([entry], source, overrides, load), "transfer")
    wrong = unbuildable(run) or misfits(entry, run.model, run.data.image_size, reencode=False)
    wrong += [] if to else ["no tower to go to; give --to TOWER, such as --to resnet18"]
    targets: list[config.Run] = []
    for name in to:
        try:
            there = target(run, name)
        except ValueError as error:
            message = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
            wrong.append(f"--to {name}: {message.removeprefix('Value error, ')}")
            continue
        own_image = there.model.model_copy(update={"image": run.model.image})  # another image tower is no misfit here
        unfit = unbuildable(there) or misfits(entry, own_image, run.data.image_size, reencode=True)
        wrong += [f"--to {name}: {mistake}" for mistake in unfit]
        if there.model == run.model:
            wrong.append(f"--to {name}: these are the towers that the set was made for, which stand there anyway")
        elif there.model in [t.model for t in targets]:
            wrong.append(f"--to {name}: is there twice")
        targets.append(there)
    if wrong:
        raise config.ConfigError(wrong, "transfer")
    return Transfer(entry, run, tuple(to), tuple(targets), random, full)
