"""`rmdd compare`: evaluate distilled sets, subsets, random pairs and full data under one protocol, in one table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.comparisons import published, results, tables
from rmdd.comparisons.engine import FOLDER, ComparedRun, Row, ScoredRow, score
from rmdd.comparisons.entries import Entry, misfits, open_entries, source_run, with_planned_phases
from rmdd.comparisons.tables import ResultTable
from rmdd.config import recipes
from rmdd.core.files import write_json
from rmdd.core.progress import Progress
from rmdd.core.storage import root_of
from rmdd.execution.backend import hold_folders, open_backend
from rmdd.models.image import weights_file
from rmdd.models.text import text_width
from rmdd.runs import cost as estimate

SCHEMA_VERSION = 1
DESCRIPTION, RESULTS = "comparison.json", "results.json"
Load = Callable[[config.Source, list[str]], config.Run]
SPREAD = "mean ± sample standard deviation over students"


@dataclass(frozen=True, repr=False)
class ComparisonResult:
    """The result of a comparison: its folder, its rows, and published results of the same size."""

    folder: Path
    """Folder that holds `table.md`, `table.csv`, `table.html` and `results.json`."""
    rows: list[dict[str, Any]]
    """One row of scores per compared set, subset or baseline, as JSON values."""
    published: list[dict[str, Any]]
    """Results printed in papers for the same dataset and number of pairs."""
    tables: tuple[ResultTable, ...]

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "error" in row]

    def __repr__(self) -> str:
        return f"ComparisonResult({self.folder}: {', '.join(row['name'] for row in self.rows)})"


@dataclass(frozen=True)
class Comparison:
    """A comparison whose entries and options passed all checks that need no data."""

    entries: tuple[Entry, ...]
    run: config.Run
    """Run whose student protocol and data are used for all rows of the table."""
    against: str
    """Name of the row with which all other rows are compared."""
    reencode: bool = False
    """Whether to accept sets of a different text encoder, by embedding their captions again with the run's encoder."""

    @property
    def folder(self) -> Path:
        """The folder of this comparison; its name ends in a hash of the entries, the run and the options."""
        entries = [[e.name, e.kind, e.value, e.pairs] for e in self.entries]
        value = config.hash_value([entries, self.run.hash_of(), self.against, self.reencode])[:8]
        return root_of(self.run.runtime) / FOLDER / f"{self.run.name}-{value}"

    def write_description(self) -> Path:
        """Write `comparison.json`, so that the comparison can be resumed from its folder; return the folder."""
        description = {
            "verb": "compare",
            "words": words_of(self.entries),
            "run": self.run.model_dump(mode="json"),
            "against": self.against,
            "reencode": self.reencode,
        }
        write_json(self.folder / DESCRIPTION, {"schema_version": SCHEMA_VERSION} | description)
        return self.folder

    def execute(self, progress: Progress | None = None) -> ComparisonResult:
        """Train the missing students and write the tables. After an interruption, call it again to resume."""
        progress = progress or Progress()
        runtime, folder = self.run.runtime, self.folder
        with hold_folders(runtime, folder), open_backend(runtime, folder / "events.jsonl", progress) as backend:
            self.write_description()
            pipeline = ComparedRun(self.run, backend, progress, folder / "protocol")
            if wrong := pipeline.check(self.entries):
                raise config.ConfigError(wrong, "comparison")
            pipeline.embed()
            rows = [pipeline.row(entry.name, entry) for entry in self.entries]
            return self._write_results(rows, score(rows, backend, progress))

    def _write_results(self, rows: Sequence[Row], scored: Sequence[ScoredRow]) -> ComparisonResult:
        values = [results.row_values(row, s) for row, s in zip(rows, scored, strict=True)]
        results.add_ratio_to_full(values)
        base = next(k for k, row in enumerate(rows) if row.name == self.against)
        for k, row in enumerate(values):
            if k != base:
                row["difference"] = results.difference((row, scored[k]), (values[base], scored[base]))
        from_papers = published.for_dataset(self.run.data.layout, self.run.distill.budget)
        title = f"comparison: {self.run.name}"
        shown = (
            table(protocol_words(self.run.model, self.run.data.image_size, self.run.evaluate), values, self.against),
            *_published(self.run.data.layout, self.run.distill.budget, from_papers),
        )
        tables.write(self.folder, title, shown, [*map(tables.flat, values), *map(published.flat, from_papers)])
        facts = {"schema_version": SCHEMA_VERSION, "protocol": self.run.hash_of(), "against": self.against}
        write_json(self.folder / RESULTS, facts | {"rows": values, "published": from_papers})
        return ComparisonResult(self.folder, values, from_papers, shown)


