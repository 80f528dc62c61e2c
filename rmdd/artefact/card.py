"""The dataset card (`README.md`) and the preview image of a distilled set."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from rmdd.artefact.distilled import CARD as CARD_FILE
from rmdd.artefact.distilled import PREVIEW, DistilledSet
from rmdd.config import recipes
from rmdd.config.order import in_words
from rmdd.data.images import denormalise

PREVIEW_PAIRS = 64
TILE = (64, 128)  # preview images have sides of 64 to 128 pixels
RECALLS = ("IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10", "R@mean")

LOSSES = {
    "wbce": "sum(F.binary_cross_entropy_with_logits(z[p], s[p]) for p in (s > 0.5, s <= 0.5)) / 2",
    "infonce": "-(s * (z.log_softmax(0) + z.log_softmax(1))).sum() / (2 * len(s))",
    "bce": "F.binary_cross_entropy_with_logits(z, s)",
    "cwcl": "-sum((s / (s.sum(d, True) + 1e-6) * z.log_softmax(d)).sum() for d in (0, 1)) / (2 * len(s))",
    "kl": "sum(F.kl_div(z.log_softmax(d), (10 * s).softmax(d)) for d in (0, 1)) / 2",
    "mse": "(z.sigmoid() - s).square().mean()",
}


def export(distilled: DistilledSet, path: Path | str, overwrite: bool = False) -> Path:
    """Save a distilled set with its card and preview; `overwrite` replaces an existing distilled set."""
    image = io.BytesIO()
    preview(distilled).save(image, "PNG")
    extra_files = {PREVIEW: image.getvalue(), CARD_FILE: text(distilled).encode("utf-8")}
    return distilled.save(path, overwrite, extra_files)


def preview(distilled: DistilledSet) -> Image.Image:
    """Draw up to 64 of the distilled images, evenly spaced over all pairs, in a nearly square grid."""
    total = distilled.num_pairs
    count = min(total, PREVIEW_PAIRS)
    pairs = distilled.as_dataset()
    side = min(max(pairs[0]["image"].shape[-1], TILE[0]), TILE[1])
    columns = math.ceil(math.sqrt(count))
    grid = Image.new("RGB", (columns * (side + 2) + 2, math.ceil(count / columns) * (side + 2) + 2), "white")
    for n in range(count):
        pixels = denormalise(pairs[n * total // count]["image"][None], distilled.mean, distilled.std)[0]
        resampling = Image.Resampling.NEAREST if pixels.shape[-1] < side else Image.Resampling.BICUBIC
        tile = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).resize((side, side), resampling)
        grid.paste(tile, (2 + n % columns * (side + 2), 2 + n // columns * (side + 2)))
    return grid


def script(distilled: DistilledSet) -> str:
    """Return a script that trains a small dual encoder on the saved set without rmdd; start it in the set's folder."""
    subset = distilled.subsets[0]
    size = distilled.image_size
    flat = 64 * math.ceil(size / 8) ** 2
    conv = "nn.Conv2d(3, 64, 9, 8, 4), nn.ReLU(), nn.Flatten()"
    blocks = {
        "full": ['blocks = [t[f"{p}.similarity.matrix"] for p in stage]'],
        "low_rank": [
            'parts = [[t[f"{p}.similarity.{n}"] for n in ("scale", "left", "right")] for p in stage]',
            'alpha = [info["subsets"][p]["similarity"]["alpha"] for p in stage]',
            "blocks = [d.diag() + c / a.shape[1] * a @ b.T for c, (d, a, b) in zip(alpha, parts)]",
        ],
        "identity": ['blocks = [torch.eye(len(t[f"{p}.images"])) for p in stage]'],
    }[subset.kind]
    logits = f"F.normalize(image(x)) @ F.normalize(text(y)).T / {distilled.model.get('temperature', 0.07)}"
    loss = [f"z, s = {logits}, torch.block_diag(*blocks)", f"loss = {LOSSES[distilled.loss]}"]
    if distilled.order != "sequence" and distilled.between == "masked":  # only pairs of the same subset are compared
        loss = [
            f"scores, rows, loss = {logits}, torch.arange(len(x)).split([len(s) for s in blocks]), 0",
            "for m, s in zip(rows, blocks):",
            "    z = scores[m][:, m]",
            f"    loss = loss + len(m) / len(x) * ({LOSSES[distilled.loss]})",
        ]
    larger = f'x = F.interpolate(x, ({size}, {size}), mode="bilinear")'
    enlarge = [] if subset.images.shape[-1] == size else [larger]
    return "\n".join(
        [
            "import json, safetensors.torch, torch, torch.nn as nn, torch.nn.functional as F",
            't, info = safetensors.torch.load_file("tensors.safetensors"), json.load(open("set.json"))',
            f"image, text = nn.Sequential({conv}, nn.Linear({flat}, 256)), nn.Linear({subset.texts.shape[1]}, 256)",
            "optimizer = torch.optim.Adam([*image.parameters(), *text.parameters()], 1e-3)",
            'for k, stage in enumerate(info["stages"]):',
            '    x, y = (torch.cat([t[f"{p}.{n}"] for p in stage]) for n in ("images", "texts"))',
            *(f"    {line}" for line in [*enlarge, *blocks]),
            "    for step in range(30):",
            *(f"        {line}" for line in loss),
            "        optimizer.zero_grad(), loss.backward(), optimizer.step()",
            '        print(f"stage {k} step {step} loss {loss.item():.4f}")',
            "def recall(x, y, k=1):",
            "    best = (F.normalize(image(x)) @ F.normalize(text(y)).T).topk(k).indices",
            "    return (best == torch.arange(len(x))[:, None]).any(1).float().mean().item()",
        ]
    )


