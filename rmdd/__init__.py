"""rmdd distils an image-text dataset into a few hundred synthetic pairs.

>>> import rmdd
>>> result = rmdd.run("demo", ["seed=1"])  # a preset's name, a YAML file or a mapping  # doctest: +SKIP
>>> distilled = rmdd.load(result.set)  # doctest: +SKIP
>>> pairs = distilled.as_dataset()  # doctest: +SKIP

`import rmdd` is fast: torch, transformers and ray are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmdd.artefact.distilled import load as load
    from rmdd.comparisons.compare import compare as compare
    from rmdd.comparisons.coreset import coreset as coreset
    from rmdd.comparisons.train import train as train
    from rmdd.comparisons.transfer import transfer as transfer
    from rmdd.config import Run as Run
    from rmdd.config import load as load_config
    from rmdd.core.version import VERSION as __version__
    from rmdd.pipeline import run as run
    from rmdd.retrieval.model import load_model as load_model
    from rmdd.searches import search as search
    from rmdd.searches.sweeps import sweep as sweep


_HOME = {
    "Run": ("rmdd.config", "Run"),
    "__version__": ("rmdd.core.version", "VERSION"),
    "compare": ("rmdd.comparisons.compare", "compare"),
    "coreset": ("rmdd.comparisons.coreset", "coreset"),
    "load": ("rmdd.artefact.distilled", "load"),
    "load_config": ("rmdd.config", "load"),
    "load_model": ("rmdd.retrieval.model", "load_model"),
    "run": ("rmdd.pipeline", "run"),
    "search": ("rmdd.searches", "search"),
    "sweep": ("rmdd.searches.sweeps", "sweep"),
    "train": ("rmdd.comparisons.train", "train"),
    "transfer": ("rmdd.comparisons.transfer", "transfer"),
}

__all__ = [
    "Run",
    "__version__",
    "compare",
    "coreset",
    "load",
    "load_config",
    "load_model",
    "run",
    "search",
    "sweep",
    "train",
    "transfer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rmdd' has no attribute '{name}'; available: {', '.join(__all__)}")
    module, attribute = _HOME[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
