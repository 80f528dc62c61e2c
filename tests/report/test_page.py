"""Tests of the HTML report; the tests write the run folder themselves, without training."""

import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from browser import CHROMIUM, HEIGHT, open_browser
from rich.console import Console

from rmdd import config
from rmdd.artefact.distilled import DistilledSet, Subset
from rmdd.cli.console import result_table
from rmdd.comparisons import tables
from rmdd.comparisons.results import RECALLS
from rmdd.core.files import append_jsonl, write_json
from rmdd.distill import similarity
from rmdd.distill.sets import save_set
from rmdd.distill.synthetic import Synthetic
from rmdd.evaluate.retrieval import chance
from rmdd.report import page, pictures, plots, referee
from rmdd.report.page import headline, write_report
from rmdd.report.search import write_page
from rmdd.runs.paths import RunPaths

pytestmark = pytest.mark.usefixtures("ink")

HOSTILE = "<script>alert('x')</script> & \"a\" <img src=x onerror=alert(1)>"
HEALTH = {
    "rows": [
        *(
            {"set": "distilled", "iterations": [i], "cosine_image": 0.3 + i / 100, "cosine_text": 0.2}
            | {"rank_image": 9.0, "rank_text": 8.0, "gap": 0.5}
            for i in (0, 40)
        ),
        {
            "set": "random pairs",
            "cosine_image": 0.3,
            "cosine_text": 0.2,
            "rank_image": 9.0,
            "rank_text": 8.0,
            "gap": 0.5,
        },
    ],
    "warnings": [f"image embeddings {HOSTILE}"],
}
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """HTML parser that checks the nesting of tags. It collects all tags, and all links that a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.references, self.ids = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def score(mean, std=1.25, n=5):
    names = [f"{d}@{k}" for d in ("IR", "TR") for k in (1, 5, 10)] + ["R@mean"]
    return {name: {"mean": mean + i / 10, "std": std, "n": n} for i, name in enumerate(names)}


def evaluation_of(iterations, **change):
    at = [(s, p) for s in range(len(iterations)) for p in (10, 20)]
    curve = [{"subset": s, "passes": p, "val": {"R@mean": 10.0 + s + p / 10}} for s, p in at]
    return {
        "table": {
            "random": {"val": score(17.0), "test_last": score(18.0)},
            "ptm_st": {"val": score(33.0), "test_last": score(34.0), "test_best_reference": score(36.5)},
            "full": {"val": score(71.0), "test_last": score(70.0)},
        },
        "spread": "sample standard deviation over students",
        "iterations": iterations,
        "selection": {"rule": "val_best", "val": [
            {"iterations": [i // 2 for i in iterations], "R@mean": 25.0}, {"iterations": iterations, "R@mean": 33.0},
        ]},
        "baseline": {"pairs": 20, "loss": "infonce", "lr": 0.3, "val": [
            {"loss": loss, "lr": lr, "R@mean": 10 + lr} for loss in ("wbce", "infonce") for lr in (0.1, 0.3)
        ]},
        "student_curves": [curve, curve],
    } | change  # fmt: skip


def make_run(tmp_path, pairs=(5,), kind="full", size=16, logged=40, captions_before=True, branches="separate"):
    """Write a run folder: initial sets, logs, experts and a distilled set; return run, paths and the set's folder."""
    run = config.load({
        "name": "tiny",
        "data": {"image_size": size},
        "model": {"image": {"name": "convnet", "weights": "random"}, "text": {"name": "hashing"}},
        "distill": {
            "budget": 20, "batch": 2, "similarity": {"kind": kind, "rank": 1}, "branches": branches,
            "phases": [{"pairs": m, "iterations": 40} for m in pairs],
        },
    })  # fmt: skip
    paths = RunPaths(**{name: tmp_path / name for name in ("data", "cache", "store", "phases", "baseline", "run")})
    paths.store.mkdir()
    (paths.store / "epoch.safetensors").write_bytes(bytes(3 * 2**20))
    subsets = []
    for p, m in enumerate(pairs):
        random = torch.Generator().manual_seed(p)
        parts = similarity.initial(run.distill.similarity, m, random)
        start = Synthetic(
            torch.randn(m, 3, size, size, generator=random),
            torch.randn(m, 6, generator=random),
            torch.tensor(0.1),
            torch.tensor(0.1),
            parts,
        )
        save_set(start, paths.start(p))
        end = start.map(lambda t, random=random: t + 0.1 * torch.randn(t.shape, generator=random))
        for i in range(1, logged + 1):
            append_jsonl(paths.phase(p) / "metrics.jsonl", {
                "phase": p, "iteration": i, "loss": 2 - i / 40, "miss_image": 1 - i / 80, "miss_text": 1 - i / 80,
                "student_loss": 3.0 / i, "lr_image": 0.1 + i / 1000, "lr_text": 0.1, "seconds": 0.25,
            })  # fmt: skip
        subsets.append(Subset(
            end.images, end.texts, end.similarity, end.alpha, 0.1375, 0.11,
            captions=[HOSTILE if not i else f"a caption now {i}" for i in range(m)],
            source_ids=[f"{HOSTILE}{i}.png" for i in range(m)],
            captions_before=[f"{HOSTILE} before {i}" for i in range(m)] if captions_before else (),
        ))  # fmt: skip
    distilled = DistilledSet(
        tuple(subsets),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        model={"image": {"name": "convnet", "weights": "random"}, "text": {"name": "hashing"}},
        method="ptm_st",
        loss="wbce",
        config=run.model_dump(mode="json", exclude={"runtime"}) | {"name": HOSTILE},
        provenance={"data": {"hash": "d4t4", "counts": {"train": {"pairs": 1234, "captions": 6170}}}, "experts": "3xp"},
    )
    return run, paths, distilled.save(tmp_path / "set")


