"""Real pairs to begin with: those nearest to the centres of clusters of joint image-text embeddings (MDM).

N records, n of them clustered, K clusters, I images, D joint width, W width of a row: 2 D for both halves, D for one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from rmdd.core.arrays import in_chunks
from rmdd.models.dual import DualEncoder
from rmdd.models.prepared import PreparedSplit

Side = Literal["joint", "image", "text"]

SAMPLE = 65_536
"""Records that are clustered at most; all of them are then compared with the centres."""
IMAGES, RECORDS = 256, 8192
"""Embedded at once."""
ROUNDS = 100


@dataclass(frozen=True)
class Embedded:
    """Every record under one model: images embedded once, captions whenever they are asked for."""

    images: Float[Tensor, "I D"]
    model: DualEncoder
    train: PreparedSplit
    side: Side

    @classmethod
    def by(cls, model: DualEncoder, train: PreparedSplit, device: torch.device, side: Side) -> "Embedded":
        """`model` is on `device`, in eval mode."""
        if side == "text":
            return cls(torch.empty(0, 0, device=device), model, train, side)
        with torch.no_grad():
            images = in_chunks(
                lambda rows: model.embed_images(train.pictures(rows, device)).float(),
                np.arange(len(train.split)),
                IMAGES,
            )
        return cls(images, model, train, side)

    def __len__(self) -> int:
        return len(self.train.split.captions)

    def rows(self, records: np.ndarray) -> Float[Tensor, "n W"]:
        """Unit rows; each half of a joint one has length 1/sqrt(2)."""
        halves = []
        if self.side != "text":
            halves.append(self.images[torch.from_numpy(self.train.split.image_of[records]).to(self.images.device)])
        if self.side != "image":
            with torch.no_grad():
                texts = torch.from_numpy(np.array(self.train.texts[records])).to(self.images.device)
                halves.append(self.model.embed_texts(texts).float())
        return F.normalize(torch.cat(halves, dim=1), dim=1)

    def blocks(self) -> Iterator[tuple[np.ndarray, Float[Tensor, "n W"]]]:
        for start in range(0, len(self), RECORDS):
            records = np.arange(start, min(start + RECORDS, len(self)))
            yield records, self.rows(records)


def centres(points: Float[Tensor, "n W"], k: int, random: torch.Generator) -> Float[Tensor, "K W"]:
    """Unit centres of spherical k-means, from k-means++ starts; one that loses its points stays where it is."""
    chosen = [int(torch.randint(len(points), (1,), generator=random))]
    apart = 1 - points @ points[chosen[0]]
    while len(chosen) < k:
        weight = apart.clamp(min=0).double().cpu()
        weight = weight if weight.sum() > 0 else torch.ones_like(weight)
        chosen.append(int(torch.multinomial(weight, 1, generator=random)))
        apart = torch.minimum(apart, 1 - points @ points[chosen[-1]])
    found = points[chosen]
    label = torch.full((len(points),), -1, device=points.device)
    for _ in range(ROUNDS):
        before, label = label, torch.cat([(p @ found.T).argmax(dim=1) for p in points.split(RECORDS)])
        if torch.equal(before, label):
            break
        total = torch.zeros_like(found).index_add_(0, label, points)
        there = torch.bincount(label, minlength=k) > 0
        found = torch.where(there[:, None], F.normalize(total, dim=1), found)
    return found


def nearest_pairs(embedded: Embedded, k: int, random: torch.Generator) -> list[int]:
    """Per cluster the record of largest cosine with its centre: a member, or, where all of these show pictures that
    are taken, any other. No record comes twice, and no picture while there are enough."""
    total = len(embedded)
    drawn = np.sort(torch.randperm(total, generator=random)[: max(SAMPLE, 4 * k)].numpy())
    found = centres(embedded.rows(drawn), k, random)
    label, cosine = _assigned(embedded, found)
    order = torch.argsort(cosine, descending=True, stable=True)
    members: list[list[int]] = [[] for _ in range(k)]
    for record, cluster in zip(order.tolist(), label[order].tolist(), strict=True):
        members[cluster].append(record)
    image_of = embedded.train.split.image_of
    taken: set[int] = set()
    chosen: list[int | None] = []
    for cluster in range(k):
        first = next((r for r in members[cluster] if int(image_of[r]) not in taken), None)
        chosen.append(first)
        if first is not None:
            taken.add(int(image_of[first]))
    left = [c for c in range(k) if chosen[c] is None]
    if left:
        scores = torch.cat([rows @ found[left].T for _, rows in embedded.blocks()]).cpu().numpy()
        picked = np.zeros(total, bool)
        picked[[r for r in chosen if r is not None]] = True
        shown = np.isin(image_of, list(taken))
        for place, cluster in enumerate(left):
            barred = picked if shown.all() else shown
            chosen[cluster] = int(np.where(barred, -np.inf, scores[:, place]).argmax())
            picked[chosen[cluster]] = True
            shown |= image_of == image_of[chosen[cluster]]
    return [r for r in chosen if r is not None]


def _assigned(embedded: Embedded, found: Float[Tensor, "K W"]) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """The nearest centre of every record, and its cosine."""
    best = [(rows @ found.T).max(dim=1) for _, rows in embedded.blocks()]
    return torch.cat([b.indices for b in best]).cpu(), torch.cat([b.values for b in best]).cpu()
