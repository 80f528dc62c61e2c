"""Tests of ranks and recalls against double loops, with ties, at chance level and for invalid input."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmdd.evaluate.retrieval import (
    Ranks,
    Recalls,
    chance,
    first_images,
    ranks,
    ranks_from_scores,
    recalls,
    recalls_from_scores,
)

KS = (1, 2, 3, 5, 10)
GOLDEN = torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.3, 0.4], [0.7, 0.6, 0.5, 0.4, 0.3, 0.2], [0.9, 0.8, 0.7, 0.6, 0.1, 0.2]])
GOLDEN_OF = torch.tensor([0, 0, 1, 1, 2, 2])


def double_loop(scores, image_of, ks, pessimistic=True):
    """Compute the recalls from their definition, by comparing one pair of scores at a time."""
    s, of = scores.tolist(), image_of.tolist()
    num_images, num_texts = len(s), len(of)

    def above(other, correct):
        return other > correct or (pessimistic and other == correct)

    ir_ranks = [sum(above(s[i][j], s[of[j]][j]) for i in range(num_images) if i != of[j]) for j in range(num_texts)]
    tr_ranks = []
    for i in range(num_images):
        best = max(s[i][j] for j in range(num_texts) if of[j] == i)
        tr_ranks.append(sum(above(s[i][j], best) for j in range(num_texts) if of[j] != i))
    return (
        {k: 100 * sum(r < k for r in ir_ranks) / num_texts for k in ks},
        {k: 100 * sum(r < k for r in tr_ranks) / num_images for k in ks},
    )


def problem(seed, counts, levels=None, width=None):
    """Return random scores (or embeddings if `width` is given); image i has `counts[i]` captions, in random order."""
    g = torch.Generator().manual_seed(seed)
    image_of = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    image_of = image_of[torch.randperm(len(image_of), generator=g)]
    if width:
        return torch.randn(len(counts), width, generator=g), torch.randn(len(image_of), width, generator=g), image_of
    if levels:
        return torch.randint(levels, (len(counts), len(image_of)), generator=g).float(), image_of
    return torch.randn(len(counts), len(image_of), generator=g), image_of


RAGGED = [1 + (7 * i) % 6 for i in range(40)]
GALLERIES = {"one": [1] * 60, "five": [5] * 40, "six": [6] * 20, "ragged": RAGGED, "single": [3], "over 128": [1] * 140}


@pytest.mark.parametrize("levels", [None, 2, 5, 40])
@pytest.mark.parametrize("counts", GALLERIES.values(), ids=GALLERIES)
def test_equals_a_double_loop(counts, levels):
    scores, image_of = problem(0, counts, levels)
    for chunk in (1, 7, 256):
        result = recalls_from_scores(scores, image_of, KS, chunk)
        ir, tr = double_loop(scores, image_of, KS)
        assert (result.ir, result.tr) == (ir, tr)
    best_ir, best_tr = double_loop(scores, image_of, KS, pessimistic=False)
    assert result.gap == max(max(best_ir[k] - ir[k], best_tr[k] - tr[k]) for k in KS)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=9),
    levels=st.integers(1, 4),
    seed=st.integers(0, 999),
    chunk=st.integers(1, 12),
)
def test_equals_a_double_loop_on_any_gallery(counts, levels, seed, chunk):
    scores, image_of = problem(seed, counts, levels)
    result = recalls_from_scores(scores, image_of, KS, chunk)
    assert (result.ir, result.tr) == double_loop(scores, image_of, KS)
    for values in (list(result.ir.values()), list(result.tr.values())):
        assert values == sorted(values) and values[0] >= 0 and values[-1] <= 100
    assert result.gap >= 0


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(1, 3), min_size=1, max_size=9), seed=st.integers(0, 999), chunk=st.integers(1, 12))
def test_first_images_equal_a_sorted_list_and_agree_with_the_ranks(counts, seed, chunk):
    """Sort the images of every caption by cosine; equal images tie, and the caption's own image then comes last."""
    random = torch.Generator().manual_seed(seed)
    image_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.randn(4, 3, generator=random)[torch.randint(4, (len(counts),), generator=random)]
    texts = torch.randn(len(image_of), 3, generator=random)
    captions = list(range(len(image_of)))
    found = first_images(images, texts, image_of, captions, 5, chunk)
    u, v = (torch.nn.functional.normalize(x.double()) for x in (images, texts))
    places = ranks(images, texts, image_of, chunk).image.tolist()
    for caption, first, place in zip(captions, found, places, strict=True):
        own, cosines = int(image_of[caption]), (u @ v[caption]).tolist()
        order = sorted(range(len(counts)), key=lambda i: (-round(cosines[i], 12), i == own, i))
        assert first == order[:5]
        assert (first.index(own) if own in first else None) == (place if place < 5 else None)