def pixels(index):
    """Return an image for each number in `index`: uniform, with a colour of its own."""
    colours = np.stack([40 * index, 255 - 40 * index, 7 * index], 1).astype(np.uint8)
    return np.broadcast_to(colours[:, :, None, None], (len(index), 3, 16, 16))


def page_of(tmp_path, evaluation=None, seconds=None, **options):
    run, paths, path = make_run(tmp_path, **options)
    evaluation = evaluation or evaluation_of([40] * len(run.distill.phases))
    seconds = seconds or {"experts": 75.0, "distill": 4000.0}
    write_report(tmp_path / "report.html", run, paths, path, evaluation, seconds, HEALTH, pixels)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(text) < 3_000_000
    return text


@pytest.mark.parametrize("pairs", [(5,), (5, 4, 3)])
@pytest.mark.parametrize("kind", ["full", "low_rank", "identity"])
def test_the_page_is_valid_and_loads_no_url(tmp_path, pairs, kind):
    text = page_of(tmp_path, pairs=pairs, kind=kind)
    parsed = Page(text)
    assert all(r.startswith(("data:image/", "#")) for r in parsed.references)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", re.sub(r"base64,[^\"]*", "", text))
    assert parsed.tags.count("img") == 2 * sum(pairs)
    assert "script" not in parsed.tags and "onerror=alert" not in re.sub(r"&lt;img.*?&gt;", "", text)
    assert "&lt;script&gt;" in text
    assert text.count("<h3>Subset") == len(pairs)
    assert ("fixed at the identity" in text) == (kind == "identity")


def test_the_page_shows_the_scores(tmp_path):
    text = page_of(tmp_path)
    for number in ("34.6 ± 1.2", "18.6 ± 1.2", "70.6 ± 1.2", "37.1 ± 1.2", "33.6 ± 1.2", "34.1 ± 1.2"):
        assert number in text
    facts = ("1,234", "picked on the test set", "infonce", "0.3", "1.2 min", "1.1 h", "3.0 MiB", "0.25 s", "0.138")
    for fact in facts:
        assert fact in text
    places = [text.index(part) for part in ("<th>R@mean", "<th>IR@1", "<img", "All scores", "val)")]
    assert places == sorted(places)  # R@mean stands first, and pictures stand before the other tables


def spans(mean):
    return {name: {"mean": mean, "low": mean - 1.5, "high": mean + 2.5} for name in score(0)}


@pytest.mark.parametrize(("reported", "picks"), [("best", True), ("last", False)])
def test_only_protocols_that_pick_a_pass_on_test_are_said_to_pick_on_test(tmp_path, reported, picks):
    evaluation = evaluation_of([40]) | {"spread": "spread over students"}
    picked = {"protocol": "mdm", "reported": reported, "scorings": 1, "minus_test_last": 2.5, "minus_own_last": 0.0}
    evaluation["reference"] = picked
    page = page_of(tmp_path, evaluation)
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(result_table(evaluation))
    texts = [page, console.export_text()]
    assert [("picked on" in text or "from picking" in text) for text in texts] == [picks] * 2
    assert ("The last pass by the paper" in page) == (not picks)


