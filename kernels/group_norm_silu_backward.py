"""The gradients of group norm, AdaGN and SiLU; `fastdiff.ops.group_norm_silu_backward` has the
formulas.

Nothing is added atomically, so two runs give the same bits: S(dy) and S(dy n) are written for each
sample and channel, and `parameters_kernel` sums over the samples.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .image import parameters, walked
from .launch import Config, Launch, launcher
from .norm import (
    address,
    affine,
    coefficients,
    load,
    of_chunk,
    of_groups,
    of_tile,
    over_groups,
    parameter,
    read,
    statistics,
)


@triton.jit
def terms(grad, value, m, a, b, gain, offset, SILU: tl.constexpr):
    """n and dy of tiles [channels, pixels] of grad and x; the others are of channels."""
    n = tl.fma(a[:, None], value - m[:, None], b[:, None])
    if SILU:
        y = tl.fma(gain[:, None], n, offset[:, None])
        e = tl.exp(-tl.maximum(y, -80.0))  # finite, so that e s is 1 - s without a cancellation
        s = 1 / (1 + e)
        grad *= tl.fma(y * (e * s), s, s)
    return n, grad


@triton.jit
def combined(n, dy, a, gain, mean, slope):
    """grad_x."""
    rest = tl.fma(n, (a * slope)[:, None], (a * mean)[:, None])
    return tl.fma(dy, (a * gain)[:, None], -rest)


@triton.jit
def store_sums(sums, sample, channels, channel, there, first, second):
    row = sums + sample * 2 * channels + channel
    tl.store(row, first, there)
    tl.store(row + channels, second, there)


@triton.jit
def group_norm_silu_backward_kernel(
    grad,
    x,
    grad_x,
    sums,
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
    """TOGETHER whole groups: x and grad are read once."""
    sample, channel, pixel, there, inside = of_groups(
        groups, pixels, WIDTH, TOGETHER, CHANNELS, PIXELS
    )
    live = there[:, None] & inside
    value = load(x, sample, channel, pixel, live)
    EXACT: tl.constexpr = x[0].dtype.element_ty == tl.float32
    m, a, b = statistics(value, live, pixels, eps, WIDTH, TOGETHER, EXACT)
    gain, offset = affine(weight, bias, scale, shift, sample, channel, there)
    dy = load(grad, sample, channel, pixel, live)
    n, dy = terms(dy, value, m, a, b, gain, offset, SILU)
    first, second = tl.sum(dy, 1), tl.sum(dy * n, 1)
    if sums is not None:
        store_sums(sums, sample, groups * WIDTH, channel, there, first, second)
    count = pixels * (1.0 * WIDTH)
    mean = over_groups(gain * first, WIDTH, TOGETHER) / count
    slope = over_groups(gain * second, WIDTH, TOGETHER) / count
    dx = combined(n, dy, a, gain, mean, slope)
    tl.store(address(grad_x, sample, channel, pixel), dx, live)


@triton.jit
def chunk_sums_kernel(
    grad,
    x,
    chunk_sums,
    coefficients,
    weight,
    bias,
    scale,
    shift,
    channels,
    pixels,
    chunks,
    tiles,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """S(dy) and S(dy n) over each chunk of pixels."""
    sample, channel, chunk, there = of_chunk(channels, chunks, CHANNELS)
    m, a, b = read(coefficients, sample, channels, channel, there)
    gain, offset = affine(weight, bias, scale, shift, sample, channel, there)
    first = tl.zeros([CHANNELS, PIXELS], tl.float32)
    second = tl.zeros_like(first)
    for tile in range(tiles):
        pixel = (chunk * tiles + tile) * PIXELS + tl.arange(0, PIXELS)
        live = there[:, None] & (pixel < pixels)
        value = load(x, sample, channel, pixel, live)
        dy = load(grad, sample, channel, pixel, live)
        n, dy = terms(dy, value, m, a, b, gain, offset, SILU)
        first += dy
        second += dy * n
    at = sample * chunks + chunk
    total = tl.sum(first, 1)
    store_sums(chunk_sums, at, channels, channel, there, total, tl.sum(second, 1))


@triton.jit
def group_sums_kernel(
    chunk_sums,
    sums,
    means,
    weight,
    scale,
    groups,
    pixels,
    chunks,
    chunk,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The sums over all chunks; and M(gain dy) and M(gain dy n), written for each channel."""
    channels = groups * WIDTH
    sample = (tl.program_id(0) // groups).to(tl.int64)
    lane = tl.arange(0, CHANNELS)
    channel, there = tl.program_id(0) % groups * WIDTH + lane, lane < WIDTH
    first = tl.zeros([CHUNKS, CHANNELS], tl.float32)
    second = tl.zeros_like(first)
    for start in range(0, chunks, CHUNKS):
        i = (start + tl.arange(0, CHUNKS))[:, None]
        live = (i < chunks) & there
        row = chunk_sums + (sample * chunks + i) * 2 * channels + channel
        first += tl.load(row, live, 0.0)
        second += tl.load(row + channels, live, 0.0)
    first, second = tl.sum(first, 0), tl.sum(second, 0)
    if sums is not None:
        store_sums(sums, sample, channels, channel, there, first, second)
    gain, _ = affine(weight, None, scale, None, sample, channel, there)
    count = pixels * (1.0 * WIDTH)
    mean = over_groups(gain * first, WIDTH, 1) / count
    slope = over_groups(gain * second, WIDTH, 1) / count
    store_sums(means, sample, channels, channel, there, mean, slope)


@triton.jit
def grad_x_kernel(
    grad,
    x,
    grad_x,
    coefficients,
    means,
    weight,
    bias,
    scale,
    shift,
    channels,
    pixels,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    sample, channel, pixel, there, inside = of_tile(channels, pixels, CHANNELS, PIXELS)
    live = there[:, None] & inside
    m, a, b = read(coefficients, sample, channels, channel, there)
    gain, offset = affine(weight, bias, scale, shift, sample, channel, there)
    row = means + sample * 2 * channels + channel
    mean, slope = tl.load(row, there, 0.0), tl.load(row + channels, there, 0.0)
    value = load(x, sample, channel, pixel, live)
    dy = load(grad, sample, channel, pixel, live)
    n, dy = terms(dy, value, m, a, b, gain, offset, SILU)
    dx = combined(n, dy, a, gain, mean, slope)
    tl.store(address(grad_x, sample, channel, pixel), dx, live)


@triton.jit
def parameters_kernel(
    sums,
    weight,
    bias,
    scale,
    grad_weight,
    grad_bias,
    grad_scale,
    grad_shift,
    samples,
    channels,
    CHANNELS: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < channels
    of_weight = tl.zeros([SAMPLES, CHANNELS], tl.float32)
    of_bias = tl.zeros_like(of_weight)
    w, b = affine(weight, bias, None, None, 0, channel, there)
    for start in range(0, samples, SAMPLES):
        sample = (start + tl.arange(0, SAMPLES)).to(tl.int64)[:, None]
        live = (sample < samples) & there
        row = sums + sample * 2 * channels + channel
        first, second = tl.load(row, live, 0.0), tl.load(row + channels, live, 0.0)
        if grad_scale is not None:
            tl.store(grad_scale + sample * channels + channel, w * second + b * first, live)
        if grad_shift is not None:
            tl.store(grad_shift + sample * channels + channel, first, live)
        if scale is not None:
            more = 1 + parameter(scale, sample, channel, live)
            first, second = more * first, more * second
        of_bias += first
        of_weight += second
    if grad_weight is not None:
        tl.store(grad_weight + channel, tl.sum(of_weight, 0), there)
    if grad_bias is not None:
        tl.store(grad_bias + channel, tl.sum(of_bias, 0), there)


def plan(
    grad: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    _: bool,
    grad_x: Tensor,
    *gradients: Tensor | None,
) -> list[Launch]:
    if not x.numel():  # sums over nothing
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return []
    image, (written, grad_read, x_read) = walked(groups, grad_x, grad, x)
    size = image.samples, 2, image.channels
    wanted = any(gradient is not None for gradient in gradients)
    sums = image.new(*size) if wanted else None
    given = parameters(weight=weight, bias=bias, scale=scale, shift=shift)
    args: dict[str, Any] = {"grad": grad_read, "x": x_read, "SILU": silu, **given}
    whole = {**args, "grad_x": written, "sums": sums, "eps": eps}
    only = image.by_group(group_norm_silu_backward_kernel, kept=2, **whole)
    if only is not None:
        launches = [only]
    else:
        args["coefficients"], launches = coefficients(image, x_read, eps, dict.fromkeys(given))
        chunk_sums, means = image.new(size[0] * image.chunks()[0], *size[1:]), image.new(*size)
        some = {"weight": given["weight"], "scale": given["scale"], "sums": sums, "means": means}
        launches += [
            image.by_chunk(chunk_sums_kernel, **args, chunk_sums=chunk_sums),
            image.by_sum(group_sums_kernel, **some, chunk_sums=chunk_sums),
            image.by_tile(grad_x_kernel, **args, grad_x=written, means=means),
        ]
    if wanted:
        names = ("grad_weight", "grad_bias", "grad_scale", "grad_shift")
        args = dict(zip(names, gradients, strict=True))
        args |= {name: given[name] for name in ("weight", "bias", "scale")}
        args |= {"sums": sums, "samples": image.samples, "channels": image.channels}
        tile = {"CHANNELS": 32, "SAMPLES": 32}
        grid = (triton.cdiv(image.channels, tile["CHANNELS"]),)
        last = Launch(parameters_kernel, [Config(tile)], lambda _: grid, args, x.device)
        launches.append(last)
    return launches


launch = launcher(plan)
