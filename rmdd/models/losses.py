"""Losses that compare scores (`logits`) with target similarities, for all images and texts in a batch of B pairs.

In both matrices, rows are images and columns are texts. All losses are differentiable in both matrices.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

FLOOR = 1e-6


def wbce(logits: Float[Tensor, "B B"], similarity: Float[Tensor, "B B"]) -> Float[Tensor, ""]:
    """Weighted binary cross-entropy of LoRS: (mean over positive entries + mean over negative entries) / 2.

    An entry is positive if its similarity is above 0.5. The factor 1/2, and the 1e-6 added to probabilities and counts,
    come from the released code of LoRS; the paper mentions neither.
    """
    p = torch.sigmoid(logits)
    entry = -similarity * torch.log(p + FLOOR) - (1 - similarity) * torch.log(1 - p + FLOOR)
    positive = (similarity > 0.5).to(entry.dtype)
    negative = 1 - positive
    on_positives = (entry * positive).sum() / (positive.sum() + FLOOR)
    on_negatives = (entry * negative).sum() / (negative.sum() + FLOOR)
    return (on_positives + on_negatives) / 2


def infonce(logits: Float[Tensor, "B B"], similarity: Float[Tensor, "B B"]) -> Float[Tensor, ""]:
    """Cross-entropy with targets `similarity`, averaged over images and texts; InfoNCE if the targets are identity."""
    by_image = -(similarity * F.log_softmax(logits, dim=1)).sum() / logits.shape[0]
    by_text = -(similarity * F.log_softmax(logits, dim=0)).sum() / logits.shape[0]
    return (by_image + by_text) / 2


def bce(logits: Float[Tensor, "B B"], similarity: Float[Tensor, "B B"]) -> Float[Tensor, ""]:
    """Binary cross-entropy, averaged over all B^2 entries; the similarities may lie outside [0, 1]."""
    return F.binary_cross_entropy_with_logits(logits, similarity)


def cwcl(logits: Float[Tensor, "B B"], similarity: Float[Tensor, "B B"]) -> Float[Tensor, ""]:
    """Cross-entropy as in `infonce`; the targets are the similarities of each image (or text) / (their sum + 1e-6)."""
    by_image = similarity / (similarity.sum(dim=1, keepdim=True) + FLOOR)
    by_text = similarity / (similarity.sum(dim=0, keepdim=True) + FLOOR)
    row, column = F.log_softmax(logits, dim=1), F.log_softmax(logits, dim=0)
    return -((by_image * row).sum() + (by_text * column).sum()) / (2 * logits.shape[0])


def kl(logits: Float[Tensor, "B B"], similarity: Float[Tensor, "B B"]) -> Float[Tensor, ""]:
    """KL(softmax(10 similarity) || softmax(logits)) / B, averaged over softmax along rows and softmax along columns."""
    total = logits.new_zeros(())
    for dim in (0, 1):
        target = F.log_softmax(10 * similarity, dim=dim)
        total = total + (target.exp() * (target - F.log_softmax(logits, dim=dim))).mean()
    return total / 2


def mse(logits: Float[Tensor, "B B"], similarity: Float[Tensor, "B B"]) -> Float[Tensor, ""]:
    """Mean squared difference between sigmoid(logits) and the similarities."""
    return (torch.sigmoid(logits) - similarity).square().mean()


LOSSES = {"wbce": wbce, "infonce": infonce, "bce": bce, "cwcl": cwcl, "kl": kl, "mse": mse}