def full_evaluation(iterations, test_images=300):
    """Return an evaluation with every optional section: intervals, reference protocol, scores, sizes and chance."""
    images = {"train": 1234, "val": 200, "test": test_images}
    points = {key: {"mean": 7.5, "low": -1.0, "high": 9.0} for key in ("HLR", "IOR", "augmented", "plain")}
    return evaluation_of(
        iterations,
        certainty={
            "over": "95 % intervals",
            "test_last": {"random": spans(18.0), "ptm_st": spans(34.0)},
            "minus_random": {"ptm_st": spans(16.25)},
        },
        reference={
            "protocol": "lors", "reported": "best", "scorings": 11, "minus_test_last": 2.5, "minus_own_last": 0.75,
        },
        size={"pairs": 5, "set_bytes": 61440},
        galleries={split: {"pairs": n, "captions": 2 * n} for split, n in images.items()},
        chance={s: chance(torch.arange(images[s]).repeat_interleave(2)).as_dict() for s in ("val", "test")},
        scores={"points": points, "LRS": 28.25, "ARS": 31.5, "augment": "dsa", "similarity": "identity"},
    )  # fmt: skip


def test_the_page_shows_intervals_reference_scores_and_cost(tmp_path):
    (tmp_path / "bare").mkdir()
    bare = page_of(tmp_path / "bare", evaluation_of([40]))
    assert "Uncertainty" not in bare and "Gain from picking on test" not in bare and "LRS" not in bare
    evaluation = full_evaluation([40])
    clocks = {"seconds_per_iteration": 0.125, "iterations_timed": 1500, "gpus": 2, "gpu_hours": 3.5}
    write_json(tmp_path / "cost.json", clocks | {"distill_gpu_hours": 1.25})
    text = page_of(tmp_path, evaluation)
    Page(text)
    for text_shown in (
        "<td>34.0 <small>[32.5, 36.5]</small></td>",
        "<td>+16.2 <small>[+14.8, +18.8]</small></td>",
        "best of 11",
        "+2.5",
        "+0.8",
        "<td>+7.5 <small>[-1.0, +9.0]</small></td>",
        "31.5",
    ):
        assert text_shown in text
    for cost in ("1.25 for distillation, 3.5 for the whole run on 2 GPUs", "0.125 s, the median of 1,500", "61,440"):
        assert cost in text
    lines = referee.lines(evaluation, {"ptm_st": "PTM-ST"})
    assert "PTM-ST minus random pairs [95 %]: +16.2 [+14.8, +18.8]" in lines and "LRS, 0 to 100: 28.2" in lines


def test_the_page_shows_what_students_find(tmp_path):
    """Write examples of a student that finds one image of two and of one that diverged; read images and ticks."""
    (tmp_path / "old").mkdir()
    assert "What the students find" not in page_of(tmp_path / "old")
    found = {"random": {"images": [3, 1], "place": 1234}, "full": {"images": [2, 0], "place": 1}}
    asked = [{"caption": HOSTILE, "image": 2, "pair_id": "2", "found": found}]
    write_json(tmp_path / "examples.json", {"images": 2000, "queries": asked})
    text = page_of(tmp_path)
    section = text[text.index("What the students find") : text.index("All scores")]
    Page(text)
    assert "place 1,234" in section and "PTM-ST" not in section and "&lt;script&gt;" in section
    rows = [re.findall(r'<li( class="own")?><img src="([^"]+)"[^>]*>(<b>.</b>)?', row) for row in section.split("<ol>")]
    uris = {i: pictures.data_uri(pixels(np.array([i]))[0]) for i in range(4)}
    own = (' class="own"', uris[2], "<b>\N{CHECK MARK}</b>")
    assert rows[1:] == [[("", uris[3], ""), ("", uris[1], "")], [own, ("", uris[0], "")]]
    assert f'<img src="{uris[2]}" alt="the image of this caption">' in section


