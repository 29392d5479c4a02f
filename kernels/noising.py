"""Noised data and the training target on the GPU; the formulas are in `fastdiff.ops.noising`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, launcher, tiled
from .philox import normals
from .tile import load, store, tile


@triton.jit(do_not_specialize=["row"])
def noising_kernel(x0, noise, x_t, target, t, table, streams, row, shape, BLOCK: tl.constexpr):
    sample, elements = tile(shape, BLOCK)
    k = table + 4 * tl.load(t + sample)
    alpha, sigma, tx, tz = tl.load(k), tl.load(k + 1), tl.load(k + 2), tl.load(k + 3)
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
    return tiled(noising_kernel, operands, streams=streams, t=t, table=table, row=row)


launch = launcher(plan)
