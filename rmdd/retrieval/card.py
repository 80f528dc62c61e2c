"""The model card (`README.md`) of a trained retrieval model."""

from collections.abc import Mapping
from typing import Any


def card(facts: Mapping[str, Any]) -> str:
    """Return the card in Markdown; `facts` is the content of `model.json`."""
    trained, data, towers = facts["trained_on"], facts["data"], facts["model"]
    scores = [f"R@mean on val: {recalls['R@mean']:.1f} %." for recalls in facts["scores"].values()]
    return CARD.format(
        pairs=trained["pairs"],
        kind=trained["kind"],
        details=", ".join(f"{name} {trained[name]}" for name in ("method", "loss", "student") if name in trained),
        image=towers["image"]["name"],
        text=towers["text"]["name"],
        size=data["image_size"],
        width=facts["embedding_size"],
        temperature=facts["temperature"],
        scores=" ".join(scores) or "It was not scored: the data of its run was not there.",
        rmdd=facts["versions"]["rmdd"],
    )


CARD = """\
---
library_name: rmdd
tags:
- image-text-retrieval
- dataset-distillation
---

# Retrieval model, trained on {pairs} pairs

It embeds images and captions in one space: the better they fit, the higher is their cosine. It was trained by rmdd
{rmdd} on {pairs} pairs ({kind}; {details}). {scores}

- Image tower: `{image}` on {size} x {size} pixels. Its weights are in `model.safetensors`.
- Text tower: `{text}`, which is frozen and is not in this folder.
- Embeddings: {width} numbers of unit length. In training, cosines were divided by {temperature:g}.

```python
import rmdd

model = rmdd.load_model(".")  # this folder
for path, score in model.search("a red ring", "folder/with/pictures", top=5):
    print(path, score)
images = model.encode_images(["one.jpg", "two.png"])  # float32 (2, {width}), unit length
texts = model.encode_texts(["a red ring"])
print(images @ texts.T)
```

On the command line: `rmdd search-images FOLDER_OF_THIS_MODEL "a red ring" FOLDER`. `model.json` has all settings.
The licence and the terms of use of the training data and of the pretrained towers apply to this model.
"""
