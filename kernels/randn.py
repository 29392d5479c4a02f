"""Normal noise on the GPU, or the uint32 stream it is made from; see `fastdiff.ops.randn`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, launcher, tiled
from .philox import interleave, normals, words
from .tile import store, tile


@triton.jit(do_not_specialize=["row"])
def randn_kernel(out, streams, row, shape, BITS: tl.constexpr, BLOCK: tl.constexpr):
    sample, elements = tile(shape, BLOCK)
    if BITS:
        r0, r1, r2, r3 = words(streams, row, sample, elements)
        z = interleave(r0, r1, r2, r3).to(tl.float32, bitcast=True)
    else:
        z = normals(streams, row, sample, elements)
    store(out, sample, elements, shape, z)


def plan(size: Sequence[int], streams: Tensor, row: int, bits: bool, out: Tensor) -> list[Launch]:
    operands = {"out": out.view(torch.float32)}
    return tiled(randn_kernel, operands, streams=streams, row=row, BITS=bits)


launch = launcher(plan)
