"""Files of training pairs that a comparison takes from outside its run: distilled sets of different runs, and coresets.

The name of a file is a hash of its content. `.safetensors` files hold learned pairs (see `rmdd.distill.sets`) with the
full similarity matrix; `.json` files list caption records of the train split.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rmdd.artefact.distilled import DistilledSet
from rmdd.core.files import atomic_path, read_json
from rmdd.distill.sets import name_by_content, read_subsets, write_subsets
from rmdd.distill.synthetic import enlarged
from rmdd.evaluate.students import TrainingPairs
from rmdd.models.prepared import PreparedSplit


def pairs_of_set(distilled: DistilledSet) -> list[TrainingPairs]:
    """Return the training pairs of each subset of a distilled set, in order, with images at their stored size."""
    return [TrainingPairs(s.images, s.texts, s.matrix, s.lr_image, s.lr_text) for s in distilled.subsets]


def enlarged_to(size: int, subsets: Sequence[TrainingPairs]) -> list[TrainingPairs]:
    """Return the pairs of each subset with images enlarged to `size` pixels per side, the input of the towers."""
    return [replace(pairs, images=enlarged(pairs.images, size)) for pairs in subsets]


def write_pairs(folder: Path, subsets: Sequence[TrainingPairs]) -> Path:
    """Write learned pairs with images at their stored size to a safetensors file in `folder`; return its path."""
    tensors = [
        {
            "images": pairs.images,
            "texts": pairs.texts,
            "similarity.matrix": pairs.similarity,
            "lr_image": torch.tensor(pairs.lr_image, dtype=torch.float64),
            "lr_text": torch.tensor(pairs.lr_text, dtype=torch.float64),
        }
        for pairs in subsets
    ]
    alpha = [1.0] * len(tensors)
    path = folder / name_by_content(tensors, alpha)
    if not path.is_file():
        write_subsets(path, tensors, alpha)
    return path


def write_records(folder: Path, records: Sequence[int]) -> Path:
    """Write the indices of captions of the train split to a JSON file in `folder`; return its path."""
    data = json.dumps(list(records)).encode()
    path = folder / f"{hashlib.sha256(data).hexdigest()[:16]}.json"
    if not path.is_file():
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    return path


def read_pairs(path: Path, image_size: int, train: Callable[[], PreparedSplit], lr: float) -> list[TrainingPairs]:
    """Read the pairs of each subset with images of `image_size` pixels; a nonzero `lr` replaces both learning rates."""
    if path.suffix == ".json":
        return [real_pairs(train(), read_json(path), lr)]
    stored = [
        TrainingPairs(t["images"], t["texts"], t["similarity.matrix"], t["lr_image"].item(), t["lr_text"].item())
        for t, _ in read_subsets(path)
    ]
    subsets = enlarged_to(image_size, stored)
    return [replace(pairs, lr_image=lr, lr_text=lr) for pairs in subsets] if lr else subsets


def real_pairs(train: PreparedSplit, records: list[int], lr: float) -> TrainingPairs:
    """Return the real pairs of the captions `records`, with identity similarity; both towers get learning rate `lr`."""
    images = train.pictures(train.split.image_of[records])
    return TrainingPairs(images, torch.tensor(train.texts[records]), torch.eye(len(records)), lr, lr)
