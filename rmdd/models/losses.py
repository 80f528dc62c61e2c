"""Losses between scaled scores and target similarities.

B pairs in a mini-batch. Rows are images, columns texts. All are differentiable in both arguments.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

FLOOR = 1e-6


def wbce(logits: Float[Tensor, "B B"], similarity: Float[Tensor, "B B"]) -> Float[Tensor, ""]:
    """Weighted binary cross entropy of LoRS: mean over positives plus mean over negatives, halved.

    Positives are the entries above 0.5. The half and the floor of 1e-6 are the released code's; the paper
    prints neither.
    """
    p = torch.sigmoid(logits)
    entry = -similarity * torch.log(p + FLOOR) - (1 - similarity) * torch.log(1 - p + FLOOR)
    positive = (similarity > 0.5).to(entry.dtype)
    negative = 1 - positive
    on_positives = (entry * positive).sum() / (positive.sum() + FLOOR)
    on_negatives = (entry * negative).sum() / (negative.sum() + FLOOR)
    return (on_positives + on_negatives) / 2


def infonce(logits: Float[Tensor, "B B"], similarity: Float[Tensor, "B B"]) -> Float[Tensor, ""]:
    """Symmetric cross entropy with targets `similarity`, which is not normalised; an identity gives InfoNCE."""
    by_image = -(similarity * F.log_softmax(logits, dim=1)).sum() / logits.shape[0]
    by_text = -(similarity * F.log_softmax(logits, dim=0)).sum() / logits.shape[0]
    return (by_image + by_text) / 2


LOSSES = {"wbce": wbce, "infonce": infonce}
