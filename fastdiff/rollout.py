"""Rollout: one run of a table on one model. Buffers are made once, then it goes row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import errors
from .ops.step import OP as STEP
from .table import Table

Model = Callable[..., Any]


def previews(table: Table) -> Table:
    """The table whose rows return the predicted x0, D, instead of the next state."""
    return replace(table, a=0.0, b=1.0, c=0.0, n=0.0, s=0.0, d=0.0, e=0.0)


def placement(model: Model) -> tuple[torch.dtype, torch.device | None]:
    """The dtype a model computes in and its device: those of its first floating parameter.

    A callable without parameters takes float32, on no device in particular.
    """
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    first = next((p for p in parameters if p.is_floating_point()), None)
    if first is None:
        return torch.float32, None
    errors.has_dtype("model: its parameters", first, errors.MODEL_DTYPES)
    return first.dtype, first.device


class Rollout:
    """The state of a run: x (float32), the register, and the model's next input.

    `x` holds the starting state and is overwritten row after row. `cond` goes to the model as its
    third argument; with a guided table `uncond` does so for the second half of a doubled batch.
    """

    def __init__(
        self,
        table: Table,
        model: Model,
        x: Tensor,
        *,
        cond: Tensor | None = None,
        uncond: Tensor | None = None,
        streams: Tensor | None = None,
        gradient: Callable[..., Tensor] | None = None,
    ) -> None:
        dtype, _ = placement(model)
        batch, device = len(x), x.device
        self.table, self.model, self.x, self.gradient = table, model, x, gradient
        self.streams = streams if table.noisy else None
        self.h = torch.zeros_like(x) if table.history else None
        self.cond = () if cond is None else (cond,)
        self.both = () if cond is None or uncond is None else (torch.cat([cond, uncond]),)
        self.guided = (table.w != 0).tolist()
        self.copies = 2 if table.guided else int(dtype != x.dtype or bool((table.c_in != 1).any()))
        self.input = x
        if self.copies:
            scaled = (float(table.c_in[0]) * x).to(dtype)
            self.input = torch.cat([scaled] * self.copies)
        self.first = self.input[:batch]
        t = timesteps(table, max(self.copies, 1) * batch, device)
        self.t_both = t.unbind()
        self.t = t[:, :batch].unbind() if table.guided else self.t_both
        self.rows = torch.arange(len(table), device=device).unbind()
        self.columns = table.tensor(device)
        self._prepare(t)

    def _prepare(self, t: Tensor) -> None:
        """Tell an optimized model (`fastdiff.optimize`) which calls will come."""
        prepare = getattr(self.model, "prepare_rows", None)
        if prepare is None:
            return
        guided = torch.tensor(self.guided, device=t.device)
        if guided.any():
            prepare(self.input, t[guided], *self.both)
        if not guided.all():
            prepare(self.first, t[~guided, : len(self.first)], *self.cond)

    def run(self, i: int, preview: Tensor | None = None) -> Tensor | None:
        """Run row i in place. With the columns of `previews(table)`, return the predicted x0."""
        if self.guided[i]:
            out = self.model(self.input, self.t_both[i], *self.both)
        else:
            out = self.model(self.first, self.t[i], *self.cond)
        m, m_u, v = split(out, self.x, self.guided[i], self.table.learned_variance)
        g = None
        if self.gradient is not None:
            g = self.gradient(self.x, self.t[i], *self.cond)
            errors.like("gradient: its result", g, "x", self.x)
        row = self.rows[i]
        x0 = None
        if preview is not None:
            x0 = STEP.call(self.x, m, preview, row, m_u, v, g, None, None, None, 0)[0]
        STEP.write(
            self.x, m, self.columns, row, m_u, v, g, self.h, None, self.streams, self.copies,
            x_next=self.x, h_next=self.h, model_input=self.input if self.copies else None,
        )  # fmt: skip
        return x0


def timesteps(table: Table, batch: int, device: torch.device) -> Tensor:
    """What the model is told: [rows, batch], int64 where all are whole numbers, else float32."""
    t = torch.tensor(table.t).to(device)
    whole = bool((t == t.round()).all())
    return t.to(torch.int64 if whole else torch.float32)[:, None].repeat(1, batch)


def split(
    out: Any, x: Tensor, guided: bool, learned_variance: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A model's output as (m, m_u, v): halves of the batch if guided, then of the channels.

    Twice the channels of x mean a learned variance; its extra channels are v, and are left out
    where the table has no use for them. Those of the conditional half count, as in GLIDE.
    """
    if not isinstance(out, Tensor):
        out = getattr(out, "sample", out)
        errors.is_tensor("model: its output", out)
    if out.dtype not in errors.MODEL_DTYPES:
        errors.has_dtype("model: its output", out, errors.MODEL_DTYPES)
    if out.device != x.device:
        errors.on_device("model: its output", out, "x", x)
    if out.shape == x.shape and not (guided or learned_variance):
        return out, None, None
    batch, channels = x.shape[:2]
    wanted = (2 * batch if guided else batch, *x.shape[1:])
    extra = learned_variance
    if out.shape != wanted:
        extra = x.dim() > 1 and out.shape == (wanted[0], 2 * channels, *x.shape[2:])
        if not extra:
            raise ValueError(
                f"model: its output has shape {tuple(out.shape)}, must be {wanted}"
                + (" (the conditional half, then the unconditional)" if guided else "")
            )
    elif learned_variance:
        raise ValueError(
            f"model: its output has {channels} channels, variance='learned_range' needs "
            f"{2 * channels}; use variance='small' or 'large'"
        )
    m_u, v = None, None
    if guided:
        out, m_u = out[:batch], out[batch:]
    if extra:
        v = out[:, channels:] if learned_variance else None
        out, m_u = out[:, :channels], None if m_u is None else m_u[:, :channels]
    return out, m_u, v
