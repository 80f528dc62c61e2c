"""`rmdd coreset`: select real pairs of a run's training split and write them as a subset folder."""

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rmdd import config
from rmdd.config.runfile import validate
from rmdd.core.files import atomic_path, read_json, write_json
from rmdd.core.locks import hold_folder
from rmdd.core.progress import Progress
from rmdd.coresets import clusters, greedy, matched
from rmdd.coresets.choice import AT_ONCE, Choice
from rmdd.coresets.cost import ByteCosts, parameters
from rmdd.coresets.draws import permuted, smallest
from rmdd.coresets.forgetting import ForgettingCounts
from rmdd.coresets.rows import Rows
from rmdd.coresets.shard import Best, Shard
from rmdd.coresets.spaces import Items, Sides, cosines
from rmdd.coresets.subset import DESCRIPTION, PREVIEW, Coreset
from rmdd.execution.parts import WorkerParts, with_restarts
from rmdd.experts.store import Store
from rmdd.generate.encoders import features
from rmdd.models.prepared import PreparedSplit
from rmdd.pipeline import Pipeline, open_pipeline

SHARE_FROM_BYTES = 256 * 2**20
"""Features of at least this size in bytes are divided among several workers."""
SAVE_EVERY = 200
"""Number of greedy picks between two saves of the picks."""
PREVIEWED = 64
"""Largest number of chosen images in the preview."""


def coreset(
    source: config.Source,
    overrides: Iterable[str] = (),
    *,
    progress: "Progress | None" = None,
    ranks: int | None = None,
    **choice: Any,
) -> Coreset:
    """Select real pairs of a run's training split; `choice` holds fields of `rmdd.coresets.choice.Choice`.

    >>> rmdd.coreset("demo", method="herding", pairs=100)  # doctest: +SKIP

    `rmdd.load_config` explains `source` and `overrides`. `ranks` is the number of workers among which the features are
    divided. Raises `ConfigError` that lists all mistakes.
    """
    checked = choice_of(choice)
    with open_pipeline(checked.prepared(config.load(source, overrides)), progress) as pipeline:
        return choose(pipeline, checked, ranks)[0]


def choice_of(fields: dict[str, Any]) -> Choice:
    """Return the checked settings of a coreset. Raises `ConfigError` that lists all mistakes in `fields`."""
    method = str(fields.get("method", "herding")).replace("-", "_")
    checked, mistakes = validate(Choice, {**fields, "method": method})
    if checked is None or mistakes:
        raise config.ConfigError(mistakes, "coreset")
    return checked


def choose(pipeline: "Pipeline", choice: Choice, ranks: int | None = None) -> tuple[Coreset, Path]:
    """Select a subset or read the existing one; return it and its folder `<storage>/coresets/<run>-<method>-<hash>`.

    `ranks` is the number of workers among which the features are divided (None: one worker, or all workers of the run
    if the features are large). If a worker dies, all are started again and resume from the stored picks.
    """
    if choice.method == "forgetting" or (choice.needs_features and choice.encoder.startswith("expert")):
        pipeline.experts()
    train = pipeline.embedded("train")

    def select() -> tuple[Coreset, Path]:
        return Selection(pipeline, choice, train).result(ranks)

    return with_restarts(select, pipeline.run.runtime.max_restarts, pipeline.progress.say)


@dataclass
class Picks:
    """Ids and scores of the items picked so far by a greedy method; a larger coreset continues from the saved file."""

    path: Path
    ids: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> "Picks":
        stored = read_json(path) if path.is_file() else {"ids": [], "values": []}
        return cls(path, stored["ids"], [math.inf if v is None else v for v in stored["values"]])

    def follow(self, next_picks: Callable[[Sequence[int]], Iterator[Best]]) -> Iterator[tuple[int, float]]:
        """Yield the stored picks, then those of `next_picks(ids)`, which continues the greedy method after `ids`."""
        stored = len(self.ids)
        yield from list(zip(self.ids, self.values, strict=True))
        try:
            for best in next_picks(list(self.ids)):
                self.ids.append(best.id)
                self.values.append(best.value)
                if len(self.ids) % SAVE_EVERY == 0:
                    self.save()
                yield best.id, best.value
        finally:
            if len(self.ids) > stored:
                self.save()

    def save(self) -> None:
        finite = [v if math.isfinite(v) else None for v in self.values]
        write_json(self.path, {"ids": self.ids, "values": finite})