@pytest.mark.parametrize("images, warned", [(4, True), (300, False)])
def test_the_page_and_the_table_show_chance_and_warn_of_a_small_gallery(tmp_path, images, warned):
    evaluation = full_evaluation([40], test_images=images)
    text, console = page_of(tmp_path, evaluation), Console(width=200, record=True, file=io.StringIO())
    console.print(result_table(evaluation))
    expected, printed = evaluation["chance"], console.export_text()
    for split in ("val", "test"):
        row = "".join(f"<td>{expected[split][m]:.1f}</td>" for m in page.RECALLS)
        assert f'<tr class="chance"><td>chance</td>{row}' in text
    row = next(re.findall(r"[\d.]+", line) for line in printed.splitlines() if re.search(r"^\W*chance ", line))
    assert row == [f"{v:.1f}" for v in (expected["val"]["R@mean"], *(expected["test"][m] for m in page.RECALLS))]
    warning = (
        "test has only 4 images: recalls at 5 and 10 say little, because chance reaches IR@5 100.0 and IR@10 100.0"
    )
    for shown in (text, " ".join(printed.split())):
        assert (warning in shown) == ("say little" in shown) == warned
    assert f"train 1,234 images (2,468 captions), val 200 images (400 captions), test {images} images" in text


def test_a_single_student_has_no_spread(tmp_path):
    lone = score(34.0, std=math.nan, n=1)
    evaluation = evaluation_of([40])
    evaluation["table"] = {row: {"val": lone, "test_last": lone} for row in evaluation["table"]}
    text = page_of(tmp_path, evaluation)
    assert "34.6" in text and not re.search(r"\bnan\b", re.sub(r"base64,[^\"]*", "", text))


@pytest.mark.parametrize("logged", [0, 1, 3])
def test_missing_and_truncated_logs_are_accepted(tmp_path, logged):
    run, paths, path = make_run(tmp_path, logged=logged)
    if logged:
        with open(paths.phase(0) / "metrics.jsonl", "a") as log:
            log.write('{"iteration": 41}\n{"phase": 0, "iterat')
    write_report(tmp_path / "report.html", run, paths, path, evaluation_of([40]), {}, HEALTH, pixels)
    text = (tmp_path / "report.html").read_text()
    Page(text)
    assert ("No iteration of this phase was logged" in text) == (not logged)


def test_parts_without_numbers_are_left_out(tmp_path):
    bare = evaluation_of([40], selection={"rule": "last", "val": []}, student_curves=[[]])
    del bare["table"]["ptm_st"]["test_best_reference"]
    text = page_of(tmp_path, bare, captions_before=False, branches="merged")
    assert "test_best_reference" not in text and "choice of the exported snapshot" not in text and "BEFORE" not in text


def test_the_page_of_a_large_set_stays_small(tmp_path):
    text = page_of(tmp_path, pairs=(90, 70), size=96)
    assert Page(text).tags.count("img") <= 2 * page.GALLERY
    assert "image/jpeg" in text


def test_two_writes_give_the_same_bytes(tmp_path):
    run, paths, path = make_run(tmp_path)
    for name in ("a", "b"):
        write_report(tmp_path / name, run, paths, path, evaluation_of([40]), {"distill": 1.0}, HEALTH, pixels)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "ours, random, full, words",
    [
        (34.0, 17.0, 68.0, "2.0 times the 17.6 of 20 random real pairs, and 50 % of the score of all 1,234 training"),
        (17.5, 17.0, 68.0, "but the spreads overlap"),
        (16.0, 17.0, 68.0, "not better than 20 random real pairs"),
        (16.0, -0.6, -0.6, ": 20 random real pairs reach 0."),
    ],
)
def test_the_headline_depends_on_scores_and_spreads(tmp_path, ours, random, full, words):
    distilled = DistilledSet.load(make_run(tmp_path)[2])
    evaluation = evaluation_of([40])
    for row, mean in zip(("ptm_st", "random", "full"), (ours, random, full), strict=True):
        evaluation["table"][row]["test_last"] = score(mean)
    sentence = headline(distilled, evaluation)
    assert words.replace("50 %", f"{100 * (ours + 0.6) / (full + 0.6):.0f} %" if full > 0 else "") in sentence
    unknown = headline(replace(distilled, provenance={}), evaluation)
    assert "1,234" not in unknown
    assert "in the memory of" not in sentence
    evaluation["baseline"]["pairs"] = distilled.num_pairs - 1
    assert f"PTM-ST, in the memory of {distilled.num_pairs - 1}, train" in headline(distilled, evaluation)


