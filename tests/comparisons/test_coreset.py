"""Tests of `rmdd coreset` and `rmdd.coreset` on a small dataset of drawn images with CLIP-like feature columns."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import rmdd
from rmdd import config
from rmdd.artefact import distilled
from rmdd.cli import app as cli
from rmdd.core.files import read_json, sha256_file, write_json
from rmdd.core.progress import Progress
from rmdd.coresets.subset import Coreset
from rmdd.data.shards import MANIFEST, Dataset
from rmdd.data.splits import load_split
from rmdd.pipeline import Pipeline
from rmdd.searches.formats import verify

TRAIN, WIDTH = 30, 6
METHODS = ("random", "herding", "k_center", "medoids", "matched", "clip_score", "forgetting")
QUIET = Progress(quiet=True)


def run_of(storage, *overrides):
    raw = {
        "name": "tiny",
        "seed": 1,
        "data": {"source": "scenes", "image_size": 16, "scenes": {"train": TRAIN, "val": 5, "test": 5, "size": 16}},
        "model": {
            "image": {"name": "convnet", "weights": "random", "widths": [4], "groups": 2, "projection": "linear"},
            "text": {"name": "hashing", "width": 16, "projection": "linear"},
            "width": 8,
        },
        "experts": {"num": 1, "epochs": 3, "batch": 16, "forgetting": 20, "lr_image": 0.5, "lr_text": 0.5},
        "distill": {"budget": 9, "batch": 4, "phases": [{"pairs": 8, "stop": 1, "endpoint": 2, "iterations": 1}]},
        "runtime": {"storage": str(storage), "ray": "off", "track": "none"},
    }
    return config.load(raw, overrides)


@pytest.fixture(scope="module")
def vectors():
    """Fixture: the random generator that draws the features of images and captions."""
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def storage(tmp_path_factory, vectors):
    """Fixture: a storage whose folder `columns` is a dataset with feature columns for images and captions."""
    folder = tmp_path_factory.mktemp("runs")
    with_columns = folder / "columns"
    from rmdd.pipeline import open_pipeline

    with open_pipeline(run_of(folder), QUIET) as pipeline:
        shutil.copytree(pipeline.ingest().path, with_columns)
    manifest = read_json(with_columns / MANIFEST)
    for shard in manifest["shards"]:
        path = with_columns / shard["file"]
        table = pq.read_table(path)
        captions = table.column("captions").to_pylist()
        image = vectors.standard_normal((len(captions), WIDTH)).astype(np.float32)
        text = [vectors.standard_normal((len(c), WIDTH)).astype(np.float32).tolist() for c in captions]
        one = pa.list_(pa.float32(), WIDTH)
        table = table.append_column("image.clip", pa.array(image.tolist(), one))
        pq.write_table(table.append_column("text.clip", pa.array(text, pa.list_(one))), path)
        shard |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_json(with_columns / MANIFEST, manifest)
    return folder


@pytest.fixture(scope="module")
def run(storage):
    return run_of(storage, "data.source=dataset", f"data.root={storage / 'columns'}")


def choose(run, method, pairs=5, **choice):
    if method != "random" or choice:
        choice = {"encoder": "columns:clip"} | choice
    return rmdd.coreset(run, method=method, pairs=pairs, progress=QUIET, **choice)


@pytest.fixture(scope="module")
def train(run):
    return load_split(Dataset.open(run.data.root), "train", run.data, run.runtime.storage)


@pytest.fixture(scope="module")
def columns(run):
    """Fixture: the image features (N, D), and for each image the text features of its captions."""
    table = pq.read_table(min(Dataset.open(run.data.root).path.glob("train-*")))
    return np.array(table.column("image.clip").to_pylist()), [
        np.array(t) for t in table.column("text.clip").to_pylist()
    ]


def distilled_set():
    """Return a distilled set of two pairs with 16 x 16 images, which takes a few kilobytes."""
    two = distilled.Subset(torch.zeros(2, 3, 16, 16), torch.zeros(2, 16), {}, 1.0, 0.1, 0.1, ["a", "b"], ["x", "y"])
    model = {"image": {"name": "convnet", "weights": "random"}, "text": {"name": "hashing"}, "temperature": 0.07}
    return distilled.DistilledSet((two,), (0.5,) * 3, (0.5,) * 3, model, "lors", "wbce", {"name": "x", "data": {}})


def normal(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_selects_distinct_training_pairs(run, train, method):
    for unit, items in (("image", TRAIN), ("record", len(train.captions))):
        subset = choose(run, method, 7, unit=unit)
        rows = subset.rows(train)
        assert len(set(rows)) == len(rows) == 7 == len(subset) and {p for p, _ in subset.records} <= set(train.pair_ids)
        if unit == "image":
            assert len({p for p, _ in subset.records}) == 7
        with pytest.raises(ValueError, match=f"cannot select {items + 1} pairs: there are only {items} {unit}s"):
            choose(run, method, items + 1, unit=unit)
    assert len(choose(run, method, 0)) == 0
    if method != "forgetting":
        assert {p for p, _ in choose(run, method, TRAIN).records} == set(train.pair_ids)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("medoids", "matched")])
def test_fewer_pairs_are_the_first_of_more_and_ranks_do_not_matter(run, method):
    few, more = choose(run, method, 4, seed=5), choose(run, method, 11, seed=5, ranks=3)
    assert few.records == more.records[:4]


def test_feature_spaces_match_their_definitions(run, columns, storage):
    image, texts = columns
    u, v = normal(image), normal(np.array([normal(t).mean(axis=0) for t in texts]))
    spaces = {
        "joint": normal(np.concatenate([u, v], axis=1)),
        "image": u,
        "text": v,
        "sum": normal(u + v),
    }
    for space, rows in spaces.items():
        subset = choose(run, "herding", 6, space=space)
        first = int((rows @ rows.mean(axis=0)).argmax())
        assert subset.features["space"] == space
        ids = {p: i for i, p in enumerate(load_split(Dataset.open(run.data.root), "train", run.data, storage).pair_ids)}
        chosen = [ids[p] for p, _ in subset.records]
        assert chosen[0] == first
        assert subset.facts["mean_error"] == pytest.approx(
            np.linalg.norm(rows.mean(0) - rows[chosen].mean(0)), abs=1e-5
        )
    half = choose(run, "herding", 6, dtype="float16")
    assert half.features["dtype"] == "float16" and half.records[0] == choose(run, "herding", 6).records[0]


def test_clip_score_selects_the_pairs_with_the_highest_cosine(run, columns, train):
    image, texts = columns
    score = np.concatenate([normal(t) @ normal(i) for i, t in zip(image, texts, strict=True)])
    assert choose(run, "clip_score", 8, unit="record").rows(train) == (-score).argsort(kind="stable")[:8].tolist()


def test_guards_drop_the_outliers(run, columns, train):
    image, texts = columns
    v = normal(np.array([normal(t).mean(axis=0) for t in texts]))
    lowest = (normal(image) * v).sum(axis=1).argsort()[: TRAIN // 5]
    subset = choose(run, "random", TRAIN - TRAIN // 5, guard="cosine", guard_share=0.2)
    assert {p for p, _ in subset.records} == set(train.pair_ids) - {train.pair_ids[i] for i in lowest}
    assert subset.facts["guard"] == {"kind": "cosine", "share": 0.2, "dropped": 6}
    assert choose(run, "k_center", 5, guard="centroids", guard_share=0.3).facts["guard"]["dropped"] == 9
    with pytest.raises(ValueError, match=r"there are only 24 images \(after guard, of 30\)"):
        choose(run, "random", 25, guard="cosine", guard_share=0.2)


@pytest.mark.parametrize("method", ["random", "herding", "k_center", "forgetting", "clip_score"])
def test_methods_can_select_within_clusters(run, method):
    subset = choose(run, method, 9, clusters=3)
    assert len({p for p, _ in subset.records}) == 9 and subset.options["quota"] == "equal"


def test_cluster_quotas_count_only_items_that_can_be_chosen(run):
    full = choose(run, "forgetting", 2, never_learned="exclude", unit="record", encoder="tower")
    never = round(full.facts["never_learned"] * full.facts["items"])
    learned = full.facts["items"] - never
    assert never > 0
    same = {"clusters": 3, "never_learned": "exclude", "unit": "record", "encoder": "tower"}
    assert len(choose(run, "forgetting", learned, **same)) == learned
    with pytest.raises(ValueError, match=rf"there are only {learned} records \(after never_learned: exclude, of"):
        choose(run, "forgetting", learned + 1, **same)


@pytest.mark.parametrize("method", ["medoids", "matched"])
def test_clustered_choices_fill_the_bytes(run, train, method):
    """The coreset is the largest one that fits in the requested bytes, even if its images are smaller than average."""
    sizes = [len(train.encoded(i)) for i in range(TRAIN)]
    for limit in (sum(sizes) // 4, sum(sizes) // 2, 2 * sum(sizes)):
        subset = choose(run, method, None, bytes=limit, seed=3)
        assert subset.facts["bytes"]["total"] <= limit
        if len(subset) < TRAIN:
            assert choose(run, method, len(subset) + 1, seed=3).facts["bytes"]["total"] > limit
    assert len(choose(run, method, None, bytes=1)) == 0


def test_matched_reports_the_overlap_of_its_clusters(run, columns):
    subset = choose(run, "matched", 6, unit="record")
    assert set(subset.facts["matched"]) == {"overlap", "empty"} and 0 < subset.facts["matched"]["overlap"] <= 1


def test_a_limit_in_bytes_is_filled_and_reported(run, train):
    for method in ("herding", "medoids"):
        subset = choose(run, method, None, bytes=6000)
        rows, used = subset.rows(train), subset.facts["bytes"]
        images = sum(len(train.encoded(int(i))) for i in {train.image_of[r] for r in rows})
        captions = sum(len(train.captions[r].encode()) for r in rows)
        assert (
            used == {"images": images, "captions": captions, "total": images + captions} and images + captions <= 6000
        )
        assert subset.facts["parameters"] == len(rows) * (3 * 16**2 + 16) and len(rows) > 1
    greedy = choose(run, "herding", None, bytes=6000)
    more = choose(run, "herding", len(greedy) + 1)
    assert more.records[:-1] == greedy.records and more.facts["bytes"]["total"] > 6000


def test_features_can_come_from_towers_and_experts(run):
    by = {encoder: choose(run, "k_center", 6, encoder=encoder) for encoder in ("tower", "expert:0")}
    assert by["tower"].records != by["expert:0"].records
    assert by["expert:0"].features["encoder"] == "expert:0" and "store" in by["expert:0"].features
    assert choose(run, "herding", 3, encoder="expert:0", space="sum", caption="seeded").facts["pairs"] == 3
    with pytest.raises(ValueError, match="image features of width 256 to text features of width 16"):
        choose(run, "herding", 3, encoder="tower", space="sum")


def test_zero_and_infinite_features_are_reported_with_their_pairs(run, train, tmp_path):
    broken = shutil.copytree(run.data.root, tmp_path / "broken")
    path = next(iter(sorted(broken.glob("train-*"))))
    table = pq.read_table(path)
    index = table.column_names.index("image.clip")
    image = np.array(table.column("image.clip").to_pylist())
    image[3] = 0
    image[4, 1] = np.nan
    pq.write_table(table.set_column(index, "image.clip", pa.array(image.tolist(), pa.list_(pa.float32(), WIDTH))), path)
    manifest = read_json(broken / MANIFEST)
    next(s for s in manifest["shards"] if s["file"] == path.name).update(bytes=path.stat().st_size)
    write_json(broken / MANIFEST, manifest)
    other = run_of(tmp_path / "runs", "data.source=dataset", f"data.root={broken}")
    named = f"2 image features are zero or not finite .first pairs: {train.pair_ids[3]}, {train.pair_ids[4]}"
    with pytest.raises(ValueError, match=named):
        choose(other, "herding")
    with pytest.raises(ValueError, match="no column 'image.dino'; its feature columns are image.clip, text.clip"):
        choose(other, "herding", encoder="columns:dino")


def test_a_stopped_selection_resumes_from_its_stored_picks(run, monkeypatch):
    monkeypatch.setattr("rmdd.comparisons.coreset.SAVE_EVERY", 3)
    full = choose(run, "k_center", 15, seed=8, encoder="tower")
    from rmdd.coresets.shard import Shard

    before, calls = Shard.farthest, []

    def dies(self, *args):
        calls.append(args)
        if len(calls) == 8:
            raise RuntimeError("stopped")
        return before(self, *args)

    monkeypatch.setattr(Shard, "farthest", dies)
    other = run_of(f"{run.runtime.storage}/other", "data.source=dataset", f"data.root={run.data.root}")
    with pytest.raises(RuntimeError, match="stopped"):
        choose(other, "k_center", 15, seed=8, encoder="tower")
    again = choose(other, "k_center", 15, seed=8, encoder="tower")
    assert again.records == full.records and again.facts["radius"] == full.facts["radius"]
    assert len(calls) - 8 < 15


def test_a_subset_is_refused_for_other_data(run, train, tmp_path):
    subset = choose(run, "random", 4)
    folder = subset.save(tmp_path / "s")
    assert Coreset.load(folder) == subset and read_json(folder / "subset.json")["schema_version"] == 1
    other = load_split(Dataset.open(run.data.root), "val", run.data, tmp_path)
    with pytest.raises(ValueError, match="4 of 4 pairs are not in split 'val'"):
        subset.rows(other)
    with pytest.raises(ValueError, match="this subset was chosen from data"):
        Coreset(**{**subset.__dict__, "data_hash": "0" * 64}).rows(train)
    assert verify(str(folder)).faults == []
    write_json(folder / "subset.json", read_json(folder / "subset.json") | {"schema_version": 9})
    assert len(verify(str(folder)).faults) == 1
    with pytest.raises(ValueError, match="schema version 9"):
        Coreset.load(folder)
    with pytest.raises(ValueError, match="holds no subset"):
        Coreset.load(tmp_path)


def test_the_command_line(storage, run, tmp_path):
    (tmp_path / "run.yaml").write_text(config.dump(run))

    def words(*more):
        return CliRunner().invoke(cli.app, ["coreset", str(tmp_path / "run.yaml"), "--quiet", *more])

    done = words(
        "--method", "k-center", "--pairs", "6", "--encoder", "columns:clip", "--option", "start=mean", "--json"
    )
    assert done.exit_code == 0, done.output
    message = json.loads(done.stdout)
    subset = Coreset.load(message["subset"])
    assert len(subset) == 6 and subset.options["start"] == "mean" and message["facts"]["radius"] > 0
    assert message["subset"].startswith(f"{storage}/coresets/tiny-k_center-")
    assert {p.name for p in (storage / "coresets").glob("[!.]*/*")} == {"subset.json", "preview.png"}
    assert "pairs of 30 images" in words("--pairs", "3", "--method", "random").stdout
    small = distilled_set().save(tmp_path / "set")
    done = words("--method", "random", "--like", str(small), "--json")
    facts = json.loads(done.stdout)["facts"]
    assert 0 < facts["bytes"]["total"] <= distilled_set().budget()["total"]["bytes"] < 30 * 1000
    for wrong, message in (
        (["--method", "herding"], "give either pairs or bytes, found neither"),
        (["--method", "clip-score", "--pairs", "3"], "the cosine of image and text is needed, but untrained towers"),
        (["--method", "best", "--pairs", "3"], "method"),
        (["--pairs", "3", "--option", "x"], "write it as name=value"),
        (["--like", str(small), "--bytes", "9"], "--like and --bytes both set the number of bytes"),
        (["--like", str(tmp_path / "no")], "--like"),
        (["--pairs", "3", "--ranks", "0"], "--ranks"),
        (
            ["--pairs", "3", "--encoder", "expert:7"],
            "the coreset needs expert 7, but the run trains 1; raise experts.num",
        ),
        (["--pairs", "3", "--method", "forgetting", "--option", "expert=2"], "the coreset needs expert 2"),
        (["--pairs", "3", "--method", "matched", "--clusters", "2"], "method matched already makes clusters"),
        (
            ["--pairs", "3", "--method", "matched", "--space", "image"],
            "method matched clusters images and texts separately",
        ),
    ):
        done = words(*wrong)
        assert done.exit_code == 2 and message in done.output, done.output


def test_forgetting_counts_are_collected_if_no_expert_has_them(run):
    plain = run.model_copy(update={"experts": run.experts.model_copy(update={"forgetting": 0, "num": 3})})
    subset = rmdd.coreset(plain, method="forgetting", pairs=4, never_learned="first", progress=QUIET)
    assert subset.facts["pool"] == 5 * TRAIN and subset.facts["epochs"] == 3 and len(subset) == 4


def test_open_parts_without_ray_stay_in_this_process(run):
    from rmdd.execution.backend import Backend
    from rmdd.execution.in_turn import SequentialExecutor

    pipeline = Pipeline(run, Backend(SequentialExecutor()), QUIET)
    with pipeline.backend.open_parts(lambda rank, size: [rank, size], 3) as ranks:
        assert ranks.call("copy") == [[0, 3], [1, 3], [2, 3]]
