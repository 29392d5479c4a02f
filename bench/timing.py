"""Timing: contenders take turns, so that whatever slows the machine slows them all.

A call on a GPU has two times: what a caller waits for, which `burst` measures, and what the GPU
works for it, which `busy` measures. On the CPU they are the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

BURST_US = 1000.0  # a turn lasts at least this long, so that reading the clock costs nothing
MOST_CYCLES, MOST_ROUNDS = 2000, 300
TRIAL_ROUNDS, SLOW_US = 3, 5e4
QUEUED = 48  # calls that a GPU's queue surely holds, of up to 20 kernels each
LONGEST_WAIT_US = 2e5
CYCLES_A_US = 2000  # of a GPU's clock, or fewer


Timed = Callable[[Sequence[Callable[[], Any]], int, str], float]


class Option(NamedTuple):
    """A provider's way to do a piece of work on one set of buffers."""

    provider: str
    how: str
    call: Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """One way to do a row's work: `calls` holds one call a set of buffers, and they are cycled.

    `provider` is whose it is ("fastdiff", "diffusers", ...), `how` the option it uses. Several
    contenders of one provider are its options, of which only the fastest is reported.
    """

    provider: str
    how: str
    calls: tuple[Callable[[], Any], ...]


@dataclass(frozen=True)
class Spread:
    """Percentiles of a sample: the median, and the middle 60 % around it."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, sample: Sequence[float] | NDArray[np.float64]) -> Spread:
        return cls(*(float(p) for p in np.percentile(sample, (20, 50, 80))))


def burst(calls: Sequence[Callable[[], Any]], cycles: int, device: str) -> float:
    """Microseconds a call, over `cycles` rounds of all calls, the device's work included."""
    calls[-1]()  # untimed: the caches belong to this contender now, not to the one before
    _wait(device)
    began = time.perf_counter_ns()
    for _ in range(cycles):
        for call in calls:
            call()
    _wait(device)
    return (time.perf_counter_ns() - began) / (1e3 * cycles * len(calls))


def busy(calls: Sequence[Callable[[], Any]], cycles: int, device: str) -> float:
    """Microseconds that a GPU works on a call, by its own events, and never waits for the host.

    It first idles until the host has queued all the calls.
    """
    if device != "cuda":
        return burst(calls, cycles, device)
    cycles = min(cycles, math.ceil(QUEUED / len(calls)))
    began = now(device)
    calls[-1]()
    submitting = 1e6 * (time.perf_counter() - began) * cycles * len(calls)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(CYCLES_A_US * min(2 * submitting, LONGEST_WAIT_US)))
    start.record()
    for _ in range(cycles):
        for call in calls:
            call()
    stop.record()
    _wait(device)
    return 1e3 * start.elapsed_time(stop) / (cycles * len(calls))


def interleave(
    contenders: Sequence[Contender],
    guess: Sequence[float],
    device: str,
    seconds: float,
    fewest: int,
    timed: Timed = burst,
) -> NDArray[np.float64]:
    """Microseconds a call, [contenders, rounds]: A, B, C, A, B, C, ... for about `seconds`.

    `guess` is what a call of each takes, in microseconds, to make turns of equal length. `timed`
    is `burst` or `busy`.
    """
    cycles = [_cycles(c.calls, us) for c, us in zip(contenders, guess, strict=True)]
    calls = [n * len(c.calls) + 1 for n, c in zip(cycles, contenders, strict=True)]
    rounds = int(np.clip(seconds * 1e6 / np.dot(calls, guess), fewest, MOST_ROUNDS))
    turns = [
        [timed(c.calls, n, device) for c, n in zip(contenders, cycles, strict=True)]
        for _ in range(rounds)
    ]
    return np.array(turns).T


def race(
    contenders: Sequence[Contender],
    device: str,
    seconds: float,
    fewest: int,
    only_if_faster: Mapping[str, str] | None = None,
    timed: Timed = burst,
) -> dict[str, tuple[Contender, NDArray[np.float64]]]:
    """By provider, its fastest contender and that one's time in each round.

    A short trial picks each provider's option; only those go into the rounds that count.
    only_if_faster={a: b} leaves provider a out where b's trial was faster.
    """
    best: dict[str, tuple[float, Contender]] = {}
    for contender in contenders:
        us = _trial(contender, device, timed)
        if contender.provider not in best or us < best[contender.provider][0]:
            best[contender.provider] = us, contender
    for a, b in (only_if_faster or {}).items():
        if a in best and b in best and best[b][0] < best[a][0]:
            del best[a]
    guess, chosen = zip(*best.values(), strict=True)
    times = interleave(chosen, guess, device, seconds, fewest, timed)
    return {c.provider: (c, us) for c, us in zip(chosen, times, strict=True)}


def _trial(contender: Contender, device: str, timed: Timed) -> float:
    us = timed(contender.calls, 1, device)
    if us > SLOW_US:
        return us
    cycles = _cycles(contender.calls, us)
    return float(np.median([timed(contender.calls, cycles, device) for _ in range(TRIAL_ROUNDS)]))


def _cycles(calls: Sequence[Callable[[], Any]], us: float) -> int:
    return min(MOST_CYCLES, math.ceil(BURST_US / (us * len(calls))))


def now(device: str) -> float:
    """Seconds on a clock that has waited for the device."""
    _wait(device)
    return time.perf_counter()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
