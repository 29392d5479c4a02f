"""The choice of a backend for each layer: measured once in the network itself, then remembered.

Each round runs the whole network with one backend wherever it is taken, so that a layer is timed
with its weights and images in the caches, or out of them, as they will be. Layers that take the
same work share a choice, in every network, process and number of threads: another would round
otherwise.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from tqdm import tqdm

from . import remembered
from .backends import backends
from .capture import Node
from .program import Program

ROUNDS, LONG = 3, 0.1  # of a run that takes LONG seconds, one tells enough
SPARE = 2**31  # bytes of packed weights that a round leaves to the next

_kept: dict[tuple[str, tuple[str, ...]], str] = {}  # (signature, backends that take it): choice


def measured() -> list[Any]:
    """The choices made in this process, as JSON values."""
    return [[signature, list(names), name] for (signature, names), name in _kept.items()]


def recall(choices: list[Any]) -> None:
    """Take choices that `measured` gave, in place of measuring: what is computed then repeats."""
    for signature, names, name in choices:
        if name in names:
            _kept[signature, tuple(names)] = name


def tune(program: Program) -> dict[Node, str]:
    """The fastest backend of each layer that has several, of a program that has its places."""
    options: dict[Node, tuple[str, tuple[str, ...]]] = {}
    for site, (node, slot) in zip(program.sites, program.steps, strict=True):
        names = tuple(backends(site, program.memory)) if slot is None else ()
        if len(names) > 1:
            options[node] = site.signature, names
    if any(option not in _kept for option in options.values()):
        known = set(_kept)
        recall([row for row in remembered.read() if (row[0], tuple(row[1])) not in known])
    unknown = {node: option for node, option in options.items() if option not in _kept}
    seconds: dict[tuple[str, tuple[str, ...]], dict[str, float]] = defaultdict(dict)
    rounds = range(max((len(names) for _, names in unknown.values()), default=0))
    for i in tqdm(rounds, desc="measuring backends", delay=2.0, leave=False, disable=None):
        choices = {
            node: _kept.get(option, option[1][i % len(option[1])])
            for node, option in options.items()
        }
        program.bind(choices)
        program.run()
        runs = [program.timed()]
        if sum(runs[0]) < LONG:
            runs += [program.timed() for _ in range(ROUNDS - 1)]
        for (node, _), *times in zip(program.steps, *runs, strict=True):
            if node in unknown and i < len(unknown[node][1]):
                total, name = seconds[unknown[node]], choices[node]
                total[name] = total.get(name, 0.0) + statistics.median(times)
        program.weights.trim(SPARE)
    for option, found in seconds.items():
        _kept[option] = min(found, key=found.__getitem__)
    if seconds:
        remembered.write(measured())
    return {node: _kept[option] for node, option in options.items()}
