"""What the machine can do: plain copies of a large tensor, which nothing that moves it beats."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .kernels import SETS
from .records import Record, Settings
from .timing import Contender, Spread, interleave
from .work import copies

SECTION = "ceiling"
SHAPE, SMALL = (16, 3, 256, 256), (2, 3, 16, 16)
GUESS_US = 500.0


def measure(settings: Settings) -> Iterator[Record]:
    """torch's copy into a tensor and to a new one: from memory, and in the caches."""
    shape = SMALL if settings.quick else SHAPE
    tensors = [torch.randn(shape, device=settings.device) for _ in range(SETS)]
    for row, n in (("from memory", SETS), ("in cache", 1)):
        options = list(zip(*(copies(x) for x in tensors[:n]), strict=True))
        contenders = [Contender(o[0].how, "", tuple(each.call for each in o)) for o in options]
        guess = [GUESS_US] * len(contenders)
        times = interleave(contenders, guess, settings.device, settings.seconds, settings.rounds)
        for contender, us in zip(contenders, times, strict=True):
            spread = Spread.of(us)
            rate = 2 * tensors[0].nbytes / spread.p50 / 1e3
            yield Record(
                SECTION, row, contender.provider, "us", **vars(spread), gb_s=rate,
                shape=shape, dtype="float32",
            )  # fmt: skip
