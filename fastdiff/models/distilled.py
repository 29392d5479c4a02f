"""What a distilled student is to be sampled with: kept in its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from ..record import Record


@dataclass(frozen=True)
class Distilled(Record):
    """How to sample a student.

    Attributes:
        timesteps: of its schedule, noisiest first; a DDIM step goes from each to the next.
        guidance: the weight of the guided teacher that it has learned; None where it was not
            guided, and where the weight is an input (`UNetConfig.guidance_max`).
    """

    timesteps: tuple[int, ...]
    guidance: float | None = None
