"""Retrieval ranks and recalls: exact, chunked, pessimistic about ties.

IR@K: a caption retrieves its image. TR@K: an image retrieves any of its captions. A candidate that scores the same as
the right one counts as ranked above it, so a collapsed model scores 0; `Recalls.gap` says how much that decided.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmdd.core.files import atomic_path

# I images, T captions, D joint width, Q queries and C candidates of one direction, q queries of one chunk,
# P most right candidates of a query

KS = (1, 5, 10)
STRIDE = 1024
"""Rows that are checked and normalised at once."""

Rows = Callable[[int, int], Tensor]
"""Scores of the queries from the first to the second number, (queries, candidates)."""


@dataclass(frozen=True)
class Recalls:
    """Percentages per K; `gap` is the largest optimistic minus pessimistic difference over all of them."""

    ir: dict[int, float]
    tr: dict[int, float]
    gap: float

    @property
    def mean(self) -> float:
        """R@mean, the plain mean over both directions and all K; models are selected by it."""
        values = [*self.ir.values(), *self.tr.values()]
        return sum(values) / len(values)

    def as_dict(self) -> dict[str, float]:
        named = {f"IR@{k}": v for k, v in self.ir.items()} | {f"TR@{k}": v for k, v in self.tr.items()}
        return named | {"R@mean": self.mean}


@dataclass(frozen=True)
class Ranks:
    """What every query found: 0-based, pessimistic ranks, from which each recall and its interval follow."""

    image: Int[Tensor, " T"]
    """Per caption, the rank of its image."""
    text: Int[Tensor, " I"]
    """Per image, the rank of its best caption."""
    image_of: Int[Tensor, " T"]
    image_ties: Int[Tensor, " T"] | None = None
    """How many of the candidates above are there by a tie alone; None: not known."""
    text_ties: Int[Tensor, " I"] | None = None
    text_own: Int[Tensor, " I"] | None = None
    """Per image, how many captions of its own score as high as its best."""

    @classmethod
    def worst(cls, image_of: Int[Tensor, " T"]) -> "Ranks":
        """Of a model that finds nothing at any K, such as a student that diverged."""
        never = torch.iinfo(torch.int32).max
        images = torch.full((int(image_of.max()) + 1,), never)
        return cls(torch.full((len(image_of),), never), images, image_of.cpu().long())

    def recalls(self, ks: Sequence[int] = KS) -> Recalls:
        """Percentages of the queries whose rank is below K. The gap is 0 where ties are not known."""
        if not ks or min(ks) < 1:
            raise ValueError(f"every K must be at least 1; found K {tuple(ks)}")
        ir, ir_gap = _recall(self.image, self.image_ties, ks)
        tr, tr_gap = _recall(self.text, self.text_ties, ks)
        return Recalls(ir, tr, max(ir_gap, tr_gap))

    def expected(self, ks: Sequence[int] = KS) -> Recalls:
        """Recalls on average over random orders of what ties. Raises `ValueError` where ties are not known."""
        if self.image_ties is None or self.text_ties is None or self.text_own is None:
            raise ValueError("these ranks were kept without their ties; rank the embeddings again")

        def percent(rank: Tensor, ties: Tensor, own: Tensor, k: int) -> float:
            """1 - C(ties, q) / C(ties + own, q) with q places left in the first k, as a product of q factors."""
            left = (k - (rank - ties)).clamp(min=0)[:, None]
            place = torch.arange(k, dtype=torch.float64)
            factor = (ties[:, None] - place).clamp(min=0) / (ties + own)[:, None].sub(place).clamp(min=1)
            return 100 * float((1 - torch.where(place < left, factor, 1.0).prod(1)).mean())

        one = torch.ones_like(self.image)
        ir = {k: percent(self.image, self.image_ties, one, k) for k in ks}
        return Recalls(ir, {k: percent(self.text, self.text_ties, self.text_own, k) for k in ks}, 0.0)

    def optimistic(self, ks: Sequence[int] = KS) -> Recalls:
        """Recalls with every tie in the model's favour."""
        if self.image_ties is None or self.text_ties is None:
            raise ValueError("these ranks were kept without their ties; rank the embeddings again")
        return Ranks(self.image - self.image_ties, self.text - self.text_ties, self.image_of).recalls(ks)

    def save(self, path: Path) -> None:
        """As int32 in a safetensors file."""
        from safetensors.torch import save_file

        tensors = {name: getattr(self, name) for name in self.__dataclass_fields__}
        with atomic_path(path) as temporary:
            save_file(
                {n: t.to("cpu", torch.int32).contiguous() for n, t in tensors.items() if t is not None}, temporary
            )

    @classmethod
    def load(cls, path: Path) -> "Ranks":
        from safetensors.torch import load_file

        return cls(**{name: t.long() for name, t in load_file(path).items()})


