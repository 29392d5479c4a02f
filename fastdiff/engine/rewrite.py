"""How the passes change a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .capture import Captured, Node


def calls(captured: Captured, *targets: Any) -> Iterator[Node]:
    """The calls of these targets that are used, and are no constants."""
    for node in list(captured.graph.nodes):
        called = node.op == "call_function" and node.target in targets
        if called and node.users and node not in captured.constants:
            yield node


def put(
    captured: Captured,
    old: Node,
    target: Callable[..., Any],
    args: Any,
    kwargs: Any = None,
    host: Node | None = None,
) -> Node:
    """A new call where `old` stands, with its users; it bears the module's name of `host`."""
    with captured.graph.inserting_before(old):
        new = captured.graph.call_function(target, args, kwargs or {})
    new.meta.update(old.meta)
    if host is not None:
        new.meta["nn_module_stack"] = host.meta.get("nn_module_stack")
    old.replace_all_uses_with(new)
    captured.graph.erase_node(old)
    return new


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an aten call by name, defaults included."""
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False))
    return {a.name: a.default_value for a in schema} | given | dict(node.kwargs)
