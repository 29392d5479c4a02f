"""A linear layer, for inference: 1x1 convolutions, and attention's projections.

    y_r = W x_r + bias + residual_r         for each row r

Sums are float32, and y is rounded to x's dtype once. The rows of x, residual and y may lie apart,
as the channels of a channels-last image that are a slice of a wider one do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..op import Case, Op
from .layout import _C, DTYPES, element_bytes

DEPTH, PANEL = 16, 32  # the kernel's steps through the inputs and the outputs


def pack(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [K, C] of a linear layer, or of a 1x1 convolution with its last dimensions cut
    off, in panels of 32 outputs.

    K must be a multiple of 32 and C of 16. TypeError or ValueError for anything else.
    """
    errors.is_tensor("weight", weight)
    errors.one_of("dtype", dtype, (torch.float32, torch.bfloat16))
    shape = tuple(weight.shape)
    if len(shape) != 2 or shape[0] % PANEL or shape[1] % DEPTH:
        raise ValueError(
            f"weight: has shape {shape}, must be (K, C) with K a multiple of {PANEL} and C of "
            f"{DEPTH}; leave other layers to torch"
        )
    panels = weight.detach().to(dtype).unflatten(0, (-1, PANEL)).mT
    if dtype == torch.bfloat16:  # the dot product's instruction takes neighbours of the sum
        panels = panels.unflatten(1, (-1, 2)).transpose(2, 3)
    return panels.contiguous()


def _unpack(weight: Tensor) -> Tensor:
    """[K, C]."""
    if weight.dim() == 4:
        weight = weight.transpose(2, 3).flatten(1, 2)
    return weight.mT.flatten(0, 1)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    out = x.to(compute) @ _unpack(weight.to(compute)).mT
    for added in (bias, residual):
        if added is not None:
            out = out + added.to(compute)
    return (out.to(x.dtype),)


def _allocate(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor]:
    return (x.new_empty(*x.shape[:-1], weight.shape[0] * PANEL),)


def _operand(t: Tensor | None) -> Any:
    if t is None:
        return None
    sample, row, _ = t.stride() if t.dim() == 3 else (0, *t.stride())
    return t.data_ptr(), DTYPES[t.dtype], (sample, row, 0, 0)


def _described(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor
) -> tuple[Any, ...] | None:
    rows = [x, residual, out]
    if not available(x.dtype) or any(t is not None and t.stride(-1) != 1 for t in rows):
        return None
    size = x.shape[0] if x.dim() == 3 else 1, x.shape[-2], x.shape[-1], out.shape[-1]
    bias_address = 0 if bias is None else bias.data_ptr()
    return size, DTYPES[x.dtype], weight.data_ptr(), bias_address, [_operand(t) for t in rows]


def available(dtype: torch.dtype) -> bool:
    """Whether the kernel runs here: with AVX2, in bfloat16 AVX-512's dot product. Else torch."""
    errors.is_a("dtype", dtype, torch.dtype)
    return _C is not None and dtype in DTYPES and _C.linear_runs(DTYPES[dtype])


def _cases() -> list[Case]:
    def case(
        name: str,
        *size: int,  # rows, or samples and rows; C; K
        dtype: torch.dtype = torch.float32,
        takes: str = "",
        large: bool = False,
    ) -> Case:
        def inputs(device: str) -> tuple[Any, ...]:
            generator = torch.Generator().manual_seed(0)

            def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(shape, generator=generator).to(device, dtype)

            def rows(width: int) -> Tensor:
                if "slice" in takes:  # of wider rows, and of more rows than are taken
                    return draw(*first, rest + 3, width + 16)[..., :rest, 16:]
                return draw(*first, rest, width)

            *first, rest, C, K = size
            weight = draw(K, C, dtype=torch.float32) / C**0.5
            return (
                rows(C),
                pack(weight, dtype),
                draw(K, dtype=torch.float32) if "bias" in takes else None,
                rows(K) if "residual" in takes else None,
            )

        return Case(name, inputs, large)

    bf16 = torch.bfloat16
    return [
        case("plain", 24, 64, 64),
        case("plain-bf16", 24, 64, 64, dtype=bf16),
        case("bias", 3, 7, 48, 96, takes="bias"),
        case("bias-bf16", 3, 7, 48, 96, dtype=bf16, takes="bias"),
        case("one", 1, 16, 32, takes="bias residual"),
        case("deep", 301, 336, 64, takes="residual"),
        case("deep-bf16", 301, 528, 64, dtype=bf16, takes="residual"),
        case("slice", 3, 21, 80, 64, takes="bias residual slice"),
        case("slice-bf16", 3, 21, 80, 64, dtype=bf16, takes="bias residual slice"),
        case("empty", 0, 16, 32),
        case("no-samples", 0, 4, 16, 32, dtype=bf16),
        *(
            case(f"large-{name}-{'x'.join(map(str, size))}", *size, dtype=dtype, large=True)
            for size in LARGE
            for name, dtype in {"fp32": torch.float32, "bf16": bf16}.items()
        ),
    ]


