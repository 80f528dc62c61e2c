"""Group normalisation (alone, or followed by ReLU and 2x2 average pooling) and SiLU, with fast second derivatives.

N images, C channels in G groups, H x W pixels. The speed of these operations is limited by memory, not by arithmetic.
When such an operation is composed of torch operations, its second derivative reads and writes the largest feature maps
of a network about forty times. This module saves only the input of an operation. Each derivative is one linear
combination of feature maps; its coefficients are computed from sums per image and channel (one pass over the maps).

Let r = 1 / deviation, xh = (x - mean) r the normalised input, z = w xh + b the output, h the gradient of a loss in z,
and m(.) the mean over the channels and pixels of a group. These are the gradients in x, w and b, and the tangent of z
for the tangents dx, dw and db of x, w and b:

    gradient    gx = r (w h - m(w h) - xh m(w h xh)),  gw = sum h xh,  gb = sum h
    tangent     dz = w r (dx - m(dx) - xh m(dx xh)) + dw xh + db

The gradient and the tangent are adjoint, so the same formulas give the derivatives of both. One implementation
therefore serves reverse mode over reverse mode and reverse mode over forward mode. Do not differentiate torch's own
forward mode of batch norm or layer norm again: torch 2.15 then silently treats the mean and the deviation as constants.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


def norm_relu_pool(
    x: Float[Tensor, "N C H W"], weight: Float[Tensor, " C"], bias: Float[Tensor, " C"], groups: int, eps: float
) -> Float[Tensor, "N C h w"]:
    """Compute `avg_pool2d(relu(group_norm(x)), 2)`, twice differentiable in all tensor arguments."""
    if x.shape[2] % 2 or x.shape[3] % 2:  # pooling drops the last row or column of odd sizes
        return F.avg_pool2d(F.relu(group_norm(x, weight, bias, groups, eps)), 2)
    return _Norm.apply(_packed(x.to(weight.dtype)), weight, bias, groups, eps, True)[0]


def group_norm(
    x: Float[Tensor, "N C *_"], weight: Float[Tensor, " C"], bias: Float[Tensor, " C"], groups: int, eps: float
) -> Float[Tensor, "N C *_"]:
    """Compute `torch.nn.functional.group_norm`, twice differentiable in all tensor arguments."""
    return _Norm.apply(_packed(x.to(weight.dtype)), weight, bias, groups, eps, False)[0]


class TwiceDifferentiable(TorchFunctionMode):
    """Context manager: inside it, this module replaces torch's layer norm, group norm, SiLU and softmax.

    The context also replaces the batch norm with which timm standardises convolution weights, and computes the
    convolution of a single pixel as a matrix product.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replacement = _REPLACEMENTS.get(func)
        result = replacement(*args, **kwargs or {}) if replacement else NotImplemented
        return func(*args, **kwargs or {}) if result is NotImplemented else result


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    rows = input.reshape(-1, 1, math.prod(normalized_shape))
    if input.dtype == torch.bfloat16:
        rows = rows.float()
    out = group_norm(rows, rows.new_ones(1), rows.new_zeros(1), 1, eps).view(input.shape)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    return NotImplemented if weight is None or bias is None else group_norm(input, weight, bias, num_groups, eps)


