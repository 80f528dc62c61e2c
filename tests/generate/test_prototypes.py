"""Matched prototypes, compared with slow exhaustive searches and with the clusters planted in the features."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmdd.coresets.matched import match
from rmdd.coresets.rows import Rows, write_rows
from rmdd.coresets.spaces import Sides
from rmdd.data.shards import Dataset
from rmdd.data.splits import Split
from rmdd.execution.parts import local_parts
from rmdd.generate.prototypes import contingency, find, partition, raw_cosines, refill_empty_clusters, retrieved

WIDTH = 6


def sides(images, texts, image_of=None):
    image_of = np.arange(len(texts)) if image_of is None else np.asarray(image_of)
    names, pixels = [f"pair {i}" for i in range(len(images))], np.zeros((len(images), 3, 1, 1), np.uint8)
    captions, rows = [f"caption {i}" for i in range(len(texts))], np.arange(len(images))
    split = Split("train", pixels, captions, image_of, names, {}, Dataset(Path(), {}), rows, Path())
    return Sides(Rows.of(images.astype(np.float32)), Rows.of(texts.astype(np.float32)), split)


def noise(count, seed=0, width=WIDTH):
    return np.random.default_rng(seed).standard_normal((count, width))


def planted(order, each=5, seed=0):
    """Return image and text features in distant groups, and the group of each image. The texts of the images in group i
    form the group `order[i]`."""
    group = np.repeat(np.arange(len(order)), each)
    centres = 40 + 30 * np.eye(len(order), WIDTH)
    images = centres[group] + noise(len(group), seed)
    return images, centres[np.asarray(order)[group]] + noise(len(group), seed + 1), group


@settings(deadline=None)
@given(k=st.integers(1, 5), n=st.integers(0, 30), seed=st.integers(0, 999))
def test_contingency_equals_a_double_loop(k, n, seed):
    random = np.random.default_rng(seed)
    a, b = random.integers(0, k, n), random.integers(0, k, n)
    slow = [[sum(1 for x, y in zip(a, b, strict=True) if (x, y) == (i, j)) for j in range(k)] for i in range(k)]
    assert contingency(a, b, k).tolist() == slow


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 6), seed=st.integers(0, 999))
def test_the_matching_has_the_maximal_overlap(size, seed):
    overlap = np.random.default_rng(seed).integers(0, 9, (size, size))
    best = max(sum(overlap[i, p[i]] for i in range(size)) for p in itertools.permutations(range(size)))
    assert overlap[np.arange(size), match(overlap)].sum() == best


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_planted_clusters_are_found_for_any_order_of_labels(order):
    images, texts, group = planted(order)
    prototypes, remaining = find(sides(images, texts), 4, 0, local_parts, rm_ratio=0.0, starts=4)
    assert (
        remaining.tolist() == list(range(20)) and prototypes.facts["overlap"] == 1 and prototypes.facts["pairless"] == 0
    )
    assert sorted(tuple(c.images) for c in prototypes.cells) == [tuple(np.flatnonzero(group == g)) for g in range(4)]
    for cell, image, text in zip(prototypes.cells, prototypes.images, prototypes.texts, strict=True):
        assert np.allclose(image, images[cell.images].mean(axis=0), atol=1e-4)
        assert np.allclose(text, texts[cell.texts].mean(axis=0), atol=1e-4)
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (prototypes.images, prototypes.texts))
    assert (np.diff((u * v).sum(axis=1)) <= 1e-6).all()


def test_rescaled_prototypes_have_the_length_of_their_members():
    images, texts, _ = planted([0, 1])
    prototypes, _ = find(sides(images, texts), 2, 0, local_parts, rm_ratio=0.0, starts=2, rescale=True)
    lengths = [np.linalg.norm(images[c.images], axis=1).mean() for c in prototypes.cells]
    assert np.allclose(np.linalg.norm(prototypes.images, axis=1), lengths, rtol=1e-5)


def test_pruning_drops_the_records_with_the_lowest_cosines():
    both, image_of = sides(noise(7), noise(14, 1), np.repeat(np.arange(7), 2)), np.repeat(np.arange(7), 2)
    cosine = [
        u @ v / np.linalg.norm(u) / np.linalg.norm(v) for u, v in zip(noise(7)[image_of], noise(14, 1), strict=True)
    ]
    assert np.allclose(raw_cosines(both), cosine, atol=1e-6)
    _, remaining = find(both, 2, 0, local_parts, rm_ratio=0.25, starts=1)
    assert remaining.tolist() == sorted(np.argsort(cosine)[3:].tolist())


@pytest.mark.parametrize("rule", ["topup", "keep_centres", "drop"])
def test_matches_without_shared_records(rule):
    """Match two groups of texts with three groups of images, so that one pair of matched clusters shares no record."""
    images, _, group = planted([0, 1, 2], each=8)
    texts = np.where((group == 0)[:, None], 50.0, -50.0) * np.eye(1, WIDTH) + 1e-3 * noise(24, 3)
    texts[group == 0] += np.where(np.arange(8) < 4, 20.0, -20.0)[:, None] * np.eye(WIDTH)[1]
    prototypes, _ = find(sides(images, texts), 3, 0, local_parts, rm_ratio=0.0, starts=4, pairless=rule)
    assert prototypes.facts["pairless"] == 1
    assert len(prototypes.images) == len(prototypes.texts) == len(prototypes.cells) == (2 if rule == "drop" else 3)
    shared = [c for c in prototypes.cells if c.shared]
    assert len(shared) == {"topup": 3, "keep_centres": 2, "drop": 2}[rule]
    members = np.concatenate([c.images for c in shared])
    assert len(set(members.tolist())) == len(members)
    for cell, image in zip(prototypes.cells, prototypes.images, strict=True):
        assert np.allclose(image, images[cell.images].mean(axis=0), atol=1e-4)


@settings(deadline=None, max_examples=15)
@given(count=st.integers(4, 24), distinct=st.integers(1, 24), seed=st.integers(0, 99), data=st.data())
def test_topup_returns_the_configured_number_of_pairs(count, distinct, seed, data):
    """The number of pairs must also be right if clusters share few records or if images have equal features."""
    pairs = data.draw(st.integers(1, count))
    images = noise(distinct, seed)[np.random.default_rng(seed).integers(0, distinct, count)]
    prototypes, _ = find(sides(images, noise(count, seed + 1)), pairs, seed, local_parts, rm_ratio=0.0, starts=1)
    assert len(prototypes.images) == len(prototypes.cells) == pairs and all(
        len(c.images) and c.shared for c in prototypes.cells
    )
    members = np.concatenate([c.images for c in prototypes.cells])
    assert len(set(members.tolist())) == len(members)


def test_empty_clusters_get_the_rows_farthest_from_their_centroid():
    label, distance = np.array([0, 0, 0, 2, 2]), np.array([0.0, 5, 1, 2, 0])
    assert refill_empty_clusters(label, distance, np.arange(5), 4).tolist() == [0, 1, 0, 3, 2]
    assert refill_empty_clusters(np.zeros(3, int), np.zeros(3), np.arange(3), 2).tolist() == [0, 0, 0]  # no row moves
    # no record has the features of row 1, so row 3 moves to the empty cluster
    assert refill_empty_clusters(label, distance, np.array([0, 2, 3, 4]), 2 + 1).tolist() == [0, 0, 0, 1, 2]


def test_rows_on_disk_and_workers_do_not_change_clusters(tmp_path, monkeypatch):
    rows = noise(60, 4).astype(np.float32)
    of = np.random.default_rng(0).integers(0, 60, 90)
    in_memory = partition(Rows.of(rows), of, 7, 1, local_parts, 2, True)
    written = write_rows(tmp_path / "rows", [(np.arange(60), rows)], WIDTH, "float32", {})
    monkeypatch.setattr("rmdd.generate.prototypes.RANKS_FROM", 0)
    opened = []

    def three(make):
        opened.append(make)
        return local_parts(make, 3)

    assert partition(written, of, 7, 1, three, 2, True).tolist() == in_memory.tolist() and opened
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert partition(Rows.of(unit), of, 7, 1, local_parts, 2).tolist() == in_memory.tolist()


def test_retrieval_with_and_without_repeats():
    rows = Rows.of(np.array([[1, 0], [1, 0.1], [0, 1], [-1, 0]], np.float32))
    queries = np.array([[2, 0], [3, 0.05]], np.float32)
    assert retrieved(queries, rows, np.arange(4), True).tolist() == [0, 0]
    assert retrieved(queries, rows, np.arange(4), False).tolist() == [0, 1]
    assert retrieved(queries, rows, np.array([2, 3]), True).tolist() == [2, 2]
    with pytest.raises(ValueError, match="1 rows are too few for 2 prototypes without repeats"):
        retrieved(queries, rows, np.array([2]), False)


@settings(deadline=None, max_examples=25)
@given(count=st.integers(1, 5), more=st.integers(0, 3), seed=st.integers(0, 99))
def test_retrieval_without_repeats_maximises_the_sum_of_cosines(count, more, seed):
    rows, queries = noise(count + more, seed).astype(np.float32), noise(count, seed + 1).astype(np.float32)
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, rows))
    cosine = u @ v.T
    prototypes = retrieved(queries, Rows.of(rows), np.arange(len(rows)), False)
    best = max(sum(cosine[i, p[i]] for i in range(count)) for p in itertools.permutations(range(len(rows)), count))
    assert len(set(prototypes.tolist())) == count
    assert cosine[np.arange(count), prototypes].sum() == pytest.approx(best, abs=1e-5)


def test_impossible_settings_are_refused():
    with pytest.raises(
        ValueError, match=r"9 pairs need at least as many caption records, but rm_ratio 0.2 leaves 8 of 10"
    ):
        find(sides(noise(10), noise(10, 1)), 9, 0, local_parts, rm_ratio=0.2)
    with pytest.raises(ValueError, match="set rm_ratio: 0"):
        find(sides(noise(4), noise(4, 1, 3)), 2, 0, local_parts)
    prototypes, _ = find(sides(noise(9), noise(9, 1, 3)), 4, 0, local_parts, rm_ratio=0.0, starts=1)
    sizes = [len(c.images) for c in prototypes.cells]
    assert sizes == sorted(sizes, reverse=True)  # without cosines, prototypes are sorted by number of records
