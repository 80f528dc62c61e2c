"""Check custom input formats, added as a file in `rmdd/data/sources` or by an installed package."""

import importlib
import io
import pkgutil
import sys

import pytest
from manual import example, install
from PIL import Image

from rmdd import config
from rmdd.config import ConfigError
from rmdd.config.sources import names
from rmdd.data import sources
from rmdd.data.ingest import ingest, quarantined

LINES = example("lined.py")
TILES = '''
"""A file with several captions and images, separated by `|||`; a range is a range of image numbers."""

from rmdd.data.inputs import find, input_path
from rmdd.data.source import Candidate, SampleSource

def files(data):
    return [(path, size, "train") for path, size in find(input_path(data.root), "*.tiles")]

def ranges(paths, data):
    return [[(0, 1), (1, 3)] for path in paths]

def candidates(file, image_range, split, data, counts):
    parts = (input_path(data.root) / file).read_bytes().split(b"|||")
    for number in range(*image_range):
        counts.rows_in += 1
        counts.captions_in += 1
        caption, image = parts[2 * number].decode(), parts[2 * number + 1]
        yield Candidate(f"{file}/{number}", (caption,), split, "tiles", f"{file} {number}", image)

SOURCE = SampleSource(files, candidates, ranges)
'''


@pytest.fixture
def data(root, draw, put):
    draw("a.png", "b.png")
    put("all.txt", "a.png: a dog\na.png: a brown dog\nb.png: a cat\ngone.png: nothing\n")
    return {"source": "lines", "root": str(root), "annotations": "all.txt"}


@pytest.fixture
def one_file(tmp_path, monkeypatch):
    """Fixture: install the custom formats `lines` and `tiles` as files in the folder of the built-in sources."""
    (tmp_path / "formats").mkdir()
    (tmp_path / "formats" / "lines.py").write_text(LINES)
    (tmp_path / "formats" / "tiles.py").write_text(TILES)
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path / "formats")])
    monkeypatch.setattr(sources.__spec__, "submodule_search_locations", sources.__path__)
    importlib.invalidate_caches()
    yield
    for name in ("lines", "tiles"):
        sys.modules.pop(f"rmdd.data.sources.{name}", None)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Fixture: install the custom format `lines` as a separate package that registers an entry point."""
    (tmp_path / "lined.py").write_text(LINES)
    install(tmp_path, "lined", "rmdd.sources")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    sys.modules.pop("lined", None)


@pytest.mark.parametrize("how", ["one_file", "installed"])
def test_a_custom_annotation_format_is_ingested(how, request, data, tmp_path):
    request.getfixturevalue(how)
    run = config.load({"data": data})
    dataset = ingest(run.data, tmp_path / "out")
    captions = {pair.pair_id: pair.captions for split in dataset.counts for pair in dataset.pairs(split)}
    assert captions == {"a.png": ("a dog", "a brown dog"), "b.png": ("a cat",)}
    assert [(bad["file"], bad["reason"]) for bad in quarantined(dataset)] == [("gone.png", "missing_file")]
    assert dataset.manifest["config"]["split_fractions"] and len(dataset.manifest["annotations"]) == 1
    assert ingest(run.data, tmp_path / "out").hash == dataset.hash


def test_a_custom_sample_format_is_read_in_ranges(one_file, root, tmp_path):
    def png(colour):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
        return buffer.getvalue()

    tiles = [part for colour in ("red", "green", "blue") for part in (colour.encode(), png(colour))]
    (root / "x.tiles").write_bytes(b"|||".join(tiles))
    run = config.load({"data": {"source": "tiles", "root": str(root)}})
    dataset = ingest(run.data, tmp_path / "out")
    assert [pair.captions for pair in dataset.pairs("train")] == [("red",), ("green",), ("blue",)]
    assert [shard["rows"] for shard in dataset.manifest["shards"]] == [1, 2]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "lines",
            r"unknown source 'lines'; available: dataset, huggingface, .*karpathy, lists, .*did you mean lists\?",
        ),
        ("nonsense", "an entry point of the group rmdd.sources"),
        ("classes", "data.source 'classes' can only be used in evaluate.probes"),
    ],
)
def test_an_unknown_source_is_a_config_error(data, name, words):
    with pytest.raises(ConfigError, match=words):
        config.load({"data": data | {"source": name}})


def test_every_file_of_the_folder_is_a_source():
    modules = {module.name for module in pkgutil.iter_modules(sources.__path__)}
    assert modules == names().keys()
    assert all(
        isinstance(sources.by_name.find(name), sources.AnnotationSource | sources.SampleSource) for name in modules
    )
