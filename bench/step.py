"""One row of a solver, as each contender runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fastdiff import DDIMSampler, DDPMSampler, NoiseSchedule, Sampler, ops
from fastdiff.op import Op

from . import agreement, peers, plain
from .records import FASTDIFF, PLAIN, UNGUIDED, Settings
from .timing import Option
from .work import W, Work, copies

STEPS, ROW = 50, 25


@dataclass(frozen=True)
class Solver:
    """A solver that fastdiff and diffusers both have, with diffusers' conventions."""

    kind: Any
    scheduler: Callable[..., Any]
    variance: dict[str, str]
    config: dict[str, str]

    def sampler(self, steps: int = STEPS) -> Sampler:
        return self.kind.like("diffusers", NoiseSchedule.linear(1000), steps, **self.variance)

    def peer(self, steps: int = STEPS) -> Any:
        return self.scheduler(steps, **self.config)


DDIM = Solver(DDIMSampler, peers.ddim, {}, {})
DDPM = Solver(DDPMSampler, peers.ddpm, {}, {})
LEARNED = Solver(
    DDPMSampler, peers.ddpm, {"variance": "learned_range"}, {"variance_type": "learned_range"}
)


def work(
    solver: Solver,
    op: Op,
    inputs: tuple[Any, ...],
    settings: Settings,
    dtype: torch.dtype = torch.float32,
    allocating: bool = False,
) -> Work:
    """fastdiff works in place, as its samplers do, or makes a new tensor.

    dtype is the model output's. A guided row has one contender more, the same step unguided.
    """
    x, m, _, _, m_u, v, *_, streams, _ = inputs
    out = m if v is None else m._base  # what the model gave: with the variance's channels
    m = m.to(dtype)
    table = solver.sampler().table
    if m_u is not None:
        table = table.with_guidance(W)
    columns = table.tensor(x.device)
    row = torch.tensor(ROW, device=x.device)
    k = plain.rows(table)[ROW]
    noisy, start = streams is not None, x.clone()

    def ours(m_u: Tensor | None = m_u) -> Tensor:
        op.write(
            x, m, columns, row, m_u, v, None, None, None, streams, 0,
            x_next=x, h_next=None, model_input=None,
        )  # fmt: skip
        return x

    def options() -> Iterator[Option]:
        if allocating:
            given = {"m_u": m_u, "v": v, "streams": streams}
            given = {name: value for name, value in given.items() if value is not None}
            yield Option(FASTDIFF, "new tensor", partial(ops.step, x, m, columns, row, **given))
        else:
            yield Option(FASTDIFF, "in place", ours)
        if m_u is not None:
            yield Option(UNGUIDED, "in place", lambda: ours(None))
        yield from peers.step(
            solver.peer(), ROW, x,
            (lambda: peers.guided(m, m_u, W)) if m_u is not None else (lambda: out.to(dtype)),
            settings.compile,
        )  # fmt: skip
        D, z = torch.empty(2, *x.shape, device=x.device)
        yield Option(
            PLAIN, "in place", lambda: plain.step_in_place(x, m, k, noisy, m_u, v, D=D, z=z)
        )
        if settings.compile:
            fused = plain.compiled(plain.step_fused)
            yield Option(PLAIN, "compiled", lambda: fused(x, m, k, noisy, m_u, v))
        yield from copies(x)

    @cache
    def expected() -> tuple[Any, Any]:
        double = [None if t is None else t.double() for t in (start, m, columns, m_u, v)]
        mean = op.reference(*double[:3], row, *double[3:])[0]
        return mean, k.s if v is None else k.s * torch.exp(k.l * v.double())

    exact = agreement.equal(lambda: expected()[0], dtype)
    moved = op.moved(x, m, columns, row, m_u, v, None, None, None, streams, 0)
    check = agreement.normal(expected) if noisy else exact
    return Work(list(options()), check, moved, x, dtype, lambda: x.copy_(start))
