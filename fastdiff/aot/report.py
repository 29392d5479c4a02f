"""One report a kernel and target, and from them the time that a target's data sheet allows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ..op import Case, Op
from ..ops import OPS
from . import compiler, machine_code
from .compiler import Source
from .machine_code import Code
from .targets import TARGETS, Target

Select = Callable[[Op, Case, Target], bool]


@dataclass(frozen=True)
class Use:
    """A launch of a compiled kernel: the case, the launch's place in its plan, its programs."""

    case: Case
    place: int
    programs: int


@dataclass
class Report:
    """A kernel compiled for a target in one configuration, and the cases that run it.

    best is whether the configuration is the launch's first: what runs where none is measured.
    """

    op: Op
    target: Target
    kernel: str
    config: Any
    best: bool
    code: Code
    uses: list[Use] = field(default_factory=list)

    @property
    def cases(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(use.case.name for use in self.uses))

    @property
    def large(self) -> bool:
        return any(use.case.large for use in self.uses)

    @property
    def resident(self) -> int:
        """Threads on a processor at once."""
        threads = self.config.threads
        return self.target.resident(threads, self.code.registers, self.code.shared)


@dataclass(frozen=True)
class Prediction:
    """What a data sheet allows for a large case: seconds, each the least that one part takes.

    memory      the fewest bytes that the op can move, at the memory's bandwidth
    issue       all launches' instructions at the processors' rate; None where a kernel loops
    each        instructions an element of the first output; None likewise
    tensor      the products of 16-bit floats on tensor cores; None for ops without
    excess      bytes that tiles read and write over the fewest; None where a kernel loops
    """

    op: str
    case: str
    target: Target
    fewest: int
    memory: float
    issue: float | None
    each: float | None
    tensor: float | None
    excess: float | None

    @property
    def roofline(self) -> float:
        return max(self.memory, self.tensor or 0.0)


def reports(select: Select = lambda op, case, target: True) -> list[Report]:
    """Compile the selected cases for the selected targets, each different kernel once.

    Large cases in every configuration, others in the first. RuntimeError where Triton cannot.
    """
    compiler.check()
    found: dict[Any, tuple[Source, Op, str, bool, list[Use]]] = {}
    for op in filter(Op.has_triton, OPS.values()):
        for case in op.cases():
            targets = [target for target in TARGETS if select(op, case, target)]
            plan = compiler.plan_of(op, case.inputs("cpu")) if targets else []
            for place, launch in enumerate(plan):
                for config in launch.configs if case.large else launch.configs[:1]:
                    programs = prod(launch.programs(config.blocks))
                    for target in targets:
                        source = Source.of(launch, target, config)
                        best = config == launch.configs[0]
                        name = launch.kernel.__name__
                        key = op.name, source.key  # ops share kernels
                        about = found.setdefault(key, (source, op, name, best, []))
                        about[-1].append(Use(case, place, programs))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiler releases Python's lock
        return list(pool.map(lambda about: _report(*about), found.values()))


def _report(source: Source, op: Op, kernel: str, best: bool, uses: list[Use]) -> Report:
    code = machine_code.read(source.compile(), source.target.backend)
    if best and any(use.case.large for use in uses):
        _ = code.names  # which predictions ask for: here, several at a time
    return Report(op, source.target, kernel, source.config, best, code, uses)


def predictions(rows: Iterable[Report]) -> list[Prediction]:
    """Of the large cases among the reports, in their order."""
    launches: dict[tuple[str, str, str], list[tuple[Report, Use]]] = {}
    for row in rows:
        for use in row.uses:
            if use.case.large and row.best:
                key = row.op.name, use.case.name, row.target.name
                launches.setdefault(key, []).append((row, use))
    return [_predict(each) for each in launches.values()]


def _predict(launches: list[tuple[Report, Use]]) -> Prediction:
    row, use = launches[0]
    op, target, inputs = row.op, row.target, use.case.inputs("cpu")
    fewest, moved, issued = op.moved(*inputs), 0, 0
    loops = False
    result = next(out for out in op.allocate(*inputs) if out is not None)
    for each, used in launches:
        if each.code.tile_bytes is None or each.code.instructions is None:
            loops = True
            continue
        moved += used.programs * each.code.tile_bytes
        issued += used.programs * each.config.threads * each.code.instructions
    return Prediction(
        op=op.name,
        case=use.case.name,
        target=target,
        fewest=fewest,
        memory=fewest / target.bandwidth,
        issue=None if loops else issued / target.issue,
        each=None if loops else issued / result.numel(),
        tensor=op.flops(*inputs) / target.tensor if op.flops else None,
        excess=None if loops else moved / fewest,
    )