def test_golden_example():
    result = recalls_from_scores(GOLDEN, GOLDEN_OF, (1, 2, 3, 5))
    assert result.tr == pytest.approx({1: 100 / 3, 2: 100 / 3, 3: 200 / 3, 5: 100})
    assert result.ir == pytest.approx({1: 0, 2: 100 / 3, 3: 100, 5: 100})
    assert result.gap == pytest.approx(100 / 6)  # IR@1 would gain 16.67 if ties were hits


def test_a_tied_positive_of_the_same_image_does_not_hurt():
    scores = torch.tensor([[1.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
    result = recalls_from_scores(scores, torch.tensor([0, 0, 1]), (1,))
    assert result.tr == {1: 100} and result.gap == 0
    assert recalls_from_scores(torch.ones(2, 3), torch.tensor([0, 0, 1]), (1,)).tr == {1: 0}


def test_embeddings_are_scored_by_cosine():
    images, texts, image_of = problem(1, RAGGED, width=24)
    u, v = (torch.nn.functional.normalize(x.double()) for x in (images, texts))
    expected = double_loop(u @ v.T, image_of, KS)
    for chunk in (1, 13, 64, 1000):
        result = recalls(images, texts, image_of, KS, chunk)
        assert (result.ir, result.tr) == expected and result.gap == 0
    scaled = recalls(images * 1e-30, texts * 1e30, image_of, KS)
    assert (scaled.ir, scaled.tr) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_low_precision_input_is_scored_in_float32_or_better(dtype):
    images, texts, image_of = problem(2, RAGGED, width=16)
    images, texts = images.to(dtype), texts.to(dtype)
    u, v = (torch.nn.functional.normalize(x.double()) for x in (images, texts))
    result = recalls(images, texts, image_of)
    assert (result.ir, result.tr) == double_loop(u @ v.T, image_of, (1, 5, 10))


@pytest.mark.parametrize("chunk", [1, 3, 17, 256])
def test_identical_embeddings_tie_exactly(chunk):
    images, texts, image_of = problem(3, [5] * 30, width=53)
    same_images, same_texts = images[:1].expand(30, -1), texts[:1].expand(150, -1)
    collapsed = recalls(same_images, same_texts, image_of, chunk=chunk)
    assert collapsed.mean == 0 and collapsed.gap == 100
    assert recalls(images, same_texts, image_of, chunk=chunk).tr == {1: 0, 5: 0, 10: 0}
    assert recalls(same_images, texts, image_of, chunk=chunk).ir == {1: 0, 5: 0, 10: 0}
    # A caption of a different image equals the captions of image 0, so image 0 must count as a miss at K = 1.
    texts = images[image_of] + 0.01 * texts
    twin = int((image_of != image_of[0]).nonzero()[0])
    texts[image_of == image_of[0]] = texts[twin] = images[image_of[0]]
    assert recalls(images, texts, image_of, (1,), chunk).tr[1] == pytest.approx(100 * 29 / 30)


def test_scaling_shifting_and_permuting_scores_does_not_change_recalls():
    scores, image_of = problem(4, RAGGED)
    base = recalls_from_scores(scores, image_of, KS)
    assert recalls_from_scores(scores * 8, image_of, KS) == base
    assert recalls_from_scores(scores.double() + 3.5, image_of, KS) == base
    g = torch.Generator().manual_seed(0)
    rows, columns = torch.randperm(scores.shape[0], generator=g), torch.randperm(scores.shape[1], generator=g)
    assert recalls_from_scores(scores[rows], rows.argsort()[image_of], KS) == base
    assert recalls_from_scores(scores[:, columns], image_of[columns], KS) == base
    all_candidates = recalls_from_scores(scores, image_of, (scores.shape[1],))
    assert all_candidates.ir == all_candidates.tr == {scores.shape[1]: 100}


def test_perfect_and_constant_scores():
    _, image_of = problem(5, [5] * 30)
    perfect = (torch.arange(30)[:, None] == image_of).float()
    assert recalls_from_scores(perfect, image_of).as_dict() == dict.fromkeys(
        ["IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10", "R@mean"], 100
    )
    constant = recalls_from_scores(torch.zeros(30, 150), image_of)
    assert constant.mean == 0 and constant.gap == 100


def test_one_caption_per_image_is_symmetric():
    scores, image_of = problem(6, [1] * 50, levels=9)
    image_in_order = scores[:, image_of.argsort()]
    straight = recalls_from_scores(image_in_order, torch.arange(50), KS)
    swapped = recalls_from_scores(image_in_order.T, torch.arange(50), KS)
    assert (straight.ir, straight.tr) == (swapped.tr, swapped.ir)


def test_random_embeddings_score_at_chance():
    images, texts, image_of = problem(7, [1] * 900, width=32)
    result = recalls(images, texts, image_of)
    for k in (1, 5, 10):
        p = k / 900
        error = 4 * 100 * math.sqrt(p * (1 - p) / 900)
        assert abs(result.ir[k] - 100 * p) <= error and abs(result.tr[k] - 100 * p) <= error


def test_an_additional_caption_never_lowers_the_recall_of_its_image():
    for seed in range(10):
        scores, image_of = problem(seed, [1] * 12, levels=6)
        hit = [recalls_from_scores(scores, image_of, (k,)).tr[k] for k in (1, 3)]
        extra = torch.full((12, 1), -1.0)
        extra[0] = scores[0].max()
        more = torch.cat([scores, extra], 1)
        after = [recalls_from_scores(more, torch.cat([image_of, torch.tensor([0])]), (k,)).tr[k] for k in (1, 3)]
        assert all(b >= a for a, b in zip(hit, after, strict=True))


def test_names_and_mean():
    result = Recalls({1: 1.0, 5: 2.0, 10: 3.0}, {1: 4.0, 5: 5.0, 10: 6.0}, 0.0)
    assert result.as_dict() == {"IR@1": 1, "IR@5": 2, "IR@10": 3, "TR@1": 4, "TR@5": 5, "TR@10": 6, "R@mean": 3.5}


def test_invalid_input_is_counted_and_rejected():
    images, texts, image_of = problem(8, [2] * 6, width=8)
    broken = images.clone()
    broken[1, 3], broken[4] = torch.nan, 0
    with pytest.raises(ValueError, match="of 6 image embeddings 1 are not finite and 1 are zero"):
        recalls(broken, texts, image_of)
    with pytest.raises(ValueError, match="of 12 text embeddings 12 are not finite"):
        recalls(images, texts * torch.inf, image_of)
    with pytest.raises(ValueError, match="2 of 8 images have no caption .first: 6."):
        recalls(torch.randn(8, 8), texts, image_of)
    with pytest.raises(ValueError, match="has indices 0..5, but images are numbered 0..3"):
        recalls(images[:4], texts, image_of)
    with pytest.raises(ValueError, match="1 of 72 scores are not finite"):
        scores = torch.zeros(6, 12)
        scores[0, 0] = torch.inf
        recalls_from_scores(scores, image_of)
    with pytest.raises(ValueError, match="0 images and 0 captions"):
        recalls(images[:0], texts[:0], image_of[:0])
    with pytest.raises(ValueError, match="chunk must be at least 1; found 0"):
        recalls(images, texts, image_of, chunk=0)
    with pytest.raises(ValueError, match=r"every K must be at least 1; found K \(0, 1\)"):
        recalls(images, texts, image_of, (0, 1))


def test_golden_example_under_every_rule_for_ties():
    result = ranks_from_scores(GOLDEN, GOLDEN_OF)
    assert result.text.tolist() == [0, 2, 4] and result.image.tolist() == [1, 2, 2, 1, 2, 2]
    assert (result.image - result.image_ties).tolist() == [0, 2, 2, 1, 2, 1]
    by_rule = (result.optimistic((1, 2, 3)), result.recalls((1, 2, 3)), result.expected((1, 2, 3)))
    table = {1: (100 / 6, 0, 100 / 12), 2: (50, 100 / 3, 500 / 12), 3: (100, 100, 100)}
    assert {k: tuple(r.ir[k] for r in by_rule) for k in table} == {k: pytest.approx(v) for k, v in table.items()}
    assert by_rule[2].tr == pytest.approx({1: 100 / 3, 2: 100 / 3, 3: 200 / 3})


def over_all_orders(row, correct, k):
    """Return the percentage of orders of tied candidates in which a correct candidate is among the first k."""
    best = max(row[j] for j in correct)
    above, level = sum(v > best for v in row), [j for j, v in enumerate(row) if v == best]
    hits = [bool(set(order[: max(0, k - above)]) & set(correct)) for order in permutations(level)]
    return 100 * sum(hits) / len(hits)


@pytest.mark.parametrize("counts", [[2, 1, 3], [1, 1, 1, 1], [5, 1]])
def test_expected_recall_is_the_mean_over_all_orders_of_tied_candidates(counts):
    for seed in range(4):
        scores, image_of = problem(seed, counts, levels=2)
        result, of = ranks_from_scores(scores, image_of).expected((1, 2)), image_of.tolist()
        for k in (1, 2):
            ir = [over_all_orders(column, [of[j]], k) for j, column in enumerate(scores.T.tolist())]
            owned = [[j for j, i in enumerate(of) if i == image] for image in range(len(counts))]
            tr = [over_all_orders(row, captions, k) for row, captions in zip(scores.tolist(), owned, strict=True)]
            assert result.ir[k] == pytest.approx(sum(ir) / len(ir)) and result.tr[k] == pytest.approx(sum(tr) / len(tr))


@pytest.mark.parametrize("counts", [[2, 1, 3], [1, 1, 1, 1], [5, 1]])
def test_chance_is_the_mean_over_all_rankings(counts):
    by_chance, of = chance(torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)), (1, 2, 5)), []
    for image, captions in enumerate(counts):
        of += [image] * captions
    for k in (1, 2, 5):
        ir = [over_all_orders([0.0] * len(counts), [image], k) for image in of]
        owned = [[j for j, image in enumerate(of) if image == i] for i in range(len(counts))]
        tr = [over_all_orders([0.0] * len(of), captions, k) for captions in owned]
        assert by_chance.ir[k] == pytest.approx(sum(ir) / len(ir))
        assert by_chance.tr[k] == pytest.approx(sum(tr) / len(tr))


@pytest.mark.parametrize("counts", GALLERIES.values(), ids=GALLERIES)
def test_the_expected_recall_of_constant_scores_is_chance(counts):
    _, image_of = problem(5, counts)
    result = ranks_from_scores(torch.zeros(len(counts), sum(counts)), image_of)
    by_chance = chance(image_of)
    if len(counts) > 10:
        assert result.recalls().mean == 0
    assert result.optimistic().mean == 100
    assert result.expected().as_dict() == pytest.approx(by_chance.as_dict())


def test_chance_on_the_published_galleries():
    """Check `chance` for test and val of Flickr30k, and for COCO with 5,000 images, ten of which have six captions."""
    flickr = chance(torch.arange(1000).repeat_interleave(5))
    assert [round(v, 3) for v in (*flickr.ir.values(), *flickr.tr.values())] == [0.1, 0.5, 1.0, 0.1, 0.499, 0.996]
    val = chance(torch.arange(1014).repeat_interleave(5))
    assert [round(v, 3) for v in (*val.ir.values(), *val.tr.values())] == [0.099, 0.493, 0.986, 0.099, 0.492, 0.983]
    coco = chance(torch.cat([torch.arange(5000).repeat_interleave(5), torch.arange(10)]))
    assert [round(v, 3) for v in (*coco.ir.values(), *coco.tr.values())] == [0.02, 0.1, 0.2, 0.02, 0.1, 0.2]


def cut_to_the_best(scores, k=128):
    """Set all but the k best scores of every query to -100, as the released evaluation does."""
    images, texts = (torch.full(m.shape, -100.0) for m in (scores, scores.T))
    for target, full in ((images, scores), (texts, scores.T)):
        best, where = full.topk(k, dim=1)
        target.scatter_(1, where, best)
    return images, texts.T


def test_the_cut_at_128_of_released_code_changes_no_recall_up_to_10():
    images, texts, image_of = problem(10, [1] * 150 + [2] * 20, width=16)
    scores = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T / 0.07
    exact, (by_image, by_text) = recalls_from_scores(scores, image_of), cut_to_the_best(scores)
    assert recalls_from_scores(by_image, image_of).tr == exact.tr
    assert recalls_from_scores(by_text, image_of).ir == exact.ir
    late = recalls_from_scores(by_text, image_of, (140,)).ir[140]
    assert late != recalls_from_scores(scores, image_of, (140,)).ir[140], "the cut must change recalls at K above 128"


def test_images_with_six_captions_use_all_of_them():
    image_of = torch.cat([torch.arange(40).repeat_interleave(5), torch.arange(4)])
    g = torch.Generator().manual_seed(0)
    result = ranks(torch.randn(40, 8, generator=g), torch.randn(204, 8, generator=g), image_of)
    assert len(result.image) == 204 and len(result.text) == 40


def broken_embeddings():
    """Yield embeddings of models that learned nothing; a wrong rule for ties would score them above chance."""
    g = torch.Generator().manual_seed(0)
    image_of = torch.arange(60).repeat_interleave(5)
    images, texts, row = torch.randn(60, 16, generator=g), torch.randn(300, 16, generator=g), torch.randn(1, 16)
    few = torch.randn(4, 16, generator=g)
    yield "collapsed", row.expand(60, -1), row.expand(300, -1), image_of
    yield "images collapsed", row.expand(60, -1), texts, image_of
    yield "texts collapsed", images, row.expand(300, -1), image_of
    yield "four points", few[torch.arange(60) % 4], few[torch.arange(300) % 4], image_of
    yield "every image twice", images[:30].repeat(2, 1), texts, image_of
    yield "low precision", images.round(), texts.round(), image_of
    yield "one axis", images.sign() * torch.eye(16)[0], texts.sign() * torch.eye(16)[0], image_of


@pytest.mark.parametrize("case", list(broken_embeddings()), ids=lambda case: case[0])
def test_collapsed_and_duplicate_embeddings_never_score_above_chance(case):
    name, images, texts, image_of = case
    result, by_chance = recalls(images, texts, image_of).as_dict(), chance(image_of).as_dict()
    spread = {m: 4 * math.sqrt(v * (100 - v) / (300 if m.startswith("IR") else 60)) for m, v in by_chance.items()}
    for metric, value in result.items():
        if name in ("collapsed", "four points", "one axis"):
            limit = by_chance[metric]
        elif (
            "collapsed" in name and metric != "R@mean"
        ):  # all queries rank the candidates equally, and the first K candidates belong to K different images
            limit = 100 * int(metric.partition("@")[2]) / 60 + 1e-9
        else:
            limit = by_chance[metric] + spread[metric]
        assert value <= limit, (name, metric)


def test_nan_and_zero_embeddings_are_rejected():
    images, texts, image_of = problem(8, [2] * 6, width=8)
    for bad in (torch.nan, torch.inf, 0.0):
        with pytest.raises(ValueError, match="of 6 image embeddings"):
            recalls(images * bad, texts, image_of)


def test_saved_ranks_can_be_loaded(tmp_path):
    result = ranks(*problem(3, RAGGED, width=8))
    result.save(tmp_path / "a.safetensors")
    again = Ranks.load(tmp_path / "a.safetensors")
    for name in result.__dataclass_fields__:
        assert torch.equal(getattr(result, name), getattr(again, name))
    assert again.recalls() == result.recalls()
    bare = Ranks(result.image, result.text, result.image_of)
    bare.save(tmp_path / "b.safetensors")
    assert Ranks.load(tmp_path / "b.safetensors").recalls().as_dict() == result.recalls().as_dict()
    with pytest.raises(ValueError, match="saved without ties"):
        bare.expected()
    worst = Ranks.worst(result.image_of)
    assert worst.recalls().mean == 0 and torch.equal(worst.image_of, result.image_of)


def test_the_worst_ranks_give_a_recall_of_0_even_in_a_gallery_smaller_than_k(tmp_path):
    worst = Ranks.worst(torch.tensor([0, 0, 1, 1, 2]))
    worst.save(tmp_path / "worst.safetensors")
    for result in (worst, Ranks.load(tmp_path / "worst.safetensors")):
        assert set(result.recalls().as_dict().values()) == {0.0}
