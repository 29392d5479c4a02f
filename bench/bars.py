"""What the project promises, as data: a row of the report and the figure it must reach."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from . import accuracy, calls, drop_in, end_to_end, kernels, networks, peers, runtimes, training
from .records import COPY, FASTDIFF, OWN, PLAIN, UNGUIDED, YARDSTICKS, Record

Found = Mapping[tuple[str, str], Record]
FASTEST = "the fastest other"


@dataclass(frozen=True)
class Bar:
    """fastdiff's figure in a row is at most `limit`.

    Against a yardstick, it is at most `limit` times that; against any other provider, it is at
    least `limit` times as fast. `aim` is what would be good.
    """

    section: str
    row: str
    limit: float
    against: str = FASTDIFF
    aim: float | None = None

    @property
    def peer(self) -> bool:
        return self.against != FASTDIFF and self.against not in YARDSTICKS

    def met(self, found: Found) -> bool:
        """Whether it is, by records from `by_row`; a row without a figure does not meet it."""
        record = self._record(found)
        if record is None or record.p50 is None:
            return False
        if self.against == FASTDIFF:
            return record.p50 <= self.limit
        if record.ratio is None:
            return False
        return record.ratio >= self.limit if self.peer else 1 / record.ratio <= self.limit

    def measured(self, found: Found) -> bool:
        """Whether the row has figures: it is left out on machines that cannot run it."""
        record = self._record(found)
        return record is not None and record.p50 is not None

    def _record(self, found: Found) -> Record | None:
        if self.against != FASTEST:
            return found.get((self.row, self.against))
        others = [
            (r.ratio, r)
            for (row, provider), r in found.items()
            if row == self.row and r.ratio and provider not in (FASTDIFF, *YARDSTICKS)
        ]
        return min(others, key=lambda other: other[0])[1] if others else None

    def __str__(self) -> str:
        unit = "" if self.against == FASTDIFF else f" x {self.against}"
        aim = "" if self.aim is None else f" (aim {self.aim:g})"
        return f"{'≥' if self.peer else '≤'} {self.limit:g}{unit}{aim}"


def _networks() -> Iterator[Bar]:
    """By batch and dtype: how much faster than the fastest other, the aim, and the error."""
    for row, limit, aim, error in zip(
        networks.ROWS, (2.1, 1.65, 1.4, 1.25), (2.4, 2.0, 1.7, 1.5), (3, 1.3, 3, 1.3), strict=True
    ):
        yield Bar(networks.SECTION, row.title, limit, FASTEST, aim)
        yield Bar(networks.SECTION, f"{row.title}: error", error, OWN)


SD = networks.STABLE_DIFFUSION.title
BARS = (
    Bar(kernels.SECTION, "step as DDIM", 20, peers.EAGER),
    Bar(kernels.SECTION, "step as DDIM", 2.2, COPY),
    Bar(kernels.SECTION, "step as DDPM, noise made", 40, peers.EAGER),
    Bar(kernels.SECTION, "step as DDPM, noise made", 5, COPY),
    Bar(kernels.SECTION, "step as DDIM, guided", 1.4, UNGUIDED),
    Bar(kernels.SECTION, "noising, noise made, v", 20, peers.EAGER),
    Bar(kernels.SECTION, "group_norm_silu, bf16", 3, PLAIN),
    Bar(kernels.SECTION, "attention, bf16", 2, PLAIN),
    Bar(kernels.SECTION, "attention, many tokens, bf16", 2.5, PLAIN),
    Bar(calls.SECTION, "sampler.step, DDIM", 8),
    Bar(calls.SECTION, "ops.step, DDIM", 4),
    Bar(calls.SECTION, "a step of a 50-step loop, free model", 15),
    Bar(calls.SECTION, "tensor allocations a step", 0),
    Bar(calls.SECTION, "import fastdiff, after torch", 0.3),
    *_networks(),
    Bar(networks.SECTION, SD, 1.2, runtimes.OPENVINO.name, 1.5),
    Bar(networks.SECTION, SD, 2, runtimes.EAGER.name),
    Bar(end_to_end.SECTION, end_to_end.CIFAR.title, 2, runtimes.OPENVINO.name),
    Bar(end_to_end.SECTION, end_to_end.CIFAR.title, 4, runtimes.PIPELINE.name),
    Bar(training.SECTION, training.ROWS[0].title, 1.5, training.DIFFUSERS, 1.8),
    Bar(training.SECTION, training.ROWS[0].title, 2.5, training.DEFAULT, 3),
    Bar(training.SECTION, f"{training.ROWS[0].title}: memory", 1, training.DIFFUSERS),
    *(Bar(drop_in.SECTION, row.title, 2.5, peers.EAGER) for row in drop_in.PIPELINES),
    *(Bar(drop_in.SECTION, f"{s.__name__}.step", 5, peers.EAGER) for s in drop_in.SCHEDULERS),
    Bar(drop_in.SECTION, "DDIMScheduler.add_noise", 5, peers.EAGER),
    Bar(accuracy.SECTION, accuracy.ROW, 5e-3),
)


def by_row(records: Iterable[Record]) -> Found:
    """The first record with a figure of each row and provider."""
    found: dict[tuple[str, str], Record] = {}
    for record in records:
        if record.p50 is not None:
            found.setdefault((record.row, record.provider), record)
    return found
