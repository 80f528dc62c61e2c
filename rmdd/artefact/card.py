"""The dataset card and the preview of a distilled set."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from rmdd.artefact.distilled import CARD as CARD_FILE
from rmdd.artefact.distilled import PREVIEW, DistilledSet
from rmdd.data.images import denormalise

PREVIEW_PAIRS = 64
TILE = (64, 128)  # smallest and largest side of a picture in the preview

LOSSES = {
    "wbce": "sum(F.binary_cross_entropy_with_logits(z[p], s[p]) for p in (s > 0.5, s <= 0.5)) / 2",
    "infonce": "-(s * (z.log_softmax(0) + z.log_softmax(1))).sum() / (2 * len(s))",
    "bce": "F.binary_cross_entropy_with_logits(z, s)",
    "cwcl": "-sum((s / (s.sum(d, True) + 1e-6) * z.log_softmax(d)).sum() for d in (0, 1)) / (2 * len(s))",
    "kl": "sum(F.kl_div(z.log_softmax(d), (10 * s).softmax(d)) for d in (0, 1)) / 2",
    "mse": "(z.sigmoid() - s).square().mean()",
}


def export(distilled: DistilledSet, path: Path | str, overwrite: bool = False) -> Path:
    """Save a set with its card and its preview. An existing set is replaced only when asked to."""
    picture = io.BytesIO()
    preview(distilled).save(picture, "PNG")
    beside = {PREVIEW: picture.getvalue(), CARD_FILE: text(distilled).encode("utf-8")}
    return distilled.save(path, overwrite, beside)


def preview(distilled: DistilledSet) -> Image.Image:
    """A near-square grid of up to 64 pictures, evenly spaced over all pairs."""
    total = distilled.num_pairs
    shown = min(total, PREVIEW_PAIRS)
    pairs = distilled.as_dataset()
    side = min(max(pairs[0]["image"].shape[-1], TILE[0]), TILE[1])
    columns = math.ceil(math.sqrt(shown))
    grid = Image.new("RGB", (columns * (side + 2) + 2, math.ceil(shown / columns) * (side + 2) + 2), "white")
    for n in range(shown):
        pixels = denormalise(pairs[n * total // shown]["image"][None], distilled.mean, distilled.std)[0]
        how = Image.Resampling.NEAREST if pixels.shape[-1] < side else Image.Resampling.BICUBIC
        tile = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).resize((side, side), how)
        grid.paste(tile, (2 + n % columns * (side + 2), 2 + n // columns * (side + 2)))
    return grid


def script(distilled: DistilledSet) -> str:
    """Plain torch that trains a small dual encoder on the saved set, run from its folder."""
    subset = distilled.subsets[0]
    size = distilled.image_size
    flat = 64 * math.ceil(size / 8) ** 2
    conv = "nn.Conv2d(3, 64, 9, 8, 4), nn.ReLU(), nn.Flatten()"
    tensors = {
        "full": [
            'x, y, s = (t[f"{k}.{n}"] for n in ("images", "texts", "similarity.matrix"))',
        ],
        "low_rank": [
            'x, y, d, a, b = (t[f"{k}.{n}"] for n in '
            '("images", "texts", "similarity.scale", "similarity.left", "similarity.right"))',
            's = d.diag() + subset["similarity"]["alpha"] / a.shape[1] * a @ b.T',
        ],
        "identity": [
            'x, y = (t[f"{k}.{n}"] for n in ("images", "texts"))',
            "s = torch.eye(len(x))",
        ],
    }[subset.kind]
    larger = f'x = F.interpolate(x, ({size}, {size}), mode="bilinear")'
    enlarge = [] if subset.images.shape[-1] == size else [larger]
    return "\n".join(
        [
            "import json, safetensors.torch, torch, torch.nn as nn, torch.nn.functional as F",
            't, info = safetensors.torch.load_file("tensors.safetensors"), json.load(open("set.json"))',
            f"image, text = nn.Sequential({conv}, nn.Linear({flat}, 256)), nn.Linear({subset.texts.shape[1]}, 256)",
            "optimizer = torch.optim.Adam([*image.parameters(), *text.parameters()], 1e-3)",
            'for k, subset in enumerate(info["subsets"]):',
            *(f"    {line}" for line in [*tensors, *enlarge]),
            "    for step in range(30):",
            f"        z = F.normalize(image(x)) @ F.normalize(text(y)).T / {distilled.model.get('temperature', 0.07)}",
            f"        loss = {LOSSES[distilled.loss]}",
            "        optimizer.zero_grad(), loss.backward(), optimizer.step()",
            '        print(f"subset {k} step {step} loss {loss.item():.4f}")',
        ]
    )


def text(distilled: DistilledSet) -> str:
    """The README of a distilled set, in the form of a dataset card."""
    budget, subset = distilled.budget(), distilled.subsets[0]
    _, _, height, width = subset.images.shape
    size = distilled.image_size
    towers = {name: distilled.model.get(name, {}).get("name", "unknown") for name in ("image", "text")}
    counts = "+".join(str(s.pairs) for s in distilled.subsets)
    data = distilled.config.get("data", {})
    return CARD.format(
        title=distilled.config.get("name", "distilled set"),
        pairs=distilled.num_pairs,
        source=" ".join(filter(None, (data.get("source", "unknown"), data.get("layout")))),
        method=distilled.method,
        loss=distilled.loss,
        counts=counts,
        image_shape=f"3 x {height} x {width}",
        enlarged="" if width == size else f"; enlarge them to {size} x {size} (bilinear) for a tower",
        text_width=subset.texts.shape[1],
        kind=subset.kind + (f", rank {subset.rank}" if subset.rank else ""),
        image_tower=towers["image"],
        text_tower=towers["text"],
        temperature=distilled.model.get("temperature", 0.07),
        mean=", ".join(f"{x:.6g}" for x in distilled.mean),
        std=", ".join(f"{x:.6g}" for x in distilled.std),
        parts="\n".join(
            f"| {part} | {budget[part]['parameters']:,} | {budget[part]['bytes']:,} |"
            for part in ("images", "texts", "similarity", "rates", "total")
        ),
        unit=budget["unit"],
        in_pairs=budget["in_pairs"],
        metrics=_table(distilled.metrics, "measure") or "None were recorded.",
        provenance=_table(distilled.provenance, "what") or "Nothing was recorded.",
        similarity_row=SIMILARITY_ROWS[subset.kind],
        made=_origin(distilled),
        licences=_licences(distilled.provenance.get("parts", [])),
        script=script(distilled),
    )


def _origin(distilled: DistilledSet) -> str:
    """How the pictures came about."""
    generated = distilled.provenance.get("generated")
    if generated is None:
        return OPTIMISED
    return PICKED if next(iter(generated.values())).get("pictures") == "real" else DECODED


def _licences(parts: list[dict[str, Any]]) -> str:
    """The pretrained parts that a set was made with, and what their model cards say."""
    rows = [
        f"| {p['role']} | `{p['id']}`{' (a local folder)' if p['local'] else ''} | `{p['revision']}` "
        f"| {p['licence'] or 'not stated; see its source'} |"
        for p in parts
    ]
    return PARTS.format(rows="\n".join(rows)) if rows else ""


def _table(values: dict[str, Any], head: str) -> str:
    rows = [f"| {name} | {format(value, '.4g' if isinstance(value, float) else '')} |" for name, value in _flat(values)]
    return "\n".join([f"| {head} | value |", "|---|---|", *rows]) if rows else ""


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Scalars by dotted name; curves and other lists stay in set.json."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, str | int | float):
            yield prefix + str(name), value


SIMILARITY_ROWS = {
    "full": "| `<k>.similarity.matrix` | M x M | how well image i fits text j; rows are images, any real number |",
    "low_rank": "| `<k>.similarity.scale` | M | with the two below, S = diag(scale) + alpha/R left right^T |\n"
    "| `<k>.similarity.left` | M x R | factor of the images |\n"
    "| `<k>.similarity.right` | M x R | factor of the texts |",
    "identity": "| (none) | | the similarity is the identity: image i belongs to text i alone |",
}

CARD = """\
---
license: other
task_categories:
- image-to-text
- text-to-image
tags:
- dataset-distillation
- image-text-retrieval
---

