"""Retrieval ranks and recalls: exact, computed in chunks, with ties counted against the model.

IR@K: a caption retrieves its image. TR@K: an image retrieves any of its captions. A candidate with the same score as
the correct one counts as ranked above it, so a collapsed model scores 0. `Recalls.gap` is the effect of this rule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmdd.core.files import atomic_path

# Letters in shapes: I images, T captions, D joint width, Q queries and C candidates of one direction, q queries of one
# chunk, P largest number of correct candidates of a query

KS = (1, 5, 10)
STRIDE = 1024
"""Number of embeddings that are checked and normalised at once."""

Rows = Callable[[int, int], Tensor]
"""Function of (start, stop) that returns the scores of queries start..stop-1 as a matrix (queries, candidates)."""


@dataclass(frozen=True)
class Recalls:
    """Recalls in percent for each cut-off K. `gap` is the largest amount that a recall would gain if ties were hits."""

    ir: dict[int, float]
    tr: dict[int, float]
    gap: float

    @property
    def mean(self) -> float:
        """R@mean: the mean of all recalls in percent, over both directions and all K; used to select models."""
        values = [*self.ir.values(), *self.tr.values()]
        return sum(values) / len(values)

    def as_dict(self) -> dict[str, float]:
        named = {f"IR@{k}": v for k, v in self.ir.items()} | {f"TR@{k}": v for k, v in self.tr.items()}
        return named | {"R@mean": self.mean}


@dataclass(frozen=True)
class Ranks:
    """The rank, from 0, of the best correct candidate of every query; wrong candidates that tie are ranked above."""

    image: Int[Tensor, " T"]
    """For each caption, the rank of its image."""
    text: Int[Tensor, " I"]
    """For each image, the rank of its best-ranked correct caption."""
    image_of: Int[Tensor, " T"]
    """For each caption, the index of its image."""
    image_ties: Int[Tensor, " T"] | None = None
    """For each caption, the number of wrong images that tie with the correct one; None: unknown."""
    text_ties: Int[Tensor, " I"] | None = None
    """For each image, the number of wrong captions that tie with its best-ranked correct caption; None: unknown."""
    text_own: Int[Tensor, " I"] | None = None
    """For each image, the number of its correct captions with the score of the best-ranked one; None: unknown."""

    @classmethod
    def worst(cls, image_of: Int[Tensor, " T"]) -> "Ranks":
        """Return the worst possible ranks, which give recall 0 at every K; used for a student that diverged."""
        last = torch.iinfo(torch.int32).max
        images = torch.full((int(image_of.max()) + 1,), last)
        return cls(torch.full((len(image_of),), last), images, image_of.cpu().long())

    def recalls(self, ks: Sequence[int] = KS) -> Recalls:
        """Return the recalls in percent at each cut-off K in `ks`. `Recalls.gap` is 0 if ties are unknown."""
        if not ks or min(ks) < 1:
            raise ValueError(f"every K must be at least 1; found K {tuple(ks)}")
        ir, ir_gap = _recall(self.image, self.image_ties, ks)
        tr, tr_gap = _recall(self.text, self.text_ties, ks)
        return Recalls(ir, tr, max(ir_gap, tr_gap))

    def expected(self, ks: Sequence[int] = KS) -> Recalls:
        """Return the mean recalls if tied candidates are ordered randomly. Raise `ValueError` if ties are unknown."""
        if self.image_ties is None or self.text_ties is None or self.text_own is None:
            raise ValueError("these ranks were saved without ties; rank the embeddings again")

        def percent(rank: Tensor, ties: Tensor, correct: Tensor, k: int) -> float:
            """Return the expected recall in percent: the mean of 1 - C(ties, q) / C(ties + correct, q).

            q is the number of places among the first k that tied candidates fill.
            """
            free = (k - (rank - ties)).clamp(min=0)[:, None]
            place = torch.arange(k, dtype=torch.float64)
            factor = (ties[:, None] - place).clamp(min=0) / (ties + correct)[:, None].sub(place).clamp(min=1)
            return 100 * float((1 - torch.where(place < free, factor, 1.0).prod(1)).mean())

        ones = torch.ones_like(self.image)
        ir = {k: percent(self.image, self.image_ties, ones, k) for k in ks}
        return Recalls(ir, {k: percent(self.text, self.text_ties, self.text_own, k) for k in ks}, 0.0)

    def optimistic(self, ks: Sequence[int] = KS) -> Recalls:
        """Return the recalls with every tie counted as a hit. Raise `ValueError` if ties are unknown."""
        if self.image_ties is None or self.text_ties is None:
            raise ValueError("these ranks were saved without ties; rank the embeddings again")
        return Ranks(self.image - self.image_ties, self.text - self.text_ties, self.image_of).recalls(ks)

    def save(self, path: Path) -> None:
        """Write the ranks to a safetensors file as int32."""
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
    """Rank all candidates of every query by cosine; `image_of[j]` is the image of caption j.

    Rows need not be normalised. Scores are float32 (float64 for float64 input). `chunk` queries are scored at once,
    which needs O(chunk * max(I, T)) memory. Candidates with identical bits always tie, for any chunk size. Raise
    `ValueError` for non-finite or zero rows, an empty gallery, or an image without captions.
    """
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        shapes = f"{tuple(images.shape)} and {tuple(texts.shape)}"
        raise ValueError(f"images and texts must have shapes (I, D) and (T, D); found {shapes}")
    image_of = _checked(image_of, len(images), len(texts), images.device)
    u, v = _normalised(images, "image"), _normalised(texts, "text")
    return _both_directions(_scorer(v, u), _scorer(u, v), image_of, len(images), chunk)


def first_images(
    images: Float[Tensor, "I D"],
    texts: Float[Tensor, "T D"],
    image_of: Int[Tensor, " T"],
    captions: Sequence[int],
    number: int,
    chunk: int = 256,
) -> list[list[int]]:
    """Return for each of `captions` the indices of its first `number` images, best first.

    A caption's own image comes after the images that tie with it, and its scores are those of `ranks` with the same
    `chunk`. So the own image is in the list exactly if its rank is below `number`.
    """
    image_of = _checked(image_of, len(images), len(texts), images.device)
    rows = _scorer(_normalised(texts, "text"), _normalised(images, "image"))
    found = []
    for caption in captions:
        first = caption // chunk * chunk
        scores = rows(first, first + chunk)[caption - first]
        own = torch.arange(len(images), device=images.device) == image_of[caption]
        own_last = own.long().argsort(stable=True)
        order = scores[own_last].argsort(descending=True, stable=True)
        found.append(own_last[order[:number]].tolist())
    return found


def ranks_from_scores(scores: Float[Tensor, "I T"], image_of: Int[Tensor, " T"], chunk: int = 256) -> Ranks:
    """Return the ranks for a matrix of scores, without changing their precision; the highest score ranks first."""
    num_images, num_texts = scores.shape
    image_of = _checked(image_of, num_images, num_texts, scores.device)
    if bad := int((~scores.isfinite()).sum()):
        raise ValueError(f"{bad} of {scores.numel()} scores are not finite; check the model that computed them")
    return _both_directions(lambda a, b: scores[:, a:b].T, lambda a, b: scores[a:b], image_of, num_images, chunk)


def recalls(
    images: Float[Tensor, "I D"],
    texts: Float[Tensor, "T D"],
    image_of: Int[Tensor, " T"],
    ks: Sequence[int] = KS,
    chunk: int = 256,
) -> Recalls:
    """Return the recalls at each cut-off K in `ks`, from embeddings; for the arguments see `ranks`."""
    return ranks(images, texts, image_of, chunk).recalls(ks)


def recalls_from_scores(
    scores: Float[Tensor, "I T"], image_of: Int[Tensor, " T"], ks: Sequence[int] = KS, chunk: int = 256
) -> Recalls:
    """Return the recalls at each cut-off K in `ks`, from a matrix of scores; the highest score ranks first."""
    return ranks_from_scores(scores, image_of, chunk).recalls(ks)


def chance(image_of: Int[Tensor, " T"], ks: Sequence[int] = KS) -> Recalls:
    """Return the mean recalls of random scores; IR@K = K / I, TR@K = 1 - C(T - m, K) / C(T, K), m captions an image."""
    num_texts, captions = len(image_of), torch.bincount(image_of)
    num_images = len(captions)

    def missed(m: Tensor, k: int) -> Tensor:
        """Return the probability that none of m captions is among the first k, as a product of k factors."""
        ranked = torch.arange(min(k, num_texts), dtype=torch.float64)
        return ((num_texts - m.double()[:, None] - ranked).clamp(min=0) / (num_texts - ranked)).prod(1)

    ir = {k: 100 * min(1.0, k / num_images) for k in ks}
    return Recalls(ir, {k: 100 * float((1 - missed(captions, k)).mean()) for k in ks}, 0.0)


def _both_directions(text_rows: Rows, image_rows: Rows, image_of: Tensor, num_images: int, chunk: int) -> Ranks:
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; found {chunk}")
    image, image_ties, _ = _ranks(text_rows, image_of[:, None], chunk)
    text, text_ties, text_own = _ranks(image_rows, _captions_of(image_of, num_images), chunk)
    return Ranks(*(t.cpu() for t in (image, text, image_of, image_ties, text_ties, text_own)))


def _captions_of(image_of: Int[Tensor, " T"], num_images: int) -> Int[Tensor, "I P"]:
    """Return the caption indices of each image; an image with fewer than P captions repeats its last caption."""
    order = image_of.argsort(stable=True)
    counts = torch.bincount(image_of, minlength=num_images)
    first = counts.cumsum(0) - counts
    place = torch.arange(int(counts.max()), device=image_of.device)
    return order[first[:, None] + torch.minimum(place[None], counts[:, None] - 1)]


def _ranks(
    rows: Rows, positives_QP: Int[Tensor, "Q P"], chunk: int
) -> tuple[Int[Tensor, " Q"], Int[Tensor, " Q"], Int[Tensor, " Q"]]:
    """Return three values per query: the rank (from 0) of its best correct candidate, with ties counted against it; how
    many wrong candidates tie with that candidate; and how many correct candidates have the same score."""
    pessimistic, ties, best_positives = [], [], []
    for start in range(0, len(positives_QP), chunk):
        score_qC = rows(start, start + chunk)
        index_qP = positives_QP[start : start + chunk]
        positive_qP = score_qC.gather(1, index_qP)
        best_q1 = positive_qP.amax(1, keepdim=True)
        above = (score_qC > best_q1).sum(1, dtype=torch.int32).long()  # an int64 sum would be three times slower
        level = (score_qC >= best_q1).sum(1, dtype=torch.int32).long() - above
        repeats = torch.zeros_like(index_qP, dtype=torch.bool)
        repeats[:, 1:] = index_qP[:, 1:] == index_qP[:, :-1]
        best_positives.append(((positive_qP == best_q1) & ~repeats).sum(1))
        tied = level - best_positives[-1]
        pessimistic.append(above + tied)
        ties.append(tied)
    return torch.cat(pessimistic), torch.cat(ties), torch.cat(best_positives)


def _recall(pessimistic: Tensor, ties: Tensor | None, ks: Sequence[int]) -> tuple[dict[int, float], float]:
    percent = {k: 100 * int((pessimistic < k).sum()) / len(pessimistic) for k in ks}
    if ties is None:
        return percent, 0.0
    return percent, max(100 * int((pessimistic - ties < k).sum()) / len(ties) - percent[k] for k in ks)


def _scorer(queries: Float[Tensor, "Q D"], candidates: Float[Tensor, "C D"]) -> Rows:
    # A matrix product may round equal candidates differently at different positions, so each distinct candidate
    # is scored once.
    distinct, which = _distinct(candidates)
    if len(distinct) == len(candidates):
        return lambda a, b: queries[a:b] @ candidates.T
    return lambda a, b: (queries[a:b] @ distinct.T)[:, which]


def _distinct(rows: Float[Tensor, "C D"]) -> tuple[Float[Tensor, "_ D"], Int[Tensor, " C"]]:
    """Return the input rows without duplicates, and for each input row its index in this result.

    Equal rows are found by a hash; rows with equal hashes are then compared.
    """
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
    for part, index in zip(bits.split(STRIDE), which.split(STRIDE), strict=True):
        assert torch.equal(part, bits[first[index]]), "different rows have the same hash"
    return rows[first], which


def _normalised(rows: Tensor, modality: str) -> Tensor:
    rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
    unit = torch.empty_like(rows)
    infinite = zero = 0
    for part, out in zip(rows.split(STRIDE), unit.split(STRIDE), strict=True):
        largest = part.abs().amax(1, keepdim=True)
        infinite += int((~largest.isfinite()).sum())
        zero += int((largest == 0).sum())
        torch.div(part, largest, out=out)  # scaling by the largest entry keeps the norm from underflow
        out.div_(out.norm(dim=1, keepdim=True)).add_(0.0)  # adding 0 turns -0 into 0: equal rows get equal bits
    if infinite or zero:
        raise ValueError(
            f"of {len(rows)} {modality} embeddings {infinite} are not finite and {zero} are zero: the model has "
            "diverged or collapsed; train it with lower learning rates"
        )
    return unit


def _checked(image_of: Tensor, num_images: int, num_texts: int, device: torch.device) -> Tensor:
    if not num_images or not num_texts:
        raise ValueError(f"the gallery has {num_images} images and {num_texts} captions; give at least one of each")
    if image_of.shape != (num_texts,):
        raise ValueError(
            f"image_of must hold one image index per caption ({num_texts}); found shape {tuple(image_of.shape)}"
        )
    image_of = image_of.to(device=device, dtype=torch.int64)
    low, high = int(image_of.min()), int(image_of.max())
    if low < 0 or high >= num_images:
        raise ValueError(f"image_of has indices {low}..{high}, but images are numbered 0..{num_images - 1}")
    captions = torch.bincount(image_of, minlength=num_images)
    if without := int((captions == 0).sum()):
        first = int(captions.argmin())
        raise ValueError(f"{without} of {num_images} images have no caption (first: {first}); remove them")
    return image_of
