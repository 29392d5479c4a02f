"""The training loss in one pass, and what it is at each timestep.

    mse_b    = mean((output_b - target_b)^2)            over the elements of sample b
    losses_b = weights[t_b] mse_b                       the L_t of Ho et al. 2020, equation 12
    sums_k   = (1, mse_b, mse_b^2) summed over the b with t_b = k

The sums are of the unweighted error, since all of timestep k has the one factor weights[k]: sums
of several batches add up, L_k is weights[k] sums[k, 1] / sums[k, 0] under any weighting, and
importance sampling takes sqrt(E[L_k^2]) = weights[k] sqrt(sums[k, 2] / sums[k, 0]) (Nichol &
Dhariwal 2021, equation 18). They are made on the device, in an order that no thread decides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..op import Case, Op
from .layout import describe, element_bytes


def reference(output: Tensor, target: Tensor, weights: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(torch.promote_types(output.dtype, target.dtype), weights.dtype)
    square = (output.to(compute) - target.to(compute)).square()
    mse = square.reshape(len(t), output.shape[1:].numel()).mean(1)
    terms = torch.stack((torch.ones_like(mse), mse, mse.square()), 1)
    return weights[t] * mse, terms.new_zeros(len(weights), 3).index_add(0, t, terms)


def _allocate(output: Tensor, target: Tensor, weights: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return weights.new_empty(len(t)), weights.new_empty(len(weights), 3)


def _described(
    output: Tensor, target: Tensor, weights: Tensor, t: Tensor, losses: Tensor, sums: Tensor
) -> tuple[Any, ...]:
    pointers = (t.data_ptr(), weights.data_ptr(), len(weights), losses.data_ptr(), sums.data_ptr())
    return *pointers, *describe(output, target)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    to_output, to_target, *_ = ctx.needs_input_grad
    gradient = torch.ops.fastdiff.weighted_mse_backward
    grads = gradient(grad.contiguous(), *ctx.saved_tensors, to_target)
    return grads[0] if to_output else None, grads[1] if to_target else None, None, None


def cases(more: tuple[Any, ...] = (), grad: bool = False) -> list[Case]:
    """Those of the forward and, with a gradient first and `more` last, of the backward."""

    def case(name: str, *size: int, large: bool = False, **how: Any) -> Case:
        def inputs(device: str) -> tuple[Any, ...]:
            generator = torch.Generator().manual_seed(0)

            def normal(*size: int) -> Tensor:
                return torch.randn(size, generator=generator).to(device)

            output = normal(*size).to(how.get("dtype", torch.float32))
            target = normal(*size).to(how.get("target", output.dtype))
            if how.get("channels_last"):
                output = output.contiguous(memory_format=torch.channels_last)
            if how.get("strided"):
                output, target = (x.repeat_interleave(2, -1)[..., ::2] for x in (output, target))
            times = how.get("times", 7)
            t = torch.randint(times, size[:1], generator=generator).to(device)
            given = (normal(size[0]),) if grad else ()
            return *given, output, target, normal(times).exp(), t, *more

        return Case(name, inputs, large)

    bf16, fp16 = torch.bfloat16, torch.float16
    return [
        case("fp32", 3, 3, 16, 16),
        case("bf16", 3, 3, 16, 16, dtype=bf16),
        case("fp16", 2, 63, dtype=fp16),
        case("mixed", 3, 4, 301, dtype=bf16, target=torch.float32),
        case("parts", 2, 3, 41, 103),  # of which a kernel sums each by itself
        case("many", 150, 3, times=40),
        case("channels-last", 2, 3, 8, 10, channels_last=True),
        case("strided", 2, 3, 8, 10, strided=True),
        case("vector", 5),
        case("one", 1, 1, times=1),
        case("empty", 0, 3, 8, 8),
        case("large", 16, 3, 256, 256, times=1000, large=True),
        case("large-bf16", 16, 3, 256, 256, dtype=bf16, times=1000, large=True),
    ]


OP = Op(
    name="weighted_mse",
    inputs="Tensor output, Tensor target, Tensor weights, Tensor t",
    outputs=("losses", "sums"),
    reference=reference,
    allocate=_allocate,
    described=_described,
    cases=cases,
    moved=lambda output, target, weights, t: element_bytes(output, target),
    backward=(_setup, _backward),
)


def weighted_mse(
    output: Tensor, target: Tensor, weights: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """The weighted mean squared error of each sample, and its sums at each timestep.

    Args:
        output, target: [B, ...], float32, bfloat16 or float16 each, of any layout.
        weights: float32 [T], the weight of each timestep; constants, without a gradient.
        t: int64 [B] in [0, T).

    Returns:
        losses, float32 [B]: weights[t] times the mean over a sample's elements; differentiable in
        output and target. sums, float32 [T, 3], without a gradient: at each timestep the number of
        samples, the sum of their unweighted errors and that of those errors' squares.

    Raises:
        TypeError, ValueError: other shapes, dtypes, devices, or t out of range (on the CPU: a
            GPU's t is not read back, and makes NaN).
    """
    for name, value in (("output", output), ("target", target)):
        errors.is_batch(name, value)
        errors.has_dtype(name, value, errors.MODEL_DTYPES)
    errors.like("target", target, "output", output)
    errors.is_tensor("weights", weights)
    errors.has_dtype("weights", weights, (torch.float32,))
    errors.on_device("weights", weights, "output", output)
    if weights.dim() != 1:
        raise ValueError(f"weights: has shape {tuple(weights.shape)}, must be [T], one a timestep")
    if weights.requires_grad:
        raise ValueError("weights: requires a gradient, must be constants; detach it")
    errors.per_sample("t", t, torch.int64, "output", output)
    errors.in_range("t", t, len(weights))
    return OP(output, target, weights.contiguous(), t.contiguous())
