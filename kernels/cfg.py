"""Classifier-free guidance on the GPU; the formula is in `fastdiff.ops.cfg`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, launcher, tiled
from .tile import load, store, tile


@triton.jit
def cfg_kernel(m_cond, m_uncond, out, weights, w, shape, BLOCK: tl.constexpr):
    sample, elements = tile(shape, BLOCK)
    if weights is not None:
        w = tl.load(weights + sample)
    c, u = load(m_cond, sample, elements, shape), load(m_uncond, sample, elements, shape)
    store(out, sample, elements, shape, u + (w + 1) * (c - u))


def plan(
    m_cond: Tensor, m_uncond: Tensor, weights: Tensor | None, w: float, out: Tensor
) -> list[Launch]:
    operands = {"m_cond": m_cond, "m_uncond": m_uncond, "out": out}
    return tiled(cfg_kernel, operands, weights=weights, w=w)


launch = launcher(plan)
