"""What the kernels of group norms share: the statistics, and who handles which elements.

A group whose tile fits the registers of one program is read once. Larger ones take three
launches, of which the last finds x in the L2 cache if it fits: the moments of each chunk of pixels,
over many channels, so that channels-last accesses are wide too; each channel's coefficients from
them; and what the caller does with those. Sums are of differences from a nearby mean, for x may be
far from zero.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .image import Image
from .launch import Launch


@triton.jit
def address(operand, sample, channel, pixel):
    """Pointers [channels, pixels] into an operand (tensor, strides of sample, channel, pixel)."""
    pointer, s, c, p = operand
    return pointer + sample * s + channel.to(tl.int64)[:, None] * c + pixel.to(tl.int64) * p


@triton.jit
def load(operand, sample, channel, pixel, live):
    """A tile [channels, pixels] as float32, 0 where it is not live."""
    return tl.load(address(operand, sample, channel, pixel), live, 0.0).to(tl.float32)


@triton.jit
def affine(weight, bias, scale, shift, sample, channel, live):
    """gain and offset [channels], float32, of y = gain n + offset; n is the normalised x.

    Each is (tensor, strides of sample and channel), or None.
    """
    gain, offset = tl.full(channel.shape, 1.0, tl.float32), tl.zeros(channel.shape, tl.float32)
    if weight is not None:
        gain = parameter(weight, sample, channel, live)
    if bias is not None:
        offset = parameter(bias, sample, channel, live)
    if scale is not None:
        more = 1 + parameter(scale, sample, channel, live)
        gain, offset = gain * more, offset * more
    if shift is not None:
        offset += parameter(shift, sample, channel, live)
    return gain, offset


@triton.jit
def parameter(operand, sample, channel, live):
    pointer, s, c = operand
    return tl.load(pointer + sample * s + channel.to(tl.int64) * c, live, 0.0).to(tl.float32)


@triton.jit
def over_groups(value, WIDTH: tl.constexpr, TOGETHER: tl.constexpr):
    """For each channel the sum of `value` [channels] over its group: TOGETHER groups of WIDTH."""
    if TOGETHER == 1:
        return tl.sum(value, 0) + tl.zeros_like(value)
    group = tl.arange(0, value.shape[0])[:, None] // WIDTH
    mine = group == tl.arange(0, triton.next_power_of_2(TOGETHER))
    total = tl.sum(tl.where(mine, value[:, None], 0.0), 0)
    return tl.sum(tl.where(mine, total, 0.0), 1)


@triton.jit
def group_sums(tile, WIDTH: tl.constexpr, TOGETHER: tl.constexpr):
    """`over_groups` of the sums over pixels, with as few values as can be crossing threads."""
    if TOGETHER == 1:
        return tl.sum(tile) + tl.zeros([tile.shape[0]], tl.float32)
    if tile.shape[0] == WIDTH * TOGETHER:
        total = tl.sum(tl.reshape(tile, [TOGETHER, WIDTH, tile.shape[1]]), 1)
        total = tl.broadcast_to(tl.sum(total, 1)[:, None], [TOGETHER, WIDTH])
        return tl.reshape(total, [tile.shape[0]])
    return over_groups(tl.sum(tile, 1), WIDTH, TOGETHER)


@triton.jit
def finished(total, square, count, eps):
    """delta = mean(d) and 1 / sqrt(variance + eps) from the sums of d = x - m and of d d."""
    delta = total / count
    variance = tl.maximum(square / count - delta * delta, 0.0, tl.PropagateNan.ALL)
    return delta, 1 / tl.sqrt_rn(variance + eps)


@triton.jit
def statistics(
    x, live, pixels, eps, WIDTH: tl.constexpr, TOGETHER: tl.constexpr, EXACT: tl.constexpr
):
    """n = a (x - m) + b of a tile [channels, pixels] of whole groups; x is 0 where not live.

    m is a rounded mean and b what is missing to it: exact where x is far from zero. EXACT, for
    float32, takes the rounding of the sum of squares out of a.
    """
    count = pixels * (1.0 * WIDTH)
    m = group_sums(x, WIDTH, TOGETHER) / count
    d = tl.where(live, x - m[:, None], 0.0)
    total = group_sums(d, WIDTH, TOGETHER)
    square = group_sums(d * d, WIDTH, TOGETHER)
    delta, a = finished(total, square, count, eps)
    if EXACT:
        # n n - 1 has both signs, so its sum is far more precise than that of d d was
        n = a[:, None] * d
        rest = group_sums(tl.where(live, tl.fma(n, n, -1.0), 0.0), WIDTH, TOGETHER) / count
        rest -= a * a * (delta * delta - eps)
        a = tl.fma(-0.5 * a, rest, a)
    return m, a, -a * delta


@triton.jit
def read(coefficients, sample, channels, channel, live):
    """m, a and b [channels] that `write` wrote."""
    row = coefficients + sample * 3 * channels + channel
    m = tl.load(row, live, 0.0)
    return m, tl.load(row + channels, live, 0.0), tl.load(row + 2 * channels, live, 0.0)


@triton.jit
def write(coefficients, sample, channels, channel, live, m, a, b):
    row = coefficients + sample * 3 * channels + channel
    tl.store(row, m, live)
    tl.store(row + channels, a, live)
    tl.store(row + 2 * channels, b, live)


@triton.jit
def of_groups(groups, pixels, WIDTH, TOGETHER, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """A program of `Image.by_group`: its sample, channels and pixels, and which of them exist."""
    programs = groups // TOGETHER
    lane, pixel = tl.arange(0, CHANNELS), tl.arange(0, PIXELS)
    channel = tl.program_id(0) % programs * (TOGETHER * WIDTH) + lane
    sample = (tl.program_id(0) // programs).to(tl.int64)
    return sample, channel, pixel, lane < TOGETHER * WIDTH, pixel < pixels


@triton.jit
def of_tile(channels, pixels, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """The same of `Image.by_tile`."""
    sample, channel, tile, there = of_chunk(channels, tl.cdiv(pixels, PIXELS), CHANNELS)
    pixel = tile * PIXELS + tl.arange(0, PIXELS)
    return sample, channel, pixel, there, pixel < pixels


@triton.jit
def of_chunk(channels, chunks, CHANNELS: tl.constexpr):
    """A program of `Image.by_chunk`: sample, channels, chunk, and which channels exist."""
    program, blocks = tl.program_id(0), tl.cdiv(channels, CHANNELS)
    channel = program // chunks % blocks * CHANNELS + tl.arange(0, CHANNELS)
    sample = (program // chunks // blocks).to(tl.int64)
    return sample, channel, program % chunks, channel < channels


@triton.jit
def moments_kernel(
    x,
    moments,
    channels,
    pixels,
    chunks,
    tiles,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Of each channel in a chunk of pixels: a pivot p, the sums of d = x - p and of d d.

    p is the mean of the chunk's first tile. So (p - mean)^2 <= tiles variance, and the variance
    loses no more than that factor in rounding.
    """
    sample, channel, chunk, there = of_chunk(channels, chunks, CHANNELS)
    first = chunk * tiles * PIXELS
    pixel = first + tl.arange(0, PIXELS)
    live = there[:, None] & (pixel < pixels)
    value = load(x, sample, channel, pixel, live)
    pivot = tl.sum(value, 1) / tl.minimum(pixels - first, PIXELS)
    total = tl.where(live, value - pivot[:, None], 0.0)
    square = total * total
    for tile in range(1, tiles):
        now = pixel + tile * PIXELS
        live = there[:, None] & (now < pixels)
        value = load(x, sample, channel, now, live)
        d = tl.where(live, value - pivot[:, None], 0.0)
        total += d
        square += d * d
    row = moments + (sample * chunks + chunk) * 3 * channels + channel
    tl.store(row, pivot, there)
    tl.store(row + channels, tl.sum(total, 1), there)
    tl.store(row + 2 * channels, tl.sum(square, 1), there)


