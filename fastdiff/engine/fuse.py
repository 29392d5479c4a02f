"""The graph in layers: what the kernels do in one pass becomes one node."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from . import layers
from .capture import Captured, Node, shape
from .regroup import hoist_images, merge_siblings, widen_edges
from .rewrite import arguments, calls, put

aten = torch.ops.aten


def fuse(captured: Captured) -> None:
    """Rewrite the graph in place."""
    for rewrite in (
        _name_layers,
        hoist_images,
        _embeddings,
        _scale_shifts,
        _activations,
        _upsamplings,
        _residuals,
        merge_siblings,
        widen_edges,
    ):
        rewrite(captured)
        captured.graph.eliminate_dead_code()
    captured.graph.lint()


def _name_layers(captured: Captured) -> None:
    """Convolutions, linear layers, norms and attention: as the functions of layers.py."""
    for node in calls(captured, aten.conv2d.default):
        a = arguments(node)
        keys = ("stride", "padding", "dilation")
        pairs = {key: tuple(a[key]) * (2 if len(a[key]) == 1 else 1) for key in keys}
        inputs = (a["input"], a["weight"], a["bias"])
        put(
            captured, node, layers.conv, inputs, {**pairs, "groups": a["groups"], "upsample": False}
        )
    for node in calls(captured, aten.linear.default):
        a = arguments(node)
        put(captured, node, layers.linear, (a["input"], a["weight"], a["bias"]))
    for node in calls(captured, aten.group_norm.default):
        a = arguments(node)
        kwargs = {"groups": a["num_groups"], "eps": a["eps"], "silu": False}
        put(captured, node, layers.norm, (a["input"], a["weight"], a["bias"]), kwargs)
    for node in calls(captured, aten.scaled_dot_product_attention.default):
        a = arguments(node)
        plain = a["attn_mask"] is None and not a["dropout_p"] and not a["is_causal"]
        if plain and a["scale"] is None and not a["enable_gqa"] and len(shape(node)) == 4:
            put(captured, node, layers.attention, (a["query"], a["key"], a["value"]))


def _split_sum(node: Node) -> list[tuple[Node, Node]]:
    """Both orders of a sum's terms; none if it is not a plain sum of two tensors."""
    a = arguments(node)
    terms = a["self"], a["other"]
    if a["alpha"] != 1 or not all(isinstance(t, fx.Node) for t in terms):
        return []
    return [(terms[1], terms[0]), terms]


def _flat(captured: Captured, node: Node, before: Node) -> Node:
    """[N, C] of [N, C, 1, 1]."""
    wanted = shape(node)[:2]
    while node.target in (aten.unsqueeze.default, aten.view.default, aten.reshape.default):
        if shape(node) == wanted or len(shape(node.args[0])) < 2:
            break
        if shape(node.args[0])[0] != wanted[0]:  # the samples are one by one in it no more
            break
        node = node.args[0]
    if shape(node) == wanted:
        return node
    with captured.graph.inserting_before(before):
        flat = captured.graph.call_function(aten.flatten.using_ints, (node, 1))
    flat.meta.update(node.meta)
    flat.meta["val"] = node.meta["val"].flatten(1)
    return flat


def _is_per_channel(captured: Captured, node: Any, x: Node) -> bool:
    """Whether a node holds one number a sample and channel of x, and is no weight, as of one."""
    size = shape(x)
    wanted = (*size[:2], *(1,) * (len(size) - 2))
    fits = isinstance(node, fx.Node) and shape(node) == wanted != size
    return fits and _varies(captured, node)


def _varies(captured: Captured, node: Node) -> bool:
    """Whether a node depends on an input of the network."""
    seen, left = {node}, [node]
    while left:
        if (now := left.pop()) in captured.inputs:
            return True
        left += [source for source in now.all_input_nodes if source not in seen]
        seen.update(left)
    return False


def _embeddings(captured: Captured) -> None:
    """conv(x) + e[N, K, 1, 1]: e, with the bias in it, is the convolution's bias."""
    for node in calls(captured, aten.add.Tensor):
        for host, e in _split_sum(node):
            if host.target is not layers.conv or len(host.users) > 1:
                continue
            if not _is_per_channel(captured, e, host):
                continue
            x, weight, bias = host.args[:3]
            flat = _flat(captured, e, node)
            if isinstance(bias, fx.Node):
                flat = _with_bias(captured, flat, bias, node, _serves_only(flat, node))
            put(captured, node, layers.conv, (x, weight, flat), host.kwargs, host)
            break


