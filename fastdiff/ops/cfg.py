"""Classifier-free guidance: (w + 1) m_cond - w m_uncond (Ho & Salimans 2022, eq. 6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..op import Case, Op
from .layout import describe, element_bytes, rows


def reference(m_cond: Tensor, m_uncond: Tensor, weights: Tensor | None, w: float) -> tuple[Tensor]:
    scale = w if weights is None else rows(weights, m_cond)
    compute = torch.promote_types(m_cond.dtype, torch.float32)
    c, u = m_cond.to(compute), m_uncond.to(compute)
    return ((u + (scale + 1) * (c - u)).to(m_cond.dtype),)


def _allocate(m_cond: Tensor, m_uncond: Tensor, weights: Any, w: float) -> tuple[Tensor]:
    return (torch.empty_like(m_cond),)


def _described(
    m_cond: Tensor, m_uncond: Tensor, weights: Tensor | None, w: float, out: Tensor
) -> tuple[Any, ...]:
    pointer = 0 if weights is None else weights.data_ptr()
    return pointer, w, *describe(m_cond, m_uncond, out)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    m_cond, m_uncond, weights, ctx.w = inputs
    ctx.save_for_backward(m_cond, m_uncond, weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
    m_cond, m_uncond, weights = ctx.saved_tensors
    scale = ctx.w if weights is None else rows(weights, grad).to(grad.dtype)
    grad_weights = None
    if ctx.needs_input_grad[2]:
        grad_weights = (grad.float() * (m_cond.float() - m_uncond.float())).flatten(1).sum(1)
    return grad * (scale + 1), grad * -scale, grad_weights, None


def _cases() -> list[Case]:
    def case(
        name: str, *size: int, dtype: Any = torch.float32, large: bool = False, **how: Any
    ) -> Case:
        def inputs(device: str) -> tuple[Tensor, Tensor, Tensor | None, float]:
            generator = torch.Generator().manual_seed(0)
            both = torch.randn(2 * size[0], *size[1:], generator=generator).to(device, dtype)
            if how.get("channels_last"):
                both = both.contiguous(memory_format=torch.channels_last)
            weights = torch.linspace(-1, 7, size[0], device=device) if how.get("each") else None
            if how.get("strided"):
                return both[: size[0], ..., ::2], both[size[0] :, ..., 1::2], weights, 1.5
            return both[: size[0]], both[size[0] :], weights, 1.5

        return Case(name, inputs, large)

    return [
        case("fp32", 2, 3, 16, 16),
        case("each", 3, 4, 301, each=True),
        case("bf16", 2, 3, 16, 16, dtype=torch.bfloat16),
        case("fp16", 1, 63, dtype=torch.float16),
        case("channels-last", 2, 3, 8, 10, channels_last=True),
        case("strided", 2, 3, 8, 10, strided=True),
        case("one", 1, 1),
        case("empty", 0, 3, 8, 8),
        case("large", 16, 3, 256, 256, large=True),
    ]


OP = Op(
    name="cfg",
    inputs="Tensor m_cond, Tensor m_uncond, Tensor? weights, float w",
    outputs=("out",),
    reference=reference,
    allocate=_allocate,
    described=_described,
    cases=_cases,
    moved=lambda m_cond, m_uncond, *_: element_bytes(m_cond, m_uncond, m_cond),
    backward=(_setup, _backward),
)


def cfg(m_cond: Tensor, m_uncond: Tensor, w: float | Tensor) -> Tensor:
    """Combine a conditional and an unconditional model output: (w + 1) m_cond - w m_uncond.

    Both are [B, ...] of one dtype (float32, bfloat16 or float16; the sum is made in float32); `w`
    is a float or a float32 tensor [B]. w = 0 is plain conditional, as in Ho & Salimans (2022);
    a library that writes u + s (c - u) has s = w + 1. Differentiable. TypeError or ValueError for
    shapes, dtypes or devices that differ.
    """
    errors.is_batch("m_cond", m_cond)
    errors.has_dtype("m_cond", m_cond, errors.MODEL_DTYPES)
    errors.like("m_uncond", m_uncond, "m_cond", m_cond)
    errors.has_dtype("m_uncond", m_uncond, (m_cond.dtype,))
    if not isinstance(w, Tensor):
        return OP(m_cond, m_uncond, None, errors.number("w", w))
    errors.per_sample("w", w, torch.float32, "m_cond", m_cond)
    return OP(m_cond, m_uncond, w.contiguous(), 0.0)