def table(protocol: str, rows: Sequence[dict[str, Any]], against: str) -> ResultTable:
    """Return the scored rows as a table of text cells; `protocol` describes how students were trained."""
    extra = [name for name in ("interval", "difference", "of_full") if any(row.get(name) for row in rows)]
    heads = {"interval": "95 % interval", "difference": f"against {against}", "of_full": "of full data"}
    costs = ("pairs", "parameters", "bytes", "seconds")
    columns = ["trained on", "method", "rates", "val R@mean", "test R@mean", *results.RECALLS]
    columns += [*(heads[name] for name in extra), *costs]
    cells = []
    for row in rows:
        shown = {
            "interval": tables.between(row.get("interval")),
            "difference": tables.gain(row.get("difference")),
            "of_full": "" if row.get("of_full") is None else f"{row['of_full']:.0f} %",
        }
        counts = [tables.count(row["costs"].get(c)) for c in costs]
        cells.append([row["name"], row["method"], rate(row), *tables.recalls(row), *(shown[n] for n in extra), *counts])
    return ResultTable(f"measured: {protocol}", columns, cells, [*column_notes(extra), *tables.remarks(rows)])


def rate(row: Mapping[str, Any]) -> str:
    """Return a text that says whether a row's learning rates are learned, fixed, or chosen on val (with the loss)."""
    if "chosen" not in row:
        return "fixed" if row["rates"] == "learned" and not recipes.learns_rates(row["method"]) else row["rates"]
    loss = "" if row["kind"] == "set" else f"{row['chosen']['loss']}, "
    return f"by val: {loss}{row['chosen']['lr']:g}"


def column_notes(extra: Sequence[str]) -> list[str]:
    """Return the notes that explain the columns of the table."""
    notes = [
        f"Recall in %, {SPREAD}. Students are paired: students with the same number have equal initial weights in all "
        "rows. The columns IR and TR are on test, which each student reads once after its last pass. All choices use "
        "val.",
        "Each student trained on random pairs has its own draw, so the spread of these students includes draws; the "
        "students of full data are the experts. The learning rates (and the loss) of real pairs are chosen on val; a "
        "distilled set has its own learning rates.",
    ]
    notes.append(
        "Pairs are the training pairs of a student; full data counts images instead. The bytes of real pairs are those "
        "of encoded images and UTF-8 captions (for random pairs, the mean over draws); those of a set, of its tensors."
    )
    if "interval" in extra:
        notes.append("Intervals are 95 % bootstrap intervals over test images, each with all its captions.")
    if "of_full" in extra:
        notes.append("`of full data`: mean test R@mean divided by the mean test R@mean of the full-data row.")
    return notes


def protocol_words(model: config.Model, image_size: int, rule: config.Evaluate) -> str:
    """Return one line that describes the protocol: towers, image size, students, passes and batch."""
    return (
        f"{model.image.name} + {model.text.name}, {image_size} pixels; {rule.students} students, "
        f"{rule.epochs} passes per subset, batch {rule.batch}"
    )