# 1x1 skips, qkv and projections of the CIFAR-10 DDPM network at batch 16 and 1, and Stable
# Diffusion's feed-forward layers.
LARGE = (
    (16384, 256, 128),
    (16384, 384, 128),
    (4096, 512, 256),
    (4096, 256, 768),
    (4096, 256, 256),
    (256, 256, 768),
    (64, 512, 256),
    (4096, 320, 1280),
    (4096, 1280, 320),
)


def _moved(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> int:
    written = x.shape[:-1].numel() * weight.shape[0] * PANEL * x.element_size()
    return element_bytes(x, weight, bias, residual) + written


OP = Op(
    name="linear",
    inputs="Tensor x, Tensor weight, Tensor? bias, Tensor? residual",
    outputs=("out",),
    reference=reference,
    allocate=_allocate,
    described=_described,
    cases=_cases,
    moved=_moved,
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """Multiply the rows of x with a packed weight; add bias and residual in the same pass.

    x: [rows, C] or [N, rows, C], float32 or bfloat16, the elements of a row adjacent; of an image,
    channels-last, `x.permute(0, 2, 3, 1).flatten(1, 2)`. weight: `pack_linear` of [K, C], in x's
    dtype. bias: float32 [K]. residual: like the result. Returns [rows, K] or [N, rows, K] in x's
    dtype. TypeError or ValueError for anything else, and RuntimeError if a gradient would be
    asked for: it carries none.
    """
    given = {
        name: value for name, value in (("bias", bias), ("residual", residual)) if value is not None
    }
    for name, value in {"x": x, "weight": weight, **given}.items():
        errors.is_tensor(name, value)
        errors.on_device(name, value, "x", x)
    errors.no_gradient(x=x, weight=weight, **given)
    errors.has_dtype("x", x, (torch.float32, torch.bfloat16))
    errors.has_dtype("weight", weight, (x.dtype,))
    if x.dim() not in (2, 3) or x.stride(-1) != 1:
        raise ValueError(
            f"x: has shape {tuple(x.shape)} and strides {x.stride()}, must be [rows, C] or "
            "[N, rows, C] with the elements of a row adjacent; flatten it, or call .contiguous()"
        )
    pair = (2,) if weight.dtype == torch.bfloat16 else ()
    shape = tuple(weight.shape)
    if len(shape) != 3 + len(pair) or shape[2:] != (PANEL, *pair) or not weight.is_contiguous():
        raise ValueError(f"weight: has shape {shape}, must come from ops.pack_linear(weight)")
    taken = shape[1] * (2 if pair else 1)
    if x.shape[-1] != taken:
        raise ValueError(f"x: has rows of {x.shape[-1]}, weight is packed for {taken}")
    outputs = shape[0] * PANEL
    if bias is not None:
        errors.has_dtype("bias", bias, (torch.float32,))
        if tuple(bias.shape) != (outputs,) or not bias.is_contiguous():
            raise ValueError(
                f"bias: has shape {tuple(bias.shape)}, must be contiguous ({outputs},)"
            )
    if residual is not None:
        errors.has_dtype("residual", residual, (x.dtype,))
        size = (*x.shape[:-1], outputs)
        if tuple(residual.shape) != size or residual.stride(-1) != 1:
            raise ValueError(
                f"residual: has shape {tuple(residual.shape)} and strides {residual.stride()}, "
                f"must be {size} as the result, with the elements of a row adjacent"
            )
    return OP(x, weight, bias, residual)
