"""A program: the layers of a network at given shapes, bound to tensors that stay where they are.

Views cost nothing: they are taken once, of buffers whose place is fixed. A concatenation costs
nothing where its parts can be written into it by the layers that make them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from . import layers
from .arena import ALIGNMENT, Block, place
from .backends import Call, backends
from .capture import VIEWS, Captured, Node, shape
from .embedding import Embedding
from .sites import Key, Site, Weights

aten = torch.ops.aten
_CONCATENATIONS = (aten.cat.default,)
Slot = tuple[Node, int, int]  # of a concatenation: that, the axis and the start


class Program:
    """What runs on one shape of inputs.

    Args:
        captured: the graph, in layers.
        dtype: of the values between layers; per-sample vectors ([N, C]) stay float32.
        memory: "high", or "low" to avoid the largest packed weights.
        weights: packed weights, shared with other programs.
    """

    def __init__(
        self, captured: Captured, dtype: torch.dtype, memory: str, weights: Weights
    ) -> None:
        self.captured, self.dtype, self.memory, self.weights = captured, dtype, memory, weights
        self.embedding = Embedding(captured)
        self.image = captured.inputs[0]
        self._plan()
        self.bytes = place(self.blocks)
        self.choices: dict[Node, str] = {}
        self.calls: list[Call] = []

    def _plan(self) -> None:
        """Shapes, strides and lifetimes, on tensors without memory."""
        depends = self.captured.depends()
        self.meta: dict[Node, Tensor] = {}
        self.block_of: dict[Node, Block] = {}
        self.blocks: list[Block] = []
        # a layer; or a copy into a concatenation, from its start along its axis
        self.steps: list[tuple[Node, Slot | None]] = []
        self._slots = self._find_slots(depends)
        for node in (self.image, *self.embedding.nodes):
            self._allocate(node, 0)
        for node in self.captured.graph.nodes:
            if node.op == "output":
                self.returned = list(node.args[0])
                self.outputs = [n for n in self.returned if isinstance(n, fx.Node)]
                for source in self.outputs:
                    self.block_of[source].last = len(self.steps)
            elif node.op == "call_function" and self._is_computed_here(node, depends):
                self._plan_call(node)

    def _is_computed_here(self, node: Node, depends: dict[Node, Any]) -> bool:
        if node in self.embedding.nodes or not depends[node]:
            return False
        if self.image in depends[node]:
            return True
        return node.target in VIEWS and node.args[0] in self.meta

    def _plan_call(self, node: Node) -> None:
        if node.target in VIEWS:
            source = node.args[0]
            try:
                view = node.target(self.meta[source], *node.args[1:], **node.kwargs)
            except RuntimeError:  # no view of what lies channels-last here, as it was of plain rows
                if node.target is not aten.view.default:
                    raise
                node.target = aten.reshape.default
                view = node.target(self.meta[source], *node.args[1:], **node.kwargs)
            if _storage(view) == _storage(self.meta[source]):
                self.meta[node], self.block_of[node] = view, self.block_of[source]
                return
        step = len(self.steps)
        self._allocate(node, step)
        if node.target in _CONCATENATIONS:
            for source, slot in _parts(node):
                if self._slots.get(source) != slot:
                    self._use(source)
                    self.steps.append((source, slot))
        else:
            for source in node.all_input_nodes:
                self._use(source)
            self.steps.append((node, None))
        self.block_of[node].last = max(self.block_of[node].last, len(self.steps) - 1)

    def _use(self, node: Node) -> None:
        if node in self.block_of:
            self.block_of[node].last = max(self.block_of[node].last, len(self.steps))

    def _find_slots(self, depends: dict[Node, Any]) -> dict[Node, Slot]:
        """Where in a concatenation the result of a layer is written."""
        slots: dict[Node, Slot] = {}
        for node in self.captured.graph.nodes:
            if node.target not in _CONCATENATIONS or self.image not in depends[node]:
                continue
            for source, slot in _parts(node):
                made = source.op == "call_function" and source.target not in VIEWS
                made = made and source.target not in _CONCATENATIONS
                if made and self.image in depends[source] and source not in slots:
                    slots[source] = slot
        return slots

    def _allocate(self, node: Node, step: int) -> None:
        """A place of its own for a node's value, or its part of a concatenation's."""
        if node in self.meta:
            return
        if node in self._slots:
            whole, axis, start = self._slots[node]
            self._allocate(whole, step)
            self.meta[node] = self.meta[whole].narrow(axis, start, shape(node)[axis])
            self.block_of[node] = self.block_of[whole]
            return
        made = _laid_out(node, self.dtype)
        self.meta[node] = made
        self.block_of[node] = Block(made.numel() * made.element_size(), step, step)
        self.blocks.append(self.block_of[node])

    def place(self, arena: Tensor) -> None:
        """Give every value its place in the arena, uint8 [at least self.bytes]."""
        self.arena = arena
        self.values = {
            node: _at(arena, self.block_of[node], meta) for node, meta in self.meta.items()
        }
        self.keys: set[Key] = set()
        how = (self.captured, self.dtype, self.weights, self.values, self.keys)
        self.sites = [Site(node, *how) for node, _ in self.steps]

    def bind(self, choices: dict[Node, str] | None = None) -> None:
        """Bind the calls, to the chosen backends or else to the first that takes a layer."""
        self.choices, self.calls = dict(choices or {}), []
        self.keys.clear()
        for site, (node, slot) in zip(self.sites, self.steps, strict=True):
            if slot is not None:
                self.calls.append(self._copy(node, slot))
                continue
            takes = backends(site, self.memory)
            name = self.choices.setdefault(node, next(iter(takes)))
            self.calls.append(takes[name](site))

    def _copy(self, source: Node, slot: Slot) -> Call:
        whole, axis, start = slot
        target = self.values[whole].narrow(axis, start, shape(source)[axis])
        constant = self.captured.constants.get(source)
        value = self.values[source] if constant is None else constant.kept
        return lambda: target.copy_(value)

    def load(self, x: Tensor, t: Tensor, rest: tuple[Tensor, ...]) -> None:
        """Set the inputs: the image, and what depends on the others."""
        self.values[self.image].copy_(x)
        known = self.embedding.values(t, rest)
        for node, value in zip(self.embedding.nodes, known, strict=True):
            self.values[node].copy_(value)
        self.loaded = t, rest

    def run(self) -> list[Tensor]:
        """Run the layers; the outputs are the program's own, until the next run."""
        for call in self.calls:
            call()
        return [self.values[node] for node in self.outputs]

    def summary(self) -> str:
        """How many layers run where, in a line."""
        counts = Counter(self.choices.values())
        return ", ".join(f"{n} {name}" for name, n in counts.most_common())

    def timed(self) -> list[float]:
        """Seconds of each call of one run."""
        return [_seconds(call) for call in self.calls]

    def embedding_seconds(self) -> float:
        """Seconds that the embedding of the latest inputs takes now, prepared or not."""
        return _seconds(lambda: self.embedding.values(*self.loaded))


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _parts(node: Node) -> Iterator[tuple[Node, Slot]]:
    """The parts of a concatenation, of which one may come twice, and where they go."""
    axis = (node.args[1] if len(node.args) > 1 else 0) % len(shape(node))
    start = 0
    for source in node.args[0]:
        yield source, (node, axis, start)
        start += shape(source)[axis]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _laid_out(node: Node, dtype: torch.dtype) -> Tensor:
    """A tensor without memory, with the layout the kernels want: channels innermost in images."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise RuntimeError(
            f"model: {node.target} returns several values, which an optimized network has no place "
            "for; use the network itself"
        )
    if value.is_floating_point():
        dtype = torch.float32 if value.dim() <= 2 else dtype
    else:
        dtype = value.dtype
    made = torch.empty(tuple(value.shape), dtype=dtype, device="meta")
    if node.target is layers.attention:
        N, heads, tokens, size = value.shape
        return torch.empty(N, tokens, heads, size, dtype=dtype, device="meta").transpose(1, 2)
    if value.dim() == 4:
        return made.contiguous(memory_format=torch.channels_last)
    if node.target is layers.norm and value.dim() == 3:
        return made.mT.contiguous().mT
    return made


def _at(arena: Tensor, block: Block, meta: Tensor) -> Tensor:
    assert block.offset % ALIGNMENT == 0
    flat = arena[block.offset : block.offset + block.size].view(meta.dtype)
    return flat.as_strided(meta.shape, meta.stride(), flat.storage_offset() + meta.storage_offset())
