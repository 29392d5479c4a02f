"""Counter-based normal noise: Philox-4x32-10 (Salmon et al. 2011) and the Box-Muller transform.

A sample's noise depends on its stream (seed, index), the row of the table and the element's
place in the contiguous sample, never on the batch, layout, shard, dtype or backend:

    r0..r3 = philox(counter = (e // 4, row, index low, index high), key = (seed low, seed high))
    u      = float32(r) 2^-32 + 2^-33            rounded to float32, in (0, 1]
    z0, z1 = sqrt(-2 ln u(r0)) (cos, sin)(2 pi r1 2^-32), and z2, z3 from r2, r3
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import errors
from ..op import Case, Op
from ..spacing import count, sizes

BEFORE_FIRST_ROW = -1  # the row of x_T, which is drawn before row 0 runs
_WORD = 0xFFFFFFFF
_LARGEST_SAMPLE = 1 << 34  # elements: four a counter of 32 bits


def philox(streams: Tensor, row: Tensor | int, elements: int) -> Tensor:
    """Random bits as int64 in [0, 2^32), [B, elements]; `streams` is int64 [B, 2]."""
    blocks = torch.arange((elements + 3) // 4, device=streams.device)
    seed, index = streams[:, :1], streams[:, 1:]
    shape = (len(streams), len(blocks))
    row = torch.as_tensor(row, device=streams.device).reshape(1, 1) & _WORD
    counter = [c.expand(shape) for c in (blocks[None], row, index & _WORD, index >> 32 & _WORD)]
    key = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, counter[0])
        high1, low1 = _multiply(0xCD9E8D57, counter[2])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [key[0] + 0x9E3779B9 & _WORD, key[1] + 0xBB67AE85 & _WORD]
    return torch.stack(counter, -1).flatten(1)[:, :elements]


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product, without overflowing int64."""
    upper, lower = (b >> 16) * a, (b & 0xFFFF) * a
    middle = (upper & 0xFFFF) + (lower >> 16)
    return (upper >> 16) + (middle >> 16), (middle << 16 | lower & 0xFFFF) & _WORD


def reference(size: Sequence[int], streams: Tensor, row: Tensor | int, bits: bool) -> tuple[Tensor]:
    elements = math.prod(size[1:])
    words = philox(streams, row, elements + -elements % 4)
    if bits:
        return (words[:, :elements].to(torch.uint32).reshape(size),)
    pairs = words.unflatten(1, (-1, 2))
    u = pairs[..., 0].float() * 2.0**-32 + 2.0**-33
    radius = torch.sqrt(-2 * torch.log(u.double()))
    angle = pairs[..., 1].double() * (2 * math.pi * 2.0**-32)
    z = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1)
    return (z.flatten(1)[:, :elements].float().reshape(size),)


def _allocate(size: Sequence[int], streams: Tensor, row: int, bits: bool) -> tuple[Tensor]:
    dtype = torch.uint32 if bits else torch.float32
    return (torch.empty(size, dtype=dtype, device=streams.device),)


def _described(
    size: Sequence[int], streams: Tensor, row: int, bits: bool, out: Tensor
) -> tuple[Any, ...]:
    elements = math.prod(size[1:])
    return size[0], elements, streams.data_ptr(), row & _WORD, bits, out.data_ptr()


def _cases() -> list[Case]:
    def case(name: str, *size: int, bits: bool = False, large: bool = False) -> Case:
        def inputs(device: str) -> tuple[Sequence[int], Tensor, int, bool]:
            return size, streams_of((1 << 40) + 7, size[0], 3, device=device), 11, bits

        return Case(name, inputs, large)

    return [
        case("bits", 3, 4, 301, bits=True),
        case("bits-one", 1, 1, bits=True),
        case("image", 2, 3, 32, 32),
        case("odd", 5, 63),
        case("one", 1, 1),
        case("empty", 0, 3),
        case("large", 16, 3, 256, 256, large=True),
    ]


