"""Retrieval recalls: exact, chunked, pessimistic about ties.

IR@K: a caption retrieves its image. TR@K: an image retrieves any of its captions. A candidate that scores the same as
the right one counts as ranked above it, so a collapsed model scores 0; `Recalls.gap` says how much that decided.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# I images, T captions, D joint width, Q queries and C candidates of one direction, q queries of one chunk


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


def recalls(
    images: Float[Tensor, "I D"],
    texts: Float[Tensor, "T D"],
    image_of: Int[Tensor, " T"],
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 256,
) -> Recalls:
    """Recalls by cosine; `image_of[j]` is the image of caption j. Rows need not be normalised.

    Scores are float32 (float64 for float64 input) and `chunk` queries are held at once: O(chunk * max(I, T)) memory.
    Candidates with the same bits tie exactly, whatever the chunk. Raises ValueError for non-finite or zero rows,
    an empty gallery, and an image without captions.
    """
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        found = f"{tuple(images.shape)} and {tuple(texts.shape)}"
        raise ValueError(f"images and texts must be (I, D) and (T, D), found {found}")
    image_of = _checked(image_of, len(images), len(texts), images.device)
    u, v = _normalised(images, "image"), _normalised(texts, "text")
    return _both(_scorer(v, u), _scorer(u, v), image_of, len(images), ks, chunk)


def recalls_from_scores(
    scores: Float[Tensor, "I T"], image_of: Int[Tensor, " T"], ks: Sequence[int] = (1, 5, 10), chunk: int = 256
) -> Recalls:
    """The same from a score matrix (higher is closer), compared in the precision it comes in."""
    num_images, num_texts = scores.shape
    image_of = _checked(image_of, num_images, num_texts, scores.device)
    if bad := int((~scores.isfinite()).sum()):
        raise ValueError(f"{bad} of {scores.numel()} scores are not finite; recalls of them would mean nothing")
    return _both(lambda a, b: scores[:, a:b].T, lambda a, b: scores[a:b], image_of, num_images, ks, chunk)


def _both(text_rows, image_rows, image_of: Tensor, num_images: int, ks: Sequence[int], chunk: int) -> Recalls:
    if chunk < 1 or not ks or min(ks) < 1:
        raise ValueError(f"chunk and every K must be at least 1; found chunk {chunk}, K {tuple(ks)}")
    index = torch.arange(num_images, device=image_of.device)
    ir, ir_gap = _recall(*_ranks(text_rows, image_of, index, chunk), ks)
    tr, tr_gap = _recall(*_ranks(image_rows, index, image_of, chunk), ks)
    return Recalls(ir, tr, max(ir_gap, tr_gap))


def _ranks(
    rows: Callable[[int, int], Tensor], query: Int[Tensor, " Q"], candidate: Int[Tensor, " C"], chunk: int
) -> tuple[Int[Tensor, " Q"], Int[Tensor, " Q"]]:
    """Optimistic and pessimistic 0-based rank of each query's best positive; positives share the query's image."""
    optimistic, pessimistic = [], []
    for start in range(0, len(query), chunk):
        score_qC = rows(start, start + chunk)
        positive_qC = query[start : start + chunk, None] == candidate
        best_q1 = score_qC.masked_fill(~positive_qC, -torch.inf).amax(1, keepdim=True)
        optimistic.append((score_qC > best_q1).sum(1))
        pessimistic.append(((score_qC >= best_q1) & ~positive_qC).sum(1))
    return torch.cat(optimistic), torch.cat(pessimistic)


def _recall(optimistic: Tensor, pessimistic: Tensor, ks: Sequence[int]) -> tuple[dict[int, float], float]:
    percent = {k: 100 * int((pessimistic < k).sum()) / len(pessimistic) for k in ks}
    gap = max(100 * int((optimistic < k).sum()) / len(optimistic) - percent[k] for k in ks)
    return percent, gap


def _scorer(queries: Float[Tensor, "Q D"], candidates: Float[Tensor, "C D"]) -> Callable[[int, int], Tensor]:
    # A matrix product may round equal columns differently by where they stand, so each distinct one is scored once.
    distinct, which = torch.unique(candidates, dim=0, return_inverse=True)
    if len(distinct) == len(candidates):
        return lambda a, b: queries[a:b] @ candidates.T
    return lambda a, b: (queries[a:b] @ distinct.T)[:, which]


def _normalised(rows: Tensor, what: str) -> Tensor:
    rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
    finite = rows.isfinite().all(1)
    zero = (rows == 0).all(1)
    if not finite.all() or zero.any():
        raise ValueError(
            f"of {len(rows)} {what} embeddings {int((~finite).sum())} are not finite and {int(zero.sum())} are zero; "
            "the model has diverged or collapsed"
        )
    rows = rows / rows.abs().amax(1, keepdim=True)  # so that no norm under- or overflows
    return rows / rows.norm(dim=1, keepdim=True)


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
