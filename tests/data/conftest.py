import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def draw(root):
    """Fixture: a function that writes small noise images to given paths below `root`; each path has its own noise."""

    def write(*paths, size=(6, 5)):
        for path in paths:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(abs(hash_of(path))).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / path, "PNG")

    return write


@pytest.fixture
def put(root):
    """Fixture: a function that writes an annotation file into `root`: a string unchanged, any other value as JSON."""

    def write(path, content, **options):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (root / path).write_text(text, **({"encoding": "utf-8"} | options))

    return write


def hash_of(path):
    return int.from_bytes(path.encode()[-7:], "big")