def _standardise(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not training or running_mean is not None or input.shape[0] != 1:
        return NotImplemented
    channels = input.shape[1]
    weight = input.new_ones(channels) if weight is None else weight
    return group_norm(input, weight, input.new_zeros(channels) if bias is None else bias, channels, eps)


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    return _SiLU.apply(input)


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    pixels = *input.shape[2:], *weight.shape[2:]
    if input.dim() != 4 or pixels != (1, 1, 1, 1) or groups != 1 or padding not in (0, (0, 0)):
        return NotImplemented
    return F.linear(input.flatten(1), weight.flatten(1), bias)[:, :, None, None]


def _log_softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    if dim is None or dtype is not None:
        return NotImplemented
    x = x - x.detach().amax(dim, keepdim=True)
    return x - x.exp().sum(dim, keepdim=True).log()


def _softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    result = _log_softmax(x, dim, dtype=dtype)
    return result if result is NotImplemented else result.exp()


_REPLACEMENTS: dict[Any, Any] = {
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _standardise,
    F.silu: _silu,
    F.conv2d: _convolve,
    **dict.fromkeys((F.log_softmax, torch.log_softmax, Tensor.log_softmax), _log_softmax),
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _softmax),
}


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, pool: bool
    ) -> tuple[Tensor, ...]:
        n, c = x.shape[:2]
        z, mean, rstd = torch.native_group_norm(x, weight, bias, n, c, x[0, 0].numel(), groups, eps)
        ctx.pool = pool
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.save_for_forward(x, weight, bias, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return F.avg_pool2d(z.relu_(), 2) if pool else z, mean, rstd

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 6
        return *_Gradient.apply(g, *ctx.saved_tensors, ctx.pool), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dx, dw, db = (
            torch.zeros_like(p) if t is None else t for p, t in zip((x, weight, bias), tangents, strict=False)
        )
        return _Tangent.apply(dx, dw, db, x, weight, bias, mean, rstd, ctx.pool), None, None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *at, ctx.pool = rest
        ctx.save_for_backward(g, *at)
        ctx.set_materialize_grads(False)
        return _gradient(_before_pool(g, _before_relu(*at) if ctx.pool else None), *at)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor | None, aw: Tensor | None, ab: Tensor | None) -> tuple[Tensor | None, ...]:
        g, *at = ctx.saved_tensors
        a, aw, ab = (torch.zeros_like(p) if t is None else t for p, t in zip(at, (a, aw, ab), strict=False))
        z = _before_relu(*at) if ctx.pool else None
        on_g = _tangent(a, aw, ab, z, *at)
        h = _before_pool(g, z)
        del z
        on_x, on_weight = _second(a, aw, h, *at, reuse_h=ctx.pool)
        return on_g, on_x, on_weight, None, None, None, None


