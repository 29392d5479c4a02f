"""A network's layer, as fastdiff's kernel and as torch run it, on one set of buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import ops
from fastdiff.op import Op

from . import agreement, plain
from .records import FASTDIFF, PLAIN, Settings
from .timing import Option
from .work import Work, copies


def group_norm_silu(op: Op, inputs: tuple[Any, ...], settings: Settings) -> Work:
    """GroupNorm and SiLU, without AdaGN."""
    x, groups, weight, bias, eps, _, _, _ = inputs

    def torchs(x: Tensor = x) -> Tensor:
        return F.silu(F.group_norm(x, groups, weight, bias, eps), inplace=True)

    def options() -> Iterator[Option]:
        ours = partial(ops.group_norm_silu, x, groups, weight, bias, eps)
        yield Option(FASTDIFF, "new tensor", ours)
        yield Option(PLAIN, "eager", torchs)
        if settings.compile:
            yield Option(PLAIN, "compiled", partial(plain.compiled(torchs), x))
        yield from copies(x)

    return _work(op, inputs, options(), x)


def attention(op: Op, inputs: tuple[Any, ...], settings: Settings) -> Work:
    """Attention, its operands side by side in one projection."""
    q, k, v, scale, _ = inputs

    def options() -> Iterator[Option]:
        yield Option(FASTDIFF, "new tensor", partial(ops.attention, q, k, v, scale))
        torchs = partial(F.scaled_dot_product_attention, scale=scale)
        yield Option(PLAIN, "sdpa", partial(torchs, q, k, v))
        apart = [t.contiguous() for t in (q, k, v)]
        yield Option(PLAIN, "sdpa, operands apart", partial(torchs, *apart))
        yield from copies(q)

    return _work(op, inputs, options(), q)


def conv3x3(op: Op, inputs: tuple[Any, ...], settings: Settings) -> Work:
    """A convolution of the case's image, with weights that torch gets as they are, then packed."""
    x, packed = inputs[:2]
    tile = {16: 2, 36: 4}[packed.shape[1]]
    channels = x.shape[1]
    weight = torch.randn(packed.shape[0] * 32, channels, 3, 3, device=x.device)
    weight /= (9 * channels) ** 0.5
    packed = ops.pack_conv3x3(weight, tile, x.dtype)
    given = weight.to(x.dtype, memory_format=torch.channels_last)

    def options() -> Iterator[Option]:
        yield Option(FASTDIFF, f"F({tile}x{tile})", partial(ops.conv3x3, x, packed))
        yield Option(PLAIN, "conv2d", partial(F.conv2d, x, given, padding=1))
        if x.device.type == "cpu":
            yield Option(PLAIN, "oneDNN, prepacked", _prepacked(x, given))
        yield from copies(x)

    double = partial(F.conv2d, x.double(), weight.double(), padding=1)
    check = agreement.equal(double, x.dtype)
    return Work(list(options()), check, op.moved(*inputs), x, x.dtype)


def _prepacked(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """oneDNN's 3x3 convolution with the weights in its own order, as torch.compile freezes it."""
    same = [1, 1]  # padding, stride, dilation
    ready = torch.ops.mkldnn._reorder_convolution_weight(weight, same, same, same, 1, list(x.shape))
    call = torch.ops.mkldnn._convolution_pointwise
    return partial(call, x, ready, None, same, same, same, 1, "none", [], "")


def _work(op: Op, inputs: tuple[Any, ...], options: Iterator[Option], like: Tensor) -> Work:
    def truth() -> Tensor:
        double = [
            t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs
        ]
        result = op.reference(*double)[0]
        assert result is not None
        return result

    check = agreement.equal(truth, like.dtype)
    return Work(list(options), check, op.moved(*inputs), like, like.dtype)
