"""Tests that the numbers in `published_results.csv` are plausible and complete, and its notes on misprints are true."""

import json

import pytest
from typer.testing import CliRunner

from rmdd.cli import app as cli
from rmdd.comparisons import tables
from rmdd.comparisons.published import LAYOUTS, PERCENT, UNITS, cells, flat, for_dataset, published, table

RECALLS = ("IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10")
COUNTS = {
    "PTM-ST": 402, "LoRS": 343, "MTT-VL": 255, "Random": 195, "Herding": 195, "K-center": 195, "Forgetting": 195,
    "MDM": 126, "Full-data": 115, "TESLA-VL": 111, "RepBlend": 62, "NCFM": 42, "EDGE": 24, "DATM": 18,
}  # fmt: skip


def test_every_cell_has_its_type_unit_and_range():
    keys = set()
    for cell in cells():
        assert cell.method and cell.dataset and cell.source
        assert cell.pairs in ("", "full") or int(cell.pairs) > 0
        assert cell.unit and (0 <= cell.mean <= 100 if cell.metric in PERCENT else cell.mean > 0)
        assert cell.std is None or 0 <= cell.std < 10
        assert "," not in "".join(v for v in vars(cell).values() if isinstance(v, str)), "commas separate the cells"
        key = (cell.method, cell.dataset, cell.pairs, cell.image_encoder, cell.text_encoder, cell.source, cell.metric)
        assert key not in keys
        keys.add(key)
    assert {cell.metric for cell in cells()} == set(UNITS)
    assert set(LAYOUTS.values()) <= {cell.dataset for cell in cells()}


def test_the_number_of_rows_per_method_is_unchanged():
    counts = {}
    for cell in cells():
        counts[cell.base_method] = counts.get(cell.base_method, 0) + 1
    assert counts == COUNTS


def test_recalls_rise_with_k_and_printed_means_are_those_of_the_recalls():
    misprints = []
    for row in published():
        value = {metric: match["mean"] for metric, match in row["metrics"].items()}
        for side in ("IR", "TR", "ACC"):
            ladder = [value[f"{side}@{k}"] for k in (1, 5, 10) if f"{side}@{k}" in value]
            assert ladder == sorted(ladder), row
        if "R@mean" in value and all(m in value for m in RECALLS):
            mean = sum(value[m] for m in RECALLS) / 6
            if abs(mean - value["R@mean"]) > 0.06:
                misprints.append((row["method"], row["dataset"], row["pairs"]))
                assert row["notes"] and "MDM" in row["source"], "a row whose printed mean is wrong must have a note"
    assert sorted(misprints) == [
        ("Herding", "COCO", "100"),
        ("Herding", "Flickr30k", "500"),
        ("LoRS", "Flickr30k", "500"),
    ]


def cell(method, dataset, pairs, metric, source):
    (match,) = [
        c for c in cells() if (c.method, c.dataset, c.pairs, c.metric) == (method, dataset, pairs, metric)
        and f"{source} " in f"{c.source} " and (c.image_encoder, c.text_encoder) == ("NFNet", "BERT")
    ]  # fmt: skip
    return match


@pytest.mark.parametrize(
    ("method", "dataset", "pairs", "metric", "printed", "origin"),
    [
        ("K-center", "Flickr30k", "100", "TR@5", 4.2, 5.0),
        ("K-center", "Flickr30k", "500", "TR@1", 4.6, 4.9),
        ("Random", "COCO", "500", "TR@1", 3.2, 1.9),
        ("Herding", "COCO", "500", "TR@1", 3.8, 1.9),
        ("K-center", "COCO", "500", "TR@1", 3.7, 2.5),
        ("Forgetting", "COCO", "500", "TR@1", 2.3, 2.1),
        ("K-center", "COCO", "500", "TR@10", 13.8, 14.3),
    ],
)
def test_numbers_that_differ_from_the_original_paper_have_a_note(method, dataset, pairs, metric, printed, origin):
    copied = cell(method, dataset, pairs, metric, "arXiv:2603.25388 Tab." + ("1" if dataset == "Flickr30k" else "2"))
    assert copied.mean == printed and str(origin) in copied.note
    assert cell(method, dataset, pairs, metric, "MTT-VL TMLR project page Tab.A").mean == origin
    assert cell(method, dataset, pairs, metric, "RepBlend NeurIPS paper").mean == origin


def test_the_notes_about_whole_tables_hold():
    def row(method, source):
        (match,) = [r for r in published() if r["method"] == method and r["source"].endswith(source)]
        return {m: v["mean"] for m, v in match["metrics"].items()}

    assert row("NCFM[clusters=100;ipc=2]", "Tab.19") == row("NCFM[clusters=200;ipc=1]", "Tab.19")
    gains = []
    for pairs in (100, 200, 500):
        ours, base = (
            [cell(m, "Flickr30k", str(pairs), metric, "arXiv:2603.25388 Tab.1").mean for metric in RECALLS]
            for m in ("PTM-ST", "LoRS")
        )
        gains.append(sum(ours) / 6 - sum(base) / 6)
    assert gains == pytest.approx([5.3, 6.5, 9.1], abs=0.06), "the table gives 9.1, the abstract 9.53"
    assert all("DINO v1" in c.note for c in cells() if c.image_encoder == "DINOv2")


def test_rows_can_be_selected_by_layout_budget_and_method():
    rows = published("flickr30k", 100, "lors")
    assert rows and {(r["dataset"], r["pairs"], r["method"]) for r in rows} == {("Flickr30k", "100", "LoRS")}
    assert all(r["protocol"] == "best of several passes, picked on test" and r["source"] for r in rows)
    assert {r["pairs"] for r in for_dataset("coco", 500)} == {"500", "full"} and for_dataset(None, 500) == []
    assert not any("[" in r["method"] for r in for_dataset("flickr30k", 500))
    for wrong in ({"dataset": "emoji"}, {"method": "nobody"}, {"pairs": "abc"}, {"dataset": "coco", "pairs": 7}):
        with pytest.raises(ValueError, match="available: "):
            published(**wrong)


def test_a_mean_that_is_not_printed_is_in_brackets():
    rows = published("flickr30k", 100, "mtt-vl")
    shown = table("t", rows)
    at = list(shown.columns).index("R@mean")
    for row, cells_ in zip(rows, shown.rows, strict=True):
        assert cells_[at].startswith("(") == ("R@mean" not in row["metrics"])
    assert shown.apart and "not measured here" in shown.notes[0]
    assert flat(rows[0])["published"] is True and "apart" in tables.page("t", [shown])


def test_variants_keep_their_brackets():
    done = CliRunner().invoke(cli.app, ["published", "--method", "NCFM", "--json"])
    variants = {row["method"] for row in json.loads(done.stdout)}
    shown = CliRunner().invoke(cli.app, ["published", "--method", "NCFM"], env={"COLUMNS": "300"}).stdout
    assert "NCFM[clusters=100;ipc=1]" in variants
    assert shown.count("[") >= len(variants)


def test_the_command_prints_published_results():
    done = CliRunner().invoke(cli.app, ["published", "--dataset", "flickr30k", "--pairs", "100", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout) == published("flickr30k", 100)
    done = CliRunner().invoke(cli.app, ["published", "--dataset", "flickr30k", "--pairs", "100"])
    assert done.exit_code == 0 and "PTM-ST" in done.stdout and "not measured here" in done.stdout
    wrong = CliRunner().invoke(cli.app, ["published", "--dataset", "flickr31k"])
    assert wrong.exit_code == 2 and "no published results for dataset 'flickr31k'" in wrong.stderr
