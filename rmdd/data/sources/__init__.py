"""Data sources, one file per input format. Each file defines `SOURCE`; see `rmdd.data.source`."""

from __future__ import annotations

from rmdd.config import Data
from rmdd.config import sources as by_name
from rmdd.data.inputs import input_path
from rmdd.data.source import AnnotationSource, SampleSource


def find(data: Data) -> AnnotationSource | SampleSource:
    """Return the source that `data` names. Raises `ValueError` if it does not exist or `data.root` is not a folder."""
    source = by_name.find(data.source)
    if not isinstance(source, AnnotationSource | SampleSource):
        raise ValueError(f"data.source '{data.source}' is no AnnotationSource or SampleSource of rmdd.data.source")
    if data.root is not None and not (root := input_path(data.root)).is_dir():
        raise ValueError(f"data.root {root} is not a folder; set it to the folder that image paths start in")
    return source
