"""What a generative method works with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rmdd.jobs import Executor, Hooks, OpenRanks, Stream

if TYPE_CHECKING:
    from rmdd.data.material import Material
    from rmdd.progress import Progress
    from rmdd.tasks import Item


@dataclass(frozen=True)
class Tools:
    """Who does the parts of the work."""

    executor: Executor
    """Trains what is fine-tuned: one task with checkpoints."""
    encoders: Stream
    """Actors that hold a model: features, captions, decoding."""
    ranks: OpenRanks
    """Hold rows of features."""
    progress: Progress


@dataclass(frozen=True)
class Studio:
    """One phase of a generative method in the making."""

    item: Item
    train: Material
    folder: Path
    """Of the phase, held."""
    tools: Tools
    hooks: Hooks
