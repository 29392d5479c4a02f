"""What runs where, and how long it takes: layer by layer, and by backend."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .program import Program


@dataclass(frozen=True)
class Line:
    """One call of a program: the layer's path in the network, what it does, and who runs it."""

    layer: str
    kind: str
    shape: tuple[int, ...]
    backend: str
    seconds: float
    flops: int

    def __str__(self) -> str:
        rate = f"{self.flops / self.seconds / 1e9:8.0f}" if self.flops else " " * 8
        size = "x".join(map(str, self.shape))
        return (
            f"{self.seconds * 1e3:9.3f} {rate}  {self.backend:16} {self.kind:12} "
            f"{size:18} {self.layer}"
        )


@dataclass(frozen=True)
class Report:
    """The lines of a program in the order they run; `str` is a table."""

    lines: tuple[Line, ...]

    @classmethod
    def of(cls, program: Program, rounds: int) -> Report:
        """Measure a program: the median of so many runs."""
        program.run()
        runs = [program.timed() for _ in range(rounds)]
        embedding = statistics.median(program.embedding_seconds() for _ in range(rounds))
        lines = [Line("time, class, text", "embedding", (), "torch", embedding, 0)]
        for (node, slot), site, *times in zip(program.steps, program.sites, *runs, strict=True):
            kind = getattr(node.target, "__name__", str(node.target)).split(".")[0]
            lines.append(
                Line(
                    site.name,
                    "cat" if slot is not None else kind,
                    tuple(program.values[node].shape) if node in program.values else (),
                    "copy" if slot is not None else program.choices[node],
                    statistics.median(times),
                    0 if slot is not None else site.flops,
                )
            )
        return cls(tuple(lines))

    @property
    def seconds(self) -> float:
        """All the layers' time."""
        return sum(line.seconds for line in self.lines)

    def by_backend(self) -> dict[str, tuple[int, float]]:
        """{backend: (layers, seconds)}, the slowest first."""
        counts, seconds = Counter[str](), defaultdict[str, float](float)
        for line in self.lines:
            counts[line.backend] += 1
            seconds[line.backend] += line.seconds
        return {b: (counts[b], seconds[b]) for b in sorted(seconds, key=lambda b: -seconds[b])}

    def __str__(self) -> str:
        head = f"{'ms':>9} {'GFLOP/s':>8}  {'backend':16} {'layer':12} {'shape':18} module"
        totals = [
            f"{seconds * 1e3:9.3f}  {layers} layers: {backend}"
            for backend, (layers, seconds) in self.by_backend().items()
        ]
        total = f"{self.seconds * 1e3:9.3f}  in all ({len(self.lines)} layers)"
        return "\n".join([head, *map(str, self.lines), "", *totals, total])