def _serves_only(node: Node, end: Node) -> bool:
    """Whether a value is used by one node, that by one, and so on to the end."""
    while node is not end:
        if len(node.users) != 1:
            return False
        node = next(iter(node.users))
    return True


def _with_bias(captured: Captured, e: Node, bias: Node, before: Node, alone: bool) -> Node:
    """e + bias: in the bias of the linear layer that made e, if that serves this `alone`."""
    own: Any = e.args[2] if e.target is layers.linear else None
    if alone and own in captured.constants and bias in captured.constants:
        parts = captured.constants[own], captured.constants[bias]
        both = captured.constant(
            f"({parts[0].key} + {parts[1].key})",
            lambda: parts[0].make() + parts[1].make(),
            own.meta["val"],
        )
        e.args = (*e.args[:2], both)
        return e
    with captured.graph.inserting_before(before):
        total = captured.graph.call_function(aten.add.Tensor, (e, bias))
    total.meta.update(e.meta)
    return total


def _scale_shifts(captured: Captured) -> None:
    """norm(x) (1 + scale) + shift: scale and shift are the norm's."""
    for node in calls(captured, aten.addcmul.default):
        a = arguments(node)
        if a["value"] == 1:
            for host, factor in ((a["tensor1"], a["tensor2"]), (a["tensor2"], a["tensor1"])):
                if _scale_shift(captured, node, host, factor, a["self"]):
                    break
    for node in calls(captured, aten.add.Tensor):
        for product, shift in _split_sum(node):
            if product.target is not aten.mul.Tensor or len(product.users) > 1:
                continue
            a, b = product.args
            if _scale_shift(captured, node, a, b, shift) or _scale_shift(
                captured, node, b, a, shift
            ):
                break


def _scale_shift(captured: Captured, node: Node, host: Any, factor: Any, shift: Any) -> bool:
    if not isinstance(host, fx.Node) or host.target is not layers.norm or len(host.users) > 1:
        return False
    if not all(_is_per_channel(captured, part, host) for part in (factor, shift)):
        return False
    scale = None
    if factor.target is aten.add.Tensor and len(factor.args) == 2:
        a, b = factor.args
        scale = a if b == 1 else b if a == 1 else None
    if not isinstance(scale, fx.Node):
        return False
    both = (_flat(captured, scale, node), _flat(captured, shift, node))
    put(captured, node, layers.norm, (*host.args[:3], *both), host.kwargs, host)
    return True


def _activations(captured: Captured) -> None:
    """silu(norm(x)): in the norm."""
    for node in calls(captured, aten.silu.default):
        host = node.args[0]
        if isinstance(host, fx.Node) and host.target is layers.norm and len(host.users) == 1:
            put(captured, node, layers.norm, host.args, {**host.kwargs, "silu": True}, host)


def _upsamplings(captured: Captured) -> None:
    """A 3x3 convolution of each pixel doubled: the convolution doubles them."""
    for node in calls(captured, layers.conv):
        source = node.args[0]
        if getattr(source.target, "_opname", "") != "upsample_nearest2d":
            continue
        small = source.args[0]
        doubled = tuple(2 * side for side in shape(small)[2:])
        sides = {shape(source)[2:], shape(node)[2:]}
        if sides == {doubled} and shape(node.args[1])[2:] == (3, 3):
            node.args = (small, *node.args[1:])
            node.kwargs = {**node.kwargs, "upsample": True}


def _residuals(captured: Captured) -> None:
    """conv(x) + y, linear(x) + y: y is the layer's residual."""
    for node in calls(captured, aten.add.Tensor):
        hosts = [pair for pair in _split_sum(node) if _takes_residual(pair[0], node)]
        hosts.sort(key=lambda pair: shape(pair[0].args[1])[-2:] == (1, 1))  # 3x3 before 1x1
        for host, residual in hosts[:1]:
            if shape(residual) == shape(node) and residual not in captured.constants:
                args = (*host.args[:3], residual)
                put(captured, node, host.target, args, host.kwargs, host)


def _takes_residual(host: Node, total: Node) -> bool:
    known = host.target in (layers.conv, layers.linear)
    return known and len(host.args) == 3 and len(host.users) == 1 and shape(host) == shape(total)
