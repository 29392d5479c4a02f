"""Group norm, AdaGN and SiLU on the GPU; the formula is in `fastdiff.ops.group_norm_silu`."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .image import parameters, walked
from .launch import Launch, launcher
from .norm import address, affine, coefficients, load, of_groups, of_tile, read, statistics


@triton.jit
def finish(y, SILU: tl.constexpr):
    if SILU:
        y = y / (1 + tl.exp(-y))
    return y


@triton.jit
def group_norm_silu_kernel(
    x,
    out,
    weight,
    bias,
    scale,
    shift,
    eps,
    groups,
    pixels,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """TOGETHER whole groups: one read, one write."""
    sample, channel, pixel, there, inside = of_groups(
        groups, pixels, WIDTH, TOGETHER, CHANNELS, PIXELS
    )
    live = there[:, None] & inside
    value = load(x, sample, channel, pixel, live)
    EXACT: tl.constexpr = x[0].dtype.element_ty == tl.float32
    m, a, b = statistics(value, live, pixels, eps, WIDTH, TOGETHER, EXACT)
    gain, offset = affine(weight, bias, scale, shift, sample, channel, there)
    y = tl.fma((a * gain)[:, None], value - m[:, None], tl.fma(b, gain, offset)[:, None])
    tl.store(address(out, sample, channel, pixel), finish(y, SILU), live)


@triton.jit
def apply_kernel(
    x,
    out,
    coefficients,
    channels,
    pixels,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    sample, channel, pixel, there, inside = of_tile(channels, pixels, CHANNELS, PIXELS)
    live = there[:, None] & inside
    m, a, b = read(coefficients, sample, channels, channel, there)
    value = load(x, sample, channel, pixel, live)
    y = tl.fma(a[:, None], value - m[:, None], b[:, None])
    tl.store(address(out, sample, channel, pixel), finish(y, SILU), live)


def plan(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    out: Tensor,
) -> list[Launch]:
    if not x.numel():
        return []
    image, (written, read) = walked(groups, out, x)
    given = parameters(weight=weight, bias=bias, scale=scale, shift=shift)
    args: dict[str, Any] = {"x": read, "out": written, "SILU": silu}
    only = image.by_group(group_norm_silu_kernel, **args, **given, eps=eps)
    if only is not None:
        return [only]
    each, launches = coefficients(image, read, eps, given)
    return [*launches, image.by_tile(apply_kernel, **args, coefficients=each)]


launch = launcher(plan)
