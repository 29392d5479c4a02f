"""The choice of a backend for each layer: measured once in the network itself, then kept.

Each round runs the whole network with one backend wherever it is taken, so that a layer is timed
with its weights and images in the caches, or out of them, as they will be. Layers that take the
same work share a choice, in every network of the process.
"""

from __future__ import annotations

import statistics
from collections import defaultdict

from torch import Tensor

from .backends import backends
from .capture import Node
from .program import Program

ROUNDS = 3

_kept: dict[tuple[str, tuple[str, ...]], str] = {}  # (signature, backends that take it): choice


def tune(program: Program, arena: Tensor, rounds: int = ROUNDS) -> dict[Node, str]:
    """The fastest backend of each layer that has several; the program is left bound to some."""
    program.bind(arena)
    options: dict[Node, tuple[str, tuple[str, ...]]] = {}
    for site, (node, whole) in zip(program.sites, program.steps, strict=True):
        names = tuple(backends(site, program.memory)) if whole is None else ()
        if len(names) > 1:
            options[node] = site.signature, names
    unknown = {node: option for node, option in options.items() if option not in _kept}
    seconds: dict[tuple[str, tuple[str, ...]], dict[str, float]] = defaultdict(dict)
    for name in dict.fromkeys(name for _, names in unknown.values() for name in names):
        program.bind(arena, {n: name for n, (_, names) in options.items() if name in names})
        program.run()
        runs = [program.timed() for _ in range(rounds)]
        for (node, _), *times in zip(program.steps, *runs, strict=True):
            if node in unknown and name in unknown[node][1]:
                known = seconds[unknown[node]]
                known[name] = known.get(name, 0.0) + statistics.median(times)
    for option, measured in seconds.items():
        _kept[option] = min(measured, key=measured.__getitem__)
    return {node: _kept[option] for node, option in options.items()}
