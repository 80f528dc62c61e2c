"""Tests that compare bootstrap intervals with a loop over captions and count how often they cover the true value."""

import numpy as np
import pytest
import torch

from rmdd.core.seeding import generator
from rmdd.evaluate.bootstrap import METRICS, Interval, difference, differences, interval, intervals
from rmdd.evaluate.retrieval import Ranks

RAGGED = [5, 1, 6, 2, 5, 5, 3, 6, 5, 4]


def ranks_of(seed, counts=RAGGED, hard=12):
    g = torch.Generator().manual_seed(seed)
    image_of = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    image_of = image_of[torch.randperm(len(image_of), generator=torch.Generator().manual_seed(9))]
    image = torch.randint(hard, (len(image_of),), generator=g)
    return Ranks(image, torch.randint(hard, (len(counts),), generator=g), image_of)


def one_draw(ranks, chosen, metric):
    """Compute `metric` on a gallery of the images `chosen`, with a loop over captions."""
    image, text, of = ranks.image.tolist(), ranks.text.tolist(), ranks.image_of.tolist()
    result = {}
    for k in (1, 3, 5, 10):
        ir = [image[j] < k for i in chosen for j in range(len(of)) if of[j] == i]
        tr = [text[i] < k for i in chosen]
        result |= {f"IR@{k}": 100 * sum(ir) / len(ir), f"TR@{k}": 100 * sum(tr) / len(tr)}
    result["R@mean"] = sum(result[f"{side}@{k}"] for side in ("IR", "TR") for k in (1, 5, 10)) / 6
    return result[metric]


def slow(a, b, metric, draws, seed, level):
    images = len(a[0].text)
    index = [
        row.tolist()
        for start in range(0, draws, 100)
        for row in torch.randint(
            images, (min(100, draws - start), images), generator=generator(seed, "bootstrap", start)
        )
    ]

    def value(chosen):
        mean = np.mean([one_draw(r, chosen, metric) for r in a])
        return mean - (np.mean([one_draw(r, chosen, metric) for r in b]) if b else 0.0)

    low, high = np.quantile([value(chosen) for chosen in index], [(1 - level) / 2, (1 + level) / 2])
    return Interval(value(range(images)), low, high)


@pytest.mark.parametrize("metric", ["R@mean", "IR@1", "TR@5", "IR@3"])
def test_equals_a_loop_over_captions(metric):
    a, b = [ranks_of(0), ranks_of(1), ranks_of(2)], [ranks_of(3, hard=30), ranks_of(4, hard=30)]
    for result, expected in (
        (interval(a, metric, 130, 7, 0.9), slow(a, [], metric, 130, 7, 0.9)),
        (difference(a, b, metric, 130, 7, 0.9), slow(a, b, metric, 130, 7, 0.9)),
    ):
        assert [result.mean, result.low, result.high] == pytest.approx([expected.mean, expected.low, expected.high])
        assert result.low <= result.mean <= result.high


def test_the_mean_is_the_mean_recall_of_the_students():
    students = [ranks_of(seed) for seed in range(3)]
    result = intervals(students, draws=10)
    assert set(result) == set(METRICS)
    for metric, estimate in result.items():
        assert estimate.mean == pytest.approx(np.mean([r.recalls().as_dict()[metric] for r in students]))


def test_paired_differences_have_narrower_intervals():
    """Images that are hard for one model are hard for both, so a paired difference varies less than either recall."""
    g = torch.Generator().manual_seed(0)
    counts = [5] * 200
    image_of = torch.arange(200).repeat_interleave(5)
    level = torch.randint(30, (200,), generator=g)
    a = Ranks(level[image_of], level, image_of)
    b = Ranks((level + 1)[image_of], level + 1, image_of)
    alone, paired = interval([a], "IR@5", 400), difference([a], [b], "IR@5", 400)
    assert paired.high - paired.low < 0.6 * (alone.high - alone.low) and len(counts) == 200
    same = difference([a], [a], draws=50)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    reverse = difference([b], [a], "IR@5", 400)
    assert [reverse.mean, reverse.low, reverse.high] == pytest.approx([-paired.mean, -paired.high, -paired.low])


def test_captions_of_one_image_are_drawn_together():
    """If the five captions of an image always have equal ranks, the interval equals that for one caption per image."""
    g = torch.Generator().manual_seed(1)
    hit = torch.randint(2, (300,), generator=g) * 20
    alone = interval([Ranks(hit, hit, torch.arange(300))], "IR@1", 500)
    of = torch.arange(300).repeat_interleave(5)
    five = interval([Ranks(hit[of], hit, of)], "IR@1", 500)
    assert [five.mean, five.low, five.high] == pytest.approx([alone.mean, alone.low, alone.high])


def test_95_percent_intervals_cover_the_true_value_in_95_percent_of_cases():
    """Draw 300 galleries of 80 images with a known hit rate, and count how often the interval contains this rate."""
    g = torch.Generator().manual_seed(2)
    covered = 0
    for _ in range(300):
        rate = 0.2 + 0.4 * torch.rand(80, 1, generator=g)  # the probability that a caption of an image is a hit
        miss = torch.rand(80, 5, generator=g) > rate
        result = interval(
            [Ranks(50 * miss.flatten(), torch.zeros(80, dtype=torch.int64), torch.arange(80).repeat_interleave(5))],
            "IR@1",
            300,
        )
        covered += result.low <= 40 <= result.high
    assert 0.90 <= covered / 300 <= 0.985


def test_draws_depend_only_on_the_seed_and_the_number_of_images():
    a, b = ranks_of(0), ranks_of(5)
    torch.manual_seed(1)
    assert interval([a], draws=150) == interval([a], draws=150) != interval([a], draws=150, seed=1)
    result = differences([a], [b], ("IR@1", "R@mean"), 150)
    assert result["IR@1"] == difference([a], [b], "IR@1", 150)


def test_invalid_arguments_are_rejected():
    a = ranks_of(0)
    with pytest.raises(ValueError, match="the list of ranks is empty"):
        interval([])
    with pytest.raises(ValueError, match="the list of ranks is empty"):
        difference([a], [])
    with pytest.raises(ValueError, match="different galleries"):
        difference([a], [ranks_of(0, RAGGED[::-1])])
    for metric in ("IR", "R@5", "IR@0", "MRR"):
        with pytest.raises(ValueError, match=f"unknown metric '{metric}'"):
            interval([a], metric)
    with pytest.raises(ValueError, match="draws must be at least 1 and level between 0 and 1"):
        interval([a], level=95.0)
