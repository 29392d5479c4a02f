"""A teacher's step in progressive distillation; the formulas are in `fastdiff.ops.teacher_step`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, launcher, tiled
from .tile import entry, load, row_of, store, tile


@triton.jit(do_not_specialize=["rows"])
def teacher_step_kernel(
    z, m, z_t, m_u, out, table, rows, i, weights, w, shape, BLOCK: tl.constexpr
):
    sample, elements = tile(shape, BLOCK)
    k = row_of(table, tl.load(i + sample), rows, 5)
    z, m = load(z, sample, elements, shape), load(m, sample, elements, shape)
    if m_u is not None:
        if weights is not None:
            w = tl.load(weights + sample)
        m_u = load(m_u, sample, elements, shape)
        m = m_u + (w + 1) * (m - m_u)
    new = entry(k, 2) * z + entry(k, 3) * (entry(k, 0) * z + entry(k, 1) * m)
    if z_t is not None:
        new += entry(k, 4) * load(z_t, sample, elements, shape)
    store(out, sample, elements, shape, new)


def plan(
    z: Tensor,
    m: Tensor,
    table: Tensor,
    i: Tensor,
    z_t: Tensor | None,
    m_u: Tensor | None,
    weights: Tensor | None,
    w: float,
    out: Tensor,
) -> list[Launch]:
    operands = {"z": z, "m": m, "z_t": z_t, "m_u": m_u, "out": out}
    args = {"table": table, "rows": len(table), "i": i, "weights": weights, "w": w}
    return tiled(teacher_step_kernel, operands, **args)


launch = launcher(plan)
