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
from .layout import DTYPES, element_bytes


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
    y = F.group_norm(x.to(compute), groups, weight, bias, eps)
    ones = (1,) * (x.dim() - 2)
    if scale is not None:
        y = y * (1 + scale.reshape(*scale.shape, *ones))
    if shift is not None:
        y = y + shift.reshape(*shift.shape, *ones)
    return ((F.silu(y) if silu else y).to(x.dtype),)


def _allocate(x: Tensor, *_: Any) -> tuple[Tensor]:
    return (torch.empty_like(x),)


def _strides(x: Tensor) -> tuple[int, int, int, int] | None:
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
    here, there = _strides(x), _strides(out)
    if not here or not there or not any(here[d] == there[d] == 1 for d in (1, 2)):
        return None
    parameters = (
        None if t is None else (t.data_ptr(), DTYPES[t.dtype], (0, t.stride(0), 0, 0))
        for t in (weight, bias)
    )
    adaptive = (
        None if t is None else (t.data_ptr(), DTYPES[t.dtype], (*t.stride(), 0, 0))
        for t in (scale, shift)
    )
    image = (x.data_ptr(), DTYPES[x.dtype], here)
    result = (out.data_ptr(), DTYPES[x.dtype], there)
    size = *x.shape[:2], x.shape[2:].numel(), groups
    return size, eps, silu, [image, *parameters, *adaptive, result]


def _by_copy(x: Tensor, *args: Any) -> None:
    """For layouts that no network has: brought to one that the kernel walks."""
    *how, out = args
    to = torch.empty(x.shape, dtype=x.dtype)
    OP.launcher("cpu")(x.contiguous(), *how, to)
    out.copy_(to)


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
        case("empty", 0, 8, 4, 4, groups=2),
        case("large", 16, 128, 32, 32, groups=32, dtype=bf16, channels_last=True, large=True),
        case("large-deep", 16, 256, 16, 16, groups=32, dtype=bf16, channels_last=True, large=True),
    ]


OP = Op(
    name="group_norm_silu",
    inputs="Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, "
    "Tensor? shift, bool silu",
    outputs=("out",),
    reference=reference,
    allocate=_allocate,
    cpp=_by_copy,
    described=_described,
    cases=_cases,
    moved=lambda x, groups, weight, bias, eps, scale, shift, silu: element_bytes(
        x, weight, bias, scale, shift, x
    ),
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

    For inference: it is not differentiable, and raises where a gradient would be asked for.

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
        RuntimeError: a tensor requires a gradient, and gradients are on.
    """
    errors.is_tensor("x", x)
    errors.has_dtype("x", x, errors.MODEL_DTYPES)
    if x.dim() < 2:
        raise ValueError(f"x: has shape {tuple(x.shape)}, must be [N, C, ...]")
    samples, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups={groups}: must divide x's {channels} channels")
    if not eps > 0:
        raise ValueError(f"eps={eps}: must be above 0")
    given = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
    for name, value in given.items():
        takes = (channels,) if name in ("weight", "bias") else (samples, channels)
        if value is None:
            continue
        errors.is_tensor(name, value)
        errors.has_dtype(name, value, tuple(dict.fromkeys((torch.float32, x.dtype))))
        errors.on_device(name, value, "x", x)
        if value.shape != takes:
            raise ValueError(f"{name}: has shape {tuple(value.shape)}, must be {takes}")
    errors.no_gradient(x=x, **given)
    return OP.call(x, groups, weight, bias, eps, scale, shift, silu)
