"""Initial pairs of MDM: the real pairs nearest to the k-means centres of joint image-text embeddings.

Symbols: N caption records, n of them clustered, K clusters, I images, D joint width, W width of an embedding row.
W is 2 D if image and text embeddings are concatenated, otherwise D.
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
"""Largest number of caption records that k-means is fitted on; the initial pairs are chosen from all records."""
IMAGES, RECORDS = 256, 8192
"""Number of images per forward pass, and of caption records per block of embeddings."""
ROUNDS = 100
"""Largest number of k-means iterations."""


@dataclass(frozen=True)
class Embedded:
    """Embeddings of all caption records under one model; images are embedded once, captions each time they are read."""

    images: Float[Tensor, "I D"]
    model: DualEncoder
    train: PreparedSplit
    side: Side

    @classmethod
    def by(cls, model: DualEncoder, train: PreparedSplit, device: torch.device, side: Side) -> "Embedded":
        """Embed the images of `train` with `model`, which must be on `device` and in eval mode."""
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
        """Return unit-length embeddings (rows) of `records`; both halves of a joint embedding have length 1/sqrt(2)."""
        halves = []
        if self.side != "text":
            halves.append(self.images[torch.from_numpy(self.train.split.image_of[records]).to(self.images.device)])
        if self.side != "image":
            with torch.no_grad():
                texts = torch.from_numpy(np.array(self.train.texts[records])).to(self.images.device)
                halves.append(self.model.embed_texts(texts).float())
        return F.normalize(torch.cat(halves, dim=1), dim=1)

    def blocks(self) -> Iterator[tuple[np.ndarray, Float[Tensor, "n W"]]]:
        """Yield all caption records in blocks, each block with its embeddings."""
        for start in range(0, len(self), RECORDS):
            records = np.arange(start, min(start + RECORDS, len(self)))
            yield records, self.rows(records)


def centres(points: Float[Tensor, "n W"], k: int, random: torch.Generator) -> Float[Tensor, "K W"]:
    """Run spherical k-means from k-means++ seeds and return unit-length centres; an empty cluster keeps its centre."""
    seeds = [int(torch.randint(len(points), (1,), generator=random))]
    distance = 1 - points @ points[seeds[0]]
    while len(seeds) < k:
        weight = distance.clamp(min=0).double().cpu()
        weight = weight if weight.sum() > 0 else torch.ones_like(weight)
        seeds.append(int(torch.multinomial(weight, 1, generator=random)))
        distance = torch.minimum(distance, 1 - points @ points[seeds[-1]])
    centre = points[seeds]
    label = torch.full((len(points),), -1, device=points.device)
    for _ in range(ROUNDS):
        before, label = label, torch.cat([(p @ centre.T).argmax(dim=1) for p in points.split(RECORDS)])
        if torch.equal(before, label):
            break
        total = torch.zeros_like(centre).index_add_(0, label, points)
        occupied = torch.bincount(label, minlength=k) > 0
        centre = torch.where(occupied[:, None], F.normalize(total, dim=1), centre)
    return centre


def nearest_pairs(embedded: Embedded, k: int, random: torch.Generator) -> list[int]:
    """Return one caption record per cluster: the unused record with the largest cosine to the cluster's centre.

    The record is chosen from the members of the cluster; if other clusters already use the images of all members, it is
    chosen from all records. No record is returned twice. An image is used twice only if no unused image remains.
    """
    total = len(embedded)
    drawn = np.sort(torch.randperm(total, generator=random)[: max(SAMPLE, 4 * k)].numpy())
    centre = centres(embedded.rows(drawn), k, random)
    label, cosine = _assigned(embedded, centre)
    order = torch.argsort(cosine, descending=True, stable=True)
    members: list[list[int]] = [[] for _ in range(k)]
    for record, cluster in zip(order.tolist(), label[order].tolist(), strict=True):
        members[cluster].append(record)
    image_of = embedded.train.split.image_of
    used_images: set[int] = set()
    chosen: list[int | None] = []
    for cluster in range(k):
        first = next((r for r in members[cluster] if int(image_of[r]) not in used_images), None)
        chosen.append(first)
        if first is not None:
            used_images.add(int(image_of[first]))
    unfilled = [c for c in range(k) if chosen[c] is None]
    if unfilled:
        scores = torch.cat([rows @ centre[unfilled].T for _, rows in embedded.blocks()]).cpu().numpy()
        record_used = np.zeros(total, bool)
        record_used[[r for r in chosen if r is not None]] = True
        image_used = np.isin(image_of, list(used_images))
        for column, cluster in enumerate(unfilled):
            excluded = record_used if image_used.all() else image_used
            chosen[cluster] = int(np.where(excluded, -np.inf, scores[:, column]).argmax())
            record_used[chosen[cluster]] = True
            image_used |= image_of == image_of[chosen[cluster]]
    return [r for r in chosen if r is not None]


def _assigned(embedded: Embedded, centre: Float[Tensor, "K W"]) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """Return, for each caption record, the index of its nearest centre and its cosine to this centre."""
    best = [(rows @ centre.T).max(dim=1) for _, rows in embedded.blocks()]
    return torch.cat([b.indices for b in best]).cpu(), torch.cat([b.values for b in best]).cpu()