# {title}: {pairs} distilled image-text pairs

![preview](preview.png)

Synthetic pairs that stand in for a large image-text dataset (source: {source}) when a retrieval model is
trained. They were made by rmdd with the method `{method}` for the loss `{loss}`. {made}

- Subsets, to be trained on in this order: {counts} pairs.
- Images: {image_shape}, normalised{enlarged}. A picture in [0, 1] is `image * std + mean` with mean ({mean}) and std
  ({std}).
- Texts: embeddings of width {text_width} from `{text_tower}`, which is needed again to embed real captions.
- Similarity: {kind}, within each subset only. Scores are cosine / {temperature}.
- Distilled with the image tower `{image_tower}`; the learned rates belong to it and to plain SGD.

## Results

{metrics}

## Size

| part | parameters | bytes |
|---|---|---|
{parts}

Counted memory-fair this is {in_pairs:.2f} pairs of {unit:,} parameters.

## Fields

`tensors.safetensors`, for each subset k = 0, 1, ... of M pairs:

| tensor | shape | meaning |
|---|---|---|
| `<k>.images` | M x {image_shape} | float32, normalised |
| `<k>.texts` | M x {text_width} | float32, not normalised |
{similarity_row}
| `<k>.lr_image`, `<k>.lr_text` | scalar | learned SGD rates of the image and the text side |

`captions.parquet`, a row per pair: `subset`, `index`, `caption` (the real caption nearest to the distilled text),
`source_id` (the real pair it started from), `caption_before` (the caption it started from). `set.json`: everything
else, with SHA-256 sums.

## Train on it without rmdd

Needs torch and safetensors; run in this folder.

```python
{script}
```

With rmdd: `rmdd.load(folder).as_dataset()`.

## Provenance

{provenance}

## Licence

The pictures and captions derive from the source data: its licence and terms of use apply to this set. Name the
source when you publish or share it.{licences}
"""
OPTIMISED = """\
Pictures and text embeddings were
optimised; they are not photographs and need not look like any."""
DECODED = """\
Pictures were
generated by the pretrained parts that the section on licences names; no safety checker looked at them."""
PICKED = """\
Pictures and
captions are real ones, picked by the method."""
PARTS = """

Pretrained parts took part in making it, whose licences and terms of use apply to what they made as well:

| part | name | revision | licence |
|---|---|---|---|
{rows}"""
