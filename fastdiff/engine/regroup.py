"""Layers as other layers that mean the same, and that the kernels take in fewer passes."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops.pack_conv3x3 import CHANNELS, PANEL
from ..ops.pack_conv3x3 import available as conv3x3_available
from . import layers
from .capture import VIEWS, Captured, Constant, Node, shape
from .rewrite import calls, put

aten = torch.ops.aten


def hoist_images(captured: Captured) -> None:
    """A linear layer whose tokens become an image's pixels: a 1x1 convolution of that image.

    So a residual image can be added in the same pass.
    """
    for node in calls(captured, layers.linear):
        x, weight, bias, _ = (*node.args, None)[:4]
        chain = _view_chain(node)
        if not chain or shape(x) != shape(node) or not _makes_image(node, chain):
            continue
        first, last = chain[0], chain[-1]
        first.replace_input_with(node, x)
        for view in chain:
            view.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
        kernel = captured.constants[weight]
        key, size = f"{kernel.key}[..., None, None]", (*shape(weight), 1, 1)
        filters = captured.constant(
            key,
            partial(_as_filters, kernel),
            weight.meta["val"].new_empty(size),
        )
        with captured.graph.inserting_after(last):
            made = captured.graph.call_function(layers.conv, (last, filters, bias), _PLAIN)
        made.meta.update(last.meta)
        last.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)


_PLAIN: dict[str, Any] = {
    "stride": (1, 1),
    "padding": (0, 0),
    "dilation": (1, 1),
    "groups": 1,
    "upsample": False,
}


def _as_filters(weight: Constant) -> Tensor:
    return weight.make()[..., None, None]


def _view_chain(node: Node) -> list[Node]:
    """The views that alone use a node, up to the first image of four axes."""
    chain: list[Node] = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target not in VIEWS:
            break
        chain.append(node)
        if len(shape(node)) == 4:
            return chain
    return []


def _makes_image(source: Node, chain: list[Node]) -> bool:
    """Whether the views of tokens [N, T, C] give the pixels of an image [N, C, H, W]."""
    if len(shape(source)) != 3:
        return False
    N, T, C = shape(source)
    image = shape(chain[-1])
    if image[:2] != (N, C) or image[2] * image[3] != T:
        return False
    tokens = value = torch.arange(N * T * C).reshape(N, T, C)
    for view in chain:
        value = view.target(value, *view.args[1:], **view.kwargs)
    return torch.equal(value, tokens.transpose(1, 2).reshape(image))


def merge_siblings(captured: Captured) -> None:
    """Linear layers of one input: one layer, of which each is a slice."""
    groups: dict[Any, list[Node]] = defaultdict(list)
    for node in calls(captured, layers.linear):
        if len(node.args) == 3 and node.args[1] in captured.constants:
            groups[node.args[0], node.args[2] is None].append(node)
    for (x, bare), nodes in groups.items():
        if len(nodes) > 1:
            _merge(captured, x, nodes, bare)


def _merge(captured: Captured, x: Node, nodes: list[Node], bare: bool) -> None:
    def joined(index: int) -> Node:
        of = [node.args[index] for node in nodes]
        parts = [captured.constants[n] for n in of]
        rows = sum(shape(n)[0] for n in of)
        like = of[0].meta["val"]
        return captured.constant(
            f"cat({', '.join(p.key for p in parts)})",
            lambda: torch.cat([p.make() for p in parts]),
            like.new_empty((rows, *like.shape[1:])),
        )

    weight, bias = joined(1), None if bare else joined(2)
    with captured.graph.inserting_after(x):
        whole = captured.graph.call_function(layers.linear, (x, weight, bias))
    whole.meta.update(nodes[0].meta)
    whole.meta["val"] = x.meta["val"].new_empty((*shape(x)[:-1], shape(weight)[0]))
    start = 0
    for node in nodes:
        width = shape(node)[-1]
        axis = len(shape(node)) - 1
        put(captured, node, aten.slice.Tensor, (whole, axis, start, start + width))
        start += width


def widen_edges(captured: Captured) -> None:
    """3x3 convolutions of few channels, at both ends of a network: of as many as kernels take.

    The inputs are padded with zeros; of the outputs, those wanted are a view.
    """
    if not conv3x3_available(torch.float32):
        return
    for node in calls(captured, layers.conv):
        x, weight, bias, *residual = node.args
        K, C, *kernel = shape(weight)
        plain = node.kwargs["stride"] == (1, 1) == node.kwargs["dilation"]
        if kernel != [3, 3] or not plain or node.kwargs["groups"] != 1 or residual:
            continue
        more_in, more_out = -C % CHANNELS, -K % PANEL
        few = C <= CHANNELS or not more_in, K <= PANEL or not more_out
        if not all(few) or not more_in + more_out:
            continue
        if bias is not None and (len(shape(bias)) != 1 or bias not in captured.constants):
            continue
        pads = (0, 0, 0, 0, 0, more_in, 0, more_out)
        wide = [_padded(captured, weight, pads)]
        wide.append(None if bias is None else _padded(captured, bias, (0, more_out)))
        with captured.graph.inserting_before(node):
            if more_in:
                x = captured.graph.call_function(aten.constant_pad_nd.default, (x, pads[:6]))
                x.meta["val"] = aten.constant_pad_nd(node.args[0].meta["val"], pads[:6])
            whole = captured.graph.call_function(layers.conv, (x, *wide), node.kwargs)
        whole.meta.update(node.meta)
        N, _, *size = shape(node)
        whole.meta["val"] = node.meta["val"].new_empty((N, K + more_out, *size))
        if more_out:
            put(captured, node, aten.slice.Tensor, (whole, 1, 0, K))
        else:
            node.replace_all_uses_with(whole)


def _padded(captured: Captured, node: Node, pads: tuple[int, ...]) -> Node:
    constant = captured.constants[node]
    return captured.constant(
        f"pad({constant.key}, {pads})",
        lambda: aten.constant_pad_nd(constant.make(), pads),
        aten.constant_pad_nd(node.meta["val"], pads),
    )
