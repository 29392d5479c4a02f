"""What the machine can do: plain copies of a large tensor, which nothing that moves it beats."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from . import kernels
from .records import Record, Settings
from .timing import Contender, Spread, busy, interleave
from .work import copies

SECTION = "ceiling"
SHAPE, SMALL = (16, 3, 256, 256), (2, 3, 16, 16)
VAST = (1024, 256, 256)  # on a GPU: long enough that starting does not count
GUESS_US = 500.0


def measure(settings: Settings) -> Iterator[Record]:
    """torch's copy into a tensor and to a new one: from memory, and in the caches."""
    shape = SMALL if settings.quick else SHAPE
    sets = kernels.sets(settings, 8 * math.prod(shape))
    rows = [("from memory", shape, sets), ("in cache", shape, 1)]
    if settings.device == "cuda":
        rows.append(("from memory, at length", SMALL if settings.quick else VAST, 1))
    for row, size, n in rows:
        tensors = [torch.randn(size, device=settings.device) for _ in range(n)]
        options = list(zip(*map(copies, tensors), strict=True))
        contenders = [Contender(o[0].how, "", tuple(each.call for each in o)) for o in options]
        guess = [GUESS_US] * len(contenders)
        times = interleave(
            contenders, guess, settings.device, settings.seconds, settings.rounds, busy
        )
        for contender, us in zip(contenders, times, strict=True):
            spread = Spread.of(us)
            rate = 2 * tensors[0].nbytes / spread.p50 / 1e3
            yield Record(
                SECTION, row, contender.provider, "us", **vars(spread), gb_s=rate,
                shape=size, dtype="float32",
            )  # fmt: skip
