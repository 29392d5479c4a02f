"""Rollout: the buffers of one run of a table on one model, and what happens in a row."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import errors
from .ops.step import OP as STEP
from .table import Table

Model = Callable[..., Any]


def previews(table: Table) -> Table:
    """The table whose rows return the predicted x0, D, instead of the next state."""
    return replace(table, a=0.0, b=1.0, c=0.0, n=0.0, s=0.0, d=0.0, e=0.0)


def means(table: Table) -> Table:
    """The table whose rows return the mean of the next state, before a classifier's shift."""
    return replace(table, q=0.0, s=0.0)


def placement(model: Model) -> tuple[torch.dtype, torch.device | None]:
    """The dtype a model takes and its device: those of its first floating parameter.

    A callable without parameters takes float32, on no device in particular; a model with an
    `input_dtype` takes that.
    """
    errors.is_callable("model", model)
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    first = next((p for p in parameters if p.is_floating_point()), None)
    if first is None:
        return torch.float32, None
    errors.has_dtype("model: its parameters", first, errors.MODEL_DTYPES)
    return getattr(model, "input_dtype", first.dtype), first.device


def begin(model: Model, prediction: str | None) -> None:
    """A run of a table on a model begins, which takes it to predict `prediction`, if known.

    What the model remembers of another run it is told to forget (`forget_run`). Raises ValueError
    where it says (`model.prediction`) that it predicts something else.
    """
    says = getattr(model, "prediction", None)
    if prediction is not None and isinstance(says, str) and says != prediction:
        raise ValueError(
            f"prediction={prediction!r}: this model says that it predicts {says!r}; give "
            "prediction=model.prediction"
        )
    for part in model.modules() if isinstance(model, torch.nn.Module) else ():
        if forget := getattr(part, "forget_run", None):
            forget()


def check_images(name: str, images: Tensor, model: Model) -> None:
    """Raise unless these are float32 [B, C, ...], none of them empty, on the model's device."""
    errors.is_tensor(name, images)
    errors.has_dtype(name, images, (torch.float32,))
    if images.dim() < 2 or not images.numel():
        raise ValueError(f"{name}: has shape {tuple(images.shape)}, must be (B, C, ...)")
    device = placement(model)[1]
    if device is not None and images.device != device:
        raise ValueError(f"{name}: is on {images.device}, the model is on {device}; move one")


def check_conditions(batch: int, **conditions: Tensor | None) -> None:
    """Raise unless these have an entry a sample of this batch; None is none.

    A model may take what is no tensor; guidance, which joins two of them, does not.
    """
    for name, value in conditions.items():
        if value is None:
            continue
        if isinstance(value, Tensor | str) or not isinstance(value, Sized):
            errors.is_batch(name, value)
        if len(value) != batch:
            raise ValueError(f"{name}: has batch {len(value)}, must be {batch}, one a sample")


