"""Forgetting events (Toneva et al. 2019), translated to pairs and counted while an expert trains.

After every epoch all records are scored, without augmentation, against one seeded pool of M other records. A record is
*correct* when its image finds its caption and its caption finds its image before anything of the pool; captions of the
same image are no rivals. It is *forgotten* when it was correct at its previous visit and is not any more. The first
visit is never an event, so E epochs give at most E // 2.

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
"""In the folder of an expert."""
BLOCK = 256
"""Images that are scored at a time."""
MARGIN = 1e-6
"""What a record must lead by; less is rounding, as between copies of one picture."""

NeverLearned = Literal["first", "last", "exclude"]


@dataclass(frozen=True)
class ForgettingCounts:
    """What is remembered of T records, as tensors of shape (T,)."""

    correct: Tensor
    """int8: at the last visit; -1 before any."""
    events: Tensor
    """int16."""
    learned: Tensor
    """int8: whether it was ever correct."""
    last: Tensor
    """int16: epoch of the last event, 0 without one."""
    visits: Tensor
    """int16."""
    margins: Tensor
    """float32: sum over visits of the smaller lead of the two directions."""
    facts: dict[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def new(cls, records: int) -> "ForgettingCounts":
        small = torch.zeros(records, dtype=torch.int16)
        never = torch.full((records,), -1, dtype=torch.int8)
        flag, total = torch.zeros(records, dtype=torch.int8), torch.zeros(records)
        return cls(never, small, flag, small.clone(), small.clone(), total)

    @classmethod
    def of(cls, tensors: dict[str, Tensor], facts: dict[str, Any] | None = None) -> "ForgettingCounts":
        return cls(**{name: tensors[name] for name in TENSORS}, facts=facts or {})

    @classmethod
    def load(cls, folder: Path) -> "ForgettingCounts":
        """The counts stored with an expert. Raises `ValueError` when there are none or they are damaged."""
        path = folder / FILE
        if not path.is_file():
            raise ValueError(f"{folder} holds no forgetting counts; train it with experts.forgetting: 1000")
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
        """The counts after `epoch` has visited `records` (None: all); others keep what they have."""
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
        """Records, the most forgotten first.

        More events, then a later last event, then a smaller mean margin, then the smaller number. Records that were
        never correct come before all, after all, or not at all, among themselves by margin and number.
        """
        never = (self.learned == 0).numpy()
        margin = (self.margins / self.visits.clamp(min=1)).numpy()
        events = np.where(never, 0, self.events.numpy().astype(np.int64))
        group = np.where(never, {"first": -1, "last": 1, "exclude": 1}[never_learned], 0)
        order = np.lexsort((np.arange(len(margin)), margin, -self.last.numpy().astype(np.int64), -events, group))
        return order[~never[order]] if never_learned == "exclude" else order

    def summary(self) -> dict[str, Any]:
        """Shares and counts for a report."""
        never = self.learned == 0
        counted = torch.bincount(self.events[~never].long(), minlength=1).tolist()
        return {"never_learned": float(never.float().mean()), "records_by_events": counted, **self.facts}


TENSORS = tuple(f.name for f in fields(ForgettingCounts) if f.name != "facts")


def pool_of(image_of: Int64[np.ndarray, " T"], size: int, seed: int) -> Int64[np.ndarray, " P"]:
    """The records that all are scored against, ascending. Raises `ValueError` when they show fewer than two images."""
    drawn = torch.randperm(len(image_of), generator=generator(seed, "forgetting pool"))[:size].numpy()
    if len(np.unique(image_of[drawn])) < 2:
        raise ValueError(f"a forgetting pool of {len(drawn)} records shows one image; raise experts.forgetting")
    return np.sort(drawn)


def margins(
    model: DualEncoder, prepared: PreparedSplit, pool: Int64[np.ndarray, " P"], device: torch.device
) -> Float32[Tensor, " T"]:
    """By how much every record leads what is best in the pool, in cosines: the smaller of both directions.

    In eval mode; leaves the mode of `model` as it was.
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
        shown, of_pool = np.unique(image_of[pool], return_inverse=True)
        u_PD = in_chunks(images, shown, BLOCK)
        v_PD = in_chunks(texts, pool, BLOCK)
        rivals = torch.from_numpy(shown).to(device)
        captions_of = torch.from_numpy(shown[of_pool]).to(device)
        for first in range(0, len(split), BLOCK):
            numbers = np.arange(first, min(first + BLOCK, len(split)))
            low, high = np.searchsorted(image_of, [first, first + BLOCK])
            own = torch.from_numpy(image_of[low:high]).to(device)
            u, v = images(numbers), texts(np.arange(low, high))
            by_image = _best(u, v_PD, torch.from_numpy(numbers).to(device), captions_of)[own - first]
            by_text = _best(v, u_PD, own, rivals)
            blocks.append(((u[own - first] * v).sum(dim=1) - torch.maximum(by_image, by_text)).cpu())
    model.train(was_training)
    return torch.cat(blocks)


def _best(
    queries: Float[Tensor, "Q D"], rivals: Float[Tensor, "P D"], own: Int[Tensor, " Q"], of: Int[Tensor, " P"]
) -> Float[Tensor, " Q"]:
    """The best cosine of every query to a rival of another image."""
    return (queries @ rivals.T).masked_fill(own[:, None] == of, -torch.inf).amax(dim=1)
