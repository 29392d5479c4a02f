"""A network as a graph: what it computes for inputs of given shapes, and from which constants."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

Node = Any  # a torch.fx.Node, whose arguments have no types that a checker could follow

# torch.export is the process's, and gives a network's weights other meanings while it looks at it
EXPORTING = threading.RLock()

VIEWS = {
    torch.ops.aten.transpose.int,
    torch.ops.aten.permute.default,
    torch.ops.aten.t.default,
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.flatten.using_ints,
    torch.ops.aten.unflatten.int,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.squeeze.dim,
    torch.ops.aten.squeeze.dims,
    torch.ops.aten.select.int,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.expand.default,
}


@dataclass(eq=False)
class Constant:
    """A weight, or what was computed from weights: made when asked for. `key` tells which."""

    key: str
    make: Callable[[], Tensor]

    @cached_property
    def kept(self) -> Tensor:
        """The tensor, made once."""
        return self.make()


@dataclass
class Captured:
    """A graph of aten calls and layers, its inputs' placeholders, and its constants by placeholder.

    `inputs` has one placeholder a tensor among the call's leaves; `result` rebuilds the call's
    return value from the graph's outputs.
    """

    graph: fx.Graph
    inputs: tuple[Node, ...]
    constants: dict[Node, Constant]
    result: Callable[[list[Any]], Any]

    def constant(self, key: str, make: Callable[[], Tensor], like: torch.Tensor) -> Node:
        """A placeholder of a new constant whose shape and dtype are those of `like`."""
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(key.replace(".", "_"))
        node.meta["val"] = like
        self.constants[node] = Constant(key, make)
        return node

    def run(self, env: dict[Node, Any], wanted: Iterable[Node]) -> list[Any]:
        """The values of the wanted nodes, given those in env; call by call, in plain torch."""
        env = dict(env)

        def value(node: Node) -> Any:
            if node not in env:
                if node in self.constants:
                    return self.constants[node].kept
                args, kwargs = map_arg((node.args, node.kwargs), value)
                env[node] = node.target(*args, **kwargs)
            return env[node]

        return [value(node) for node in wanted]

    def depends(self) -> dict[Node, frozenset[Node]]:
        """The inputs that each node depends on."""
        found: dict[Node, frozenset[Node]] = {}
        for node in self.graph.nodes:
            own = frozenset([node]) if node in self.inputs else frozenset()
            found[node] = own.union(*(found[n] for n in node.all_input_nodes))
        return found


def shape(node: Node) -> tuple[int, ...]:
    """The shape of a node's value."""
    return tuple(node.meta["val"].shape)


def layer_name(node: Node) -> str:
    """The path, in the model, of the module that a node comes from."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def _is_in_place(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


@contextmanager
def _in_plain_torch(model: nn.Module) -> Iterator[None]:
    """Blocks that `UNet.fuse_blocks` had run on our ops are calls of torch meanwhile."""
    fused = [m for m in model.modules() if getattr(m, "fused", None) is True]
    for module in fused:
        module.fused = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in fused:
            module.fused = True  # type: ignore[assignment]


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    """The graph of model(*args, **kwargs) for such tensors, whatever their values.

    Raises:
        RuntimeError: what the model does depends on the values, or cannot be traced.
        TypeError, ValueError: the model does not take them.
    """
    try:
        with torch.no_grad(), _in_plain_torch(model):
            program = torch.export.export(model, args, kwargs, strict=False)
            if any(_is_in_place(node) for node in program.graph.nodes):
                program = program.run_decompositions({})
    except (TypeError, ValueError):  # the model's own words about its inputs
        raise
    except Exception as error:
        raise RuntimeError(
            f"model: torch.export cannot trace {type(model).__name__} on these inputs: {error}"
        ) from error
    signature = program.graph_signature
    values = {**program.constants, **program.state_dict}
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    constants = {
        node: Constant(names[node.name], values[names[node.name]].detach)
        for node in placeholders
        if node.name in names
    }
    by_name = {n.name: n for n in placeholders}
    inputs = tuple(
        by_name[spec.arg.name]
        for spec in signature.input_specs
        if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument)
    )
    spec = program.call_spec.out_spec
    return Captured(
        program.graph, inputs, constants, lambda outputs: pytree.tree_unflatten(outputs, spec)
    )
