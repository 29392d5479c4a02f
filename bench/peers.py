"""diffusers' ways to do one piece of work, for a race to pick the fastest from.

Eager is how its pipelines and users call a scheduler. torch.compile of the same call stands apart,
as a contender of its own, so that neither hides the other.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils.logging import set_verbosity_error
from torch import Tensor

from .timing import Option

EAGER, COMPILED = "diffusers", "diffusers compiled"
AT_BEST = {COMPILED: EAGER}  # compiled is shown where it is the faster one

set_verbosity_error()
warnings.filterwarnings("ignore", module="torch._dynamo")
torch._logging.set_logs(all=logging.ERROR)  # graph breaks in its schedulers are many, and known


def _scheduler(kind: type, steps: int, **config: Any) -> Any:
    made = kind(**config)
    made.set_timesteps(steps)
    return made


ddim = partial(_scheduler, DDIMScheduler)
ddpm = partial(_scheduler, DDPMScheduler)


def guided(c: Tensor, u: Tensor, w: float) -> Tensor:
    """Classifier-free guidance as diffusers' pipelines write it; their scale is w + 1."""
    return u + (w + 1) * (c - u)


def step(
    scheduler: Any, i: int, x: Tensor, m: Callable[[], Tensor], compile: bool
) -> Iterator[Option]:
    """`scheduler.step(m(), t, x)` at its timestep i, in each way that gives the same result."""

    def call(step: Callable[..., Any], t: Any) -> Callable[[], Tensor]:
        return lambda: step(m(), t, x, return_dict=False)[0]

    t = scheduler.timesteps[i]
    yield Option(EAGER, "int t", call(scheduler.step, int(t)))
    yield Option(EAGER, "tensor t", call(scheduler.step, t))
    if compile:
        yield Option(COMPILED, "int t", call(torch.compile(scheduler.step, dynamic=False), int(t)))


def noising(scheduler: Any, x0: Tensor, t: Tensor, compile: bool) -> Iterator[Option]:
    """add_noise, randn_like and get_velocity: x_t and the v target."""
    yield Option(EAGER, "", lambda: _noised(scheduler, x0, t))
    if compile:
        yield Option(COMPILED, "", lambda: torch.compile(_noised, dynamic=False)(scheduler, x0, t))


def _noised(scheduler: Any, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    noise = torch.randn_like(x0)
    return scheduler.add_noise(x0, noise, t), scheduler.get_velocity(x0, noise, t)