def ranks(
    images: Float[Tensor, "I D"], texts: Float[Tensor, "T D"], image_of: Int[Tensor, " T"], chunk: int = 256
) -> Ranks:
    """Ranks by cosine; `image_of[j]` is the image of caption j. Rows need not be normalised.

    Scores are float32 (float64 for float64 input) and `chunk` queries are held at once: O(chunk * max(I, T)) memory.
    Candidates with the same bits tie exactly, whatever the chunk. Raises ValueError for non-finite or zero rows,
    an empty gallery, and an image without captions.
    """
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        shapes = f"{tuple(images.shape)} and {tuple(texts.shape)}"
        raise ValueError(f"images and texts must be (I, D) and (T, D), found {shapes}")
    image_of = _checked(image_of, len(images), len(texts), images.device)
    u, v = _normalised(images, "image"), _normalised(texts, "text")
    return _both(_scorer(v, u), _scorer(u, v), image_of, len(images), chunk)


def ranks_from_scores(scores: Float[Tensor, "I T"], image_of: Int[Tensor, " T"], chunk: int = 256) -> Ranks:
    """The same from a score matrix (higher is closer), compared in the precision it comes in."""
    num_images, num_texts = scores.shape
    image_of = _checked(image_of, num_images, num_texts, scores.device)
    if bad := int((~scores.isfinite()).sum()):
        raise ValueError(f"{bad} of {scores.numel()} scores are not finite; recalls of them would mean nothing")
    return _both(lambda a, b: scores[:, a:b].T, lambda a, b: scores[a:b], image_of, num_images, chunk)


def recalls(
    images: Float[Tensor, "I D"],
    texts: Float[Tensor, "T D"],
    image_of: Int[Tensor, " T"],
    ks: Sequence[int] = KS,
    chunk: int = 256,
) -> Recalls:
    """Recalls of `ranks`."""
    return ranks(images, texts, image_of, chunk).recalls(ks)


def recalls_from_scores(
    scores: Float[Tensor, "I T"], image_of: Int[Tensor, " T"], ks: Sequence[int] = KS, chunk: int = 256
) -> Recalls:
    """Recalls of `ranks_from_scores`."""
    return ranks_from_scores(scores, image_of, chunk).recalls(ks)


def chance(image_of: Int[Tensor, " T"], ks: Sequence[int] = KS) -> Recalls:
    """What random scores reach on average: K / I, and 1 - C(T - m, K) / C(T, K) for an image with m captions."""
    num_texts, captions = len(image_of), torch.bincount(image_of)
    num_images = len(captions)

    def missed(m: Tensor, k: int) -> Tensor:
        """Chance that none of m captions is among k of all, as a product of k factors."""
        ranked = torch.arange(min(k, num_texts), dtype=torch.float64)
        return ((num_texts - m.double()[:, None] - ranked).clamp(min=0) / (num_texts - ranked)).prod(1)

    ir = {k: 100 * min(1.0, k / num_images) for k in ks}
    return Recalls(ir, {k: 100 * float((1 - missed(captions, k)).mean()) for k in ks}, 0.0)


def _both(text_rows: Rows, image_rows: Rows, image_of: Tensor, num_images: int, chunk: int) -> Ranks:
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; found {chunk}")
    of_image, image_ties, _ = _ranks(text_rows, image_of[:, None], chunk)
    of_text, text_ties, own = _ranks(image_rows, _captions_of(image_of, num_images), chunk)
    return Ranks(*(t.cpu() for t in (of_image, of_text, image_of, image_ties, text_ties, own)))


def _captions_of(image_of: Int[Tensor, " T"], num_images: int) -> Int[Tensor, "I P"]:
    """Per image its captions; a row that is short repeats its last one."""
    order = image_of.argsort(stable=True)
    counts = torch.bincount(image_of, minlength=num_images)
    first = counts.cumsum(0) - counts
    place = torch.arange(int(counts.max()), device=image_of.device)
    return order[first[:, None] + torch.minimum(place[None], counts[:, None] - 1)]