class Selection:
    """The selection of one coreset: features, picked items (images or caption records), and the subset folder."""

    def __init__(self, pipeline: "Pipeline", choice: Choice, train: PreparedSplit):
        self.pipeline, self.choice, self.train, self.run = pipeline, choice, train, pipeline.run
        self.seed = self.run.seed if choice.seed is None else choice.seed
        self.items = Items.of(train.split, choice.unit, self.seed)
        self.facts: dict[str, Any] = {}
        self.sides: Sides | None = None
        self.key = ""
        """Hash of all settings that change which items are picked, except the number of picks."""
        self.values: list[float] = []
        """Score of each greedy pick at the time it was picked, in order of picking."""
        self._mean: np.ndarray | None = None

    def result(self, ranks: int | None) -> tuple[Coreset, Path]:
        began = time.perf_counter()
        choice, item, run = self.choice, self.pipeline.item(), self.run
        feature_facts: dict[str, Any] = {}
        rows: Rows | None = None
        folder = Path()
        if choice.needs_features:
            rows, feature_facts, self.sides, folder = features(
                item.feature_source, self.train, self.items, choice, self.pipeline.backend.encoders
            )
        data = self.train.split.dataset.hash
        store = {"store": item.paths.store.name} if choice.method == "forgetting" else {}
        inputs = {"data": data, "captions": run.data.captions.model_dump(), "method": choice.method, "seed": self.seed}
        inputs |= {"unit": choice.unit, "options": choice.options(), "features": feature_facts, **store}
        self.key = config.hash_value(inputs)
        size = {"pairs": choice.pairs, "bytes": choice.bytes}
        name = f"{run.name}-{choice.method}-{config.hash_value(inputs | size)[:8]}"
        target = self.pipeline.storage.root / "coresets" / name
        self.pipeline.storage.fetch(target)
        if (target / DESCRIPTION).is_file():
            return Coreset.load(target), target
        with hold_folder(target, wait=True):
            if rows is None:
                chosen = self.picks(None)
            else:
                workers = ranks or (None if 4 * len(rows) * rows.width >= SHARE_FROM_BYTES else 1)
                with self.pipeline.backend.open_parts(functools.partial(open_shard, folder), workers) as parts:
                    chosen = self.picks(parts)
            records = self.items.record_of[chosen].tolist()
            self.facts |= self.cost(records) | {"seconds": round(time.perf_counter() - began, 3)}
            options = choice.options()
            named = self.pair_names(records)
            subset = Coreset(choice.method, options, self.seed, choice.unit, data, feature_facts, named, self.facts)
            self.preview(chosen, target / PREVIEW)
            subset.save(target)
        return subset, target

    def pair_names(self, records: Sequence[int]) -> tuple[tuple[str, int], ...]:
        """Return the pair id and the caption number of each caption record."""
        split = self.train.split
        images = split.image_of[list(records)]
        first = np.searchsorted(split.image_of, images)
        return tuple(
            (split.pair_ids[image], record - begin)
            for image, record, begin in zip(images.tolist(), records, first.tolist(), strict=True)
        )

    @functools.cached_property
    def costs(self) -> ByteCosts:
        return ByteCosts.of(self.train.split, self.pipeline.item().paths.cache)

    def cost(self, records: Sequence[int]) -> dict[str, Any]:
        """Return how many pairs, images, parameters and bytes `records` have, and how many items can be chosen."""
        images = len(set(self.train.split.image_of[list(records)].tolist())) if records else 0
        numbers = parameters(len(records), self.run.data.image_size, self.train.texts.shape[1])
        return {
            "pairs": len(records),
            "images": images,
            "parameters": numbers,
            "bytes": self.costs.bytes_of(records),
            "items": len(self.items),
        }

    def preview(self, chosen: Sequence[int], path: Path) -> None:
        """Write a PNG file that shows the first chosen images in a square grid."""
        from PIL import Image

        shown = self.items.image_of[list(chosen[:PREVIEWED])]
        if not len(shown):
            return
        index, position = np.unique(shown, return_inverse=True)
        images = np.asarray(self.train.split.some_images(index))[position].transpose(0, 2, 3, 1)
        side = math.ceil(math.sqrt(len(images)))
        edge = images.shape[1]
        sheet = Image.new("RGB", (side * edge, -(-len(images) // side) * edge), "white")
        for i, image in enumerate(images):
            sheet.paste(Image.fromarray(np.ascontiguousarray(image)), (i % side * edge, i // side * edge))
        with atomic_path(path) as temporary:
            sheet.save(temporary, "PNG")

    # -- picks ---------------------------------------------------------------------------------------------------

    def picks(self, ranks: WorkerParts | None) -> list[int]:
        """Return the ids of the chosen items in the order in which they were chosen."""
        choice, ids = self.choice, np.arange(len(self.items))
        if ranks:
            greedy.checked(ranks)
        if ranks and choice.guard != "none":
            dropped = self.outliers(ranks, ids)
            ranks.call("drop", dropped)
            ids = np.setdiff1d(ids, dropped)
            self.facts["guard"] = {"kind": choice.guard, "share": choice.guard_share, "dropped": len(dropped)}
        if ranks and choice.clusters and choice.method == "forgetting":  # quotas must not count excluded records
            excluded = np.setdiff1d(ids, self.ranking)
            ranks.call("drop", excluded)
            ids = np.setdiff1d(ids, excluded)
        if (choice.pairs or 0) > len(ids):
            filters = ["guard"] if "guard" in self.facts else []
            filters += ["never_learned: exclude"] if choice.never_learned == "exclude" else []
            after = f" (after {' and '.join(filters)}, of {len(self.items)})" if filters else ""
            raise ValueError(
                f"cannot select {choice.pairs} pairs: there are only {len(ids)} {choice.unit}s{after}; ask for fewer"
            )
        if choice.clusters or choice.method in AT_ONCE:
            assert ranks is not None
            picks = self.choose_jointly(ranks, len(ids))
        else:
            with closing(self.order(ranks, ids)) as order:  # type: ignore[type-var]
                picks = self.take(order)
                if choice.method == "k_center" and picks:
                    self.facts["radius"] = self.radius(order, len(picks))
        if ranks and picks:
            chosen_mean = greedy.rows_of(ranks, picks).astype(np.float64).mean(axis=0)
            self.facts["mean_error"] = float(np.linalg.norm(self.mean(ranks) - chosen_mean))
        return picks

    def mean(self, ranks: WorkerParts) -> np.ndarray:
        """Return the mean feature of all items that can be chosen."""
        if self._mean is None:
            self._mean = greedy.mean(ranks, greedy.checked(ranks).largest)
        return self._mean

    def radius(self, order: Iterator[int], picks: int) -> float:
        """Return the covering radius of the first `picks` picks: the largest distance of an item to the nearest."""
        if len(self.values) <= picks:
            next(order, None)
        return math.sqrt(self.values[picks]) if len(self.values) > picks else 0.0

    def take(self, order: Iterator[int]) -> list[int]:
        """Take items from `order` up to the requested pairs or bytes. Raises `ValueError` if `order` is too short."""
        choice = self.choice
        if choice.bytes is not None:
            record_of = self.items.record_of
            item_of = {}

            def records() -> Iterator[int]:
                for item in order:
                    item_of[int(record_of[item])] = item
                    yield int(record_of[item])

            return [item_of[record] for record in self.costs.within(records(), choice.bytes)]
        picks = list(itertools.islice(order, choice.pairs))
        if len(picks) < (choice.pairs or 0):
            raise ValueError(
                f"cannot select {choice.pairs} pairs: {choice.method} gives only {len(picks)} of {len(self.items)}; "
                "ask for fewer pairs, or set never_learned: last, which adds the pairs that were never learned"
            )
        return picks

    def choose_jointly(self, ranks: WorkerParts, available: int) -> list[int]:
        """Select items with a method whose choice depends on the number of items, such as medoids.

        If a size in bytes is requested, select the largest number of items that fits.
        """
        choice = self.choice

        def of(k: int) -> tuple[list[int], dict[str, Any]]:
            if choice.method == "medoids":
                return clusters.medoids(ranks, k, self.seed), {}
            if choice.method == "matched":
                assert self.sides is not None
                chosen, facts = matched.matched(ranks, k, self.seed, self.sides.images.width)
                return chosen, {"matched": facts}
            count = min(choice.clusters, available)
            method = functools.partial(self.order, stored=False)
            chosen = clusters.balanced(
                ranks, k, count, choice.quota, self.seed, lambda part: method(part, np.concatenate(part.call("ids")))
            )
            return chosen, {}

        best, facts = of(choice.pairs or 0) if choice.bytes is None else self.largest(ranks, of, available)
        self.facts |= facts
        return best

    def largest(
        self, ranks: WorkerParts, of: Callable[[int], tuple[list[int], dict[str, Any]]], available: int
    ) -> tuple[list[int], dict[str, Any]]:
        """Return the largest selection that fits in the requested bytes; `of(k)` selects k items."""
        limit = self.choice.bytes or 0
        total = self.costs.bytes_of(self.items.record_of.tolist())["total"]
        k = min(available, max(1, limit * len(self.items) // total))
        best: tuple[list[int], dict[str, Any]] = [], {}
        fits, over = 0, available + 1
        while over - fits > 1:
            ranks.call("release")
            picks = of(k)
            used = self.costs.bytes_of(self.items.record_of[picks[0]].tolist())["total"]
            fits, over, best = (k, over, picks) if used <= limit else (fits, k, best)
            k = min(max(k * limit // used, fits + 1), over - 1)
        return best

    def outliers(self, ranks: WorkerParts, ids: np.ndarray) -> np.ndarray:
        """Return the ids of the outliers that the option `guard` drops before the selection."""
        choice = self.choice
        if choice.guard == "centroids":
            return clusters.outliers(ranks, choice.guard_share, self.seed)
        assert self.sides is not None
        return clusters.worst(ids, cosines(self.sides, self.items, choice.caption), choice.guard_share)

    def order(self, ranks: WorkerParts | None, ids: np.ndarray, stored: bool = True) -> Iterator[int]:
        """Yield items of `ids` in the order of the selection method; if `stored`, greedy picks are kept in a file."""
        choice = self.choice
        if choice.method == "random":
            draw = permuted(ids, self.seed) if choice.draw == "permutation" else smallest(ids, None, self.seed)
            yield from draw.tolist()
        elif choice.method in ("forgetting", "clip_score"):
            allowed = set(ids.tolist())
            yield from (item for item in self.ranking if item in allowed)
        else:
            assert ranks is not None
            yield from self.greedy_order(ranks, stored)

    def greedy_order(self, ranks: WorkerParts, stored: bool) -> Iterator[int]:
        """Yield the picks of herding or k-center; if `stored`, first those saved by an earlier selection."""
        mu = self.mean(ranks) if stored else greedy.mean(ranks, greedy.checked(ranks).largest)

        def next_picks(picked: Sequence[int]) -> Iterator[Best]:
            if self.choice.method == "herding":
                return greedy.herding(ranks, mu, picked)
            return greedy.k_center(ranks, greedy.start_of(ranks, self.choice.start, self.seed, mu), picked)

        if not stored:
            yield from (best.id for best in next_picks([]))
            return
        path = self.pipeline.item().paths.cache / f"picks-{self.key}.json"
        with hold_folder(path, wait=True), closing(Picks.open(path).follow(next_picks)) as picks:  # type: ignore[type-var]
            for item, value in picks:
                self.values.append(value)
                yield item

    @functools.cached_property
    def ranking(self) -> list[int]:
        """The ids of all items, best first, for methods that score each item independently (clip-score, forgetting)."""
        choice = self.choice
        if choice.method == "clip_score":
            assert self.sides is not None
            score = cosines(self.sides, self.items, choice.caption)
            ranking: list[int] = np.lexsort((np.arange(len(score)), -score)).tolist()
            return ranking
        folder = Store.open(self.pipeline.item().paths.store).folder(choice.expert)
        self.pipeline.storage.fetch(folder)
        counts = ForgettingCounts.load(folder)
        self.facts |= counts.summary()
        records = counts.ranking(choice.never_learned)
        if choice.unit == "record":
            ranking = records.tolist()
            return ranking
        images = self.train.split.image_of[records]
        _, first = np.unique(images, return_index=True)
        first = np.sort(first)
        self.items.record_of[images[first]] = records[first]
        ranking = images[first].tolist()
        return ranking


def open_shard(folder: Path, rank: int, size: int) -> Shard:
    return Shard(Rows.open(folder).share(rank, size))
