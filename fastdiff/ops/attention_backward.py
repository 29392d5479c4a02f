"""The gradient of attention, without its weights ever being stored.

    p  = exp(scale q k' - lse)                  the softmax's weights again
    d  = rowsum(grad out)                       = rowsum(p (grad v'))
    ds = p (grad v' - d)
    grad_q = scale ds k,   grad_k = scale ds' q,   grad_v = p' grad

From Dao et al. 2022, appendix B.2. Sums are float32; in 16 bits p and ds are rounded once, before
their products. Every block of queries and of keys sums its own gradient, so that two runs agree in
every bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..op import Case, Op
from . import attention
from .attention import operands_of, size_of, token_major
from .layout import element_bytes


def reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = q.dtype
    compute = torch.promote_types(dtype, torch.float32)
    grad, q, k, v, out = (t.to(compute) for t in (grad, q, k, v, out))
    p = (scale * (q @ k.mT) - lse[..., None]).exp()
    d = (grad * out).sum(-1, keepdim=True)
    ds = p * (grad @ v.mT - d)
    p, ds = (t.to(dtype).to(compute) for t in (p, ds))
    grads = scale * (ds @ k), scale * (ds.mT @ q), p.mT @ grad
    return grads[0].to(dtype), grads[1].to(dtype), grads[2].to(dtype)


def _allocate(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return token_major(q), token_major(k), token_major(v)


def _described(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *gradients: Tensor,
) -> tuple[Any, ...] | None:
    operands = operands_of(q, k, v, out, grad, *gradients)
    if not operands or not lse.is_contiguous():
        return None
    return *size_of(q, k), scale, lse.data_ptr(), operands


def _by_copy(*args: Any) -> None:
    """Brings together the elements of heads, and what the kernel does not take to the reference."""
    tensors, lse, scale, gradients = args[:5], args[5], args[6], args[7:]
    adjacent = [t if t.stride(3) == 1 else t.contiguous() for t in tensors]
    if operands_of(*adjacent, *gradients):
        OP.launcher("cpu")(*adjacent, lse.contiguous(), scale, *gradients)
    else:
        for to, value in zip(gradients, reference(*args[:7]), strict=True):
            to.copy_(value)


def _cases() -> list[Case]:
    def case(forward: Case) -> Case:
        def inputs(device: str) -> tuple[Any, ...]:
            q, k, v, scale, _ = forward.inputs(device)
            if forward.large:  # only timed: numbers of the right size do
                out, lse = q.roll(1, 2), q.new_full(q.shape[:3], 0.5, dtype=torch.float32)
                lse += math.log(k.shape[2])
            else:
                out, lse = attention.reference(q, k, v, scale, True)
            generator = torch.Generator().manual_seed(1)
            grad = torch.randn(q.transpose(1, 2).shape, generator=generator).to(q).transpose(1, 2)
            return grad, q, k, v, out, lse, scale

        return Case(forward.name, inputs, forward.large)

    # without what adds nothing here, and without cases of one key: the gradient of its q and k is
    # 0, which the reference meets by its order of summing
    names = (
        *("fp32", "bf16", "fp16", "size-40", "size-40-bf16", "size-80", "size-160", "size-200"),
        *("size-512", "size-8", "size-6", "cross", "cross-bf16", "blocks-bf16", "sharp"),
        *("sharp-bf16", "columns", "empty", "large", "large-many"),
    )
    return [case(forward) for forward in attention.OP.cases() if forward.name in names]


OP = Op(
    name="attention_backward",
    inputs=("Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale"),
    outputs=("grad_q", "grad_k", "grad_v"),
    reference=reference,
    allocate=_allocate,
    described=_described,
    otherwise=_by_copy,
    cases=_cases,
    flops=lambda grad, q, k, v, out, lse, scale: 10 * q.numel() * k.shape[2],
    moved=lambda grad, q, k, v, out, lse, scale: element_bytes(grad, out, lse, *2 * (q, k, v)),
)
