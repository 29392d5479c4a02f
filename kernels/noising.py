"""Noised data and the training target on the GPU; the formulas are in `fastdiff.ops.noising`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, launcher, tiled
from .philox import normals
from .tile import entry, load, row_of, store, tile


@triton.jit(do_not_specialize=["rows", "row"])
def noising_kernel(
    x0, noise, x_t, target, t, table, rows, streams, row, shape, BLOCK: tl.constexpr
):
    sample, elements = tile(shape, BLOCK)
    k = row_of(table, tl.load(t + sample), rows, 4)
    alpha, sigma, tx, tz = entry(k, 0), entry(k, 1), entry(k, 2), entry(k, 3)
    x = load(x0, sample, elements, shape)
    if noise is not None:
        z = load(noise, sample, elements, shape)
    else:
        z = normals(streams, row, sample, elements)
    store(x_t, sample, elements, shape, alpha * x + sigma * z)
    store(target, sample, elements, shape, tx * x + tz * z)


def plan(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    streams: Tensor | None,
    row: int,
    x_t: Tensor,
    target: Tensor,
) -> list[Launch]:
    operands = {"x0": x0, "noise": noise, "x_t": x_t, "target": target}
    args = {"t": t, "table": table, "rows": len(table), "row": row}
    return tiled(noising_kernel, operands, streams=streams, **args)


launch = launcher(plan)
