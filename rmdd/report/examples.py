"""Retrieval examples of the report: captions of test, and the images that students find for them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rmdd.report.pictures import data_uri

SIDE = 80  # maximum side in pixels of the images
EXACT_SIDE = 32  # images with at most this side are stored losslessly
Pixels = Callable[[np.ndarray], np.ndarray]
"""Function that returns the images of test with the given indices, as uint8 (n, 3, H, W)."""


def queries(content: Mapping[str, Any], labels: Mapping[str, str], pixels: Pixels) -> list[dict[str, Any]]:
    """Return each caption of `content` (see `rmdd.evaluate.examples`) with its image and the images that were found.

    `labels` maps rows of the result table to displayed names, in the order of the page.
    """
    asked: Sequence[Mapping[str, Any]] = content["queries"]
    shown = sorted({i for q in asked for i in (q["image"], *(n for f in q["found"].values() for n in f["images"]))})
    uris = dict(zip(shown, map(_uri, pixels(np.array(shown))), strict=True))
    return [
        {
            "caption": query["caption"],
            "image": uris[query["image"]],
            "rows": [
                {
                    "label": label,
                    "place": query["found"][row]["place"],
                    "images": [{"uri": uris[i], "own": i == query["image"]} for i in query["found"][row]["images"]],
                }
                for row, label in labels.items()
                if row in query["found"]
            ],
        }
        for query in asked
    ]


def _uri(pixels: np.ndarray) -> str:
    return data_uri(pixels, None if max(pixels.shape) <= EXACT_SIDE else SIDE)
