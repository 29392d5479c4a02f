"""The gradient of attention on the GPU; the formulas are in `fastdiff.ops.attention_backward`.

Two launches (Dao 2023, section 3.1): a program of the first owns a block of queries, walks the keys
and sums grad_q; one of the second owns a block of keys, walks the queries and sums grad_k and
grad_v. The first leaves rowsum(grad out) for the second.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .heads import block, columns, dot, load, owning, place, product, rows, store, told, whole, wide
from .launch import Config, Launch, launcher

LOG2_E = tl.constexpr(1 / math.log(2))


@triton.jit
def queries_kernel(
    grad,
    q,
    k,
    v,
    out,
    lse,
    dots,
    grad_q,
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
    given = block(rows(grad, sample, head, UNIT, QUERIES, COLUMNS), first, live)
    made = block(rows(out, sample, head, UNIT, QUERIES, COLUMNS), first, live)
    d = tl.zeros([QUERIES], tl.float32)
    for c in range(0, SIZE, COLUMNS):
        d += tl.sum(load(given, c, SIZE).to(tl.float32) * load(made, c, SIZE).to(tl.float32), 1)
    tl.store(dots + pair * queries + row, d, live)
    query = block(rows(q, sample, head, UNIT, QUERIES, COLUMNS), first, live)
    held, held_grad = whole(query, SIZE), whole(given, SIZE)
    level = tl.load(lse + pair * queries + row, live, other=0.0) * LOG2_E
    k = rows(k, sample, head, UNIT, KEYS, COLUMNS)
    v = rows(v, sample, head, UNIT, KEYS, COLUMNS)
    total = tl.zeros([QUERIES, COLUMNS], tl.float32)
    for start in range(0, keys, KEYS):
        exist = None if EVEN else tl.arange(0, KEYS) < keys - start
        key, value = block(k, start, exist), block(v, start, exist)
        p = tl.exp2(product(held, query, key, SIZE) * (scale * LOG2_E) - level[:, None])
        ds = p * (product(held_grad, given, value, SIZE) - d[:, None])
        if exist is not None:  # beyond the keys p may be infinite
            ds = tl.where(exist[None, :], ds, 0.0)
        part = load(key, column, SIZE)
        total = dot(ds.to(part.dtype), part, total)
    result = block(rows(grad_q, sample, head, UNIT, QUERIES, COLUMNS), first, live)
    store(result, column, total * scale, SIZE)


@triton.jit
def keys_kernel(
    grad,
    q,
    k,
    v,
    lse,
    dots,
    grad_k,
    grad_v,
    shape,
    scale,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    heads, queries, keys = shape
    sample, head, pair, first, column = place(keys, heads, KEYS, SIZE, COLUMNS)
    live = first + tl.arange(0, KEYS) < keys
    key = block(rows(k, sample, head, UNIT, KEYS, COLUMNS), first, live)
    value = block(rows(v, sample, head, UNIT, KEYS, COLUMNS), first, live)
    held, held_value = whole(key, SIZE), whole(value, SIZE)
    q = rows(q, sample, head, UNIT, QUERIES, COLUMNS)
    grad = rows(grad, sample, head, UNIT, QUERIES, COLUMNS)
    total_k = tl.zeros([KEYS, COLUMNS], tl.float32)
    total_v = tl.zeros([KEYS, COLUMNS], tl.float32)
    for start in range(0, queries, QUERIES):
        row = start + tl.arange(0, QUERIES)
        exist = row < queries
        # beyond the queries the weights are 0
        level = tl.load(lse + pair * queries + row, exist, other=float("inf")) * LOG2_E
        d = tl.load(dots + pair * queries + row, exist, other=0.0)
        query, given = block(q, start, exist), block(grad, start, exist)
        p = tl.exp2(product(held, key, query, SIZE) * (scale * LOG2_E) - level[None, :])
        part = load(given, column, SIZE)
        total_v = dot(p.to(part.dtype), part, total_v)
        ds = p * (product(held_value, value, given, SIZE) - d[None, :])
        part = load(query, column, SIZE)
        total_k = dot(ds.to(part.dtype), part, total_k)
    result = block(rows(grad_k, sample, head, UNIT, KEYS, COLUMNS), first, live)
    store(result, column, total_k * scale, SIZE)
    result = block(rows(grad_v, sample, head, UNIT, KEYS, COLUMNS), first, live)
    store(result, column, total_v, SIZE)


def configs(owned: str, walked: str, size: int, dtype: torch.dtype) -> list[Config]:
    """Those that keep everything in registers, by the size of a head."""

    def each(rows: int, step: int, across: int, threads: int = 256, stages: int = 2) -> Config:
        return Config({owned: rows, walked: step, "COLUMNS": across}, threads, stages)

    if dtype == torch.float32:  # three bfloat16 each
        if size <= 64:
            return [each(32, 32, 16, stages=1) if size <= 16 else each(32, 32, 64)]
        return [each(64, 32, 32, stages=1) if owned == "QUERIES" else each(32, 16, 32, stages=1)]
    if size > 64:
        return [each(64, 32, 128, stages=2 if size <= 256 else 1)]
    across = columns(size, 64)
    return [each(64, 64, across), each(64, 64, across, threads=128)]


def plan(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> list[Launch]:
    keys = k.shape[2]
    grad, q, k, v, out = wide(grad, q, k, v, out)
    lse = lse.contiguous()
    common = {"lse": lse, "dots": torch.empty_like(lse), "scale": scale}
    common["shape"] = (*q.shape[1:3], keys)
    first = told(grad=grad, q=q, k=k, v=v, out=out, grad_q=grad_q) | common
    second = told(grad=grad, q=q, k=k, v=v, grad_k=grad_k, grad_v=grad_v) | common
    size, dtype = q.shape[3], q.dtype
    by_query, by_key = (
        configs(*names, size, dtype) for names in (("QUERIES", "KEYS"), ("KEYS", "QUERIES"))
    )
    first["EVEN"] = all(keys % c.blocks["KEYS"] == 0 for c in by_query)
    return [
        Launch(queries_kernel, by_query, owning("QUERIES", grad_q), first, q.device),
        Launch(keys_kernel, by_key, owning("KEYS", grad_k), second, q.device),
    ]


launch = launcher(plan)