def text(distilled: DistilledSet) -> str:
    """Return the `README.md` of a distilled set: a dataset card in Markdown."""
    budget, subset = distilled.budget(), distilled.subsets[0]
    _, _, height, width = subset.images.shape
    size = distilled.image_size
    towers = {name: distilled.model.get(name, {}).get("name", "unknown") for name in ("image", "text")}
    counts = "+".join(str(s.pairs) for s in distilled.subsets)
    data, title = distilled.config.get("data", {}), distilled.config.get("name", "distilled set")
    rates = "learned" if recipes.learns_rates(distilled.method) else "fixed"
    return CARD.format(
        title=title,
        pretty_name=json.dumps(f"{title}: {distilled.num_pairs} distilled image-text pairs", ensure_ascii=False),
        size=next(name for limit, name in SIZES if distilled.num_pairs < limit),
        pairs=distilled.num_pairs,
        source=" ".join(filter(None, (data.get("source", "unknown"), data.get("layout")))),
        method=distilled.method,
        loss=distilled.loss,
        counts=counts,
        order=f" Train on {in_words(distilled.order, distilled.between)}." if len(distilled.subsets) > 1 else "",
        image_shape=f"3 x {height} x {width}",
        enlarged="" if width == size else f"; enlarge them to {size} x {size} (bilinear) before an image tower",
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
        results=_results(distilled) or "No scores were recorded.",
        provenance=_table(distilled.provenance, "item") or "No provenance was recorded.",
        rates=rates,
        rates_of=RATES[rates],
        similarity_row=SIMILARITY_ROWS[subset.kind],
        origin=_origin(distilled),
        licences=_licences(distilled.provenance.get("parts", [])),
        script=script(distilled),
    )


def train_pairs(distilled: DistilledSet) -> int | None:
    """Return the number of pairs on which the experts of a set were trained; None if the set does not say."""
    data, limit = distilled.provenance.get("data"), distilled.config.get("data", {}).get("train_limit")
    pairs: int | None = data.get("counts", {}).get("train", {}).get("pairs") if isinstance(data, dict) else None
    return min(pairs, limit) if pairs and limit else pairs


