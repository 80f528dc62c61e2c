"""A trained retrieval model: it embeds images and captions, and finds the images that fit a caption.

On disk a model is a folder with `model.safetensors` (all weights), `model.json` (towers, preprocessing, origin) and
`README.md`. n images or captions, D features in the joint space, F features of a caption from the text tower.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rmdd import config
from rmdd.config.runfile import validate
from rmdd.core.checks import DiskCheck, Format
from rmdd.core.files import read_json, replaced_folder, write_json
from rmdd.core.tensors import Damaged, load_checked, save_checked
from rmdd.core.version import VERSION
from rmdd.data.captions import clean
from rmdd.data.images import normalise
from rmdd.models.dual import DualEncoder, build
from rmdd.models.text import Encoder, encoder_identity
from rmdd.retrieval.card import card
from rmdd.retrieval.pictures import pictures_in, read

SCHEMA_VERSION = 1
DESCRIPTION, WEIGHTS, CARD, ENTRY = "model.json", "model.safetensors", "README.md", "model"
PREPROCESSING = ("image_size", "background", "exif_orientation", "max_pixels", "captions")
"""Fields of the section `data` of a run file that change what the towers see; a model keeps their values."""


class Hit(NamedTuple):
    """An image that a search found, and the cosine of its embedding and that of the query."""

    path: Any
    score: float


@dataclass(frozen=True, eq=False)
class Gallery:
    """Images and their embeddings, which can be searched several times."""

    images: Sequence[Any]
    """The images, as they were given: paths, PIL images or arrays."""
    embeddings: Float[Tensor, "n D"] = field(repr=False)
    unreadable: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Reason for each file that could not be read and was left out, by path."""

    def __repr__(self) -> str:
        return f"Gallery({len(self.images)} images, {len(self.unreadable)} unreadable)"


