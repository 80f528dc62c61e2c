"""Forgetting events (Toneva et al. 2019), adapted to image-text pairs and counted while an expert trains.

After every epoch, all caption records are compared, without augmentation, with a random pool of P records. A record is
*correct* if its image is more similar to its caption than to any caption of the pool, and its caption more similar to
its image than to any image of the pool. Pool records of the same image are not compared. A record is *forgotten* if it
was correct after the previous epoch and no longer is. In E epochs, a record can be forgotten at most E // 2 times.

N images, T records, P records of the pool, D joint width.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor

from rmdd.core.arrays import in_chunks
from rmdd.core.seeding import generator
from rmdd.core.tensors import Damaged, load_checked, save_checked
from rmdd.data.images import normalise
from rmdd.models.dual import DualEncoder
from rmdd.models.prepared import PreparedSplit

FILE = "forgetting.safetensors"
"""Name of the file with the forgetting counts, in the folder of an expert."""
BLOCK = 256
"""Number of images that are embedded and scored at once."""
MARGIN = 1e-6
"""Smallest cosine margin of a correct caption record. Smaller margins are rounding errors, as for equal images."""

NeverLearned = Literal["first", "last", "exclude"]


@dataclass(frozen=True)
class ForgettingCounts:
    """Forgetting counts of T caption records, as tensors (T,). A visit is the scoring of a record after an epoch."""

    correct: Tensor
    """Whether the caption record was correct at its last visit: int8, 1 or 0; -1 before the first visit."""
    events: Tensor
    """Number of forgetting events (changes from correct to wrong) of the caption record, int16."""
    learned: Tensor
    """Whether the caption record was correct at any visit: int8, 1 or 0."""
    last: Tensor
    """Epoch of the last forgetting event of the caption record, int16; 0 if there was none."""
    visits: Tensor
    """Number of visits (scorings at the end of an epoch) of the caption record, int16."""
    margins: Tensor
    """Sum of the cosine margins at all visits, float32. Each margin is that of the worse retrieval direction."""
    facts: dict[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def new(cls, records: int) -> "ForgettingCounts":
        """Return the counts of `records` caption records before their first visit."""
        small = torch.zeros(records, dtype=torch.int16)
        never = torch.full((records,), -1, dtype=torch.int8)
        flag, total = torch.zeros(records, dtype=torch.int8), torch.zeros(records)
        return cls(never, small, flag, small.clone(), small.clone(), total)

    @classmethod
    def of(cls, tensors: dict[str, Tensor], facts: dict[str, Any] | None = None) -> "ForgettingCounts":
        return cls(**{name: tensors[name] for name in TENSORS}, facts=facts or {})

    @classmethod
    def load(cls, folder: Path) -> "ForgettingCounts":
        """Load the forgetting counts of the expert in `folder`. Raises `ValueError` if they are missing or damaged."""
        path = folder / FILE
        if not path.is_file():
            raise ValueError(f"{folder} holds no forgetting counts; train the expert with experts.forgetting: 1000")
        try:
            tensors, facts = load_checked(path, "forgetting")
        except Damaged as error:
            raise ValueError(f"{path} is damaged ({error}); delete {folder} and train that expert again") from error
        facts.pop("schema_version", None)
        return cls.of(tensors, facts)

    def save(self, folder: Path) -> None:
        save_checked(folder / FILE, self.tensors(), "forgetting", self.facts)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in TENSORS}

    def visited(
        self,
        epoch: int,
        correct: Bool[Tensor, " n"],
        margin: Float[Tensor, " n"] | None = None,
        records: Int[Tensor, " n"] | None = None,
    ) -> "ForgettingCounts":
        """Return the counts after visiting `records` (None: all) at the end of `epoch`; other records do not change."""
        index = torch.arange(len(self.correct)) if records is None else records
        new = {name: t.clone() for name, t in self.tensors().items()}
        forgotten = (self.correct[index] == 1) & ~correct
        new["correct"][index] = correct.to(torch.int8)
        new["events"][index] += forgotten.to(torch.int16)
        new["learned"][index] |= correct.to(torch.int8)
        new["last"][index] = torch.where(forgotten, torch.tensor(epoch, dtype=torch.int16), self.last[index])
        new["visits"][index] += 1
        if margin is not None:
            new["margins"][index] += margin
        return ForgettingCounts(**new, facts=self.facts)

    def ranking(self, never_learned: NeverLearned) -> Int64[np.ndarray, " n"]:
        """Return the numbers of the caption records in the order of selection, the most forgotten record first.

        Equally forgotten records are ordered by later last event, then smaller mean margin, then smaller number.
        `never_learned` says whether records that were never correct come first, come last or are left out.
        """
        never = (self.learned == 0).numpy()
        margin = (self.margins / self.visits.clamp(min=1)).numpy()
        events = np.where(never, 0, self.events.numpy().astype(np.int64))
        group = np.where(never, {"first": -1, "last": 1, "exclude": 1}[never_learned], 0)
        order = np.lexsort((np.arange(len(margin)), margin, -self.last.numpy().astype(np.int64), -events, group))
        return order[~never[order]] if never_learned == "exclude" else order

    def summary(self) -> dict[str, Any]:
        """Return the share of records never correct, and how many of the others have 0, 1, 2, ... forgetting events."""
        never = self.learned == 0
        histogram = torch.bincount(self.events[~never].long(), minlength=1).tolist()
        return {"never_learned": float(never.float().mean()), "records_by_events": histogram, **self.facts}


TENSORS = tuple(f.name for f in fields(ForgettingCounts) if f.name != "facts")


def pool_of(image_of: Int64[np.ndarray, " T"], size: int, seed: int) -> Int64[np.ndarray, " P"]:
    """Return in ascending order the row numbers of the caption records that are drawn for the pool.

    All records are compared with this pool. Raises `ValueError` when it has fewer than two different images.
    """
    drawn = torch.randperm(len(image_of), generator=generator(seed, "forgetting pool"))[:size].numpy()
    if len(np.unique(image_of[drawn])) < 2:
        raise ValueError(f"a forgetting pool of {len(drawn)} records has only one image; raise experts.forgetting")
    return np.sort(drawn)


def margins(
    model: DualEncoder, prepared: PreparedSplit, pool: Int64[np.ndarray, " P"], device: torch.device
) -> Float32[Tensor, " T"]:
    """Return the margin of each caption record: its image-text cosine minus the best cosine with a rival in the pool.

    A rival has a different image. The worse retrieval direction counts. Scores in eval mode, then restores the mode.
    """
    split, image_of = prepared.split, prepared.split.image_of
    was_training = model.training
    model.eval()

    def images(index: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(np.array(split.some_images(index)))
        return model.embed_images(normalise(pixels.to(device), prepared.mean, prepared.std))

    def texts(index: np.ndarray) -> Tensor:
        return model.embed_texts(torch.from_numpy(np.array(prepared.texts[index])).to(device))

    blocks = []
    with torch.no_grad():
        pool_images, of_pool = np.unique(image_of[pool], return_inverse=True)
        u_PD = in_chunks(images, pool_images, BLOCK)
        v_PD = in_chunks(texts, pool, BLOCK)
        rivals = torch.from_numpy(pool_images).to(device)
        captions_of = torch.from_numpy(pool_images[of_pool]).to(device)
        for first in range(0, len(split), BLOCK):
            numbers = np.arange(first, min(first + BLOCK, len(split)))
            low, high = np.searchsorted(image_of, [first, first + BLOCK])
            images_of = torch.from_numpy(image_of[low:high]).to(device)
            u, v = images(numbers), texts(np.arange(low, high))
            by_image = _best(u, v_PD, torch.from_numpy(numbers).to(device), captions_of)[images_of - first]
            by_text = _best(v, u_PD, images_of, rivals)
            blocks.append(((u[images_of - first] * v).sum(dim=1) - torch.maximum(by_image, by_text)).cpu())
    model.train(was_training)
    return torch.cat(blocks)


def _best(
    queries: Float[Tensor, "Q D"],
    rivals: Float[Tensor, "P D"],
    image: Int[Tensor, " Q"],
    rival_image: Int[Tensor, " P"],
) -> Float[Tensor, " Q"]:
    """Return the highest cosine of each query with any rival, without the rivals that belong to the query's image."""
    return (queries @ rivals.T).masked_fill(image[:, None] == rival_image, -torch.inf).amax(dim=1)
