"""Who can run a layer, and how: each backend packs the weights and binds a call without arguments.

A call reads and writes tensors that stay where they are. Of the backends that take a layer the
fastest is chosen by measuring (tune.py); without a measurement it is the first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from . import layers
from .sites import Site

Call = Callable[[], Any]
Bind = Callable[[Site], Call]

onednn = torch.ops.mkldnn


def backends(site: Site, memory: str) -> dict[str, Bind]:
    """The backends that take a layer, by name; the first is the choice where none is measured."""
    if site.target in (layers.conv, layers.linear) and not site.has_constant(1):
        return {"torch": _torch}
    if site.target is layers.conv and len(site.shape(0)) == 4:
        return {**_own_convolutions(site, memory), "onednn": _convolution}
    if site.target is layers.linear and len(site.shape(1)) == 2:
        return {**_own_linear(site), "onednn": _linear}
    if site.target is layers.norm:
        return {"group_norm_silu": _norm}
    if site.target is layers.attention:
        return {"attention": _attention}
    return {"torch": _torch}


def _own_convolutions(site: Site, memory: str) -> dict[str, Bind]:
    size, how = site.shape(1), site.kwargs
    if how["stride"] != (1, 1) or how["dilation"] != (1, 1) or how["groups"] != 1:
        return {}
    if size[2:] == (1, 1) and how["padding"] == (0, 0):
        return _own_linear(site)
    if size[2:] != (3, 3) or how["padding"] != (1, 1) or size[0] % 32 or size[1] % 16:
        return {}
    if not ops.conv3x3_available(site.dtype):
        return {}
    bias = site.tensor(2)
    if bias is not None and (bias.dtype != torch.float32 or bias.stride(-1) != 1):
        return {}
    tiles = (2,) if memory == "low" or site.dtype != torch.float32 else (4, 2)
    return {f"winograd{tile}": partial(_winograd, tile=tile) for tile in tiles}


def _own_linear(site: Site) -> dict[str, Bind]:
    K, C = site.shape(1)[:2]
    bias = site.tensor(2)
    fits = K % 32 == 0 and C % 16 == 0 and (bias is None or bias.dim() == 1)
    rows = [_rows(t) for t in (site.tensor(0), site.tensor(3), site.out) if t is not None]
    if not fits or not ops.linear_available(site.dtype) or any(r is None for r in rows):
        return {}
    return {"linear": _panels}


def _rows(t: Tensor) -> Tensor | None:
    """A tensor as [N, rows, channels], if that is a view with adjacent channels."""
    rows = t.permute(0, 2, 3, 1) if t.dim() == 4 else t
    rows = rows.flatten(1, -2) if rows.dim() > 3 else rows
    return rows if rows.data_ptr() == t.data_ptr() and rows.stride(-1) == 1 else None


def _panels(site: Site) -> Call:
    """Our linear kernel, for linear layers and 1x1 convolutions."""
    rows = [None if t is None else _rows(t) for t in (site.tensor(0), site.tensor(3), site.out)]
    weight = site.packed(1, "linear", lambda w: ops.pack_linear(w.flatten(1), site.dtype))
    return ops.OPS["linear"].bind(rows[0], weight, site.tensor(2), *rows[1:])


def _winograd(site: Site, tile: int) -> Call:
    x, bias, residual = site.tensor(0), site.tensor(2), site.tensor(3)
    weight = site.packed(1, f"winograd{tile}", lambda w: ops.pack_conv3x3(w, tile, site.dtype))
    how = (residual, site.kwargs["upsample"], site.out)
    return ops.OPS["conv3x3"].bind(x, weight, bias, *how)


def _convolution(site: Site) -> Call:
    """oneDNN, with its own packed weight; what it cannot add is added as the result is stored."""
    x, bias, residual = site.values[site.node.args[0]], site.tensor(2), site.tensor(3)
    how, out, dtype = site.kwargs, site.out, site.dtype
    upsample = how["upsample"]
    last = torch.channels_last
    pads = [list(how[key]) for key in ("padding", "stride", "dilation")]
    size = [x.shape[0], x.shape[1], *(n * (2 if upsample else 1) for n in x.shape[2:])]

    def pack(weight: Tensor) -> Tensor:
        weight = weight.to(dtype).contiguous(memory_format=last)
        return onednn._reorder_convolution_weight(weight, *pads, how["groups"], size)

    weight = site.packed(1, f"onednn{size}", pack)
    own = bias.to(dtype) if bias is not None and bias.dim() == 1 else None
    addends = [t for t in (residual,) if t is not None]
    if bias is not None and own is None:
        addends.append(bias[:, :, None, None])

    def call() -> None:
        given = F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x
        given = given.contiguous(memory_format=last)
        y = onednn._convolution_pointwise(given, weight, own, *pads, how["groups"], "none", [], "")
        for addend in addends[:-1]:
            y = y + addend
        if addends:
            torch.add(y, addends[-1], out=out)
        else:
            out.copy_(y)

    return call


def _linear(site: Site) -> Call:
    x, bias, residual = site.tensor(0), site.tensor(2), site.tensor(3)
    out, dtype = site.out, site.dtype
    weight = site.packed(
        1, "onednn", lambda w: onednn._reorder_linear_weight(w.to(dtype).contiguous())
    )
    own = None if bias is None else bias.to(dtype)

    def call() -> None:
        y = onednn._linear_pointwise(x, weight, own, "none", [], "")
        if residual is None:
            out.copy_(y)
        else:
            torch.add(y, residual, out=out)

    return call


def _norm(site: Site) -> Call:
    x, *rest = (site.tensor(i) for i in range(5))
    weight, bias, scale, shift = rest
    how = site.kwargs
    inputs = (x, how["groups"], weight, bias, how["eps"], scale, shift, how["silu"])
    return ops.OPS["group_norm_silu"].bind(*inputs, site.out)


def _attention(site: Site) -> Call:
    q, k, v = (site.values[node] for node in site.node.args)
    return ops.OPS["attention"].bind(q, k, v, q.shape[-1] ** -0.5, False, site.out, None)


def _torch(site: Site) -> Call:
    """What the call means, in torch; the result is copied to its place."""
    args, kwargs = site.arguments()
    target, out = site.target, site.out

    def call() -> None:
        out.copy_(target(*args, **kwargs))

    return call
