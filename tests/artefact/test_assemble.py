"""Check the distilled set that `assemble` makes of a run whose phase files are written by the test."""

import numpy as np
import pytest
import torch

from rmdd import config
from rmdd.artefact.assemble import assemble, nearest, portable
from rmdd.artefact.distilled import DistilledSet
from rmdd.core.files import write_json
from rmdd.data.ingest import ingest
from rmdd.data.shards import Dataset
from rmdd.distill import phases
from rmdd.distill.sets import save_set
from rmdd.distill.starts import choose_records
from rmdd.models.prepared import prepare_split
from rmdd.runs.paths import RunPaths

RUN = {
    "name": "tiny",
    "seed": 3,
    "data": {"source": "scenes", "scenes": {"train": 10, "val": 2, "test": 2, "size": 16}, "image_size": 16},
    "model": {"image": {"name": "convnet", "weights": "random"}, "text": {"name": "hashing", "width": 32}},
    "distill": {"budget": 20, "batch": 2, "phases": [{"pairs": 4, "iterations": 6}, {"pairs": 3, "iterations": 4}]},
}
EVALUATION = {"table": {"ptm_st": {"val": {"R@mean": {"mean": 1.5, "std": 0.5, "n": 5}}}}}


def finished(tmp_path, **distill):
    run = config.load(RUN | {"distill": RUN["distill"] | distill})
    dataset = ingest(run.data, tmp_path / "data")
    places = RunPaths(
        data=dataset.path,
        cache=tmp_path / "cache",
        store=tmp_path / "experts" / "eee",
        phases=tmp_path / "phases" / "ppp",
        baseline=tmp_path / "baselines",
        run=tmp_path / "run",
    )
    train = prepare_split(run.data, run.model, Dataset.open(dataset.path), "train", places.cache)
    chosen = []
    for p, plan in enumerate(run.distill.phases):
        records = choose_records(p, plan.pairs, train, run.seed_of("distill"))
        write_json(places.phase(p) / "records.json", records)
        save_set(phases.initial(run, p, train, records), places.set(p, plan.iterations))
        chosen.append(records)
    sets = [places.set(0, 6), places.set(1, 4)]
    assembled = assemble(
        run, train, sets, experts="eee", iterations=(6, 4), metrics=EVALUATION["table"], version="1.2.3"
    )
    return run, assembled, train, chosen


def test_an_unmoved_set_is_nearest_to_what_it_started_from(tmp_path):
    _, distilled, train, chosen = finished(tmp_path)
    assert [s.pairs for s in distilled.subsets] == [4, 3]
    for subset, records in zip(distilled.subsets, chosen, strict=True):
        assert list(subset.captions_before) == [train.split.captions[r] for r in records]
        assert list(subset.captions) == list(subset.captions_before)
        assert list(subset.source_ids) == [train.split.pair_ids[train.split.image_of[r]] for r in records]
    assert (distilled.mean, distilled.std) == (train.mean, train.std)
    assert distilled.metrics == EVALUATION["table"]


def test_the_set_records_its_origin_but_no_local_paths(tmp_path):
    run, distilled, train, _ = finished(tmp_path)
    origin = distilled.provenance
    assert origin["data"]["hash"] == train.split.dataset.hash
    assert origin["rmdd"] == "1.2.3"
    assert origin["data"]["counts"]["train"]["pairs"] == 10
    assert (origin["experts"], origin["phases"], origin["iterations"]) == ("eee", "ppp", [6, 4])
    assert origin["seeds"] == {"experts": 3, "distill": 3, "evaluate": 3}
    assert "runtime" not in distilled.config and "root" not in distilled.config["data"]
    assert config.load(distilled.config).hash_of() == run.hash_of()
    saved = distilled.save(tmp_path / "set")
    assert str(tmp_path) not in (saved / "set.json").read_text()
    assert DistilledSet.load(saved).provenance == origin


def test_a_start_from_noise_has_no_source(tmp_path):
    _, distilled, train, _ = finished(tmp_path, init="noise")
    subset = distilled.subsets[0]
    assert set(subset.source_ids) == {""} and not subset.captions_before
    assert set(subset.captions) <= set(train.split.captions)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_nearest_by_chunks_equals_a_double_loop(chunk):
    random = np.random.default_rng(0)
    captions, queries = (random.standard_normal((n, 5)).astype("float32") for n in (11, 7))
    captions[8] = captions[2]
    queries[0] = 3 * captions[8]

    def cosine(a, b):
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    want = [max(range(11), key=lambda j: round(cosine(q, captions[j]), 5)) for q in queries]
    assert nearest(torch.tensor(queries), captions, chunk=chunk).tolist() == want
    assert want[0] == 2


def test_portable_leaves_the_run_alone():
    run = config.load({"data": {"source": "table", "root": "/secret"}, "runtime": {"storage": "/elsewhere"}})
    assert "secret" not in str(portable(run)) and "elsewhere" not in str(portable(run))
    assert run.data.root == "/secret"
