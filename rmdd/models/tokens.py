"""A transformers text tower on token embeddings, which take the place of its word embeddings.

Padding is marked by the embeddings themselves: a token of zeros is none. It has no gradient, so it stays zero.
B captions of L tokens each at most, d width of a word embedding, F of a caption's.
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
    """Captions as word embeddings, and these as one vector each, pooled as the frozen tower pools. No dropout."""

    def __init__(self, tower: TextTower, device: torch.device | str = "cpu"):
        super().__init__()
        self.tower = tower
        self.model: Any
        self.tokenizer, self.model = load(tower, device)

    def words(self, captions: Sequence[str]) -> Float[Tensor, "B L d"]:
        """Word embeddings of captions, as long as the longest; differentiable in the tower."""
        cut = {"truncation": True, "max_length": self.tower.max_tokens}
        tokens = self.tokenizer(list(captions), padding=True, return_tensors="pt", **cut).to(self.model.device)
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
    """Which positions hold a token."""
    return words.detach().ne(0).any(dim=2)
