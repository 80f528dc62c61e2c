"""Examples of retrieval for the report: captions of test, and the first images that a student finds for each of them.

The captions depend only on the test split, so the examples of all students show the same captions. A student finds them
in the pass in which it is scored on test.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmdd.core.seeding import generator
from rmdd.data.splits import Split
from rmdd.evaluate.retrieval import Ranks, first_images

CAPTIONS = 6
"""Number of captions whose results are shown."""
IMAGES = 5
"""Number of images that are shown for each caption, best first."""


def captions_of_examples(image_of: Int[Tensor, " T"]) -> list[int]:
    """Return the captions of the examples: the first caption of each of `CAPTIONS` images that a fixed seed draws."""
    drawn = torch.randperm(int(image_of.max()) + 1, generator=generator(0, "retrieval examples"))[:CAPTIONS]
    return [int((image_of == image).nonzero()[0]) for image in drawn]


def examples_of(
    images: Float[Tensor, "I D"], texts: Float[Tensor, "T D"], ranks: Ranks, chunk: int
) -> list[dict[str, Any]]:
    """Return, per caption of the examples, its first `images` and the `place` (from 1) of its own image.

    `ranks` are the ranks of the same embeddings, computed with the same `chunk`.
    """
    captions = captions_of_examples(ranks.image_of)
    found = first_images(images, texts, ranks.image_of, captions, IMAGES, chunk)
    places = (ranks.image[captions] + 1).tolist()
    return [{"images": first, "place": place} for first, place in zip(found, places, strict=True)]


def content(split: Split, found: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the content of `examples.json`: captions of the examples, their images, and what each student found.

    `found` maps the rows of the result table to the examples of one of their students.
    """
    captions = captions_of_examples(torch.from_numpy(split.image_of))
    queries = []
    for place, caption in enumerate(captions):
        image = int(split.image_of[caption])
        facts = {"caption": split.captions[caption], "image": image, "pair_id": split.pair_ids[image]}
        queries.append(facts | {"found": {row: examples[place] for row, examples in found.items()}})
    return {"images": len(split), "queries": queries}