@dataclass(frozen=True, eq=False, repr=False)
class RetrievalModel:
    """A trained dual encoder with its text tower and preprocessing. `rmdd.load_model` and `rmdd.train` return it."""

    encoder: DualEncoder
    """The image tower and the projections, in eval mode; it gives cosines / temperature."""
    towers: config.Model
    """Section `model` of the run: the settings of both towers and of the projections."""
    data: config.Data
    """Section `data` of the run, of which a model uses the fields of the preprocessing."""
    mean: Sequence[float]
    std: Sequence[float]
    text_width: int
    text_encoder: str
    """Identity of the text tower: a hash of its files, or of its hub id and commit."""
    trained_on: Mapping[str, Any]
    """Facts about the training: kind and number of pairs, method, loss, number of the student, hash of the data."""
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Recalls in percent on the val split of the run, under the key `val`; empty if the data was not there."""
    path: Path | None = None
    """Folder that the model was saved in or loaded from."""

    def __post_init__(self) -> None:
        self.encoder.requires_grad_(False).eval()

    def __repr__(self) -> str:
        towers = f"{self.towers.image.name} + {self.towers.text.name}"
        return f"RetrievalModel({towers}, {self.embedding_size} features, trained on {self.trained_on['pairs']} pairs)"

    @property
    def embedding_size(self) -> int:
        """D, the number of features of an embedding."""
        with torch.no_grad():
            return self.encoder.embed_texts(torch.ones(1, self.text_width, device=self.device)).shape[1]

    @property
    def device(self) -> torch.device:
        """Device that computes the embeddings."""
        return next(self.encoder.parameters()).device

    def encode_images(self, images: str | Path | Iterable[Any]) -> Float[Tensor, "n D"]:
        """Return an embedding of unit length for each image: a path, a PIL image, or an array of uint8 (H, W, 3).

        The embeddings are float32 on the CPU. Raises an error for an image that cannot be read.
        """
        return self._embedded([images] if isinstance(images, str | Path) else list(images))[1]

    def encode_texts(self, texts: Iterable[str]) -> Float[Tensor, "n D"]:
        """Return an embedding of unit length for each caption, as float32 on the CPU.

        The captions are first cleaned by the rule of the training. Raises `ValueError` for a caption without words.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        cleaned = [clean(text, self.data.captions) for text in texts]
        if empty := [text for text, words in zip(texts, cleaned, strict=True) if not words]:
            raise ValueError(f"the text {empty[0]!r} has no words after it was cleaned; give a caption")
        if not texts:
            return torch.zeros(0, self.embedding_size)
        with torch.no_grad():
            return self.encoder.embed_texts(torch.tensor(self._text_tower.vectors(cleaned)).to(self.device)).cpu()

    def gallery(
        self, images: str | Path | Iterable[Any], on_batch: Callable[[int, int], object] = lambda done, total: None
    ) -> Gallery:
        """Embed images that will be searched several times: those of a folder and its subfolders, or a list.

        Files that cannot be read are left out; `Gallery.unreadable` has the reasons. `on_batch` is called with the
        number of images that are done, and with the number of all images.
        """
        pictures = pictures_in(Path(images)) if isinstance(images, str | Path) else list(images)
        unreadable: dict[str, str] = {}
        numbers, embeddings = self._embedded(pictures, unreadable, on_batch)
        return Gallery([pictures[n] for n in numbers], embeddings, unreadable)

    def search(self, query: str, images: Gallery | str | Path | Iterable[Any], top: int = 5) -> list[Hit]:
        """Return the `top` images that fit the caption `query` best, each with its cosine, the best first.

        `images` is a folder, which is read with its subfolders; a list of paths, PIL images or arrays; or a gallery.
        """
        gallery = images if isinstance(images, Gallery) else self.gallery(images)
        scores = gallery.embeddings @ self.encode_texts([query])[0]
        best = scores.argsort(descending=True, stable=True)[:top].tolist()
        return [Hit(gallery.images[n], float(scores[n])) for n in best]

    def _embedded(
        self,
        pictures: Sequence[Any],
        unreadable: dict[str, str] | None = None,
        on_batch: Callable[[int, int], object] = lambda done, total: None,
    ) -> tuple[list[int], Float[Tensor, "n D"]]:
        """Return the numbers of the pictures that could be read, and their embeddings."""

        def leave_out(number: int, error: Exception) -> None:
            assert unreadable is not None
            unreadable[str(pictures[number])] = str(error)

        kept, parts = list[int](), [torch.zeros(0, self.embedding_size)]
        for numbers, pixels in read(pictures, self.data, leave_out if unreadable is not None else None):
            with torch.no_grad():
                batch = normalise(torch.from_numpy(pixels).to(self.device), self.mean, self.std)
                parts.append(self.encoder.embed_images(batch).cpu())
            kept += numbers
            on_batch(numbers[-1] + 1, len(pictures))
        return kept, torch.cat(parts)

    @functools.cached_property
    def _text_tower(self) -> Encoder:
        found = encoder_identity(self.towers.text)
        if found != self.text_encoder:
            raise ValueError(
                f"the model was trained with another version of the text encoder '{self.towers.text.name}' (hash "
                f"{self.text_encoder[:12]}, found {found[:12]}); install that version, or set model.text.name in "
                f"{DESCRIPTION} to its folder"
            )
        return Encoder(self.towers.text, 256, self.device, None)

    def save(self, folder: Path | str) -> "RetrievalModel":
        """Write the model to a folder, which may hold an older model; return the model with the path of the folder."""
        folder = Path(folder).absolute()
        check_replaceable(folder)
        with replaced_folder(folder) as temporary:
            save_checked(temporary / WEIGHTS, self.encoder.state_dict(), ENTRY, {})
            write_json(temporary / DESCRIPTION, self._description())
            (temporary / CARD).write_text(card(self._description()), encoding="utf-8")
        return replace(self, path=folder)

    def _description(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "embedding_size": self.embedding_size,
            "temperature": self.encoder.temperature,
            "model": self.towers.model_dump(mode="json"),
            "text_encoder": self.text_encoder,
            "text_width": self.text_width,
            "data": self.data.model_dump(mode="json", include=set(PREPROCESSING)),
            "normalisation": {"mean": list(self.mean), "std": list(self.std)},
            "trained_on": dict(self.trained_on),
            "scores": {split: dict(recalls) for split, recalls in self.scores.items()},
            "versions": {"rmdd": VERSION, "torch": torch.__version__, "timm": version("timm")},
        }

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> "RetrievalModel":
        """Load a model that `rmdd train` saved; `device` is cpu or cuda. Pretrained weights are not downloaded again.

        >>> rmdd.load_model("runs/models/demo-set-0123abcd")  # doctest: +SKIP

        A new process computes embeddings with the same bits, if it uses the same device and number of threads. Raises
        `ValueError` for a missing, damaged or newer model.
        """
        path, device = Path(path).absolute(), torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda was asked for, and this machine has no GPU that torch can use; give cpu")
        if not (path / DESCRIPTION).is_file():
            raise ValueError(f"no model at {path}: {DESCRIPTION} is missing; give a folder that `rmdd train` wrote")
        facts, towers, data = _read_description(path / DESCRIPTION)
        try:
            weights, _ = load_checked(path / WEIGHTS, ENTRY)
            initial = towers.model_copy(update={"image": towers.image.model_copy(update={"weights": "random"})})
            encoder = build(initial, facts["text_width"], data.image_size, 0, "student")
            encoder.temperature = facts["temperature"]
            encoder.load_state_dict(weights)
            shape = facts["normalisation"] | {name: facts[name] for name in ("text_width", "text_encoder")}
            origin = {"trained_on": facts["trained_on"], "scores": facts["scores"]}
        except (Damaged, KeyError, TypeError, RuntimeError) as error:
            written, now = facts.get("versions", {}), version("timm")
            raise ValueError(
                f"{path} is damaged, or its image tower differs in this version of timm (written with "
                f"{written.get('timm')}, installed {now}): {error}; copy or train the model again"
            ) from error
        return cls(encoder.to(device), towers, data, **shape, **origin, path=path)


