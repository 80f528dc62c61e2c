"""Compare merged checkpoints with the paper's formula in plain Python; check how many checkpoints stay in memory."""

from collections import Counter

import pytest
import torch
from toy import EPOCHS, EXPERTS, same_tensors

from rmdd.distill.distribution.merging import Cell, Pool, cosine, draw_two, interpolated, merge

SHAPES = {"image_tower.a": (3, 2), "image_tower.b": (4,), "text_head.c": (2, 5)}


def params(seed, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=random, dtype=dtype) for n, s in SHAPES.items()}


def slow_merge(anchor, first, second, alpha, positive):
    result = {}
    for name, w in anchor.items():
        one = [float(x - y) for x, y in zip(first[name].flatten(), w.flatten(), strict=True)]
        two = [float(x - y) for x, y in zip(second[name].flatten(), w.flatten(), strict=True)]
        length = sum(x * x for x in one) ** 0.5 * sum(x * x for x in two) ** 0.5
        c = sum(x * y for x, y in zip(one, two, strict=True)) / (length + 1e-12)
        c = min(1.0, max(0.0 if positive else -1.0, c))
        ratio = 2 * c / (1 + c)
        mean = [(x + y) / 2 for x, y in zip(one, two, strict=True)]
        flat = [float(o) + alpha * ratio * m for o, m in zip(w.flatten(), mean, strict=True)]
        result[name] = torch.tensor(flat, dtype=torch.float64).view(w.shape)
    return result


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_merge_equals_the_published_formula(seed, alpha, positive):
    anchor, first, second = params(seed), params(seed + 10), params(seed + 20)
    result, slow = (
        merge(anchor, first, second, alpha, positive=positive),
        slow_merge(anchor, first, second, alpha, positive),
    )
    for name in SHAPES:
        torch.testing.assert_close(result[name], slow[name], rtol=1e-9, atol=1e-11)
    swapped = merge(anchor, second, first, alpha, positive=positive)
    assert all(torch.allclose(swapped[n], result[n], rtol=1e-12) for n in SHAPES), "checkpoint order does not matter"


def test_merging_equal_checkpoints_and_anchors():
    anchor, first, second = params(0, torch.float32), params(1, torch.float32), params(2, torch.float32)
    for name, t in merge(anchor, first, first, 1.0).items():
        torch.testing.assert_close(t, first[name])
    assert same_tensors(merge(anchor, first, second, 0.0), anchor)
    assert same_tensors(merge(anchor, anchor, second, 1.0), anchor), "a checkpoint equal to the anchor gives the anchor"


def test_orthogonal_and_opposed_displacements_give_the_anchor():
    anchor = {"w": torch.zeros(2)}
    x, y = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 3.0])}
    assert same_tensors(merge(anchor, x, y, 1.0), anchor)
    opposed = {"w": torch.tensor([-2.0, 0.1])}
    assert same_tensors(merge(anchor, x, opposed, 1.0), anchor)
    assert merge(anchor, x, opposed, 1.0, positive=False)["w"].norm() > 100, "without the clamp the teacher is huge"
    assert cosine(x["w"], opposed["w"], positive=False) == pytest.approx(-1, abs=2e-3)


def test_checkpoints_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"missing \['text_head.c'\]"):
        merge(params(0), {n: t for n, t in params(1).items() if n != "text_head.c"}, params(2), 0.5)


def test_interpolation_is_linear():
    anchor, other = params(0), params(1)
    for name, t in interpolated(anchor, other, 0.25).items():
        torch.testing.assert_close(t, 0.75 * anchor[name] + 0.25 * other[name])


@pytest.mark.parametrize(("experts", "epochs"), [([0, 2, 5], [1, 2, 3]), ([0, 1], [4]), ([3], [1, 2])])
@pytest.mark.parametrize("within", [False, True])
def test_all_pairs_of_different_checkpoints_are_drawn(experts, epochs, within):
    if within and len(epochs) < 2:
        with pytest.raises(ValueError, match=r"needs two checkpoints, .* set experts.keep: all"):
            draw_two(experts, epochs, torch.Generator(), within=True)
        return
    counts = Counter()
    for seed in range(600):
        first, second = draw_two(experts, epochs, torch.Generator().manual_seed(seed), within=within)
        assert first != second and (not within or first.expert == second.expert)
        counts[first, second] += 1
    cells = [Cell(e, t) for e in experts for t in epochs]
    wanted = {(a, b) for a in cells for b in cells if a != b and (not within or a.expert == b.expert)}
    assert set(counts) == wanted


def test_a_pool_reads_on_demand_and_limits_its_memory(store, monkeypatch):
    reads = []
    read = store.read
    monkeypatch.setattr(type(store), "read", lambda self, *cell: reads.append(cell) or read(*cell))
    one = sum(p.numel() * 4 for p in read(0, 1).values())
    pool = Pool(store, range(EXPERTS), range(1, EPOCHS + 1), max_bytes=2 * one)
    assert not reads
    for cell in (Cell(0, 1), Cell(1, 2), Cell(0, 1), Cell(1, 3), Cell(0, 1), Cell(1, 2)):
        assert same_tensors(pool.read(cell), read(*cell))
        assert len(pool._cached) <= 2 and pool._bytes == len(pool._cached) * one
    assert reads == [(0, 1), (1, 2), (1, 3), (1, 2)], "the least recently used checkpoint is dropped first"
    small = Pool(store, [0], [1], max_bytes=1)
    assert same_tensors(small.read(Cell(0, 1)), read(0, 1)) and len(small._cached) == 1
