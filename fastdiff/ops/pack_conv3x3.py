"""The weight of a 3x3 convolution as `conv3x3` takes it: G g G^T of each pair of channels.

Of the points that B, G and A belong to, F(4x4) has 0, +-1/sqrt 2, +-sqrt 2 and infinity: half the
rounding error of the usual 0, +-1, +-2. The transform is float32 and rounded once.

The gradient of x is a convolution too: of the result's gradient, with the input and the output
channels exchanged and the taps in reverse order. Its weight is packed with `transposed`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import errors
from ..op import Case, Op
from .layout import _C, DTYPES, element_bytes

CHANNELS, PANEL = 16, 32  # the kernel's steps through the input and output channels
_AVAILABLE = {dtype for dtype, code in DTYPES.items() if _C is not None and _C.conv3x3_runs(code)}
_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))}


@cache
def matrices(tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """B^T, G and A^T in float64: Toom-Cook at the finite points a_i, and at infinity.

    With M(x) = prod_i (x - a_i), row i of B^T holds the coefficients of M / (x - a_i), row i of G
    (1, a_i, a_i^2) / M'(a_i) and column i of A^T the powers of a_i.
    """
    points, span = _POINTS[tile], tile + 2
    B, G, A = np.zeros((span, span)), np.zeros((span, 3)), np.zeros((tile, span))
    for i, a in enumerate(points):
        others = [b for b in points if b != a]
        sign = -1.0 if tile == 2 and i == 0 else 1.0  # or the first row of B^T would be negative
        B[i, : span - 1] = sign * np.poly(others)[::-1]
        G[i] = sign * np.array([1.0, a, a * a]) / np.prod([a - b for b in others])
        A[:, i] = [a**k for k in range(tile)]
    B[-1], G[-1, 2], A[-1, -1] = np.poly(points)[::-1], 1.0, 1.0
    return torch.tensor(B), torch.tensor(G), torch.tensor(A)


def available(dtype: torch.dtype) -> bool:
    """Whether the kernels of `conv3x3` and of its gradients run here; use torch where they do not.

    They take AVX2, and for bfloat16 the dot product of AVX-512.
    """
    errors.is_a("dtype", dtype, torch.dtype)
    return dtype in _AVAILABLE


def reference(weight: Tensor, tile: int, bfloat16: bool, transposed: bool) -> tuple[Tensor]:
    if transposed:
        weight = weight.transpose(0, 1).flip(2, 3)
    K, C = weight.shape[:2]
    G = matrices(tile)[1].to(weight.device, weight.dtype)
    taps = weight.reshape(K // PANEL, PANEL, C, 9).permute(0, 3, 2, 1)
    if bfloat16:  # the dot product's instruction takes neighbours of the sum
        taps = taps.unflatten(2, (C // 2, 2)).transpose(3, 4)
    U = (torch.kron(G, G) @ taps.flatten(2)).unflatten(2, taps.shape[2:])
    return (U.to(_dtype(weight, bfloat16)),)


def _dtype(weight: Tensor, bfloat16: bool) -> torch.dtype:
    """float64, in which the truth is computed, stays."""
    return torch.bfloat16 if bfloat16 and weight.dtype != torch.float64 else weight.dtype


def _allocate(weight: Tensor, tile: int, bfloat16: bool, transposed: bool) -> tuple[Tensor]:
    K, C = weight.shape[:2]
    if transposed:
        K, C = C, K
    depth = (C // 2, PANEL, 2) if bfloat16 else (C, PANEL)
    shape = (K // PANEL, (tile + 2) ** 2, *depth)
    return (weight.new_empty(shape, dtype=_dtype(weight, bfloat16)),)


def _described(
    weight: Tensor, tile: int, bfloat16: bool, transposed: bool, out: Tensor
) -> tuple[Any, ...] | None:
    outputs, inputs, row, tap = weight.stride()
    if weight.dtype != torch.float32 or not available(out.dtype) or row != 3 * tap:
        return None
    K, C = weight.shape[:2]
    if transposed:
        K, C, outputs, inputs = C, K, inputs, outputs
    size, strides = (K, C, tile, transposed), (outputs, inputs, tap)
    return size, DTYPES[out.dtype], weight.data_ptr(), strides, out.data_ptr()


def _cases() -> list[Case]:
    def case(
        name: str,
        K: int,
        C: int,
        tile: int,
        *,
        bfloat16: bool = False,
        transposed: bool = False,
        last: bool = False,
        large: bool = False,
    ) -> Case:
        def inputs(device: str) -> tuple[Any, ...]:
            weight = torch.randn(K, C, 3, 3, generator=torch.Generator().manual_seed(0))
            layout = torch.channels_last if last else torch.contiguous_format
            weight = weight.to(device).contiguous(memory_format=layout)
            return weight, tile, bfloat16, transposed

        return Case(name, inputs, large)

    return [
        case("f4", 32, 16, 4),
        case("f2", 96, 48, 2),
        case("bf16", 96, 48, 2, bfloat16=True),
        case("f4-bf16", 32, 16, 4, bfloat16=True),
        case("transposed", 48, 96, 4, transposed=True),
        case("transposed-bf16", 48, 96, 2, bfloat16=True, transposed=True),
        case("last", 64, 32, 4, last=True),
        case("last-transposed-bf16", 32, 64, 2, bfloat16=True, transposed=True, last=True),
        case("large-f4", 256, 512, 4, large=True),
        case("large-bf16", 256, 512, 2, bfloat16=True, large=True),
        case("large-transposed-bf16", 256, 512, 2, bfloat16=True, transposed=True, large=True),
    ]


OP = Op(
    name="pack_conv3x3",
    inputs="Tensor weight, int tile, bool bfloat16, bool transposed",
    outputs=("out",),
    reference=reference,
    allocate=_allocate,
    described=_described,
    cases=_cases,
    moved=lambda *inputs: element_bytes(inputs[0], *_allocate(*inputs)),
)


def pack_conv3x3(
    weight: Tensor,
    tile: int,
    dtype: torch.dtype = torch.float32,
    *,
    transposed: bool = False,
) -> Tensor:
    """The weight [K, C, 3, 3] of a convolution, transformed for tiles of 2x2 or 4x4 outputs.

    Tiles of 2 take 1.8 times the weight's memory, tiles of 4 take 4 times. In bfloat16, 2 is the
    choice: 4 has six times the error of a direct convolution. It carries no gradient.

    Args:
        weight: floating, K a multiple of 32 and C of 16; read as float32, best without a copy:
            contiguous or channels-last.
        tile: 2 or 4.
        dtype: float32 or bfloat16, that of the tensors to convolve.
        transposed: for the gradient of x: C is a multiple of 32 then and K of 16.

    Raises:
        TypeError, ValueError: anything else.
    """
    errors.is_tensor("weight", weight)
    errors.one_of("tile", tile, _POINTS)
    errors.one_of("dtype", dtype, (torch.float32, torch.bfloat16))
    shape = tuple(weight.shape)
    K, C = ("C", "K") if transposed else ("K", "C")
    outputs, inputs = (shape[1::-1] if transposed else shape[:2]) if len(shape) == 4 else (1, 1)
    if outputs % PANEL or inputs % CHANNELS or shape[2:] != (3, 3):
        raise ValueError(
            f"weight: has shape {shape}, must be (K, C, 3, 3) with {K} a multiple of {PANEL} and "
            f"{C} of {CHANNELS}; leave other convolutions to torch"
        )
    return OP(weight.detach().float(), tile, dtype == torch.bfloat16, transposed)
