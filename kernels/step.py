"""One row of a sampler's table on the GPU, in one pass; the formulas are in `fastdiff.ops.step`.

The row's index and coefficients are read on the device, so one captured CUDA graph replays every
row. What is absent is None, which is a compile-time constant.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..table import COLUMNS
from .launch import Launch, launcher, tiled
from .philox import normals
from .tile import entry, load, row_of, store, tile

WIDTH = tl.constexpr(len(COLUMNS))
_NAMES = ("c_in", "w", "px", "pm", "clip", "q", "a", "b", "c", "n", "s", "l", "d", "e")
C_IN, W, PX, PM, CLIP, Q, A, B, C, N, S, L, D, E = (
    tl.constexpr(COLUMNS.index(name)) for name in _NAMES
)


@triton.jit(do_not_specialize=["rows", "batch"])
def step_kernel(
    x,
    m,
    m_u,
    v,
    g,
    h,
    z,
    x_next,
    h_next,
    model_input,
    table,
    rows,
    row,
    streams,
    batch,
    shape,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, elements = tile(shape, BLOCK)
    i = tl.load(row)
    k = row_of(table, i, rows, WIDTH)
    x, m = load(x, sample, elements, shape), load(m, sample, elements, shape)
    if m_u is not None:
        m_u = load(m_u, sample, elements, shape)
        m = m_u + (entry(k, W) + 1) * (m - m_u)
    r = 1.0
    if v is not None:
        r = tl.exp(entry(k, L) * load(v, sample, elements, shape))
    clip = entry(k, CLIP)
    x0 = entry(k, PX) * x + entry(k, PM) * m
    x0 = tl.clamp(x0, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    if g is not None:
        x0 += entry(k, Q) * r * r * load(g, sample, elements, shape)
    new_x = entry(k, A) * x + entry(k, B) * x0 + entry(k, N) * m
    if h is not None:
        new_x += entry(k, C) * load(h, sample, elements, shape)
        store(h_next, sample, elements, shape, entry(k, D) * x + entry(k, E) * x0)
    if z is not None:
        new_x += entry(k, S) * r * load(z, sample, elements, shape)
    elif streams is not None:
        new_x += entry(k, S) * r * normals(streams, i, sample, elements)
    store(x_next, sample, elements, shape, new_x)
    if model_input is not None:
        c_in = entry(row_of(table, tl.minimum(i + 1, rows - 1), rows, WIDTH), C_IN)
        for copy in tl.static_range(COPIES):
            store(model_input, sample + copy * batch, elements, shape, c_in * new_x)


def plan(
    x: Tensor,
    m: Tensor,
    table: Tensor,
    row: Tensor,
    m_u: Tensor | None,
    v: Tensor | None,
    g: Tensor | None,
    h: Tensor | None,
    z: Tensor | None,
    streams: Tensor | None,
    copies: int,
    x_next: Tensor,
    h_next: Tensor | None,
    model_input: Tensor | None,
) -> list[Launch]:
    operands = {"x": x, "m": m, "m_u": m_u, "v": v, "g": g, "h": h, "z": z, "x_next": x_next}
    operands |= {"h_next": h_next, "model_input": None}
    if model_input is not None:
        operands["model_input"] = model_input[: len(x)]
    args = {"table": table, "rows": len(table), "row": row, "batch": len(x), "COPIES": copies}
    return tiled(step_kernel, operands, streams=streams, **args)


launch = launcher(plan)
