"""The studio. A generative method uses it to compute features, to run models on workers and to write pairs.

Shapes: M pairs of the phase, F features of a text, S x S pixels of a picture.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rmdd import config
from rmdd.core.device import device_of
from rmdd.core.files import write_json
from rmdd.core.storage import open_storage
from rmdd.data.captions import clean
from rmdd.data.images import normalise
from rmdd.distill import phases
from rmdd.distill.sets import save_set
from rmdd.distill.synthetic import Synthetic, reduced
from rmdd.execution.executor import Executor
from rmdd.execution.parts import OpenParts
from rmdd.execution.tasks import Hooks, Interrupted, Stream, Values, sequential_stream, with_progress
from rmdd.generate.decode import Decoder, PictureWriter, is_drawn, picture_of, read_requests, write_requests
from rmdd.generate.encoders import FeatureSource, sides_of
from rmdd.models.pretrained import PretrainedModel
from rmdd.models.text import embed

if TYPE_CHECKING:
    from rmdd.core.progress import Progress
    from rmdd.coresets.spaces import Sides
    from rmdd.models.prepared import PreparedSplit


@dataclass(frozen=True)
class Tools:
    """The workers that a generative method can use, and the progress display."""

    executor: Executor
    """Runs the fine-tuning of a model as one task with checkpoints."""
    encoders: Stream
    """Processes work items on workers that hold a model, to compute features, captions or images."""
    ranks: OpenParts
    """Starts workers that each hold a part of the feature rows."""
    progress: "Progress"


@dataclass(frozen=True)
class Studio:
    """What a generative method uses in one phase: the run, the train split, a folder and workers."""

    run: config.Run
    phase: int
    feature_source: FeatureSource
    root: Path
    """Root folder of the storage of the run."""
    train: "PreparedSplit"
    folder: Path
    """Folder of the phase, locked by this process."""
    tools: Tools
    hooks: Hooks
    tune: Callable[[int], bool]
    """Trains the model that the method fine-tunes, for the given number of updates; returns whether it finished."""

    @property
    def pairs(self) -> int:
        """Number of pairs M that the run file sets for this phase."""
        return self.run.distill.phases[self.phase].pairs

    @property
    def seed(self) -> int:
        return self.run.seed_of("distill")

    @property
    def device(self) -> torch.device:
        return device_of(self.run.runtime)

    def stream(self, title: str, unit: str, here: bool = False) -> Stream:
        """Return a function `(make, items)` that processes work items on the workers or, with `here`, in this process.

        The function shows progress, and can be interrupted between two items. `make()` returns a callable that
        processes one item and returns the amount of work done, as `{unit: count}`.
        """
        stream = with_progress(self.tools.progress, title, unit, sequential_stream if here else self.tools.encoders)

        def streamed(make: Callable[[], Callable[[Values], Values]], items: Sequence[Values]) -> Any:
            for done in stream(functools.partial(_stored, make, self.run.runtime), items):
                yield done
                if self.hooks.should_stop():
                    raise Interrupted

        return streamed

    def features(self, encoder: str) -> "Sides":
        """Return the unnormalised features of train images and captions from an encoder such as `clip:ID`."""
        return sides_of(self.feature_source, self.train, encoder, self.stream(f"features of {encoder}", "rows"))

    def draw(
        self,
        make: Callable[[], Decoder],
        requests: Sequence[Values],
        tensors: Mapping[str, Tensor] | None = None,
        batch: int = 1,
        here: bool = False,
    ) -> list[Path]:
        """Generate the images of all pairs and return their paths; an existing image of an equal request is kept.

        `requests` holds JSON values for each pair; `index` and `seed` are added to them. Row i of each tensor belongs
        to pair i. `make` returns the decoder and must be picklable. It is called in the workers (with `here`, in this
        process).
        """
        numbered = [{**request, "index": i, "seed": self.seed} for i, request in enumerate(requests)]
        write_requests(self.folder, numbered, dict(tensors or {}))
        written = read_requests(self.folder)
        todo = sorted({r["index"] // batch for r in written if not is_drawn(self.folder, r)})
        size, threads = self.run.data.image_size, self.run.runtime.threads
        writer = functools.partial(PictureWriter, make, self.folder, batch, size, threads)
        blocks: list[Values] = [{"block": block} for block in todo]
        for _ in self.stream(f"pictures of phase {self.phase}", "pictures", here)(writer, blocks):
            pass
        return [picture_of(self.folder, i) for i in range(len(written))]

    def finish(
        self,
        pictures: Sequence[Path],
        records: Sequence[int],
        captions: Sequence[str],
        texts: Float[Tensor, "M F"] | None = None,
        parts: Sequence[PretrainedModel] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the files of the phase. The distilled set is written last, and marks the phase as finished.

        `records` are the caption records from which the pairs were generated. `texts` are the caption embeddings for
        students, by default from the text tower of the run. `parts` are the pretrained models that were used. `parts`
        and `facts` are recorded in the artefact. Raises `ValueError` for lengths or shapes that do not match.
        """
        run, rule, count = self.run, self.run.distill, len(pictures)
        if not count == len(records) == len(captions):
            numbers = f"{count} images, {len(records)} records and {len(captions)} captions"
            raise ValueError(f"a method must give equal numbers of images, records and captions, found {numbers}")
        if empty := [i for i, caption in enumerate(captions) if not clean(caption, run.data.captions)]:
            raise ValueError(f"the captions of pairs {empty[:5]} are empty; check the captioner")
        texts = self.embedded(captions) if texts is None else texts.float()
        if texts.shape != (count, self.train.texts.shape[1]) or not texts.isfinite().all():
            shape = f"({count}, {self.train.texts.shape[1]})"
            raise ValueError(f"caption embeddings must be finite and of shape {shape}, found {tuple(texts.shape)}")
        images = normalise(
            torch.stack([read_picture(p, run.data.image_size) for p in pictures]), self.train.mean, self.train.std
        )
        rates = (rule.inner_lr, rule.inner_lr_text or rule.inner_lr)
        lr_image, lr_text = (torch.tensor(float(rate)) for rate in rates)
        synthetic = Synthetic(reduced(images, run.stored_size), texts, lr_image, lr_text)
        save_set(phases.initial(run, self.phase, self.train, list(records)), self.folder / "start.safetensors")
        write_json(self.folder / "records.json", [int(r) for r in records])
        write_json(self.folder / "captions.json", list(captions))
        write_json(self.folder / "parts.json", [part.facts() for part in parts])
        write_json(self.folder / "facts.json", dict(facts or {}))
        save_set(synthetic, self.folder / "set-000001.safetensors")

    def embedded(self, captions: Sequence[str]) -> Float[Tensor, "M F"]:
        """Clean captions by the rules for the dataset's captions, and embed them with the text tower of the run."""
        run = self.run
        cleaned = [clean(caption, run.data.captions) for caption in captions]
        features = embed(
            cleaned,
            run.model.text,
            self.feature_source.splits.cache,
            device=str(self.device),
            threads=run.runtime.threads,
        )
        return torch.from_numpy(np.array(features))


def _stored(make: Callable[[], Callable[[Values], Values]], runtime: config.Runtime) -> Callable[[Values], Values]:
    """Open the storage, so that the files of this worker are published to it; then return `make()`."""
    open_storage(runtime)
    return make()


def read_picture(path: Path, size: int) -> Tensor:
    """Read the image of a pair as uint8 (3, S, S). Raises `ValueError` unless it has `size` x `size` RGB pixels."""
    with Image.open(path) as image:
        if image.size != (size, size) or image.mode != "RGB":
            raise ValueError(
                f"{path} is {image.mode} {image.size}, not RGB of side {size}; delete it to generate it again"
            )
        return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())
