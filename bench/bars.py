"""What the project promises, as data: a row of the report and the figure it must reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from . import accuracy, calls, kernels, peers
from .records import COPY, FASTDIFF, UNGUIDED, YARDSTICKS, Record

Found = Mapping[tuple[str, str], Record]


@dataclass(frozen=True)
class Bar:
    """fastdiff's figure in a row is at most `limit`.

    Against a yardstick, its time is at most `limit` times that; against any other provider, it is
    at least `limit` times as fast.
    """

    section: str
    row: str
    limit: float
    against: str = FASTDIFF

    @property
    def peer(self) -> bool:
        return self.against != FASTDIFF and self.against not in YARDSTICKS

    def met(self, found: Found) -> bool:
        """Whether it is, by records from `by_row`; a row without a figure does not meet it."""
        record = found.get((self.row, self.against))
        if record is None or record.p50 is None:
            return False
        if self.against == FASTDIFF:
            return record.p50 <= self.limit
        if record.ratio is None:
            return False
        return record.ratio >= self.limit if self.peer else 1 / record.ratio <= self.limit

    def __str__(self) -> str:
        unit = "" if self.against == FASTDIFF else f" x {self.against}"
        return f"{'≥' if self.peer else '≤'} {self.limit:g}{unit}"


BARS = (
    Bar(kernels.SECTION, "step as DDIM", 20, peers.EAGER),
    Bar(kernels.SECTION, "step as DDIM", 2.2, COPY),
    Bar(kernels.SECTION, "step as DDPM, noise made", 40, peers.EAGER),
    Bar(kernels.SECTION, "step as DDPM, noise made", 5, COPY),
    Bar(kernels.SECTION, "step as DDIM, guided", 1.4, UNGUIDED),
    Bar(kernels.SECTION, "noising, noise made, v", 20, peers.EAGER),
    Bar(calls.SECTION, "sampler.step, DDIM", 8),
    Bar(calls.SECTION, "ops.step, DDIM", 4),
    Bar(calls.SECTION, "a step of a 50-step loop, free model", 15),
    Bar(calls.SECTION, "tensor allocations a step", 0),
    Bar(calls.SECTION, "import fastdiff, after torch", 0.3),
    Bar(accuracy.SECTION, accuracy.ROW, 5e-3),
)


def by_row(records: Iterable[Record]) -> Found:
    """The first record with a figure of each row and provider."""
    found: dict[tuple[str, str], Record] = {}
    for record in records:
        if record.p50 is not None:
            found.setdefault((record.row, record.provider), record)
    return found