class _Tangent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dx: Tensor, dw: Tensor, db: Tensor, *rest: Any) -> Tensor:
        *at, ctx.pool = rest
        dx = _packed(dx)
        ctx.save_for_backward(dx, dw, *at)
        return _tangent(dx, dw, db, _before_relu(*at) if ctx.pool else None, *at)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, *at = ctx.saved_tensors
        h = _before_pool(g, _before_relu(*at) if ctx.pool else None)
        on_tangents = _gradient(h, *at) if any(ctx.needs_input_grad[:3]) else (None, None, None)
        on_x = on_weight = None
        if any(ctx.needs_input_grad[3:5]):
            on_x, on_weight = _second(dx, dw, h, *at, reuse_h=ctx.pool)
        return *on_tangents, on_x, on_weight, None, None, None, None


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return torch.ops.aten.silu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _SiLUSlope.apply(g, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Tensor:
        return _SiLUSlope.apply(dx, *ctx.saved_tensors)


class _SiLUSlope(torch.autograd.Function):
    """The derivative of SiLU at x, times g (a gradient or a tangent)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        return torch.ops.aten.silu_backward(g, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor) -> tuple[Tensor | None, Tensor | None]:
        g, x = ctx.saved_tensors
        on_g = torch.ops.aten.silu_backward(a, x) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return on_g, None
        s = x.sigmoid()  # the second derivative of SiLU is s (1 - s) (2 + x (1 - 2 s))
        bend = torch.addcmul(x, x, s, value=-2).add_(2).mul_(s)
        return on_g, bend.mul_(s.neg_().add_(1)).mul_(a).mul_(g)


def _gradient(h: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    sizes = (*x.shape[:2], x[0, 0].numel(), mean.shape[1])
    return torch.ops.aten.native_group_norm_backward(_packed(h), x, mean, rstd, weight, *sizes, [True, True, True])


def _tangent(
    dx: Tensor,
    dw: Tensor,
    db: Tensor,
    z: Tensor | None,
    x: Tensor,
    weight: Tensor,
    _: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> Tensor:
    r, mu, average = _statistics(x, mean, rstd)
    sums = _sum(dx)
    on_x = r * (dw - weight * r * average(r * (_dot(dx, x) - mu * sums)))
    constant = db - weight * r * average(sums) - on_x * mu
    out = _combine(constant, weight * r, dx, on_x, x)
    return out if z is None else F.avg_pool2d(out.mul_(torch.gt(z, 0, out=z)), 2)


def _second(
    a: Tensor, aw: Tensor, h: Tensor, x: Tensor, weight: Tensor, _: Tensor, mean: Tensor, rstd: Tensor, *, reuse_h: bool
) -> tuple[Tensor, Tensor]:
    """Return the derivatives of <a, gx> + <aw, gw> in x and w; with `reuse_h`, the derivative in x overwrites h."""
    r, mu, average = _statistics(x, mean, rstd)
    sa, sh, sah = _sum(a), _sum(h), _dot(a, h)
    sax, shx = r * (_dot(a, x) - mu * sa), r * (_dot(h, x) - mu * sh)
    ma, mh, max_, mhx = average(sa), average(weight * sh), average(sax), average(weight * shx)
    through_r = r * (average(weight * sah) - ma * mh - max_ * mhx)
    on_a, on_h = -r * mhx, aw - r * max_ * weight  # the gradient in xh is on_a * a + on_h * h
    on_x = -r * r * (average(on_a * sax + on_h * shx) + through_r)
    constant = -r * average(on_a * sa + on_h * sh) - on_x * mu
    wide = [_like_map(t, x) for t in (constant, r * on_a, r * on_h, on_x)]
    out = h.mul_(wide[2]).addcmul_(a, wide[1]) if reuse_h else torch.mul(h, wide[2]).addcmul_(a, wide[1])
    return out.addcmul_(x, wide[3]).add_(wide[0]), (r * (sah - ma * sh - max_ * shx)).sum(0)


def _statistics(x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Return 1 / deviation and the mean, each per image and channel. The third result is a function that turns sums
    over the pixels of each channel into means over each group."""
    (n, groups), size = mean.shape, x[0].numel() // mean.shape[1]
    channels = x.shape[1] // groups  # number of channels in each group
    r, mu = rstd.repeat_interleave(channels, 1), mean.repeat_interleave(channels, 1)
    return r, mu, lambda sums: (sums.view(n, groups, -1).sum(2) / size).repeat_interleave(channels, 1)


def _before_relu(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    r, mu, _ = _statistics(x, mean, rstd)
    return _combine(bias - mu * r * weight, r * weight, x)


def _before_pool(g: Tensor, z: Tensor | None) -> Tensor:
    """Return the gradient in the norm's output z, given the gradient g in the output of the pooling. Overwrites z."""
    return g if z is None else F.interpolate(g / 4, scale_factor=2.0).mul_(torch.gt(z, 0, out=z))


def _dot(a: Tensor, b: Tensor) -> Float[Tensor, "N C"]:
    return _sum(a * b)


def _sum(a: Tensor) -> Float[Tensor, "N C"]:
    return a.sum(tuple(range(2, a.dim())))


def _packed(x: Tensor) -> Tensor:
    """Return `x` as a contiguous tensor. On a CPU, feature maps become channels-last, because this layout makes pooling
    and the first convolution several times faster. On other devices, the norm supports only the standard layout."""
    last = x.dim() == 4 and x.device.type == "cpu"
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _combine(constant: Tensor, *terms: Tensor) -> Tensor:
    """Return constant + coefficient * map + ...; `terms` alternates between coefficients and feature maps.

    The constant and the coefficients have one value per image and channel.
    """
    out = torch.addcmul(_like_map(constant, terms[1]), terms[1], _like_map(terms[0], terms[1]))
    for coefficient, part in zip(terms[2::2], terms[3::2], strict=True):
        out.addcmul_(part, _like_map(coefficient, part))
    return out


def _like_map(coefficient: Float[Tensor, "N C"], like: Tensor) -> Tensor:
    return coefficient.reshape(*coefficient.shape[:2], *[1] * (like.dim() - 2))
