"""Group normalisation, an adaptive affine map and SiLU in one pass over a U-Net's activations.

    n = (x - mean) / sqrt(variance + eps)       over each group's channels and pixels (Wu & He 2018)
    y = (weight n + bias) (1 + scale) + shift   AdaGN (Dhariwal & Nichol 2021, section 3)
    out = y / (1 + exp(-y))                     SiLU, where it is asked for

The statistics are float32 and double whatever the dtype of x, and x is rounded to once, at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import errors
from ..op import Case, Op
from ..spacing import count
from .layout import DTYPES, Operand, element_bytes


def reference(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    weight, bias, scale, shift = (
        None if t is None else t.to(compute) for t in (weight, bias, scale, shift)
    )
    # F's refuses a group of one value, which is no less defined: its weight's bias
    y = torch.group_norm(x.to(compute), groups, weight, bias, eps)
    ones = (1,) * (x.dim() - 2)
    if scale is not None:
        y = y * (1 + scale.reshape(*scale.shape, *ones))
    if shift is not None:
        y = y + shift.reshape(*shift.shape, *ones)
    return ((F.silu(y) if silu else y).to(x.dtype),)


def _allocate(x: Tensor, *_: Any) -> tuple[Tensor]:
    return (torch.empty_like(x),)


def strides_of(x: Tensor) -> tuple[int, int, int, int] | None:
    """(sample, channel, pixel, 0), or None where the pixels are not at one stride."""
    sample, channel, *spatial = x.stride()
    pixel, pixels = 1, 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(spatial), strict=True):
        if size == 1:
            continue
        if pixels == 1:
            pixel = stride
        elif stride != pixel * pixels:
            return None
        pixels *= size
    return sample, 1 if x.shape[1] == 1 and pixels == 1 else channel, pixel, 0


def walked(*images: Tensor) -> list[Operand] | None:
    """The operands of images of one shape, or None where kernels do not walk them together."""
    strides = [s for s in map(strides_of, images) if s]
    together = any(all(s[d] == 1 for s in strides) for d in (1, 2))
    if not together or len(strides) < len(images):
        return None
    return [(t.data_ptr(), DTYPES[t.dtype], s) for t, s in zip(images, strides, strict=True)]


def of_channels(*parameters: Tensor | None) -> list[Operand | None]:
    """The operands of tensors [C] and [N, C]."""
    return [
        None
        if t is None
        else (t.data_ptr(), DTYPES[t.dtype], (t.stride(0) * (t.dim() - 1), t.stride(-1), 0, 0))
        for t in parameters
    ]


def _described(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    out: Tensor,
) -> tuple[Any, ...] | None:
    images = walked(x, out)
    if not images:
        return None
    size = *x.shape[:2], x.shape[2:].numel(), groups
    return size, eps, silu, [images[0], *of_channels(weight, bias, scale, shift), images[1]]


def _by_copy(x: Tensor, *args: Any) -> None:
    """For layouts that no network has: brought to one that the kernel walks."""
    if not x.numel():
        return  # which no layout does; there is nothing to write
    *how, out = args
    to = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    OP.launcher(x.device.type)(x.contiguous(), *how, to)
    out.copy_(to)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.groups, weight, bias, ctx.eps, scale, shift, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "group_norm_silu: has no second derivative, which create_graph=True asks for; use "
            "torch's own functions"
        )
    x, *given = ctx.saved_tensors
    weight, bias, scale, shift = given
    places = (2, 3, 5, 6)  # of weight, bias, scale and shift among the inputs
    parameters = any(ctx.needs_input_grad[i] for i in places)
    call = torch.ops.fastdiff.group_norm_silu_backward.default
    grad_x, *rest = call(
        *(grad, x, ctx.groups, weight, bias, ctx.eps, scale, shift, ctx.silu, parameters)
    )
    gradients: list[Tensor | None] = [grad_x, *[None] * 7]
    if parameters:
        there = [i for i, t in zip(places, given, strict=True) if t is not None]
        for i, gradient in zip(there, rest, strict=True):
            gradients[i] = gradient
    return tuple(gradients)


_PARTS = 64  # kParts of csrc/cuda/kernels.h


def _scratch(x: Tensor, groups: int, *_: Any) -> Tensor:
    """The sum and the sum of squares of the parts of each group."""
    return x.new_empty((len(x), groups, _PARTS, 2), dtype=torch.float64)


def _cases() -> list[Case]:
    def case(name: str, *size: int, groups: int, large: bool = False, **how: Any) -> Case:
        def inputs(device: str) -> tuple[Any, ...]:
            generator = torch.Generator().manual_seed(0)

            def normal(*shape: int) -> Tensor:
                return torch.randn(shape, generator=generator)

            dtype = how.get("dtype", torch.float32)
            x = how.get("std", 1.5) * normal(*size) + how.get("mean", 0.3)
            x = x.to(device, dtype)
            if how.get("channels_last"):
                x = x.contiguous(memory_format=torch.channels_last)
            if how.get("slice"):  # half of the channels of a larger tensor
                x = torch.cat([x, x.flip(1)], dim=1).contiguous(memory_format=torch.channels_last)[
                    :, : size[1]
                ]
            if how.get("transposed"):
                x = x.mT
            weight = bias = scale = shift = None
            kept = how.get("parameters", dtype)
            if how.get("affine", True):
                weight, bias = (normal(size[1]).to(device, kept) for _ in range(2))
            if how.get("adaptive"):  # as a U-Net has them: halves of one projection
                both = normal(size[0], 2 * size[1]).to(device, kept)
                scale, shift = both.chunk(2, dim=1)
            return x, groups, weight, bias, 1e-5, scale, shift, how.get("silu", True)

        return Case(name, inputs, large)

    bf16, fp16 = torch.bfloat16, torch.float16
    return [
        case("fp32", 2, 32, 9, 7, groups=8),
        case("fp32-last", 2, 32, 9, 7, groups=8, channels_last=True),
        case("bf16", 2, 32, 16, 16, groups=8, dtype=bf16, adaptive=True),
        case("bf16-last", 2, 96, 16, 16, groups=32, dtype=bf16, channels_last=True),
        case("adaptive", 3, 64, 5, 5, groups=32, channels_last=True, adaptive=True),
        case("mixed", 2, 32, 8, 8, groups=4, dtype=bf16, parameters=torch.float32, adaptive=True),
        case("fp16", 2, 12, 8, 8, groups=4, dtype=fp16),
        case("odd", 3, 21, 13, 11, groups=7),
        case("odd-last", 3, 21, 13, 11, groups=7, channels_last=True, adaptive=True),
        case("plain", 2, 8, 6, 6, groups=2, silu=False, affine=False),
        case("slice", 2, 24, 7, 5, groups=6, slice=True),
        case("transposed", 2, 8, 6, 5, groups=4, transposed=True),
        case("tokens", 2, 16, 301, groups=4),
        case("vectors", 4, 63, groups=9),
        case("far", 2, 16, 32, 32, groups=4, mean=1000.0, std=0.1),
        case("far-last", 2, 16, 32, 32, groups=4, mean=1000.0, std=0.1, channels_last=True),
        case("one-group", 2, 10, 5, 5, groups=1, channels_last=True),
        case("one-sample", 1, 256, 16, 16, groups=32, channels_last=True),
        case("wide", 1, 2100, 2, 2, groups=3, channels_last=True),
        case("chunks", 1, 3, 37, 61, groups=1, mean=3.0, channels_last=True),
        case("empty", 0, 8, 4, 4, groups=2),
        case("large", 16, 128, 32, 32, groups=32, dtype=bf16, channels_last=True, large=True),
        case("large-deep", 16, 256, 16, 16, groups=32, dtype=bf16, channels_last=True, large=True),
        case("large-image", 1, 320, 64, 64, groups=32, dtype=bf16, channels_last=True, large=True),
        case("large-planes", 16, 128, 32, 32, groups=32, dtype=bf16, large=True),
    ]


OP = Op(
    name="group_norm_silu",
    inputs="Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, "
    "Tensor? shift, bool silu",
    outputs=("out",),
    reference=reference,
    allocate=_allocate,
    described=_described,
    otherwise=_by_copy,
    scratch=_scratch,
    cases=_cases,
    moved=lambda x, groups, weight, bias, eps, scale, shift, silu: element_bytes(
        x, weight, bias, scale, shift, x
    ),
    backward=(_setup, _backward),
)


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """Normalise each group of channels, apply an affine map, AdaGN's if given, then SiLU.

    Differentiable, once, in x and all four parameters (`ops/group_norm_silu_backward.py`).

    Args:
        x: [N, C, ...], float32, bfloat16 or float16; channels-last and contiguous layouts, also
            slices of their channels, are read as they lie. The result has x's dtype and layout.
        groups: divides C.
        weight, bias: [C] or None, float32 or of x's dtype.
        eps: added to the variance, above 0.
        scale, shift: [N, C] or None, AdaGN's, float32 or of x's dtype: y (1 + scale) + shift.
        silu: whether y / (1 + exp(-y)) follows.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number; the message says which.
    """
    check_norm(x, groups, eps, weight=weight, bias=bias)
    for name, value in {"scale": scale, "shift": shift}.items():
        if value is not None:
            check_parameter(name, value, x, x.shape[:2])
    return OP(x, groups, weight, bias, eps, scale, shift, silu)


def check_norm(x: Tensor, groups: int, eps: float, **of_channels: Tensor | None) -> None:
    """Raise unless a group norm takes these; `of_channels` are its parameters of shape [C]."""
    errors.is_tensor("x", x)
    errors.has_dtype("x", x, errors.MODEL_DTYPES)
    if x.dim() < 2:
        raise ValueError(f"x: has shape {tuple(x.shape)}, must be [N, C, ...]")
    if x.shape[1] % count("groups", groups, 1) or groups > max(1, x.shape[1]):
        raise ValueError(f"groups={groups}: must divide x's {x.shape[1]} channels")
    if not errors.number("eps", eps) > 0:
        raise ValueError(f"eps={eps}: must be above 0")
    for name, value in of_channels.items():
        if value is not None:
            check_parameter(name, value, x, x.shape[1:2])


def check_parameter(name: str, value: Tensor, x: Tensor, shape: torch.Size) -> None:
    """Raise unless `value` has this shape, x's device, and its dtype or float32."""
    errors.is_tensor(name, value)
    errors.has_dtype(name, value, tuple(dict.fromkeys((torch.float32, x.dtype))))
    errors.on_device(name, value, "x", x)
    if value.shape != shape:
        raise ValueError(f"{name}: has shape {tuple(value.shape)}, must be {tuple(shape)}")
