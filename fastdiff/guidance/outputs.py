"""A model's output taken apart, and put together again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import errors
from ..rollout import split


def check_call(x: Tensor, t: Tensor) -> None:
    """Raise unless a model can be asked at x [B, C, ...], of no empty samples, and t [B]."""
    errors.is_tensor("x", x)
    errors.has_dtype("x", x, (*errors.MODEL_DTYPES, torch.float64))
    if x.dim() < 2 or not x.shape[1:].numel():
        raise ValueError(f"x: has shape {tuple(x.shape)}, must be [B, C, ...]")
    errors.per_sample("t", t, None, "x", x)


def as_taken(x: Tensor, model: Any) -> Tensor:
    """x in the dtype of the model's first floating parameter; as it is where there is none."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return x.to(next((p.dtype for p in parameters if p.is_floating_point()), x.dtype))


def parts(out: Any, x: Tensor, guided: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(m, m_u, v) in float32, as `rollout.split`; m_u is m where not guided, v may be None."""
    out = getattr(out, "sample", out)
    errors.is_tensor("model: its output", out)
    learned = out.dim() > 1 and out.shape[1] == 2 * x.shape[1]
    m, m_u, v = split(out, x, guided, learned)
    m = m.float()
    return m, m if m_u is None else m_u.float(), None if v is None else v.float()


def joined(m: Tensor, v: Tensor | None) -> Tensor:
    """The output again: m, and the extra channels v where there are such."""
    return m if v is None else torch.cat([m, v], 1)