load_model = RetrievalModel.load


def check_replaceable(folder: Path) -> None:
    """Raise `ValueError` if a model cannot be written to `folder`, because that is a file or has files of no model."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / DESCRIPTION).is_file():
        raise ValueError(f"{folder} has other files and is no model; choose another folder")


def _read_description(file: Path) -> tuple[dict[str, Any], config.Model, config.Data]:
    """Return the description of a model, and its sections `model` and `data`. Raises `ValueError` if it is damaged."""
    try:
        facts = read_json(file)
        if (found := facts["schema_version"]) != SCHEMA_VERSION:
            mistakes = [f"it has schema version {found}, this rmdd reads {SCHEMA_VERSION}"]
        else:
            towers, wrong = validate(config.Model, facts["model"])
            data, also_wrong = validate(config.Data, facts["data"])
            mistakes = [*(f"model.{mistake}" for mistake in wrong), *(f"data.{mistake}" for mistake in also_wrong)]
            if towers and data:
                return facts, towers, data
    except (ValueError, KeyError, TypeError) as error:
        mistakes = [f"{type(error).__name__}: {error}"]
    raise ValueError(
        f"{file} is damaged, or from another version of rmdd: {'; '.join(mistakes)}; copy the model again, use the "
        "version of rmdd that wrote it, or train it again"
    )


def reasons(unreadable: Mapping[str, str]) -> dict[str, int]:
    """Return how many files could not be read for each reason."""
    return dict(Counter(text.partition(":")[0] for text in unreadable.values()))


def verify(path: Path, check: DiskCheck) -> None:
    """Check that the model at `path` can be loaded and has finite weights."""
    if not check.begin(path):
        return
    remedy = "copy the model again, or write it again with `rmdd train`"
    check.tensors(path / WEIGHTS, ENTRY, remedy)
    with check.errors_as_faults(path / DESCRIPTION, remedy):
        RetrievalModel.load(path)


FORMAT = Format((DESCRIPTION,), "models/*", verify)
