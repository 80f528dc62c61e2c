"""Tests that compare the health statistics of embeddings with a slow implementation and check extreme inputs."""

import itertools
import math

import numpy as np
import pytest
import torch

from rmdd.evaluate import health as module
from rmdd.evaluate.health import collapsed, health, stripes


def rows(n, d, seed, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow(images, texts):
    """Compute the health statistics with Python loops over pairs of rows."""
    u = [np.asarray(x) / np.linalg.norm(x) for x in images]
    v = [np.asarray(x) / np.linalg.norm(x) for x in texts]
    n = len(u)
    off = [(i, j) for i in range(n) for j in range(n) if i != j]
    pairs = list(itertools.combinations(range(n), 2))
    mean_u, mean_v = sum(u) / n, sum(v) / n
    stats = {
        "cosine_image": np.mean([u[i] @ u[j] for i, j in pairs]),
        "cosine_text": np.mean([v[i] @ v[j] for i, j in pairs]),
        "cosine_image_p05": np.percentile([u[i] @ u[j] for i, j in off], 5),
        "cosine_text_p95": np.percentile([v[i] @ v[j] for i, j in off], 95),
        "centroid_image": np.linalg.norm(mean_u),
        "centroid_text": np.linalg.norm(mean_v),
        "gap": np.linalg.norm(mean_u - mean_v),
        "alignment": np.mean([np.sum((a - b) ** 2) for a, b in zip(u, v, strict=True)]),
        "uniformity_image": math.log(np.mean([math.exp(-2 * np.sum((u[i] - u[j]) ** 2)) for i, j in pairs])),
        "uniformity_text": math.log(np.mean([math.exp(-2 * np.sum((v[i] - v[j]) ** 2)) for i, j in pairs])),
        "uniformity_cross": math.log(np.mean([math.exp(-2 * np.sum((u[i] - v[j]) ** 2)) for i, j in off])),
        "margin": np.mean([u[i] @ v[i] for i in range(n)]) - np.mean([u[i] @ v[j] for i, j in off]),
    }
    stats["gap_share"] = stats["gap"] ** 2 / stats["alignment"]
    for side, each in (("image", u), ("text", v)):
        s = np.linalg.svd(np.array(each) - np.mean(each, 0), compute_uv=False)
        s = s[s > 1e-9]
        stats[f"rank_{side}"] = math.exp(-sum(x / s.sum() * math.log(x / s.sum()) for x in s))
    for side, queries, candidates in (("image", v, u), ("text", u, v)):
        counts = np.zeros(n)
        for q in queries:
            for j in sorted(range(n), key=lambda j, q=q: -(q @ candidates[j]))[:10]:
                counts[j] += 1
        z = counts - counts.mean()
        stats[f"hubness_{side}"] = np.mean(z**3) / np.mean(z**2) ** 1.5
    return stats


def test_statistics_equal_slow_loops():
    images = rows(40, 7, 0) + 0.5
    texts = images @ rows(7, 7, 1) + 0.3 * rows(40, 7, 2)
    stats = health(3 * images, texts)
    for name, value in slow(images.numpy(), texts.numpy()).items():
        assert stats[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_the_chunk_size_does_not_change_the_statistics(monkeypatch):
    images, texts = rows(50, 5, 3), rows(50, 5, 4)
    exact = health(images, texts)
    monkeypatch.setattr(module, "CHUNK", 7)
    assert health(images, texts) == pytest.approx(exact, rel=1e-12)


def test_sampled_statistics_are_close_and_seeded(monkeypatch):
    images, texts = rows(60, 5, 5), rows(60, 5, 6)
    exact = health(images, texts)
    monkeypatch.setattr(module, "EXACT", 10)
    monkeypatch.setattr(module, "SAMPLE", 3000)
    drawn = health(images, texts, seed=1)
    assert drawn == health(images, texts, seed=1)
    for name in ("uniformity_image", "uniformity_cross", "cosine_text_p50"):
        assert drawn[name] != exact[name]
        assert drawn[name] == pytest.approx(exact[name], abs=0.15), name


def test_equal_rows():
    stats = health(torch.ones(12, 4), torch.ones(12, 4))
    assert stats["cosine_image"] == pytest.approx(1)
    assert stats["uniformity_image"] == pytest.approx(0, abs=1e-12)
    assert stats["rank_image"] == 0
    assert stats["gap"] == pytest.approx(0, abs=1e-12) == stats["alignment"] == stats["gap_share"]
    assert stats["margin"] == pytest.approx(0, abs=1e-12)


def test_orthonormal_rows():
    stats = health(torch.eye(6), torch.eye(6))
    assert stats["cosine_image"] == pytest.approx(0, abs=1e-12)
    assert stats["gap"] == stats["alignment"] == 0
    assert stats["margin"] == pytest.approx(1)
    assert stats["rank_image"] == pytest.approx(5)


def test_texts_opposite_to_their_images():
    images = rows(20, 6, 7)
    stats = health(images, -images)
    assert stats["alignment"] == pytest.approx(4)


def test_the_linear_probe_separates_distant_modalities_and_is_at_chance_for_equal_ones():
    images = rows(100, 8, 8)
    offset = torch.zeros(8, dtype=torch.float64)
    offset[0] = 50
    assert health(images + offset, rows(100, 8, 9) - offset)["separability"] == 1
    assert health(images, rows(100, 8, 9))["separability"] == pytest.approx(0.5, abs=0.15)


def test_unusable_rows_are_counted_and_left_out():
    images, texts = rows(20, 6, 10), rows(20, 6, 11)
    broken, other = images.clone(), texts.clone()
    broken[3] = 0
    broken[5, 1] = torch.nan
    other[5] = torch.inf
    other[9] = 0
    stats = health(broken, other)
    usable = torch.tensor([i not in (3, 5, 9) for i in range(20)])
    assert stats.pop("unusable") == 3
    assert stats.pop("pairs") == 20
    rest = health(images[usable], texts[usable])
    assert stats == {k: v for k, v in rest.items() if k in stats}
    assert health(torch.zeros(4, 3), torch.ones(4, 3)) == {"pairs": 4, "unusable": 4}


def test_statistics_do_not_depend_on_the_norm_of_rows():
    images, texts = rows(30, 6, 12), rows(30, 6, 13)
    scaled = health(images * torch.logspace(-150, 150, 30, dtype=torch.float64)[:, None], texts * 1e-300)
    assert scaled == pytest.approx(health(images, texts), rel=1e-6, abs=1e-9)


def test_stripes():
    by_row = torch.arange(5.0)[:, None].expand(5, 5)
    m = 200
    assert stripes(by_row.repeat(40, 1)[:m].repeat(1, 40)[:, :m]) == pytest.approx(1, abs=0.02)
    noise = rows(m, m, 14)
    assert stripes(noise) == pytest.approx(2 / m, rel=0.5)
    assert stripes(torch.eye(4)) == 0 == stripes(torch.ones(1, 1))


def test_collapsed_sets_get_warnings_and_healthy_ones_do_not():
    real = health(rows(60, 16, 15), rows(60, 16, 16))
    assert collapsed(health(rows(60, 16, 17), rows(60, 16, 18)), real) == []
    point = torch.ones(60, 16, dtype=torch.float64)
    narrow = collapsed(health(rows(60, 16, 17) + 30 * point, rows(60, 16, 18)), real)
    assert len(narrow) == 1 and "image" in narrow[0] and "cosine" in narrow[0]
    flat = rows(60, 2, 19) @ rows(2, 16, 20)
    poor = collapsed(health(rows(60, 16, 17), flat), real)
    assert any("text" in warning and "rank" in warning for warning in poor)
    assert "zero" in collapsed(health(0 * flat, flat), real)[0]