def _published(layout: str | None, budget: int, rows: Sequence[dict[str, Any]]) -> list[ResultTable]:
    if not rows:
        return []
    name = published.LAYOUTS[str(layout)]
    return [published.table(f"published, not measured here: {name}, {budget} pairs and full data", rows)]


def words_of(entries: Iterable[Entry]) -> list[str]:
    """Return arguments of `rmdd compare` with absolute paths, so that they open the same entries from any folder."""
    return [e.address if e.kind in ("random", "full") else f"{e.name}={e.address}" for e in entries]


def compare(
    words: Iterable[str | Path],
    source: config.Source | None = None,
    overrides: Iterable[str] = (),
    *,
    against: str | None = None,
    reencode: bool = False,
    progress: Progress | None = None,
) -> ComparisonResult:
    """Evaluate distilled sets, subsets, `random`, `random:N` and `full` under one protocol and write one table.

    A set is the folder of a distilled set or of its run, or a safetensors file; a subset is a folder with
    `subset.json`. `source` gives the protocol and the data in a form that `rmdd.load_config` accepts; default: those
    of the first set's run. `against` names the row that all other rows are compared with (default: `random`, else
    the first row). `reencode` accepts sets of a different text encoder; their captions are embedded again.

    >>> rmdd.compare(["runs/demo-0123abcd", "random", "full"])  # doctest: +SKIP

    Scores of finished students are reused, so adding a set trains only its students. Raises `ConfigError` for entries
    that do not fit the protocol.
    """
    return prepare_comparison([str(w) for w in words], source, list(overrides), against, reencode).execute(progress)


def prepare_comparison(
    words: Sequence[str],
    source: config.Source | None,
    overrides: list[str],
    against: str | None = None,
    reencode: bool = False,
    load: Load = config.load,
) -> Comparison:
    """Open and check the entries of a comparison. Raises `ConfigError` that lists all mistakes."""
    entries = open_entries(words)
    run = protocol_of(entries, source, overrides, load)
    wrong = unbuildable(run) or [
        mistake for entry in entries for mistake in misfits(entry, run.model, run.data.image_size, reencode)
    ]
    names = [e.name for e in entries]
    if against is not None and against not in names:
        wrong.append(f"--against {against}: unknown row; the rows are {', '.join(names)}")
    if wrong:
        raise config.ConfigError(wrong, "comparison")
    default = next((e.name for e in entries if e.kind == "random"), names[0])
    return Comparison(tuple(entries), run, against or default, reencode)


def protocol_of(
    entries: Sequence[Entry],
    source: config.Source | None,
    overrides: list[str],
    load: Load,
) -> config.Run:
    """Return the run whose data and evaluation settings all rows use; it has no probes. Raises `ConfigError`."""
    run = _protocol_of(entries, source, overrides, load)
    return run.model_copy(update={"evaluate": run.evaluate.model_copy(update={"probes": {}})})


def _protocol_of(
    entries: Sequence[Entry], source: config.Source | None, overrides: list[str], load: Load
) -> config.Run:
    if source is not None:
        where = str(source) if isinstance(source, str | Path) else "comparison"
        return with_planned_phases(load(source, overrides), where)
    for entry in entries:
        if (raw := source_run(entry)) is not None:
            return load(raw, overrides)
    mistake = "no entry records the run that made it, so there is no protocol; give --config CONFIG"
    raise config.ConfigError([mistake], "comparison")


def unbuildable(run: config.Run) -> list[str]:
    """Return a list with the reason why a tower of `run` cannot be built; the list is empty if both towers can."""
    try:
        tower = run.model.image
        if tower.weights != "pretrained" and not tower.is_random:
            weights_file(tower)
        estimate.model_on_meta(run, text_width(run.model.text))
    except (ValueError, ArithmeticError) as error:  # timm models divide by zero if the image is too small
        return [f"image tower '{run.model.image.name}': {error}" if isinstance(error, ArithmeticError) else str(error)]
    return []
