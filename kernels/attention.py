"""Attention on the GPU; the formula is in `fastdiff.ops.attention`.

A program owns a block of queries and walks the keys block by block (Dao et al. 2022, algorithm 1;
Dao 2023): the weights never leave it. Exponents are to base 2, the scale folded into them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .heads import block, columns, dot, load, owning, place, product, rows, store, told, whole, wide
from .launch import Config, Launch, launcher

LN2 = tl.constexpr(math.log(2))


@triton.jit
def attention_kernel(
    q,
    k,
    v,
    out,
    lse,
    shape,
    scale,
    EVEN: tl.constexpr,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    heads, queries, keys = shape
    sample, head, pair, first, column = place(queries, heads, QUERIES, SIZE, COLUMNS)
    row = first + tl.arange(0, QUERIES)
    live = row < queries
    query = block(rows(q, sample, head, UNIT, QUERIES, COLUMNS), first, live)
    held = whole(query, SIZE)
    k = rows(k, sample, head, UNIT, KEYS, COLUMNS)
    v = rows(v, sample, head, UNIT, KEYS, COLUMNS)
    total = tl.zeros([QUERIES, COLUMNS], tl.float32)
    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    weight = tl.zeros([QUERIES], tl.float32)
    for start in range(0, keys, KEYS):
        exist = None if EVEN else tl.arange(0, KEYS) < keys - start
        s = product(held, query, block(k, start, exist), SIZE)
        if exist is not None:
            s = tl.where(exist[None, :], s, float("-inf"))
        new = tl.maximum(peak, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new[:, None])
        kept = tl.exp2(peak - new)
        value = load(block(v, start, exist), column, SIZE)
        total = dot(p.to(value.dtype), value, total * kept[:, None])
        weight = weight * kept + tl.sum(p, 1)
        peak = new
    result = block(rows(out, sample, head, UNIT, QUERIES, COLUMNS), first, live)
    store(result, column, total / weight[:, None], SIZE)
    if lse is not None:
        tl.store(lse + pair * queries + row, (peak + tl.log2(weight)) * LN2, live)


def configs(size: int, dtype: torch.dtype) -> list[Config]:
    """Those that keep everything in registers on all GPUs, by the size of a head."""

    def each(queries: int, keys: int, most: int, threads: int) -> Config:
        blocks = {"QUERIES": queries, "KEYS": keys, "COLUMNS": columns(size, most)}
        return Config(blocks, threads, 2)

    if dtype == torch.float32:  # three bfloat16 each
        return [each(64, 32, 64 if size <= 64 else 32, 256 if size > 16 else 128)]
    if size > 128:
        return [each(64, 32, 256, 256), each(32, 32, 256, 128)]
    large = [each(128, 128, 64, 256)] if size <= 64 else []
    return [each(128, 64, 128, 256), each(64, 64, 128, 128), *large]


def plan(
    q: Tensor, k: Tensor, v: Tensor, scale: float, with_lse: bool, out: Tensor, lse: Tensor | None
) -> list[Launch]:
    keys = k.shape[2]
    q, k, v = wide(q, k, v)
    args: dict[str, Any] = told(q=q, k=k, v=v, out=out)
    args |= {"lse": lse, "shape": (*q.shape[1:3], keys), "scale": scale / math.log(2)}
    chosen = configs(q.shape[3], q.dtype)
    args |= {"EVEN": all(keys % c.blocks["KEYS"] == 0 for c in chosen)}
    return [Launch(attention_kernel, chosen, owning("QUERIES", out), args, q.device)]


launch = launcher(plan)
