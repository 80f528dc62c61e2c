"""A transformers text tower whose input is word embeddings instead of token ids.

A word embedding of zeros marks padding. Padding gets no gradient, so it stays zero. Shapes: B captions, L tokens in the
longest caption, d features of a word embedding, F features of a caption embedding.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rmdd.config import TextTower
from rmdd.models.text import load


class TokenTower(nn.Module):
    """A module that maps word embeddings to caption embeddings, with the pooling of `tower` and without dropout."""

    def __init__(self, tower: TextTower, device: torch.device | str = "cpu"):
        super().__init__()
        self.tower = tower
        self.model: Any
        self.tokenizer, self.model = load(tower, device)

    def words(self, captions: Sequence[str]) -> Float[Tensor, "B L d"]:
        """Return word embeddings of captions, padded to the longest one; differentiable in the tower's parameters."""
        limit = {"truncation": True, "max_length": self.tower.max_tokens}
        tokens = self.tokenizer(list(captions), padding=True, return_tensors="pt", **limit).to(self.model.device)
        return self.model.get_input_embeddings()(tokens["input_ids"]) * tokens["attention_mask"][..., None]

    def forward(self, words: Float[Tensor, "B L d"]) -> Float[Tensor, "B F"]:
        mask = mask_of(words)
        hidden = self.model(inputs_embeds=words, attention_mask=mask.long()).last_hidden_state
        if self.tower.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            pooled = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return F.normalize(pooled, dim=1) if self.tower.normalise else pooled


def mask_of(words: Float[Tensor, "B L d"]) -> Bool[Tensor, "B L"]:
    """Return a mask of the word positions: True for a token, False for padding."""
    return words.detach().ne(0).any(dim=2)
