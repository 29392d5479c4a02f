"""The graph without what does nothing in inference, and with each value computed once."""

from __future__ import annotations

import hashlib
import operator
from typing import Any, cast

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from .capture import Captured, Constant, Node, shape

aten = torch.ops.aten

_IDENTITIES = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
}
_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default}
_NEUTRAL = {aten.mul.Tensor: 1, aten.div.Tensor: 1, aten.add.Tensor: 0, aten.sub.Tensor: 0}
_ASSERTIONS = {aten._assert_tensor_metadata.default, aten._assert_async.msg}


def simplify(captured: Captured) -> None:
    """Rewrite the graph in place."""
    for node in list(captured.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTIONS:
            captured.graph.erase_node(node)
        elif _is_identity(node):
            _replace(captured, node, node.args[0])
        elif node.target is operator.getitem:
            _part(captured, node)
    captured.graph.eliminate_dead_code()
    _fold(captured)
    _merge_equal(captured)
    captured.graph.eliminate_dead_code()


def _replace(captured: Captured, node: Node, by: Any) -> None:
    node.replace_all_uses_with(by)
    captured.graph.erase_node(node)


def _is_identity(node: Node) -> bool:
    if node.target in _IDENTITIES:
        return True
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    if not all(isinstance(n.meta.get("val"), torch.Tensor) for n in (source, node)):
        return False
    same = shape(source) == shape(node) and source.meta["val"].dtype == node.meta["val"].dtype
    if node.target in _NEUTRAL:
        return same and len(node.args) == 2 and node.args[1] == _NEUTRAL[node.target]
    return same and node.target in _CASTS


def _part(captured: Captured, node: Node) -> None:
    """A part of an unbind, chunk or split, as a select or a slice of the whole."""
    source, index = node.args
    if not isinstance(source, fx.Node) or not isinstance(index, int):
        return
    name = getattr(source.target, "_opname", "")
    if name not in ("unbind", "chunk", "split", "split_with_sizes"):
        return
    whole = source.args[0]
    given = source.args[1 if name == "unbind" else 2 :] or [source.kwargs.get("dim", 0)]
    dim = given[0]
    with captured.graph.inserting_before(node):
        if name == "unbind":
            part = captured.graph.call_function(aten.select.int, (whole, dim, index))
        else:
            sizes = [value.shape[dim] for value in source.meta["val"]]
            start = sum(sizes[:index])
            args = (whole, dim, start, start + sizes[index])
            part = captured.graph.call_function(aten.slice.Tensor, args)
    part.meta.update(node.meta)
    _replace(captured, node, part)


def _fold(captured: Captured) -> None:
    """Turn what depends on no input into constants, computed when asked for."""
    depends, constants = captured.depends(), captured.constants
    for node in list(captured.graph.nodes):
        if node.op == "call_function" and not depends[node] and not _is_random(node):
            parts: Any = map_arg((node.args, node.kwargs), cast(Any, constants.__getitem__))

            def make(target: Any = node.target, parts: Any = parts) -> Any:
                args, kwargs = pytree.tree_map_only(Constant, lambda c: c.kept, parts)
                return target(*args, **kwargs)

            constants[node] = Constant(_key(node, captured), make)


def _is_random(node: Node) -> bool:
    if node.target is aten.scaled_dot_product_attention.default:  # tagged for its dropout's sake
        return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p"))
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _key(node: Node, captured: Captured) -> str:
    parts = map_arg((node.args, node.kwargs), lambda n: captured.constants[n].key)
    # hashed: each key has those before it, whose lengths would double at each sum
    return f"{node.target}:{hashlib.sha256(repr(parts).encode()).hexdigest()}"


def _merge_equal(captured: Captured) -> None:
    seen: dict[Any, Node] = {}
    for node in list(captured.graph.nodes):
        if node.op != "call_function" or node in captured.constants or _is_random(node):
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))
        if key in seen:
            _replace(captured, node, seen[key])
        else:
            seen[key] = node
