"""A group norm and the linear layer after it: the prologue of an attention block.

    n   = weight (x - mean) / sqrt(variance + eps) + bias     as group_norm_silu has it
    out = W n + b                                             for each pixel, a token

n is rounded to x's dtype, as between the two layers, but never written: on a GPU the matrix product
makes it from x as it goes, so that x is read and nothing else of its size is moved. The products
are summed in float32. On the CPU the two layers run one after the other, in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import errors
from ..op import Case, Op
from . import group_norm_silu
from .layout import element_bytes


def reference(
    x: Tensor,
    groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor]:
    args = (x, groups, norm_weight, norm_bias, eps, None, None, False)
    (n,) = group_norm_silu.reference(*args)
    tokens = n.reshape(*x.shape[:2], x.shape[2:].numel()).transpose(1, 2)
    return (F.linear(tokens, weight, None if bias is None else bias.to(x.dtype)),)


def _allocate(
    x: Tensor, groups: int, norm_weight: Any, norm_bias: Any, eps: float, weight: Tensor, bias: Any
) -> tuple[Tensor]:
    return (x.new_empty(x.shape[0], x.shape[2:].numel(), weight.shape[0]),)


def _cases() -> list[Case]:
    def case(
        name: str, *size: int, groups: int, outputs: int, large: bool = False, **how: Any
    ) -> Case:
        def inputs(device: str) -> tuple[Any, ...]:
            generator = torch.Generator().manual_seed(0)
            dtype = how.get("dtype", torch.float32)

            def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(shape, generator=generator).to(device, dtype)

            x = normal(*size) + how.get("mean", 0.0)
            if how.get("channels_last"):
                x = x.contiguous(memory_format=torch.channels_last)
            if how.get("transposed"):
                x = x.mT
            kept = how.get("parameters", dtype)
            affine: list[Tensor | None] = [None, None]
            if how.get("affine", True):
                affine = [normal(size[1], dtype=kept) for _ in range(2)]
            weight = normal(outputs, size[1]) / size[1] ** 0.5
            bias = normal(outputs, dtype=kept) if how.get("bias", True) else None
            return x, groups, *affine, 1e-5, weight, bias

        return Case(name, inputs, large)

    bf16, fp16 = torch.bfloat16, torch.float16
    last: dict[str, Any] = {"dtype": bf16, "channels_last": True}
    return [
        case("fp32", 2, 32, 5, 7, groups=8, outputs=96),
        case("fp32-last", 2, 32, 5, 7, groups=8, outputs=96, channels_last=True),
        case("bf16", 2, 64, 8, 8, groups=32, outputs=192, dtype=bf16),
        case("bf16-last", 2, 64, 8, 8, groups=32, outputs=192, **last),
        case("fp16", 1, 24, 9, groups=4, outputs=40, dtype=fp16),
        case("mixed", 1, 48, 4, 4, groups=8, outputs=48, parameters=torch.float32, **last),
        case("odd", 3, 21, 13, groups=7, outputs=63),
        case("plain", 1, 16, 301, groups=4, outputs=8, affine=False, bias=False),
        case("transposed", 2, 8, 3, 5, groups=4, outputs=8, transposed=True),
        case("far", 1, 16, 6, 6, groups=4, outputs=16, mean=1000.0),
        case("one-token", 1, 2, 1, groups=1, outputs=1),
        case("empty", 0, 8, 4, 4, groups=2, outputs=24),
        case("large", 16, 256, 16, 16, groups=32, outputs=768, large=True, **last),
        case("large-many", 2, 640, 32, 32, groups=32, outputs=1920, large=True, **last),
    ]


def _moved(x: Tensor, groups: int, norm_weight: Any, norm_bias: Any, eps: float, *of: Any) -> int:
    weight, bias = of
    written = x.shape[0] * x.shape[2:].numel() * weight.shape[0] * x.element_size()
    return element_bytes(x, norm_weight, norm_bias, weight, bias) + written


OP = Op(
    name="group_norm_linear",
    inputs="Tensor x, int groups, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "Tensor weight, Tensor? bias",
    outputs=("out",),
    reference=reference,
    allocate=_allocate,
    cases=_cases,
    moved=_moved,
    flops=lambda x, groups, norm_weight, norm_bias, eps, weight, bias: 2 * x.numel() * len(weight),
)


def group_norm_linear(
    x: Tensor,
    groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """A linear layer of the normalised pixels of x: [N, tokens, K], a token for each pixel.

    For inference: it is not differentiable, and raises where a gradient would be asked for. It is
    one pass on GPUs alone; on the CPU it runs torch's group norm and linear layer.

    Args:
        x: [N, C, ...], float32, bfloat16 or float16, in any layout of `group_norm_silu`.
        groups: divides C.
        norm_weight, norm_bias: [C] or None, float32 or of x's dtype.
        eps: added to the variance, above 0.
        weight: [K, C], of x's dtype.
        bias: [K] or None, float32 or of x's dtype.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number; the message says which.
        RuntimeError: a tensor requires a gradient, and gradients are on.
    """
    group_norm_silu.check_norm(x, groups, eps, norm_weight=norm_weight, norm_bias=norm_bias)
    errors.is_tensor("weight", weight)
    errors.has_dtype("weight", weight, (x.dtype,))
    errors.on_device("weight", weight, "x", x)
    channels = x.shape[1]
    if weight.dim() != 2 or weight.shape[1] != channels:
        raise ValueError(f"weight: has shape {tuple(weight.shape)}, must be [K, {channels}]")
    if bias is not None:
        group_norm_silu.check_parameter("bias", bias, x, weight.shape[:1])
    errors.no_gradient(x=x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias)
    return OP(x, groups, norm_weight, norm_bias, eps, weight, bias)
