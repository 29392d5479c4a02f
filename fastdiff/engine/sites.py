"""A site: one layer of a program, with the tensors it reads and the one it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from . import layers
from .arena import Pool
from .capture import Captured, Node, layer_name, shape

Key = tuple[str, str]  # the constant's, and how it is packed


class Weights:
    """Packed weights, each made once and shared by all the programs of an engine."""

    def __init__(self) -> None:
        self._pool = Pool()
        self._packed: dict[Key, Tensor] = {}
        self._settled: set[Key] = set()

    def get(self, key: Key, make: Callable[[], Tensor]) -> Tensor:
        """What was packed under a key, or what `make` packs now."""
        if key not in self._packed:
            self._packed[key] = make()
        return self._packed[key]

    def settle(self, wanted: set[Key]) -> None:
        """Forget all but these, and move what is new to large pages."""
        self._packed = {key: self._packed[key] for key in wanted}
        self._settled &= wanted
        for key in wanted - self._settled:
            if self._packed[key].layout == torch.strided:  # oneDNN's formats are its own
                self._packed[key] = self._pool.keep(self._packed[key])
            self._settled.add(key)

    def trim(self, most: int) -> None:
        """Forget what is not settled if all takes more than so many bytes."""
        if self.bytes > most:
            self.settle(set(self._settled))

    @property
    def bytes(self) -> int:
        """Memory of all packed weights."""
        return sum(p.numel() * p.element_size() for p in self._packed.values())


@dataclass(eq=False)
class Site:
    """One layer: `node` in the captured graph, whose values are the tensors `values`.

    `dtype` is what the engine computes in; constants that a kernel takes in float32 stay so.
    `keys` collects what the program's sites have had packed.
    """

    node: Node
    captured: Captured
    dtype: torch.dtype
    weights: Weights
    values: dict[Node, Tensor]
    keys: set[Key]

    @property
    def target(self) -> Any:
        return self.node.target

    @property
    def kwargs(self) -> dict[str, Any]:
        return dict(self.node.kwargs)

    @property
    def name(self) -> str:
        return layer_name(self.node)

    @property
    def out(self) -> Tensor:
        return self.values[self.node]

    def shape(self, index: int) -> tuple[int, ...]:
        """The shape of an argument."""
        return shape(self.node.args[index])

    def tensor(self, index: int) -> Tensor | None:
        """An argument: a value of the program, or a constant as the model has it."""
        node = self.node.args[index] if index < len(self.node.args) else None
        if not isinstance(node, fx.Node):
            return None
        constant = self.captured.constants.get(node)
        return self.values[node] if constant is None else constant.kept

    def has_constant(self, index: int) -> bool:
        """Whether an argument is a constant."""
        return self.node.args[index] in self.captured.constants

    def packed(self, index: int, how: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        """A constant argument as a backend packs it."""
        constant = self.captured.constants[self.node.args[index]]
        key = (constant.key, how)
        self.keys.add(key)
        return self.weights.get(key, lambda: make(constant.make()))

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All arguments, with floating constants in the dtype of the program."""

        def value(node: Node) -> Any:
            constant = self.captured.constants.get(node)
            if constant is None:
                return self.values[node]
            made = constant.kept
            return made.to(self.dtype) if made.is_floating_point() else made

        return map_arg((self.node.args, self.node.kwargs), value)

    @property
    def signature(self) -> str:
        """Equal for layers that take the same work: kind, shapes, dtype."""
        args, kwargs = map_arg((self.node.args, self.node.kwargs), shape)
        kind = getattr(self.target, "__name__", str(self.target))
        return f"{kind}{args}{kwargs} {self.dtype}"

    @property
    def flops(self) -> int:
        """Floating-point operations of the layer computed directly, as torch counts them."""
        args, kwargs = map_arg((self.node.args, self.node.kwargs), lambda n: n.meta["val"])
        if self.target not in (layers.conv, layers.linear, layers.attention):
            return 0
        from torch.utils.flop_counter import FlopCounterMode  # loads triton where it is installed

        with FlopCounterMode(display=False) as counter:
            self.target(*args, **kwargs)
        return counter.get_total_flops()
