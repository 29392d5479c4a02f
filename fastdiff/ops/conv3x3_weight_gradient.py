"""The gradient of a 3x3 convolution's weight by Winograd's minimal filtering.

    grad_g = G^T [ sum over tiles (A grad_y A^T) * (B^T d B) ] G      * is element by element

with the matrices of `conv3x3`, of which it is the derivative by g: the tiles' sum is a matrix
product of output and input channels at each of the (m + 2)^2 positions. Transforms and sums are
float32; with bfloat16 the two transformed tiles are each rounded once. Layout: channels-last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..op import Case, Op
from .conv3x3 import LARGE
from .layout import DTYPES, element_bytes
from .pack_conv3x3 import available, matrices


def reference(x: Tensor, grad: Tensor, tile: int) -> tuple[Tensor]:
    dtype, compute = x.dtype, torch.promote_types(x.dtype, torch.float32)
    B, G, A = (m.to(x.device, compute) for m in matrices(tile))
    down, right = (-size % tile for size in x.shape[2:])
    x = F.pad(x.to(compute), (1, 1 + right, 1, 1 + down))
    d = x.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile)
    y = F.pad(grad.to(compute), (0, right, 0, down)).unfold(2, tile, tile).unfold(3, tile, tile)
    V = torch.einsum("ia,nchwab,jb->ijchwn", B, d, B).flatten(3).to(dtype).to(compute)
    M = torch.einsum("ai,nkhwab,bj->ijkhwn", A, y, A).flatten(3).to(dtype).to(compute)
    U = M @ V.mT
    return (torch.einsum("ia,ijkc,jb->kcab", G, U, G).contiguous(),)


def _allocate(x: Tensor, grad: Tensor, tile: int) -> tuple[Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    return (x.new_empty((grad.shape[1], x.shape[1], 3, 3), dtype=compute),)


def _described(x: Tensor, grad: Tensor, tile: int, out: Tensor) -> tuple[Any, ...] | None:
    if not available(x.dtype) or x.stride(1) != 1 or grad.stride(1) != 1:
        return None
    N, C, H, W = x.shape
    operands = [(t.data_ptr(), DTYPES[t.dtype], t.stride()) for t in (x, grad)]
    return (N, H, W, grad.shape[1], C, tile), DTYPES[x.dtype], out.data_ptr(), operands


def _cases() -> list[Case]:
    def case(
        name: str,
        *size: int,  # N, C, H, W, K
        tile: int = 4,
        dtype: torch.dtype = torch.float32,
        large: bool = False,
    ) -> Case:
        def inputs(device: str) -> tuple[Any, ...]:
            generator = torch.Generator().manual_seed(0)
            N, C, H, W, K = size
            x, grad = (
                torch.randn((N, H, W, channels), generator=generator).to(device, dtype)
                for channels in (C, K)
            )
            return x.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2), tile

        return Case(name, inputs, large)

    bf16 = torch.bfloat16
    return [
        case("f4", 2, 32, 8, 8, 32),
        case("f2", 2, 32, 8, 8, 32, tile=2),
        case("f2-bf16", 2, 32, 8, 8, 32, tile=2, dtype=bf16),
        case("f4-bf16", 1, 16, 8, 8, 32, dtype=bf16),
        case("odd", 3, 48, 7, 13, 96),
        case("odd-f2", 3, 48, 7, 13, 96, tile=2),
        case("odd-bf16", 3, 48, 7, 13, 96, tile=2, dtype=bf16),
        case("one", 1, 16, 1, 1, 32),
        case("one-bf16", 1, 16, 1, 1, 32, tile=2, dtype=bf16),
        case("empty", 0, 16, 8, 8, 32),
        case("deep", 1, 288, 4, 4, 32, tile=2),
        case("deep-bf16", 1, 288, 4, 4, 32, tile=2, dtype=bf16),
        case("chunks", 3, 512, 32, 32, 32),
        case("chunks-bf16", 3, 512, 32, 32, 32, tile=2, dtype=bf16),
        *(
            case(f"large-{name}-{'x'.join(map(str, size))}", *size, large=True, **how)  # type: ignore[arg-type]
            for size in LARGE
            if size[0] > 1
            for name, how in {
                "f4": {"tile": 4},
                "f2": {"tile": 2},
                "bf16": {"tile": 2, "dtype": bf16},
            }.items()
        ),
    ]


OP = Op(
    name="conv3x3_weight_gradient",
    inputs="Tensor x, Tensor grad, int tile",
    outputs=("out",),
    reference=reference,
    allocate=_allocate,
    described=_described,
    cases=_cases,
    moved=lambda x, grad, tile: element_bytes(x, grad, *_allocate(x, grad, tile)),
)