def _results(distilled: DistilledSet) -> str:
    """Return Markdown tables of the scores: retrieval recalls, then every probe, then all other recorded scores."""
    pairs = train_pairs(distilled)
    labels = {
        "random": "random real pairs, same budget",
        distilled.method: f"this set (`{distilled.method}`)",
        "full": f"all {pairs:,} training pairs" if pairs else "all training pairs",
    }
    known = {row: scores for row, scores in distilled.metrics.items() if row in labels and "test_last" in scores}
    if not known:
        return _table(distilled.metrics, "score")
    rows = [
        [label, *(known[row]["test_last"][recall] for recall in RECALLS), known[row]["val"]["R@mean"]]
        for row, label in labels.items()
        if row in known
    ]
    if in_paper := known.get(distilled.method, {}).get("test_best_reference"):
        rows.append(["this set, scored as in the paper of the method", *(in_paper.get(r) for r in RECALLS), None])
    tables = [_score_table([*RECALLS, "R@mean on val"], rows), RESULTS_NOTE + (PAPER_NOTE if in_paper else "")]
    for probe, scores in known.get(distilled.method, {}).get("probes", {}).items():
        rows = [[label, *known[row]["probes"][probe].values()] for row, label in labels.items() if row in known]
        tables += [f"Probe `{probe}`:", _score_table(list(scores), rows)]
    others = {row: scores for row, scores in distilled.metrics.items() if row not in known}
    return "\n\n".join(filter(None, [*tables, _table(others, "other score")]))


def _score_table(columns: list[str], rows: list[list[Any]]) -> str:
    """Return a Markdown table; each row has a label, then one score (mean, std and n) per column, or None."""
    lines = [f"| trained on | {' | '.join(columns)} | students |", f"|---|{'---|' * (len(columns) + 1)}"]
    for label, *scores in rows:
        cells = [_mean_and_std(score) if score else "" for score in scores]
        lines.append(f"| {label} | {' | '.join(cells)} | {next(score['n'] for score in scores if score)} |")
    return "\n".join(lines)


def _mean_and_std(score: dict[str, Any]) -> str:
    """Format a score as `mean ± std`, or as the mean alone when only one student was trained."""
    unknown = score["std"] is None or math.isnan(score["std"])
    return f"{score['mean']:.1f}" + ("" if unknown else f" ± {score['std']:.1f}")


def _origin(distilled: DistilledSet) -> str:
    """Return the sentence that says how the images were made."""
    generated = distilled.provenance.get("generated")
    if generated is None:
        return OPTIMISED
    return PICKED if next(iter(generated.values())).get("pictures") == "real" else DECODED


def _licences(parts: list[dict[str, Any]]) -> str:
    """Return a table of the pretrained models that made the set, and their licences; empty without models."""
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
    """Yield all scalars of nested dicts under dotted names; lists such as curves are left out, as set.json has them."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, str | int | float):
            yield prefix + str(name), value


SIMILARITY_ROWS = {
    "full": "| `<k>.similarity.matrix` | M x M | how well image i (row) matches text j (column); any real number |",
    "low_rank": "| `<k>.similarity.scale` | M | diagonal of the similarity S = diag(scale) + alpha/R left right^T |\n"
    "| `<k>.similarity.left` | M x R | factor for the images |\n"
    "| `<k>.similarity.right` | M x R | factor for the texts |",
    "identity": "| (none) | | the similarity is the identity: image i matches text i only |",
}

RESULTS_NOTE = """\
Scores are in percent, on the test split unless the column says val. IR@k is the share of captions whose image is among
the first k results; TR@k is the share of images with one of their captions among the first k. R@mean is the mean of
these six. Each row is the mean ± standard deviation over students with different seeds. All settings were chosen on
val, and each student was scored on test once, after its last pass. `set.json` has all digits under `metrics`."""

PAPER_NOTE = """ The last row
repeats the paper's own way of scoring, for comparison with its numbers only."""

