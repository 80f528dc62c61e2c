"""EVLF's fusion of an image latent with the text of the image, and the losses that train the fusion.

Latent positions attend to text tokens (and, in the released code, to each other). The fused latent z~ stays close to
the original latent z, and the text embedding can be predicted from z~.

    L = lambda_1 L_align + lambda_2(step) MSE(z~, z)

Shapes: B pairs, unscaled latents of C channels and N = h w positions, L text tokens of F features, K keys, d features
of a position inside the fusion module.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class Layer(nn.Module):
    """A transformer layer: attention of `x` to `keys`, then a feed-forward network, each followed by LayerNorm."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.norm_attention, self.norm_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "B N d"], keys: Float[Tensor, "B K d"], padding: Bool[Tensor, "B K"]
    ) -> Float[Tensor, "B N d"]:
        attended, _ = self.attention(x, keys, keys, key_padding_mask=padding, need_weights=False)
        x = self.norm_attention(x + self.dropout(attended))
        return self.norm_feed(x + self.dropout(self.feed(x)))


class Fusion(nn.Module):
    """A module that fuses latents with text tokens and returns latents of the same shape and scale.

    If `keys` is both (as in the released code), latents attend to image and text tokens. If `keys` is text (as in the
    paper), latents attend only to text tokens. All layers use the same keys. With `residual`, the output is added to
    the latent through a convolution that starts at zero, so an untrained module changes nothing. Without `residual` (as
    published), the module must learn to keep the latent.
    """

    def __init__(
        self,
        text_width: int,
        grid: tuple[int, int],
        *,
        channels: int = 4,
        width: int = 256,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.1,
        keys: Literal["both", "text"] = "both",
        residual: bool = True,
    ):
        super().__init__()
        self.grid, self.keys, self.residual = grid, keys, residual
        self.image_in = nn.Conv2d(channels, width, 1)
        self.text_in = nn.Linear(text_width, width)
        self.position = nn.Parameter(torch.randn(1, grid[0] * grid[1], width))
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))
        self.image_out = nn.Conv2d(width, channels, 1)
        if residual:
            nn.init.zeros_(self.image_out.weight)
            nn.init.zeros_(self.image_out.bias)  # type: ignore[arg-type]

    def forward(
        self,
        latents: Float[Tensor, "B C h w"],
        tokens: Float[Tensor, "B L F"],
        padding: Bool[Tensor, "B L"],
    ) -> Float[Tensor, "B C h w"]:
        """Return fused latents; tokens in `padding` are ignored. Raises `ValueError` unless latents fit `grid`."""
        if latents.shape[-2:] != self.grid:
            raise ValueError(
                f"this fusion was built for latents of {self.grid[0]} x {self.grid[1]}, found "
                f"{latents.shape[-2]} x {latents.shape[-1]}; use the same image size in training and sampling"
            )
        x = self.image_in(latents).flatten(2).transpose(1, 2) + self.position
        text = self.text_in(tokens)
        if self.keys == "both":
            keys, hidden = torch.cat([x, text], dim=1), F.pad(padding, (x.shape[1], 0))
        else:
            keys, hidden = text, padding
        for layer in self.layers:
            x = layer(x, keys, hidden)
        out = self.image_out(x.transpose(1, 2).reshape(len(x), -1, *self.grid))
        return latents + out if self.residual else out


class Projector(nn.Module):
    """A module that predicts a text embedding from a fused latent. Raises `ValueError` if `grid` is below 4 x 4."""

    def __init__(self, text_width: int, grid: tuple[int, int], *, channels: int = 4, width: int = 64):
        super().__init__()
        if min(grid) < 4:
            raise ValueError(f"latents of {grid[0]} x {grid[1]} are too small for the projector; use larger images")
        self.cut = nn.Conv2d(channels, width, 4, stride=4)
        self.read = nn.Linear(16 * width, text_width)
        self.norm = nn.LayerNorm(text_width)

    def forward(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B F"]:
        return self.norm(self.read(F.adaptive_avg_pool2d(self.cut(latents), 4).flatten(1)))


def alignment(
    read: Float[Tensor, "B F"],
    texts: Float[Tensor, "B F"],
    positive: Bool[Tensor, "B B"],
    temperature: float,
) -> Float[Tensor, ""]:
    """InfoNCE with several positives: -log of the mean probability of a row's positives, averaged over both directions.

    `positive` is symmetric and True on the diagonal. If `positive` is True nowhere else, the loss is the cross-entropy.
    """
    assert positive.diagonal().all(), "each row needs a positive pair"
    logits = F.normalize(read, dim=1) @ F.normalize(texts, dim=1).T / temperature
    none = torch.finfo(logits.dtype).min

    def rows(logits: Tensor) -> Tensor:
        logs = F.log_softmax(logits, dim=1).masked_fill(~positive, none)
        return (positive.sum(dim=1).to(logs.dtype).log() - torch.logsumexp(logs, dim=1)).mean()

    return (rows(logits) + rows(logits.T)) / 2


def positives(pictures: Int[Tensor, " B"], captions: Int[Tensor, " B"]) -> Bool[Tensor, "B B"]:
    """Return a mask whose entry (i, j) is True if pairs i and j have the same image number or caption number."""
    return (pictures[:, None] == pictures[None, :]) | (captions[:, None] == captions[None, :])


def ramp(step: int, total: int, low: float, high: float) -> float:
    """Return a weight that rises linearly from `low` at step 0 to `high` at step `total` / 2, and then stays `high`."""
    half = total / 2
    return high if step >= half else low + (high - low) * step / half


def first_end(ids: Int[Tensor, "B L"], end: int) -> Int[Tensor, " B"]:
    """For each text, return the position of the first end-of-text token `end`, or the last position if there is none.

    Stable Diffusion's tokenizer also pads with this token, so the last end-of-text token is usually padding.
    """
    ends = ids == end
    return torch.where(ends.any(dim=1), ends.int().argmax(dim=1), ids.shape[1] - 1)


def positions_after(positions: Int[Tensor, " B"], length: int) -> Bool[Tensor, "B L"]:
    """Return a mask that is True for the tokens of each text after the position given in `positions`."""
    return torch.arange(length, device=positions.device)[None, :] > positions[:, None]


def augment_text(
    tokens: Float[Tensor, "B L F"], random: torch.Generator, *, drop_all: float, drop: float, noise: float
) -> Float[Tensor, "B L F"]:
    """Augment text tokens for training.

    With probability `drop_all` all tokens become zero. Otherwise, each number becomes zero with probability `drop`, the
    remaining numbers are scaled up, and noise of deviation `noise` is added. `random` is a CPU generator, so all
    devices use the same random numbers.
    """
    if float(torch.rand((), generator=random)) < drop_all:
        return torch.zeros_like(tokens)
    mask = torch.rand(tokens.shape, generator=random).to(tokens.device) >= drop
    added = torch.randn(tokens.shape, generator=random).to(tokens.device) * noise
    return tokens * mask / (1 - drop) + added