def _ranks(
    rows: Rows, positives_QP: Int[Tensor, "Q P"], chunk: int
) -> tuple[Int[Tensor, " Q"], Int[Tensor, " Q"], Int[Tensor, " Q"]]:
    """Pessimistic 0-based rank of each query's best positive, how many candidates merely tie with it, and how many
    positives are as good."""
    pessimistic, ties, good = [], [], []
    for start in range(0, len(positives_QP), chunk):
        score_qC = rows(start, start + chunk)
        index_qP = positives_QP[start : start + chunk]
        own_qP = score_qC.gather(1, index_qP)
        best_q1 = own_qP.amax(1, keepdim=True)
        above = (score_qC > best_q1).sum(1, dtype=torch.int32).long()  # summing into int64 takes thrice as long
        level = (score_qC >= best_q1).sum(1, dtype=torch.int32).long() - above
        repeats = torch.zeros_like(index_qP, dtype=torch.bool)
        repeats[:, 1:] = index_qP[:, 1:] == index_qP[:, :-1]
        good.append(((own_qP == best_q1) & ~repeats).sum(1))
        tied = level - good[-1]
        pessimistic.append(above + tied)
        ties.append(tied)
    return torch.cat(pessimistic), torch.cat(ties), torch.cat(good)


def _recall(pessimistic: Tensor, ties: Tensor | None, ks: Sequence[int]) -> tuple[dict[int, float], float]:
    percent = {k: 100 * int((pessimistic < k).sum()) / len(pessimistic) for k in ks}
    if ties is None:
        return percent, 0.0
    return percent, max(100 * int((pessimistic - ties < k).sum()) / len(ties) - percent[k] for k in ks)


def _scorer(queries: Float[Tensor, "Q D"], candidates: Float[Tensor, "C D"]) -> Rows:
    # A matrix product may round equal columns differently by where they stand, so each distinct one is scored once.
    distinct, which = _distinct(candidates)
    if len(distinct) == len(candidates):
        return lambda a, b: queries[a:b] @ candidates.T
    return lambda a, b: (queries[a:b] @ distinct.T)[:, which]


def _distinct(rows: Float[Tensor, "C D"]) -> tuple[Float[Tensor, "_ D"], Int[Tensor, " C"]]:
    """Rows that differ in their bits, and which of them each row is; found by a hash, which is checked."""
    bits = rows.contiguous().view(torch.int32)
    random = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=random).to(rows.device)
    hashes = torch.cat([(part.long() * factors).sum(1) for part in bits.split(STRIDE)])
    _, which = torch.unique(hashes, return_inverse=True)
    count = int(which.max()) + 1
    if count == len(rows):
        return rows, which
    first = torch.full((count,), len(rows), device=rows.device)
    first = first.scatter_reduce(0, which, torch.arange(len(rows), device=rows.device), "amin")
    for part, own in zip(bits.split(STRIDE), which.split(STRIDE), strict=True):
        assert torch.equal(part, bits[first[own]]), "two rows have one hash"
    return rows[first], which


def _normalised(rows: Tensor, what: str) -> Tensor:
    rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
    unit = torch.empty_like(rows)
    infinite = zero = 0
    for part, out in zip(rows.split(STRIDE), unit.split(STRIDE), strict=True):
        largest = part.abs().amax(1, keepdim=True)
        infinite += int((~largest.isfinite()).sum())
        zero += int((largest == 0).sum())
        torch.div(part, largest, out=out)  # so that no norm under- or overflows
        out.div_(out.norm(dim=1, keepdim=True)).add_(0.0)  # and no zero has a sign
    if infinite or zero:
        raise ValueError(
            f"of {len(rows)} {what} embeddings {infinite} are not finite and {zero} are zero; "
            "the model has diverged or collapsed"
        )
    return unit


def _checked(image_of: Tensor, num_images: int, num_texts: int, device: torch.device) -> Tensor:
    if not num_images or not num_texts:
        raise ValueError(f"the gallery has {num_images} images and {num_texts} captions; it needs both")
    if image_of.shape != (num_texts,):
        raise ValueError(f"image_of must give one image per caption ({num_texts}); found shape {tuple(image_of.shape)}")
    image_of = image_of.to(device=device, dtype=torch.int64)
    low, high = int(image_of.min()), int(image_of.max())
    if low < 0 or high >= num_images:
        raise ValueError(f"image_of spans {low}..{high} but images are 0..{num_images - 1}")
    captions = torch.bincount(image_of, minlength=num_images)
    if bare := int((captions == 0).sum()):
        first = int(captions.argmin())
        raise ValueError(f"{bare} of {num_images} images have no caption (first: {first}); leave them out")
    return image_of