SIZES = ((1000, "n<1K"), (10_000, "1K<n<10K"), (math.inf, "10K<n<100K"))
"""Size categories of Hugging Face: a number of pairs below the limit, and the name."""

RATES = {
    "learned": "Its learning rates were learned\n  for this tower and plain SGD.",
    "fixed": "Its method does not learn learning rates:\n  those in the set are fixed values for plain SGD.",
}

CARD = """\
---
license: other
license_name: terms-of-the-source-data
license_link: README.md
pretty_name: {pretty_name}
size_categories:
- {size}
configs:
- config_name: default
  data_files: captions.parquet
task_categories:
- image-to-text
- text-to-image
tags:
- dataset-distillation
- image-text-retrieval
---

# {title}: {pairs} distilled image-text pairs

![preview](preview.png)

These synthetic pairs replace a large image-text dataset (source: {source}) when you train a retrieval model. They
were made by rmdd with the method `{method}` and the loss `{loss}`. {origin}

- Subsets: {counts} pairs.{order}
- Images: {image_shape}, normalised{enlarged}. `image * std + mean` gives pixels in [0, 1], with mean ({mean})
  and std ({std}).
- Texts: embeddings of width {text_width} from `{text_tower}`. Use the same encoder to embed real captions.
- Similarity: {kind}, within each subset only. The logits of a pair are cosine / {temperature}.
- The set was distilled with the image tower `{image_tower}`. {rates_of}

## Results

{results}

## Size

| part | parameters | bytes |
|---|---|---|
{parts}

Counted in parameters, the set is as large as {in_pairs:.2f} real pairs of {unit:,} parameters each.

## Fields

`tensors.safetensors` has these tensors for each subset k = 0, 1, ... of M pairs:

| tensor | shape | meaning |
|---|---|---|
| `<k>.images` | M x {image_shape} | float32, normalised |
| `<k>.texts` | M x {text_width} | float32, not normalised |
{similarity_row}
| `<k>.lr_image`, `<k>.lr_text` | scalar | {rates} SGD learning rates of the image tower and the text tower |

`captions.parquet` has one row per pair: `subset`, `index`, `image` (a PNG file to look at, with pixels rounded and
clamped; train on `tensors.safetensors`), `caption` (the real caption nearest to the distilled text
embedding), `source_id` (the real pair that this pair started from), and `caption_before` (the caption of that real
pair). `set.json` has the subsets of each stage of training (`stages`), the configuration, provenance and scores, and
the SHA-256 of the other two files.

## Train on it without rmdd

This script needs torch and safetensors. Run it in this folder.

```python
{script}
```

The script has small towers of its own and a fixed learning rate. `recall` is R@k, from image to text, of the pairs it
gets; call it with unseen pictures and captions, prepared as above.

## Train on it with rmdd

These commands train the towers above with the set's learning rates, order and number of passes, and search pictures
with the trained model (FOLDER is the folder of this file):

```sh
rmdd train FOLDER --out model
rmdd search-images model "a red bicycle" PICTURES
```

In Python, `rmdd.load("FOLDER").as_dataset()` returns the pairs as a torch dataset. Hugging Face datasets can show the
pairs: `datasets.load_dataset("FOLDER")` has the pictures and captions of `captions.parquet`.

## Provenance

{provenance}

## Licence

The images and captions are derived from the source data, so its licence and terms of use apply to this set. Name the
source when you publish or share the set.{licences}
"""
OPTIMISED = """\
The images and
text embeddings were optimised: they are not photographs and may not look natural."""
DECODED = """\
The images were
generated by the pretrained models listed under Licence; no safety checker was used."""
PICKED = """\
The images and
captions are real ones, chosen by the method."""
PARTS = """

The set was made with these pretrained models. Their licences and terms of use also apply to it:

| role | name | revision | licence |
|---|---|---|---|
{rows}"""
