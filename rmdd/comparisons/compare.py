"""`rmdd compare`: sets, subsets, random pairs and full data under one protocol, in one table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.comparisons import published, results, tables
from rmdd.comparisons.engine import FOLDER, ComparedRun, Row, score
from rmdd.comparisons.entries import Entry, made_by, misfits, open_entries, planned
from rmdd.comparisons.tables import ResultTable
from rmdd.core.files import write_json
from rmdd.core.progress import Progress
from rmdd.core.storage import root_of
from rmdd.execution.backend import hold_folders, open_backend
from rmdd.models.image import weights_file
from rmdd.models.text import text_width
from rmdd.runs import cost as estimate

SCHEMA_VERSION = 1
BEGUN, RESULTS = "comparison.json", "results.json"
Source = str | Path | Mapping[str, Any] | config.Run
Load = Callable[[str | Mapping[str, Any], list[str]], config.Run]
SPREAD = "mean ± sample standard deviation over students"


@dataclass(frozen=True)
class Compared:
    """What a comparison leaves: its folder with `table.md`, `table.csv`, `table.html` and `results.json`, its rows as
    plain values, and the published ones that stand below them."""

    folder: Path
    rows: list[dict[str, Any]]
    published: list[dict[str, Any]]
    tables: tuple[ResultTable, ...]

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "error" in row]


@dataclass(frozen=True)
class Comparison:
    """What is compared, checked as far as that needs no data."""

    entries: tuple[Entry, ...]
    run: config.Run
    against: str
    reencode: bool = False

    @property
    def folder(self) -> Path:
        """Named by all that the table says."""
        entries = [[e.name, e.kind, e.value, e.pairs] for e in self.entries]
        value = config.hash_value([entries, self.run.hash_of(), self.against, self.reencode])[:8]
        return root_of(self.run.runtime) / FOLDER / f"{self.run.name}-{value}"

    def begin(self) -> Path:
        """Keep what it is, so that it can be resumed by its folder; returns the folder."""
        plain = {
            "verb": "compare",
            "words": worded(self.entries),
            "run": self.run.model_dump(mode="json"),
            "against": self.against,
            "reencode": self.reencode,
        }
        write_json(self.folder / BEGUN, {"schema_version": SCHEMA_VERSION} | plain)
        return self.folder

    def go(self, progress: Progress | None = None) -> Compared:
        """Train what is missing and write the tables. Going on after an interruption is calling it again."""
        progress = progress or Progress()
        runtime, folder = self.run.runtime, self.folder
        with hold_folders(runtime, folder), open_backend(runtime, folder / "events.jsonl", progress) as backend:
            self.begin()
            compared = ComparedRun(self.run, backend, progress, folder / "protocol")
            if wrong := compared.check(self.entries):
                raise config.ConfigError(wrong, "comparison")
            compared.embed()
            rows = [compared.row(entry.name, entry) for entry in self.entries]
            return self._written(rows, list(zip(rows, score(rows, backend, progress), strict=True)))

    def _written(self, rows: Sequence[Row], scored: list[tuple[Row, Any]]) -> Compared:
        plain = [results.plain(row, s) for row, s in scored]
        results.of_full(plain)
        base = next(k for k, row in enumerate(rows) if row.name == self.against)
        for k, row in enumerate(plain):
            if k != base:
                row["difference"] = results.against((row, scored[k][1]), (plain[base], scored[base][1]))
        beside = published.beside(self.run.data.layout, self.run.distill.budget)
        title = f"comparison: {self.run.name}"
        shown = (
            table(protocol_words(self.run.model, self.run.data.image_size, self.run.evaluate), plain, self.against),
            *_published(self.run.data.layout, self.run.distill.budget, beside),
        )
        tables.write(self.folder, title, shown, [*map(tables.flat, plain), *map(published.flat, beside)])
        facts = {"schema_version": SCHEMA_VERSION, "protocol": self.run.hash_of(), "against": self.against}
        write_json(self.folder / RESULTS, facts | {"rows": plain, "published": beside})
        return Compared(self.folder, plain, beside, shown)


def table(protocol: str, rows: Sequence[dict[str, Any]], against: str) -> ResultTable:
    """The rows as people read them; `protocol` says in words how students were trained."""
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
        held = [tables.count(row["costs"].get(c)) for c in costs]
        cells.append([row["name"], row["method"], rate(row), *tables.recalls(row), *(shown[n] for n in extra), *held])
    return ResultTable(f"measured: {protocol}", columns, cells, [*reading(extra), *tables.remarks(rows)])


def rate(row: Mapping[str, Any]) -> str:
    """Where the rates came from; those chosen on val with the loss of real pairs."""
    if "chosen" not in row:
        recipe = config.Distill.model_construct(method=row["method"]).recipe
        return "as set" if row["rates"] == "learned" and recipe and not recipe.learns_rates else row["rates"]
    loss = "" if row["kind"] == "set" else f"{row['chosen']['loss']}, "
    return f"by val: {loss}{row['chosen']['lr']:g}"


def reading(extra: Sequence[str]) -> list[str]:
    """How to read the columns."""
    notes = [
        f"Recall in %, {SPREAD}. Students are paired: the same number begins alike in every row. The columns IR and TR "
        "are on test, read once per student after its last pass; every choice was made on val.",
        "Random pairs are drawn anew for every student and full data has experts for students, so their spread is over "
        "draws and experts. Rates (and the loss) of real pairs are chosen on val; a distilled set brings its own.",
    ]
    notes.append(
        "Pairs are counted as students see them, those of all data as images. Bytes of real pairs are images as they "
        "lie in the shards and captions in UTF-8 (of random pairs the mean over draws), those of a set its tensors."
    )
    if "interval" in extra:
        notes.append("Intervals are at 95 %, by resampling test images with all of their captions.")
    if "of_full" in extra:
        notes.append("`of full data` is the ratio of mean test R@mean to that of the row of all pairs.")
    return notes


def protocol_words(model: config.Model, image_size: int, rule: config.Evaluate) -> str:
    """The protocol in one line."""
    return (
        f"{model.image.name} + {model.text.name}, {image_size} pixels; {rule.students} students, "
        f"{rule.epochs} passes per subset, batch {rule.batch}"
    )


def _published(layout: str | None, budget: int, beside: Sequence[dict[str, Any]]) -> list[ResultTable]:
    if not beside:
        return []
    name = published.LAYOUTS[str(layout)]
    return [published.table(f"published, not measured here: {name}, {budget} pairs and full data", beside)]


def worded(entries: Iterable[Entry]) -> list[str]:
    """The entries as words that open them again, from any folder."""
    return [e.address if e.kind in ("random", "full") else f"{e.name}={e.address}" for e in entries]


def compare(
    words: Iterable[str | Path],
    source: Source | None = None,
    overrides: Iterable[str] = (),
    *,
    against: str | None = None,
    reencode: bool = False,
    progress: Progress | None = None,
) -> Compared:
    """Evaluate distilled sets, subsets, `random`, `random:N` and `full` under one protocol and write one table.

    A set is the folder of one, or of a run that has one, or a file of bare tensors; a subset is a folder with
    `subset.json`. `source` gives the protocol and the data, as `config.load` takes it; without it they are those that
    the first set was made by. `against` names the row that others are compared with (default: `random`, else the
    first one); `reencode` embeds captions of sets with another text encoder anew.

    >>> rmdd.compare(["runs/demo-0123abcd", "random", "full"])  # doctest: +SKIP

    What is there is used, so adding a set trains only its students. Raises `ConfigError` for what cannot be compared.
    """
    return begin([str(w) for w in words], source, list(overrides), against, reencode).go(progress)


def begin(
    words: Sequence[str],
    source: Source | None,
    overrides: list[str],
    against: str | None = None,
    reencode: bool = False,
    load: Load = config.load,
) -> Comparison:
    """A comparison, checked. Raises `ConfigError` with all that is wrong."""
    entries = open_entries(words)
    run = protocol_of(entries, source, overrides, load)
    wrong = unbuildable(run) or [
        mistake for entry in entries for mistake in misfits(entry, run.model, run.data.image_size, reencode)
    ]
    names = [e.name for e in entries]
    if against is not None and against not in names:
        wrong.append(f"--against {against}: there is no such row; there are {', '.join(names)}")
    if wrong:
        raise config.ConfigError(wrong, "comparison")
    usual = next((e.name for e in entries if e.kind == "random"), names[0])
    return Comparison(tuple(entries), run, against or usual, reencode)


def protocol_of(
    entries: Sequence[Entry],
    source: Source | None,
    overrides: list[str],
    load: Load,
) -> config.Run:
    """The run whose data and evaluation hold for all rows; a comparison asks no probes. Raises `ConfigError`."""
    run = _protocol_of(entries, source, overrides, load)
    return run.model_copy(update={"evaluate": run.evaluate.model_copy(update={"probes": {}})})


def _protocol_of(entries: Sequence[Entry], source: Source | None, overrides: list[str], load: Load) -> config.Run:
    if isinstance(source, config.Run):
        source = source.model_dump(mode="json")
    if source is not None:
        run = load(source if isinstance(source, Mapping) else str(source), overrides)
        return planned(run, str(source) if not isinstance(source, Mapping) else "comparison")
    for entry in entries:
        if (raw := made_by(entry)) is not None:
            return load(raw, overrides)
    mistake = "none of these says by which run it was made, so the protocol is open; give --config CONFIG"
    raise config.ConfigError([mistake], "comparison")


def unbuildable(run: config.Run) -> list[str]:
    """Why the towers of `run` cannot be had."""
    try:
        tower = run.model.image
        if tower.weights != "pretrained" and not tower.is_random:
            weights_file(tower)
        estimate.model_on_meta(run, text_width(run.model.text))
    except (ValueError, ArithmeticError) as error:  # some of timm's divide by a size that has come to nothing
        return [f"image tower '{run.model.image.name}': {error}" if isinstance(error, ArithmeticError) else str(error)]
    return []
