"""The gradient of the training loss; the formula is in `fastdiff.ops.weighted_mse_backward`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops.weighted_mse_backward import scale as scale_of
from .launch import Launch, launcher, tiled
from .tile import entry, load, row_of, store, tile


@triton.jit(do_not_specialize=["times"])
def weighted_mse_backward_kernel(
    output,
    target,
    grad_output,
    grad_target,
    grad,
    weights,
    times,
    t,
    scale,
    shape,
    BLOCK: tl.constexpr,
):
    sample, elements = tile(shape, BLOCK)
    weight = entry(row_of(weights, tl.load(t + sample), times, 1), 0)
    slope = scale * weight * tl.load(grad + sample)
    full = load(output, sample, elements, shape) - load(target, sample, elements, shape)
    full *= slope
    store(grad_output, sample, elements, shape, full)
    if grad_target is not None:
        store(grad_target, sample, elements, shape, -full)


def plan(
    grad: Tensor,
    output: Tensor,
    target: Tensor,
    weights: Tensor,
    t: Tensor,
    to_target: bool,
    grad_output: Tensor,
    grad_target: Tensor | None,
) -> list[Launch]:
    operands: dict[str, Tensor | None] = {"output": output, "target": target}
    operands |= {"grad_output": grad_output, "grad_target": grad_target}
    rest = {"grad": grad, "weights": weights, "times": len(weights), "t": t}
    return tiled(weighted_mse_backward_kernel, operands, **rest, scale=scale_of(output))


launch = launcher(plan)