def test_the_headline_claims_no_more_than_the_test_split_can_show(tmp_path):
    distilled, evaluation = DistilledSet.load(make_run(tmp_path)[2]), evaluation_of([40])
    interval = evaluation["certainty"] = {
        "minus_random": {"ptm_st": {"R@mean": {"mean": 9.0, "low": -1.0, "high": 20.0}}}
    }
    assert "but the 95 % interval of the difference includes 0" in headline(distilled, evaluation)
    interval["minus_random"]["ptm_st"]["R@mean"]["low"] = 1.0
    assert " % of the score" in headline(distilled, evaluation)
    sentence = headline(distilled, evaluation | {"chance": {"test": {"R@mean": 48.5}}})
    assert "points above 20 random real pairs" in sentence and "chance is 48.5" in sentence and " % of" not in sentence


def test_the_gallery_shows_pairs_of_all_subsets():
    shown = page._shown([100, 10, 1])
    assert sum(map(len, shown)) <= page.GALLERY + 2 and all(shown)
    assert shown[0] == sorted(set(shown[0])) and shown[0][-1] > 90
    assert page._shown([3, 2]) == [[0, 1, 2], [0, 1]]


@pytest.mark.parametrize("value, text", [(0.4, "0.4 s"), (90, "1.5 min"), (5400, "1.5 h")])
def test_durations(value, text):
    assert page.duration(value) == text


def test_heat_maps_of_many_pairs_are_averaged_in_blocks():
    svg = plots.heat_map(np.full((2 * plots.CELLS + 1,) * 2, 0.5), 1.0)
    assert len(svg) < 100_000 and "<image" in svg


# -- in a browser ---------------------------------------------------------------------------------------------------

LAID_OUT = """({
    width: document.documentElement.scrollWidth,
    table: document.querySelector("table").getBoundingClientRect().top,
    picture: document.querySelector("img, svg")?.getBoundingClientRect().top ?? 0,
    score: [...document.querySelector("table").rows[0].cells].find(
        (cell) => ["R@mean", "val", "val R@mean"].includes(cell.textContent)).getBoundingClientRect().right,
    row: Math.max(...[...document.querySelectorAll("tr")].map((row) => row.getBoundingClientRect().height)),
})"""
"""Returns from a page its width, the tops of its first table and picture, the right edge of the column of the first
score, and the height of its highest table row, all in pixels."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Fixture: a page of a run with many subsets, of a search and of a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    run, paths, path = make_run(folder, pairs=(30, 20, 20))
    evaluation = full_evaluation([40, 40, 40], test_images=4)
    found = {row: {"images": [0, 1, 2, 3], "place": 3} for row in ("random", "ptm_st", "full")}
    asked = [{"caption": HOSTILE, "image": i, "pair_id": f"{i}", "found": found} for i in range(4)]
    write_json(folder / "examples.json", {"images": 4, "queries": asked})
    write_report(folder / "run.html", run, paths, path, evaluation, {"distill": 4000.0}, HEALTH, pixels)
    space = {f"distill.{name}": {"loguniform": [1, 10000]} for name in ("lr_image", "lr_text", "lr_similarity")}
    searched = config.load({"extends": "demo", "search": {"trials": 20, "space": space}})
    rows = [
        {"number": n, "state": "complete", "val": 10.0 + n, "cost": {"iterations": 100}}
        | {"values": dict.fromkeys(space, 10.0 + n)}
        for n in range(20)
    ]
    write_page(folder / "search.html", HOSTILE, searched.search, rows, [19], dict.fromkeys(space, 1 / 3))
    columns = ("trained on", "method", "n", "val R@mean", "test R@mean", *RECALLS, "difference to random pairs")
    table = tables.ResultTable("Results", columns, [(f"set {n}", "ptm_st", *["20.1 ± 3.6"] * 10) for n in range(4)])
    (folder / "comparison.html").write_text(tables.page("demo", [table, table]))
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with open_browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.mark.parametrize("width", HEIGHT)
@pytest.mark.parametrize("name", ["run", "search", "comparison"])
def test_pages_fit_a_phone_and_a_laptop(browser, pages, name, width):
    """Check that first the scores, then the pictures are on the first two screens, and that a table alone scrolls."""
    browser.show(pages / f"{name}.html", width)
    laid_out = browser.value(LAID_OUT)
    assert laid_out["width"] <= width
    assert laid_out["table"] < 2 * HEIGHT[width]
    assert laid_out["picture"] < 2 * HEIGHT[width]
    assert laid_out["score"] <= width
    assert laid_out["row"] < 170  # in a column of one letter per line, a label of 30 letters has 750 pixels
    assert browser.errors == []
    assert all(url.startswith(("file:", "data:")) for url in browser.requests)
