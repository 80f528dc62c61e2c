"""Check NCFM's clusters of pairs: each has enough images, small ones are merged, initial pairs are distinct."""

import numpy as np
import pytest

from rmdd.distill.distribution.classes import assigned, balanced, clusters_of, initial_pairs


def points(images=60, captions=3, width=4, groups=3, seed=0):
    random = np.random.default_rng(seed)
    image_of = np.repeat(np.arange(images), captions)
    centres = 10 * random.standard_normal((groups, width))
    result = centres[image_of % groups] + random.standard_normal((len(image_of), width))
    return result.astype(np.float32), image_of


def images_in(labels, image_of, clusters):
    return [len(set(image_of[labels == c].tolist())) for c in range(clusters)]


@pytest.mark.parametrize(("clusters", "ipc"), [(1, 5), (3, 4), (12, 2), (30, 1)])
def test_every_cluster_has_enough_images(clusters, ipc):
    x, image_of = points()
    labels = clusters_of(x, image_of, clusters, ipc, seed=0)
    assert len(labels) == len(x) and set(labels.tolist()) == set(range(clusters))
    assert min(images_in(labels, image_of, clusters)) >= ipc
    assert np.array_equal(labels, clusters_of(x, image_of, clusters, ipc, seed=0))


def test_planted_groups_are_found():
    x, image_of = points()
    labels = clusters_of(x, image_of, 3, 2, seed=0)
    assert len({(int(a), int(b)) for a, b in zip(labels, image_of % 3, strict=True)}) == 3


def test_points_go_to_the_nearest_centre():
    x, _ = points()
    centres = x[::25]
    slow = [min(range(len(centres)), key=lambda c: float(((p - centres[c]) ** 2).sum())) for p in x]
    assert assigned(x, centres).tolist() == slow


def test_a_small_cluster_joins_the_nearest_and_the_largest_is_split():
    """The points lie on a line: 20 images near 0, 10 near 100, one image at 98, and one empty cluster."""
    place = np.concatenate([np.linspace(-1, 1, 20), np.linspace(100, 101, 10), [98.0]])
    x = np.stack([place, np.zeros_like(place)], axis=1).astype(np.float32)
    labels = balanced(x, np.arange(31), np.array([0] * 20 + [1] * 10 + [2]), 4, 2)
    sizes = images_in(labels, np.arange(31), 4)
    assert labels[30] == labels[20], "the image at 98 joins its neighbours"
    assert sorted(sizes) == [5, 6, 10, 10], "both groups were split, because each was once the largest"
    assert not set(labels[:20].tolist()) & set(labels[20:].tolist())
    along = labels[np.argsort(place)]
    assert (np.diff(along) != 0).sum() == 3, "each cluster is an interval of the line"


def test_sizes_are_counted_in_images():
    """Check that five captions of one image add one image to the size of a cluster."""
    x = np.concatenate([np.zeros((5, 2)), np.ones((30, 2)) * np.arange(10, 40)[:, None]]).astype(np.float32)
    image_of = np.array([0] * 5 + list(range(1, 31)))
    labels = balanced(x, image_of, np.array([0] * 5 + [1] * 30), 2, 3)
    assert min(images_in(labels, image_of, 2)) >= 3


@pytest.mark.parametrize("pick", ["nearest", "random"])
def test_initial_pairs_have_distinct_images(pick):
    x, image_of = points(captions=5)
    labels = clusters_of(x, image_of, 6, 3, seed=0)
    records = initial_pairs(x, image_of, labels, 6, 3, pick, seed=0)
    assert labels[records].tolist() == np.repeat(np.arange(6), 3).tolist(), "cluster by cluster"
    assert all(len(set(image_of[records[3 * c : 3 * c + 3]].tolist())) == 3 for c in range(6))
    assert records == initial_pairs(x, image_of, labels, 6, 3, pick, seed=0)
    if pick == "nearest":
        for c in range(6):
            own = np.flatnonzero(labels == c)
            away = ((x - x[own].mean(axis=0)) ** 2).sum(axis=1)
            taken = records[3 * c : 3 * c + 3]
            others = [r for r in own if image_of[r] not in image_of[taken]]
            assert away[taken[0]] == away[own].min() and all(away[r] >= away[taken].max() for r in others)


def test_too_few_images_are_refused():
    x, image_of = points(images=20)
    match = "7 clusters of 2 pairs each need at least 28 images, but the train split has 20"
    with pytest.raises(ValueError, match=match):
        clusters_of(x, image_of, 7, 2, seed=0)
