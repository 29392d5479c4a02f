"""How tensors are told to the kernels: an address, a dtype code and four strides each."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_C: Any
try:
    _C = import_module("fastdiff._C")
except ImportError:  # fastdiff.op runs the reference then, and `fastdiff doctor` says why
    _C = None

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType of csrc/tensor.h

Operand = tuple[int, int, tuple[int, int, int, int]]


def describe(*tensors: Tensor | None) -> tuple[tuple[int, int, int, int], list[Operand | None]]:
    """The common size [B, d1, d2, d3] of equal-shaped tensors, and each one's operand.

    Neighbouring dimensions that every tensor walks in one stride are merged, the batch never; so
    contiguous tensors become [B, 1, 1, elements] and channels-last images [B, 1, C, H W].
    Strides are counted in elements. ValueError when more than three inner dimensions remain.
    """
    present = [t for t in tensors if t is not None]
    shape, strides = present[0].shape, [t.stride() for t in present]
    alike = all(s[1:] == strides[0][1:] for s in strides) or not shape.numel()
    if alike and present[0].is_contiguous():
        merged = (shape[0], 1, 1, shape[1:].numel())
        return merged, [
            (t.data_ptr(), DTYPES[t.dtype], (t.stride(0), 0, 0, 1)) if t is not None else None
            for t in tensors
        ]
    inner: list[int] = []  # the last dimension of each merged group
    size: list[int] = []
    for d in range(len(shape) - 1, 0, -1):
        if shape[d] == 1:
            continue
        if inner and all(s[d] == s[inner[0]] * size[0] for s in strides):
            size[0] *= shape[d]
        else:
            inner.insert(0, d)
            size.insert(0, shape[d])
    if len(inner) > 3:
        raise ValueError(
            f"strides={strides}: tensors of {len(shape)} dimensions with these layouts are not "
            "supported; call .contiguous() first"
        )
    pad = 3 - len(inner)
    operands = [
        (
            t.data_ptr(),
            DTYPES[t.dtype],
            (t.stride(0), *(0,) * pad, *(t.stride(d) for d in inner)),
        )
        if t is not None
        else None
        for t in tensors
    ]
    return (shape[0], *(1,) * pad, *size), operands  # type: ignore[return-value]


def rows(per_sample: Tensor, like: Tensor) -> Tensor:
    """A [B] tensor as a column that multiplies [B, ...]."""
    return per_sample.reshape(-1, *(1,) * (like.dim() - 1))


def element_bytes(*tensors: Tensor | None) -> int:
    """The bytes of all elements."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
