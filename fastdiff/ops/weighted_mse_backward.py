"""The gradient of `ops.weighted_mse`, in one pass.

    grad_output = (2 / n) weights[t_b] grad_b (output_b - target_b)
    grad_target = -grad_output

with n elements in a sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..op import Case, Op
from .layout import describe, element_bytes, rows
from .weighted_mse import cases


def scale(output: Tensor) -> float:
    """2 / n."""
    return 2 / max(output.shape[1:].numel(), 1)


def reference(
    grad: Tensor, output: Tensor, target: Tensor, weights: Tensor, t: Tensor, to_target: bool
) -> tuple[Tensor, Tensor | None]:
    compute = torch.promote_types(torch.promote_types(output.dtype, target.dtype), weights.dtype)
    slope = rows(scale(output) * weights[t] * grad, output)
    full = slope * (output.to(compute) - target.to(compute))
    return full.to(output.dtype), (-full).to(target.dtype) if to_target else None


def _allocate(
    grad: Tensor, output: Tensor, target: Tensor, weights: Tensor, t: Tensor, to_target: bool
) -> tuple[Tensor, Tensor | None]:
    return torch.empty_like(output), torch.empty_like(target) if to_target else None


def _described(
    grad: Tensor,
    output: Tensor,
    target: Tensor,
    weights: Tensor,
    t: Tensor,
    to_target: bool,
    grad_output: Tensor,
    grad_target: Tensor | None,
) -> tuple[Any, ...]:
    pointers = (t.data_ptr(), weights.data_ptr(), len(weights), grad.data_ptr())
    return *pointers, scale(output), *describe(output, target, grad_output, grad_target)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.to_target = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    """A second derivative, for gradient penalties: grad_output is bilinear."""
    grad, output, target, weights, t = ctx.saved_tensors
    given = grads[0].float() - (grads[1].float() if ctx.to_target else 0)
    slope = scale(output) * weights[t]
    each = given * (output.float() - target.float())
    to_grad = slope * each.reshape(len(t), output.shape[1:].numel()).sum(1)
    to_output = rows(slope * grad, output) * given
    return to_grad, to_output.to(output.dtype), -to_output.to(target.dtype), None, None, None


def _cases() -> list[Case]:
    both = (Case(f"{case.name}-both", case.inputs) for case in cases((True,), grad=True))
    chosen = [case for case in both if case.name in ("mixed-both", "strided-both")]
    return cases((False,), grad=True) + chosen


OP = Op(
    name="weighted_mse_backward",
    inputs="Tensor grad, Tensor output, Tensor target, Tensor weights, Tensor t, bool to_target",
    outputs=("grad_output", "grad_target?"),
    reference=reference,
    allocate=_allocate,
    described=_described,
    cases=_cases,
    moved=lambda grad, output, target, weights, t, to_target: element_bytes(
        output, target, output, target if to_target else None
    ),
    backward=(_setup, _backward),
)