OP = Op(
    name="randn",
    inputs="SymInt[] size, Tensor streams, int row, bool bits",
    outputs=("out",),
    reference=reference,
    allocate=_allocate,
    described=_described,
    cases=_cases,
    moved=lambda size, *_: 4 * math.prod(size),
)


def streams_of(
    seed: int | Sequence[int],
    batch: int,
    first_index: int = 0,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The noise streams of a batch: int64 [B, 2] of (seed, index).

    One int gives sample k the stream (seed, first_index + k); a sequence of `batch` ints gives
    sample k the stream (seed[k], 0), which is that of `seed=seed[k]` at batch 1.
    ValueError for a seed outside [0, 2^63) or a sequence of another length.
    """
    batch = count("batch", batch, 0)
    one = isinstance(seed, int | np.integer)
    seeds = sizes("seed", [seed] if one else seed, "an int, or one a sample")
    if not one and len(seeds) != batch:
        raise ValueError(f"seed: has {len(seeds)} entries, must be one int or {batch} of them")
    first_index = count("first_index", first_index, 0, (1 << 63) - max(1, batch))
    for word in seeds:
        if not 0 <= word < 1 << 63:
            raise ValueError(f"seed={word}: must be in [0, 2^63)")
    made = torch.zeros(batch, 2, dtype=torch.int64)
    made[:, 0] = torch.tensor(seeds)
    if one:
        made[:, 1] = first_index + torch.arange(batch)  # whose end may be 2^63
    return made.to(device, non_blocking=True)


def _draw(
    shape: Sequence[int],
    seed: int | Sequence[int],
    row: int,
    first_index: int,
    device: torch.device | str,
    bits: bool,
) -> Tensor:
    shape = sizes("shape", shape)
    if not shape or any(s < 0 for s in shape):
        raise ValueError(f"shape={shape}: must be [B, ...] with no negative size")
    if max(shape) >= 1 << 61 or math.prod(shape) >= 1 << 61:
        raise ValueError(f"shape={shape}: has more elements than memory has addresses")
    if math.prod(shape[1:]) > _LARGEST_SAMPLE:
        raise ValueError(f"shape={shape}: a sample can have at most 2^34 elements")
    row = check_row(row)
    streams = streams_of(seed, shape[0], first_index, device=device)
    return OP(shape, streams, row, bits)


def randn(
    shape: Sequence[int],
    seed: int | Sequence[int] = 0,
    *,
    row: int = BEFORE_FIRST_ROW,
    first_index: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise, float32 [B, ...]: the z that row `row` of a sampler adds.

    `row=-1`, the default, is the noise that sampling starts from. Sample k uses the stream
    (seed, first_index + k), so any part of a batch can be made apart:
    `randn((8, 3), 0)[5:] == randn((3, 3), 0, first_index=5)`. `seed` may be B ints, one a sample.
    """
    return _draw(shape, seed, row, first_index, device, bits=False)


def randbits(
    shape: Sequence[int],
    seed: int | Sequence[int] = 0,
    *,
    row: int = BEFORE_FIRST_ROW,
    first_index: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The uint32 stream that `randn` is made from, [B, ...]; arguments as there."""
    return _draw(shape, seed, row, first_index, device, bits=True)


def check_row(row: int) -> int:
    """The row, if it is one: -1, that of x_T, or as many as 32 bits count."""
    return count("row", row, BEFORE_FIRST_ROW, _WORD - 1)


def check_streams(name: str, streams: Tensor, batch: int) -> None:
    """Raise unless `streams` is contiguous int64 [batch, 2], as `streams_of` makes it."""
    errors.is_tensor(name, streams)
    errors.has_dtype(name, streams, (torch.int64,))
    if streams.shape != (batch, 2) or not streams.is_contiguous():
        raise ValueError(
            f"{name}: has shape {tuple(streams.shape)}, must be contiguous ({batch}, 2); "
            "make it with ops.streams_of(seed, batch)"
        )
