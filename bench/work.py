"""A piece of work, as each contender does it, on one set of buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff import NoiseSchedule, ops
from fastdiff.op import Op

from . import agreement, peers, plain
from .records import COPY, FASTDIFF, PLAIN, YARDSTICKS, Settings
from .timing import Option

W = 1.5  # guidance weight


@dataclass(frozen=True)
class Work:
    """`check(result)` says what is wrong with an option's result, None if nothing; `reset()`
    restores the inputs that some options work on in place. `moved` is the fewest bytes to move.
    """

    options: list[Option]
    check: agreement.Check
    moved: int
    like: Tensor
    dtype: torch.dtype = torch.float32
    reset: Callable[[], Any] = lambda: None


def faults(work: Work) -> dict[tuple[str, str], str]:
    """By (provider, how), the options that fail or give another result, and why."""
    wrong = {}
    for provider, how, call in work.options:
        work.reset()
        try:
            complaint = None if provider in YARDSTICKS else work.check(call())
        except Exception as error:  # a peer that cannot run here is told, not fatal
            complaint = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if complaint:
            wrong[provider, how] = complaint
    work.reset()
    return wrong


def noising(op: Op, inputs: tuple[Any, ...], settings: Settings) -> Work:
    """Noising with fresh noise, and the v target."""
    x0, t = inputs[0], inputs[1] * 140 + 60
    schedule = NoiseSchedule.linear(1000)
    levels = torch.tensor(schedule.noising_table("v"), device=x0.device)[t].float()
    alpha, sigma = (c.reshape(-1, *(1,) * (x0.dim() - 1)) for c in levels.T[:2])
    x_t, target, z = torch.empty(3, *x0.shape, device=x0.device)
    scratch = {"x_t": x_t, "target": target, "z": z}

    def options() -> Iterator[Option]:
        yield Option(FASTDIFF, "new tensors", lambda: ops.noising(x0, t, schedule, "v", seed=1))
        yield from peers.noising(peers.ddpm(50), x0, t, settings.compile)
        yield Option(PLAIN, "in place", lambda: plain.noising_in_place(x0, alpha, sigma, **scratch))
        if settings.compile:
            fused = plain.compiled(plain.noising_fused)
            yield Option(PLAIN, "compiled", lambda: fused(x0, alpha, sigma))
        yield from copies(x0)

    return Work(list(options()), agreement.noised(x0, alpha, sigma), op.moved(*inputs), x0)


def cfg(op: Op, inputs: tuple[Any, ...], settings: Settings) -> Work:
    """Guidance alone."""
    c, u = inputs[:2]

    def options() -> Iterator[Option]:
        yield Option(FASTDIFF, "new tensor", lambda: ops.cfg(c, u, W))
        yield Option(peers.EAGER, "as its pipelines do", lambda: peers.guided(c, u, W))
        yield Option(PLAIN, "lerp", lambda: plain.cfg(c, u, W))
        if settings.compile:
            fused = plain.compiled(plain.cfg)
            yield Option(PLAIN, "compiled", lambda: fused(c, u, W))
        yield from copies(c)

    check = agreement.equal(lambda: (W + 1) * c.double() - W * u.double(), c.dtype)
    return Work(list(options()), check, op.moved(*inputs), c)


def randn(op: Op, inputs: tuple[Any, ...], settings: Settings) -> Work:
    """Noise alone."""
    size, streams = inputs[:2]
    z = torch.empty(size, device=streams.device)

    def options() -> Iterator[Option]:
        yield Option(FASTDIFF, "new tensor", lambda: ops.randn(size, 1, device=z.device))
        yield Option(peers.EAGER, "torch.randn", lambda: torch.randn(size, device=z.device))
        yield Option(PLAIN, "normal_", z.normal_)
        yield from copies(z)

    return Work(list(options()), agreement.normal(lambda: (0.0, 1.0)), op.moved(*inputs), z)


def copies(x: Tensor) -> Iterator[Option]:
    """Plain copies of a tensor: the yardstick."""
    to = torch.empty_like(x)
    yield Option(COPY, "copy_", lambda: to.copy_(x))
    yield Option(COPY, "clone", x.clone)
