"""Built-in data sources, one file per input format. Each file defines `SOURCE`; see `rmdd.data.source`."""

from __future__ import annotations

from rmdd.config import Data
from rmdd.config import sources as by_name
from rmdd.data.inputs import input_path
from rmdd.data.source import AnnotationSource, SampleSource


def find(data: Data) -> AnnotationSource | SampleSource:
    """Return the source that `data.source` names. Raises `ValueError` if it is unknown or `data.root` is no folder."""
    source = by_name.find(data.source)
    if not isinstance(source, AnnotationSource | SampleSource):
        raise ValueError(f"data.source '{data.source}' has a SOURCE that is no AnnotationSource or SampleSource")
    if data.root is not None and not (root := input_path(data.root)).is_dir():
        hub = "; for a dataset of the hub, set data.huggingface.hub to its id" if data.source == "huggingface" else ""
        raise ValueError(f"data.root {root} is not a folder; give the folder that image paths are relative to{hub}")
    return source
