"""What does not depend on the image: embeddings of time and class, keys and values of a text.

`prepare` has computed the rows of a whole run together, so that no weight of theirs is read at each
step; what depends on the text alone is computed once for a text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .capture import VIEWS, Captured, Node

_CHUNK = 32 * 2**20  # numbers kept of a run's rows; longer runs compute them in pieces


class Embedding:
    """The values, among those a captured network needs, that do not depend on its first input.

    `nodes` are the graph's nodes of these values, of which the views are not computed here.
    """

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        depends = captured.depends()
        image, time, *rest = (*captured.inputs, None, None)
        self.rest = tuple(node for node in rest if node is not None)
        self.time = time
        border: dict[Node, None] = {}
        for node in captured.graph.nodes:
            if image not in depends[node] and node.op != "output":
                continue
            for source in node.all_input_nodes:
                while source.target in VIEWS and image not in depends[source]:
                    source = source.args[0]
                if depends[source] and image not in depends[source]:
                    border[source] = None
        self.moving = [n for n in border if time in depends[n]]
        self.still = [n for n in border if time not in depends[n]]
        self.nodes = self.moving + self.still
        self._known: tuple[tuple[Tensor, ...], list[Tensor]] | None = None
        self._run: _Run | None = None

    def values(self, t: Tensor, rest: Sequence[Tensor]) -> list[Tensor]:
        """The values of `nodes` at timesteps t [B], for the other inputs of the network."""
        known = self._run.find(t, rest) if self._run else None
        return (self._moving(t, rest) if known is None else known) + self._still(rest)

    def prepare(self, t: Tensor, rest: Sequence[Tensor]) -> None:
        """Expect calls with the rows of t [rows, B] and these other inputs, in this order."""
        self._run = _Run(self, t, rest) if self.moving else None

    def _moving(self, t: Tensor, rest: Sequence[Tensor]) -> list[Tensor]:
        env = dict(zip((self.time, *self.rest), (t, *rest), strict=True))
        return self.captured.run(env, self.moving)

    def _still(self, rest: Sequence[Tensor]) -> list[Tensor]:
        if not self.still:
            return []
        if self._known is None or not _same(rest, self._known[0]):
            env = dict(zip(self.rest, rest, strict=True))
            self._known = _kept(rest), self.captured.run(env, self.still)
        return self._known[1]


def _kept(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What they hold now: of a change through memory that is shared a tensor shows no trace."""
    return tuple(t.clone() for t in tensors)


def _same(tensors: Sequence[Tensor], kept: Sequence[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


class _Run:
    """The rows of a run, computed in pieces that are as long as memory allows."""

    def __init__(self, of: Embedding, t: Tensor, rest: Sequence[Tensor]) -> None:
        self.of, self.t, self.rest = of, t, _kept(rest)
        self.index = {tuple(times): i for i, times in enumerate(t.tolist())}
        width = sum(n.meta["val"].numel() for n in of.moving)
        self.length = max(1, min(len(t), _CHUNK // max(width, 1)))
        self.piece: tuple[int, list[Tensor]] | None = None

    def find(self, t: Tensor, rest: Sequence[Tensor]) -> list[Tensor] | None:
        """The values of a row, if t and the rest are those of one."""
        i = self.index.get(tuple(t.tolist()))
        if i is None or not _same(rest, self.rest):
            return None
        start = i // self.length * self.length
        if self.piece is None or self.piece[0] != start:
            times = self.t[start : start + self.length]
            many = torch.vmap(lambda t: tuple(self.of._moving(t, self.rest)))(times)
            self.piece = start, list(many)
        return [values[i - start] for values in self.piece[1]]