@triton.jit
def group_coefficients_kernel(
    x,
    coefficients,
    weight,
    bias,
    scale,
    shift,
    eps,
    groups,
    pixels,
    WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """m, a and b of y = a (x - m) + b, for each channel of whole groups."""
    sample, channel, pixel, there, inside = of_groups(
        groups, pixels, WIDTH, TOGETHER, CHANNELS, PIXELS
    )
    live = there[:, None] & inside
    value = load(x, sample, channel, pixel, live)
    EXACT: tl.constexpr = x[0].dtype.element_ty == tl.float32
    m, a, b = statistics(value, live, pixels, eps, WIDTH, TOGETHER, EXACT)
    gain, offset = affine(weight, bias, scale, shift, sample, channel, there)
    write(coefficients, sample, groups * WIDTH, channel, there, m, a * gain, b * gain + offset)


@triton.jit
def coefficients_kernel(
    moments,
    coefficients,
    weight,
    bias,
    scale,
    shift,
    eps,
    groups,
    pixels,
    chunks,
    chunk,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The same, from the moments of a group's chunks."""
    channels = groups * WIDTH
    sample = (tl.program_id(0) // groups).to(tl.int64)
    lane = tl.arange(0, CHANNELS)
    channel, there = tl.program_id(0) % groups * WIDTH + lane, lane < WIDTH
    each = tl.arange(0, CHUNKS)
    first = moments + sample * chunks * 3 * channels + channel
    count = pixels * (1.0 * WIDTH)
    total = tl.zeros([CHUNKS, CHANNELS], tl.float32)
    for start in range(0, chunks, CHUNKS):
        i = (start + each)[:, None]
        live = (i < chunks) & there
        row = first + i.to(tl.int64) * 3 * channels
        size = tl.minimum(pixels - i * chunk, chunk).to(tl.float32)
        total += size * tl.load(row, live, 0.0) + tl.load(row + channels, live, 0.0)
    m = tl.sum(tl.sum(total, 0), 0) / count
    total, square = tl.zeros_like(total), tl.zeros_like(total)
    for start in range(0, chunks, CHUNKS):
        i = (start + each)[:, None]
        live = (i < chunks) & there
        row = first + i.to(tl.int64) * 3 * channels
        size = tl.minimum(pixels - i * chunk, chunk).to(tl.float32)
        e = tl.where(live, tl.load(row, live, 0.0) - m, 0.0)  # x - m = d + e
        d = tl.load(row + channels, live, 0.0)
        total += d + size * e
        square += tl.load(row + 2 * channels, live, 0.0) + e * (2 * d + size * e)
    delta, a = finished(tl.sum(tl.sum(total, 0), 0), tl.sum(tl.sum(square, 0), 0), count, eps)
    gain, offset = affine(weight, bias, scale, shift, sample, channel, there)
    m = tl.zeros_like(gain) + m
    write(coefficients, sample, channels, channel, there, m, a * gain, offset - a * gain * delta)


def coefficients(
    image: Image, x: tuple[Any, ...], eps: float, given: dict[str, Any]
) -> tuple[Tensor, list[Launch]]:
    """float32 [samples, 3, channels]: m, a, b of each channel; and the launches that write it."""
    coefficients = image.new(image.samples, 3, image.channels)
    args = {"coefficients": coefficients, "eps": eps, **given}
    only = image.by_group(group_coefficients_kernel, x=x, **args)
    if only is not None:
        return coefficients, [only]
    moments = image.new(image.samples, image.chunks()[0], 3, image.channels)
    first = image.by_chunk(moments_kernel, x=x, moments=moments)
    return coefficients, [first, image.by_sum(coefficients_kernel, **args, moments=moments)]