class Rollout:
    """Everything that the rows of a run read and write, on the device: nothing is read back.

    `x` holds the starting state, float32, and is overwritten row after row; `dtype` is what the
    model computes in. `cond` goes to the model as its third argument; with a guided table
    `uncond` does so for the second half of a doubled batch. With `preview`, `x0` holds the
    predicted x0 of the latest row. With `at_mean`, a gradient is taken at `mean`, the row's.
    """

    BY_ROW = ("t", "columns", "previews", "means")
    BUFFERS = (*BY_ROW, "x", "h", "streams", "cond", "both", "input", "x0", "mean")

    def __init__(
        self,
        table: Table,
        dtype: torch.dtype,
        x: Tensor,
        *,
        cond: Tensor | None = None,
        uncond: Tensor | None = None,
        streams: Tensor | None = None,
        preview: bool = False,
        at_mean: bool = False,
    ) -> None:
        self.x, self.cond = x, cond
        self.guided = (table.w != 0).tolist()
        self.learned_variance = table.learned_variance
        self.streams = streams if table.noisy else None
        self.h = torch.zeros_like(x) if table.history else None
        self.both = None
        if table.guided and cond is not None and uncond is not None:
            self.both = torch.cat([cond, uncond])
        self.copies = 2 if table.guided else int(dtype != x.dtype or bool((table.c_in != 1).any()))
        self.c_in = table.c_in.tolist()
        self.input = x
        if self.copies:
            self.input = torch.cat([(self.c_in[0] * x).to(dtype)] * self.copies)
        self.t = timesteps(table, len(self.input), x.device)
        self.columns = table.tensor(x.device)
        self.previews = previews(table).tensor(x.device) if preview else None
        self.x0 = torch.empty_like(x) if preview else None
        self.means = means(table).tensor(x.device) if at_mean else None
        self.mean = torch.empty_like(x) if at_mean else None

    def step(
        self,
        model: Model,
        gradient: Callable[..., Tensor] | None,
        guided: bool,
        t: Tensor,
        row: Tensor,
    ) -> None:
        """Run one row in place. t: what `self.t` holds for it; row: its number, int64."""
        x, batch = self.x, len(self.x)
        cond = () if self.cond is None else (self.cond,)
        t_alone = t if len(t) == batch else t.narrow(0, 0, batch)
        if guided:
            out = model(self.input, t, *(() if self.both is None else (self.both,)))
        else:
            alone = self.input if t_alone is t else self.input.narrow(0, 0, batch)
            out = model(alone, t_alone, *cond)
        m, m_u, v = split(out, x, guided, self.learned_variance)
        g = None
        if gradient is not None:
            if self.mean is not None:
                STEP.write(
                    x, m, self.means, row, m_u, v, None, None, None, None, 0,
                    x_next=self.mean, h_next=None, model_input=None,
                )  # fmt: skip
            g = gradient(x if self.mean is None else self.mean, t_alone, *cond)
            errors.like("gradient: its result", g, "x", x)
        if self.x0 is not None:
            STEP.write(
                x, m, self.previews, row, m_u, v, g, None, None, None, 0,
                x_next=self.x0, h_next=None, model_input=None,
            )  # fmt: skip
        STEP.write(
            x, m, self.columns, row, m_u, v, g, self.h, None, self.streams, self.copies,
            x_next=x, h_next=self.h, model_input=self.input if self.copies else None,
        )  # fmt: skip

    def put(self, x: Tensor, i: int) -> None:
        """Replace the state that row i starts from."""
        self.x.copy_(x)
        if self.copies:
            self.input.copy_(torch.cat([self.c_in[i] * x] * self.copies))

    def prepare(self, model: Model) -> None:
        """Tell an optimized model (`fastdiff.optimize`) which calls will come."""
        prepare = getattr(model, "prepare_rows", None)
        if prepare is None:
            return
        guided, batch = torch.tensor(self.guided), len(self.x)
        if guided.any():
            prepare(self.input, self.t[guided], *(() if self.both is None else (self.both,)))
        if not guided.all():
            cond = () if self.cond is None else (self.cond,)
            prepare(self.input[:batch], self.t[~guided, :batch], *cond)


def timesteps(table: Table, batch: int, device: torch.device) -> Tensor:
    """What the model is told: [rows, batch], int64 where all are whole numbers, else float32."""
    dtype = np.int64 if np.array_equal(table.t, table.t.round()) else np.float32
    t = torch.from_numpy(table.t.astype(dtype)).to(device, non_blocking=True)
    return t.unsqueeze(1).repeat(1, batch)


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
    batch, channels = len(x), x.shape[1:2].numel()
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
        m, m_u = out.chunk(2)
    else:
        m = out
    if extra:
        m, v = m.chunk(2, 1)
        v = v if learned_variance else None
        m_u = None if m_u is None else m_u.chunk(2, 1)[0]
    return m, m_u, v


def unconditional(model: Model, cond: Tensor | None, uncond: Tensor | None) -> Tensor:
    """What stands for "no condition" beside `cond`: `uncond`, or what the model says does."""
    made = getattr(model, "distilled", None)
    if (weight := getattr(made, "guidance", None)) is not None:
        raise ValueError(f"guidance: this student has learned the weight {weight:g}; leave it out")
    if cond is None:
        raise ValueError("guidance: needs a condition to strengthen; give cond")
    errors.is_batch("cond", cond)
    if uncond is None:
        if not hasattr(model, "null_cond"):
            raise ValueError(
                "uncond: guidance needs what stands for no condition, like cond; "
                "give it, or a model with a method null_cond(cond)"
            )
        uncond = model.null_cond(cond)
    errors.like("uncond", uncond, "cond", cond)
    return uncond
