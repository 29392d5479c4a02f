"""Attention's operands, [N, heads, tokens, size], on the host and on the device.

A program owns a block of rows (tokens of one head) and COLUMNS of a result. Where a head has more
columns than that, products over all of them are summed COLUMNS at a time, so that a head of any
size fits a program's registers; what a row has one of, each program of it writes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

FURTHEST = 512  # no block has more rows, nor more columns
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def wide(*operands: Tensor) -> list[Tensor]:
    """The operands, copied where their rows cannot be read 128 bits at a time.

    A copy reads an operand once; a kernel reads it once for each block that the other side has.
    """
    return [
        t if t.stride(3) == 1 and not any(s % 8 for s in t.stride()[:3]) else t.contiguous()
        for t in operands
    ]


def told(**operands: Tensor) -> dict[str, Any]:
    """The arguments that operands of one head size become, each (tensor, its four strides).

    The strides but the last are counted in UNIT elements. Where all are multiples of 8 and those
    of a block fit 32 bits, it is 8: the compiler sees where rows begin, and moves 128 bits at a
    time. Else it is 1, and offsets take 64 bits.
    """
    strides = {
        name: [0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
        for name, t in operands.items()
    }
    far = any(FURTHEST * (s[2] + s[3]) >= 2**31 for s in strides.values())
    unit = 1 if far or any(n % 8 for s in strides.values() for n in s[:3]) else 8
    args: dict[str, Any] = {
        name: (t, *(s // unit for s in strides[name][:3]), t.stride(3))
        for name, t in operands.items()
    }
    return args | {"SIZE": next(iter(operands.values())).shape[3], "UNIT": unit}


def columns(size: int, most: int) -> int:
    """COLUMNS for heads of `size`: a power of two, at least the 16 that a product takes."""
    return min(most, max(16, triton.next_power_of_2(size)))


def owning(rows: str, owned: Tensor) -> Callable[[Mapping[str, int]], tuple[int]]:
    """The grid in which each program owns a block of a result, blocks[rows] x COLUMNS."""
    batch, heads, tokens, size = owned.shape

    def programs(blocks: Mapping[str, int]) -> tuple[int]:
        down, across = triton.cdiv(tokens, blocks[rows]), triton.cdiv(size, blocks["COLUMNS"])
        return (batch * heads * down * across,)

    return programs


@triton.jit
def place(tokens, heads, ROWS: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's sample, head, number of that head in all, first token and first column."""
    across: tl.constexpr = (SIZE + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    column = program % across * COLUMNS
    program = program // across
    blocks = tl.cdiv(tokens, ROWS)
    pair = program // blocks
    sample, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    return sample, head, pair.to(tl.int64), (program % blocks) * ROWS, column


@triton.jit
def rows(operand, sample, head, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A head, to take blocks of: its address, strides, and the offsets of [ROWS, COLUMNS]."""
    pointer, s0, s1, s2, s3 = operand
    token, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    if UNIT == 1:
        token, column = token.to(tl.int64), column.to(tl.int64)
    first = pointer + (sample * s0 + head * s1) * UNIT
    return first, s2 * UNIT, s3, token * s2 * UNIT + column * s3


@triton.jit
def block(rows, start, live):
    """ROWS tokens from `start` on; `live`, [ROWS], tells which there are, None if all."""
    first, stride, across, each = rows
    return first + tl.cast(start, tl.int64) * stride, across, each, live


@triton.jit
def pointers(block, column, SIZE: tl.constexpr):
    """Of COLUMNS of a block from `column` on, and which of them exist."""
    first, across, each, live = block
    there = column + tl.arange(0, each.shape[1])[None, :] < SIZE
    if live is not None:
        there = live[:, None] & there
    return first + tl.cast(column, tl.int64) * across + each, there


@triton.jit
def load(block, column, SIZE: tl.constexpr):
    """COLUMNS of a block from `column` on; 0 where there are none."""
    at, there = pointers(block, column, SIZE)
    if block[3] is None and SIZE // at.shape[1] * at.shape[1] == SIZE:
        value = tl.load(at)
    else:
        value = tl.load(at, there, other=0.0)
    return value


@triton.jit
def store(block, column, value, SIZE: tl.constexpr):
    """Write COLUMNS of a block from `column` on, rounded to its dtype."""
    at, there = pointers(block, column, SIZE)
    tl.store(at, value.to(at.dtype.element_ty), there)


@triton.jit
def whole(block, SIZE: tl.constexpr):
    """All columns of a block, for many products; None if they are more than COLUMNS."""
    value = None
    if block[2].shape[1] >= SIZE:
        value = load(block, 0, SIZE)
    return value


@triton.jit
def dot(a, b, total=None):
    """The matrix product, summed in float32 onto `total`, on tensor cores.

    A float32 is the sum of three bfloat16, which leaves six products of weight 2^-16 or more. The
    interpreter knows no such thing, adds float32 in numpy's order, and multiplies bfloat16 as if
    its bits were integers: so there it is the exact product, rounded to float32.
    """
    if INTERPRETED:
        product = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
        product = product.to(tl.float32)
        return product if total is None else total + product
    return tl.dot(a, b, total, input_precision="bf16x6")


@triton.jit
def product(held, a, b, SIZE: tl.constexpr):
    """a b' over all columns, [rows of a, rows of b]; `held` is whole(a)."""
    if held is not None:
        total = dot(held, load(b, 0, SIZE).T)
    else:
        total = tl.zeros([a[2].shape[0], b[2].shape[0]], tl.float32)
        for column in range(0, SIZE, a[2].shape[1]):
            total = dot(load(a, column, SIZE), load(b, column, SIZE).T, total)
    return total
