"""The gradients of `group_norm_silu`; its inputs are all that is kept for them.

With n and y as there, gain = weight (1 + scale), dy = grad silu'(y), sums S over a channel's
pixels and means M over a group's channels and pixels:

    silu'(y)    = s (1 + y (1 - s)),  s = 1 / (1 + exp(-y));  1 without SiLU
    grad_x      = (gain dy - M(gain dy) - n M(gain dy n)) / sqrt(variance + eps)
    grad_shift  = S(dy)                     grad_scale  = weight S(dy n) + bias S(dy)
    grad_bias   = sum over samples of (1 + scale) S(dy)
    grad_weight = sum over samples of (1 + scale) S(dy n)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..op import Case, Op
from . import group_norm_silu
from .group_norm_silu import of_channels, walked
from .layout import element_bytes


def reference(
    grad: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    parameters: bool,
) -> tuple[Tensor | None, ...]:
    compute = torch.promote_types(x.dtype, torch.float32)
    samples, channels = x.shape[:2]
    pixels = x.shape[2:].numel()
    by_group = samples, groups, channels // groups * pixels
    by_channel = samples, channels, pixels

    n = x.to(compute).reshape(by_group)
    n = n - n.mean(2, keepdim=True)
    a = (n.square().mean(2, keepdim=True) + eps).rsqrt()
    n = (a * n).reshape(by_channel)
    w = 1.0 if weight is None else weight.to(compute)
    b = 0.0 if bias is None else bias.to(compute)
    more = 1.0 if scale is None else 1 + scale.to(compute)
    gain = (torch.ones_like(n[..., 0]) * w * more)[..., None]

    dy = grad.to(compute).reshape(by_channel)
    if silu:
        y = gain * n + (torch.zeros_like(n[..., 0]) + b * more)[..., None]
        if shift is not None:
            y = y + shift.to(compute)[..., None]
        s = y.sigmoid()
        dy = dy * s * (1 + y * (1 - s))
    dn = (gain * dy).reshape(by_group)
    n = n.reshape(by_group)
    grad_x = a * (dn - dn.mean(2, keepdim=True) - n * (dn * n).mean(2, keepdim=True))
    first, second = dy.sum(2), (dy * n.reshape(by_channel)).sum(2)
    gradients = (
        ((more * second).sum(0), weight),
        ((more * first).sum(0), bias),
        (w * second + b * first, scale),
        (first, shift),
    )
    return grad_x.reshape(x.shape).to(x.dtype), *(
        value.to(of.dtype) if parameters and of is not None else None for value, of in gradients
    )


def _allocate(
    grad: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    parameters: bool,
) -> tuple[Tensor | None, ...]:
    return torch.empty_like(x), *(
        t.new_empty(t.shape) if parameters and t is not None else None
        for t in (weight, bias, scale, shift)
    )


def _described(
    grad: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    parameters: bool,
    grad_x: Tensor,
    *gradients: Tensor | None,
) -> tuple[Any, ...] | None:
    images = walked(x, grad_x, grad)
    if not images or grad.dtype != x.dtype:
        return None
    size = *x.shape[:2], x.shape[2:].numel(), groups
    given = of_channels(weight, bias, scale, shift)
    return size, eps, silu, [images[0], *given, *images[1:], *of_channels(*gradients)]


def _by_copy(grad: Tensor, x: Tensor, *args: Any) -> None:
    """For gradients that do not lie as x does, and for layouts that no network has."""
    grad_x = args[8]
    if not x.numel():  # which no layout walks
        for out in args[8:]:
            if out is not None:
                out.zero_()
        return
    if not walked(x):
        x = x.contiguous()
    grad, to = torch.empty_like(x).copy_(grad), torch.empty_like(x)
    OP.launcher("cpu")(grad, x, *args[:8], to, *args[9:])
    grad_x.copy_(to)


def _cases() -> list[Case]:
    """Those of the forward op, with a gradient like its output; and a few of its own."""

    def case(of: Case, name: str = "", parameters: bool = True, **how: Any) -> Case:
        def inputs(device: str) -> tuple[Any, ...]:
            x, *rest = of.inputs(device)
            generator = torch.Generator().manual_seed(3)
            grad = torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator))
            if how.get("contiguous"):
                grad = grad.contiguous()
            if how.get("expanded"):  # of a sum
                grad = grad.flatten()[:1].reshape((1,) * x.dim()).expand(x.shape)
            return grad, x, *rest, parameters

        return Case(name or of.name, inputs, of.large)

    forward = {case.name: case for case in group_norm_silu.OP.cases()}
    return [
        *map(case, forward.values()),
        case(forward["adaptive"], "only-x", parameters=False),
        case(forward["fp32-last"], "layouts-differ", contiguous=True),
        case(forward["fp32"], "expanded", expanded=True),
    ]


def _moved(
    grad: Tensor, x: Tensor, groups: int, weight: Any, bias: Any, eps: float, *rest: Any
) -> int:
    scale, shift, _, parameters = rest
    once = element_bytes(weight, bias, scale, shift)
    return element_bytes(grad, x, x) + once * (1 + parameters)


OP = Op(
    name="group_norm_silu_backward",
    inputs=f"Tensor grad, {group_norm_silu.OP.inputs}, bool parameters",
    outputs=("grad_x", "grad_weight?", "grad_bias?", "grad_scale?", "grad_shift?"),
    reference=reference,
    allocate=_allocate,
    described=_described,
    otherwise=_by_copy,
    cases=_cases,
    moved=_moved,
)
