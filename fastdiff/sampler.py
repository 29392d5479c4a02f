"""The one loop that runs a table."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import errors
from . import graph as graphs
from .ops.randn import BEFORE_FIRST_ROW, randn, streams_of
from .ops.step import step
from .rollout import Model, Rollout, begin, check_conditions, placement, split, unconditional
from .spacing import count, sizes
from .table import Table

_streams = lru_cache(maxsize=32)(streams_of)


class Sampler:
    """Runs any `Table`; the samplers of `fastdiff.samplers` differ only in the table they build.

    A model is a callable `model(x, t)` or `model(x, t, cond)`, t a [B] tensor; an output with a
    `.sample` (diffusers) is unwrapped. The state is float32 whatever the model's dtype.
    """

    prediction: str | None = None  # what the table takes the model to predict, if that is known

    def __init__(self, table: Table) -> None:
        errors.is_a("table", table, Table)
        self.table = table
        self._guided: list[bool] = (table.w != 0).tolist()
        self._noisy, self._history = table.noisy, table.history
        self._learned_variance, self._classifier = table.learned_variance, table.classifier
        self._registers: dict[torch.device, Tensor] = {}
        self._tables: dict[torch.device, tuple[Tensor, tuple[Tensor, ...]]] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}\n{self.table!r}"

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        shape: Sequence[int],
        seed: int | Sequence[int] = 0,
        x_T: Tensor | None = None,
        cond: Tensor | None = None,
        guidance: float | Sequence[float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        progress: bool = False,
        callback: Callable[[int, Tensor, Tensor], Any] | None = None,
        first_index: int = 0,
        *,
        uncond: Tensor | None = None,
        gradient: Callable[..., Tensor] | None = None,
        gradient_at: str = "x",
        graph: bool | None = None,
    ) -> Tensor:
        """Draw samples: float32, of the given shape, on the model's device.

        shape: [B, C, ...]. seed: an int, or one a sample; sample k has the noise of the stream
        (seed, first_index + k), whatever the batch. x_T: the noise to start from, float32, unit
        variance, in place of the seed's. cond: the model's third argument, [B, ...].
        guidance: the weight w of (w + 1) m_cond - w m_uncond, a number or one a row of the table;
        guidance_interval=(lo, hi) keeps it to noise levels lo < sigma / alpha <= hi, and other
        rows run the conditional half alone, and no classifier shifts them. uncond: what stands for
        "no condition", by default `model.null_cond(cond)`. gradient(x, t[, cond]): a classifier's
        gradient, for a table with a classifier scale (`fastdiff.guidance`), taken at the state x
        or at the row's "mean", where the paper expands ln p(y | x). callback(row, x, x0) is called
        after each row with the state and the predicted x0; x is overwritten by the next row, clone
        it to keep it.
        graph: whether rows are replayed from CUDA graphs (`fastdiff.graph`): by default on a GPU,
        for an nn.Module that allows it; False never, True or else RuntimeError. progress: a bar,
        on a GPU at most two rows ahead of it.

        Raises ValueError or TypeError, before the model runs, for arguments that do not fit, or a
        model whose `.prediction` is not the sampler's.
        """
        errors.is_callable("model", model)
        for name, given in (("gradient", gradient), ("callback", callback)):
            if given is not None:
                errors.is_callable(name, given)
        shape, table, interval = sizes("shape", shape), self.table, guidance_interval
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(f"shape={shape}: must be (B, C, ...), every size at least 1")
        if guidance is not None:
            with errors.naming("guidance"):
                table = self.table.with_guidance(guidance)
            if interval is not None:
                with errors.naming("guidance_interval"):
                    table = self.table.with_guidance(guidance, interval)
        elif interval is not None and not table.classifier:
            raise ValueError("guidance_interval: was given without guidance; give its weight w")
        if interval is not None and table.classifier:
            with errors.naming("guidance_interval"):
                table = table.with_classifier_in(interval)
        check_conditions(shape[0], cond=cond, uncond=uncond)
        if table.guided:
            uncond = unconditional(model, cond, uncond)
        errors.one_of("gradient_at", gradient_at, ("x", "mean"))
        self._check_gradient(gradient)
        if not self.table.classifier:
            gradient = None  # of rows that the scale moves nothing in
        begin(model, self.prediction)
        start, streams = self._start(model, shape, seed, x_T, first_index)
        dtype, preview = placement(model)[0], callback is not None
        rollout = Rollout(
            table, dtype, start, cond=cond, uncond=uncond, streams=streams, preview=preview,
            at_mean=gradient_at == "mean" and gradient is not None,
        )  # fmt: skip
        with graphs.stepping(model, rollout, gradient, graph) as advance:
            for i in _shown(table, start.device) if progress else range(len(table)):
                state = advance(i)
                if callback is not None and state.x0 is not None:
                    callback(i, state.x, state.x0.clone())
        return rollout.x

    def _check_gradient(self, gradient: object) -> None:
        if self._classifier != (gradient is not None):
            raise ValueError(
                "gradient: is needed by a table with a classifier scale, and only by it"
            )

    def _start(
        self,
        model: Model,
        shape: tuple[int, ...],
        seed: int | Sequence[int],
        x_T: Tensor | None,
        first_index: int,
    ) -> tuple[Tensor, Tensor]:
        device = placement(model)[1]
        if x_T is not None:
            errors.is_tensor("x_T", x_T)
        if device is None:
            device = x_T.device if x_T is not None else torch.device("cpu")
        streams = streams_of(seed, shape[0], first_index, device=device)
        if x_T is None:
            x_T = randn(shape, seed, row=BEFORE_FIRST_ROW, first_index=first_index, device=device)
        errors.has_dtype("x_T", x_T, (torch.float32,))
        if x_T.shape != shape:
            raise ValueError(f"x_T: has shape {tuple(x_T.shape)}, must be {shape} as shape says")
        if x_T.device != device:
            raise ValueError(f"x_T: is on {x_T.device}, the model is on {device}; move one")
        return x_T.contiguous() * self.table.init, streams

    def step(
        self,
        model_output: Any,
        i: int,
        x: Tensor,
        noise: Tensor | None = None,
        *,
        gradient: Tensor | None = None,
        seed: int | Sequence[int] = 0,
        first_index: int = 0,
    ) -> Tensor:
        """Row i of the table, for a loop of your own: the next state, float32, as x.

        model_output: the model's output at (c_in x, t) of that row, [B, ...] in any model dtype;
        twice the channels with a learned variance; twice the batch, conditional half first, where
        the table guides. noise: float32, as x; without it a noisy row makes the noise of the
        streams (seed, first_index + k), which is that of `sample`. gradient: a classifier's at x,
        float32, as x, for a table with a classifier scale. A solver with history keeps its
        register here: run the rows in order, from 0.
        """
        i = count("i", i, 0, len(self.table) - 1, ", a row of the table")
        errors.is_batch("x", x)
        if noise is not None:
            errors.like("noise", noise, "x", x)
            errors.has_dtype("noise", noise, (torch.float32,))
        if gradient is not None or self._classifier:
            self._check_gradient(gradient)
            assert gradient is not None
            errors.like("gradient", gradient, "x", x)
            errors.has_dtype("gradient", gradient, (torch.float32,))
        m, m_u, v = split(model_output, x, self._guided[i], self._learned_variance)
        streams = None
        if self._noisy and noise is None:
            make = _streams if type(seed) is type(first_index) is int else streams_of
            streams = make(seed, len(x), first_index, device=x.device)
        columns, rows = self._on(x.device)
        if not self._history:
            return step(x, m, columns, rows[i], m_u=m_u, v=v, g=gradient, z=noise, streams=streams)
        h = self._register(i, x)
        x_next, self._registers[x.device] = step(
            x, m, columns, rows[i], m_u=m_u, v=v, g=gradient, h=h, z=noise, streams=streams
        )
        return x_next

    def _register(self, i: int, x: Tensor) -> Tensor:
        if i == 0:
            return torch.zeros_like(x)
        h = self._registers.get(x.device)
        if h is None or h.shape != x.shape:
            raise ValueError(f"i={i}: this solver remembers the row before; start with i=0")
        return h

    def _on(self, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The table's columns and row numbers on a device, made once."""
        if device not in self._tables:
            columns = self.table.tensor(device)
            self._tables[device] = columns, torch.arange(len(self.table), device=device).unbind()
        return self._tables[device]


def _shown(table: Table, device: torch.device) -> Iterator[int]:
    """The rows, with a bar of those done: a GPU is let run two rows behind, so it never idles."""
    behind: deque[torch.cuda.Event] = deque()
    for i in tqdm(range(len(table)), desc=table.name):
        yield i
        if device.type == "cuda":
            behind.append(torch.cuda.current_stream(device).record_event())
            if len(behind) > 2:
                behind.popleft().synchronize()
