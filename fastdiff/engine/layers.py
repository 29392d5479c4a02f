"""What the engine's layers mean, in plain torch: the graph stays executable after each rewrite."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    upsample: bool = False,
) -> Tensor:
    """conv2d of x, or of x with each pixel doubled, + bias ([K], or [N, K]) + residual."""
    if upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    if bias is not None:
        y = y + bias.reshape(-1, bias.shape[-1], 1, 1)
    return y if residual is None else y + residual


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """x W' + bias + residual over the last axis."""
    y = F.linear(x, weight, bias)
    return y if residual is None else y + residual


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    groups: int,
    eps: float,
    silu: bool = False,
) -> Tensor:
    """GroupNorm, then (1 + scale) y + shift with scale and shift [N, C], then SiLU."""
    y = F.group_norm(x, groups, weight, bias, eps)
    if scale is not None and shift is not None:
        tail = (1,) * (x.dim() - 2)
        y = torch.addcmul(shift.unflatten(1, (-1, *tail)), y, 1 + scale.unflatten(1, (-1, *tail)))
    return F.silu(y) if silu else y


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v, of [N, heads, tokens, d]."""
    return F.scaled_dot_product_attention(q, k, v)
