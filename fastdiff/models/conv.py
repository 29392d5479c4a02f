"""The 3x3 convolution of stride 1 and padding 1 that trains by Winograd's minimal filtering."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import errors, ops
from ..ops.pack_conv3x3 import PANEL

_LAST = torch.channels_last


def _pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2:].numel()


def _tile(x: Tensor) -> int:
    """F(4x4) halves the products of F(2x2), but has weights of twice the size; in bfloat16, an
    error that is too large."""
    return 4 if x.dtype == torch.float32 and _pixels(x) >= 1024 else 2


def faster(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether `conv3x3_train` takes these, x once cast to dtype, and is faster than torch.

    It takes a float32 weight whose input and output channels are multiples of 32, and x in
    float32 or, where the CPU has its dot product, bfloat16. Where the pixels of all images are
    few, packing the weight costs more than the convolution.
    """
    return (
        x.device.type == "cpu"
        and weight.dtype == torch.float32
        and not any(channels % PANEL for channels in weight.shape[:2])
        and _pixels(x) >= 128
        and ops.conv3x3_available(dtype)
    )


class _Conv3x3(torch.autograd.Function):
    """Keeps x and the weight: packing it again costs less than keeping it packed."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        packed = ops.pack_conv3x3(weight, _tile(x), x.dtype)
        return ops.conv3x3(x, packed, bias, residual=residual)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, _ = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias_dims = None if bias is None else bias.dim()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "conv3x3_train: has no second derivative, which create_graph=True asks for; use "
                "torch's own functions"
            )
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad
        grad = grad.contiguous(memory_format=_LAST)
        tile = _tile(x)
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            packed = ops.pack_conv3x3(weight, tile, x.dtype, transposed=True)
            grad_x = ops.conv3x3(grad, packed)
        if needs_weight:
            grad_weight = torch.ops.fastdiff.conv3x3_weight_gradient.default(x, grad, tile)
        if needs_bias:
            dims = (2, 3) if ctx.bias_dims == 2 else (0, 2, 3)
            grad_bias = grad.sum(dims, dtype=torch.float32)
        return grad_x, grad_weight, grad_bias, grad if needs_residual else None


def conv3x3_train(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None
) -> Tensor:
    """Convolve x with weight; add bias and residual in the same pass. Differentiable, once, in all.

    Winograd's minimal filtering makes the result and the gradients of x and weight. Shape and
    dtype alone decide how, so that a run that is repeated has the same bits.

    Args:
        x: [N, C, H, W], float32 or bfloat16; read without a copy if channels-last.
        weight: float32 [K, C, 3, 3]; C and K are multiples of 32.
        bias: float32, [K], or one a sample [N, K].
        residual: [N, K, H, W] in x's dtype.

    Returns:
        [N, K, H, W], channels-last, in x's dtype.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; the message says which.
    """
    errors.is_tensor("x", x)
    errors.is_tensor("weight", weight)
    errors.has_dtype("x", x, (torch.float32, torch.bfloat16))
    errors.has_dtype("weight", weight, (torch.float32,))
    if weight.dim() == 4 and weight.shape[1] % PANEL:
        raise ValueError(
            f"weight: has shape {tuple(weight.shape)}, must be (K, C, 3, 3) with C a multiple of "
            f"{PANEL}, which the gradient of x asks for; leave other convolutions to torch"
        )
    x = x.contiguous(memory_format=_LAST) if x.dim() == 4 else x
    if residual is not None and residual.dim() == 4:
        residual = residual.contiguous(memory_format=_LAST)
    return _Conv3x3.apply(x, weight, bias, residual)


def fused(
    conv: nn.Conv2d, x: Tensor, each: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """A 3x3 convolution of stride 1 and padding 1, by `conv3x3_train` if that is faster.

    To the convolution of x [N, C, H, W] are added `each` [N, K] and `residual` [N, K, H, W].
    """
    device = x.device.type
    cast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if cast else x.dtype
    if faster(x, conv.weight, dtype):
        bias = conv.bias
        if each is not None:
            bias = each.float() if bias is None else bias + each
        residual = None if residual is None else residual.to(dtype)
        return conv3x3_train(x.to(dtype), conv.weight, bias, residual=residual)
    return plain(conv, x, each, residual)


def plain(
    conv: nn.Conv2d, x: Tensor, each: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """What `fused` computes, in plain torch."""
    out = nn.Conv2d.forward(conv, x)
    if each is not None:
        out = out + each[:, :, None, None]
    return out if residual is None else residual + out


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 1 and padding 1 that can add to its result as it is stored.

    In plain torch or, where `fused` is set, fused. The two are equal to rounding and have the same
    gradients.
    """

    fused = False

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 3, padding=1)

    def forward(
        self, x: Tensor, each: Tensor | None = None, *, residual: Tensor | None = None
    ) -> Tensor:
        """The convolution of x [N, C, H, W], plus `each` [N, K] and `residual` [N, K, H, W]."""
        return (fused if self.fused else plain)(self, x, each, residual)
