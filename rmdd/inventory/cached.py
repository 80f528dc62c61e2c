"""The files of the folder `cache` that kept work would read again: pictures, caption embeddings and features.

Names of these files are hashes of their content's settings. The names that runs need are computed as runs compute them.
Where that would repeat too much of the work (features, probes, pictures of generative methods), all files of that kind
stay as long as any such work is kept.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rmdd import config, methods
from rmdd.config.hashing import hash_value
from rmdd.core.storage import root_of
from rmdd.data.captions import SplitCaptions
from rmdd.data.shards import SPLITS, Dataset
from rmdd.data.splits import load_split
from rmdd.inventory.contents import Contents
from rmdd.inventory.work import ERRORS, StoredWork
from rmdd.models.text import embedding_file
from rmdd.runs.paths import dataset_folder

PICTURES = tuple(f"{split}-*.{ending}" for split in SPLITS for ending in ("npy", "bin"))
TEXTS = ("text-*.npy", "text-*.parts")
FEATURES = ("features-*", "sides-*", "picks-*.json", "image-bytes-*.npy")


def unused_cache(contents: Contents, kept: Sequence[StoredWork]) -> set[str]:
    """Return the files and folders in `cache` that no kept work would read again."""
    used, patterns = set[Path](), {*PICTURES, *TEXTS, *FEATURES}
    seen = set[str]()
    for work in kept:
        if work.kind == "model":
            continue
        if work.kind in ("coreset", "comparison", "training"):
            patterns -= {*FEATURES, *TEXTS}
        if work.kind == "coreset" or (work.kind == "run" and not (work.path / "run.yaml").is_file()):
            patterns -= set(PICTURES if work.kind == "run" else ()) | set(TEXTS)
            continue
        runs = [*([] if work.kind == "sweep" else [work.run]), *work.members.values()]
        for run in runs:
            if run.evaluate.probes:
                patterns -= {*PICTURES, *TEXTS}
            if not methods.method_of(run).iterates:
                patterns -= {*FEATURES, *TEXTS}
            view = hash_value([str(dataset_folder(run)), run.model_dump(mode="json", include={"data", "model"})])
            if view not in seen and patterns & {*PICTURES, *TEXTS}:
                seen.add(view)
                try:
                    used |= set(_cached_files(run))
                except ERRORS:  # the dataset is missing or damaged
                    patterns -= {*PICTURES, *TEXTS}
    found = {name for pattern in patterns for name in contents.find(f"cache/{pattern}")}
    return found - {contents.name(path) for path in used}


def _cached_files(run: config.Run) -> Iterator[Path]:
    """Yield the files of the decoded images and of the caption embeddings of all splits of a run."""
    dataset, cache = Dataset.open(dataset_folder(run)), root_of(run.runtime) / "cache"
    for split in SPLITS:
        yield from load_split(dataset, split, run.data, cache).cached_files
        text = embedding_file(SplitCaptions(dataset, split, run.data), run.model.text, cache)
        yield from (text, text.with_suffix(".parts"))
