"""Whole sampling loops as generators, a step at a time, so that loops can take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import Table

from . import plain
from .records import FASTDIFF
from .timing import now

Model = Callable[[Tensor, Tensor], Tensor]  # (x, t), t a tensor of no dimensions -> output
Loop = Iterator[Tensor]  # yields the state after each step
PAUSE = 0.01  # seconds


def of_diffusers(scheduler: Any, steps: int, model: Model, x: Tensor) -> Loop:
    """As diffusers' pipelines loop; its state has the model's dtype."""
    scheduler.set_timesteps(steps, device=x.device)
    for t, number in zip(scheduler.timesteps, scheduler.timesteps.tolist(), strict=True):
        x = scheduler.step(model(x, t), number, x, return_dict=False)[0]
        yield x


def of_plain(table: Table, model: Model, x: Tensor, dtype: torch.dtype) -> Loop:
    """A loop by hand, in place, with a float32 state; the noise, if any, is torch's."""
    x, (D, z) = x.clone(), torch.empty(2, *x.shape, device=x.device)
    t = torch.tensor(table.t, device=x.device).long()
    for now_at, k in zip(t, plain.rows(table), strict=True):
        yield plain.step_in_place(x, model(x.to(dtype), now_at), k, table.noisy, D=D, z=z)


def compiled_step(
    network: nn.Module, labels: Tensor, dtype: torch.dtype
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(x, t, row of a guided table) -> x', from the network to the update one compiled function.

    On a GPU it is one CUDA graph. Its result is overwritten by the next call.
    """

    def step(x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        both = torch.cat([x, x]).to(dtype, memory_format=torch.channels_last)
        m, m_u = network(both, t.expand(len(both)), labels).chunk(2)
        return plain.next_state(x, m, plain.Row(*row.unbind()), False, m_u)

    return torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False)


def of_compiled(step: Callable[[Tensor, Tensor, Tensor], Tensor], table: Table, x: Tensor) -> Loop:
    """A loop of `compiled_step`."""
    t = torch.tensor(table.t, device=x.device).long()
    for now_at, row in zip(t, table.tensor(x.device), strict=True):
        torch.compiler.cudagraph_mark_step_begin()
        x = step(x, now_at, row).clone()
        yield x


class Turns:
    """A forward pre-hook for a network: whenever fastdiff's loop calls it, others take a step.

    All loops so share whatever happens to the machine, and fastdiff's is its public
    `Sampler.sample`. After the run, `steps()` has the microseconds of each step, by provider; a
    loop's preparation counts into its first. `states` has where the others ended. Between two
    steps OpenMP's threads, which spin for milliseconds after their work, are let fall asleep: they
    would take a core from the one that comes next, and none from themselves.
    """

    def __init__(self, others: Mapping[str, Loop], device: str) -> None:
        self.others, self.device = others, device
        self.states: dict[str, Tensor] = {}
        self.times: dict[str, list[float]] = {p: [] for p in (FASTDIFF, *others)}
        self.since = now(device)

    def __call__(self, network: nn.Module, args: tuple[Any, ...]) -> None:
        self._lap(FASTDIFF)
        for provider, loop in self.others.items():
            self._pause()
            self.states[provider] = next(loop)
            self._lap(provider)
        self._pause()

    def _pause(self) -> None:
        if self.device == "cpu":
            time.sleep(PAUSE)
        self.since = now(self.device)

    def _lap(self, provider: str) -> None:
        self.times[provider].append(1e6 * (now(self.device) - self.since))
        self.since = now(self.device)

    def steps(self) -> dict[str, list[float]]:
        """Call it as soon as the run is over: it ends the last step."""
        self._lap(FASTDIFF)
        preparation, first, *rest = self.times[FASTDIFF]
        return {**self.times, FASTDIFF: [preparation + first, *rest]}
