"""The same formulas in plain PyTorch, written with care: in place, and whole for torch.compile.

A coefficient that is zero in the sampler at hand is left out, as one would who writes only that
sampler. Coefficients are Python floats, which torch.compile makes constants; or tensors, where one
compiled function serves every row.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastdiff.table import COLUMNS, Table

Row = namedtuple("Row", COLUMNS)  # of a sampler's table


def rows(table: Table) -> list[Row]:
    """The rows of a table as numbers."""
    return [Row(*row) for row in table.numpy().tolist()]


def next_state(
    x: Tensor, m: Tensor, k: Row, noisy: bool, m_u: Tensor | None = None, v: Tensor | None = None
) -> Tensor:
    """x' of one row of a table: for torch.compile, which makes it one loop."""
    m = m.float()
    if m_u is not None:
        m = m_u + (k.w + 1) * (m - m_u)
    D = (k.px * x + k.pm * m).clamp(-k.clip, k.clip)
    x_next = k.b * D
    if isinstance(k.a, Tensor) or k.a:
        x_next = x_next + k.a * x
    if isinstance(k.n, Tensor) or k.n:
        x_next = x_next + k.n * m
    if noisy:
        s = k.s if v is None else k.s * torch.exp(k.l * v)
        x_next = x_next + s * torch.randn_like(x)
    return x_next


def step_fused(x: Tensor, *args: Any, **given: Any) -> Tensor:
    """The same, stored in x."""
    return x.copy_(next_state(x, *args, **given))


def step_in_place(
    x: Tensor,
    m: Tensor,
    k: Row,
    noisy: bool,
    m_u: Tensor | None = None,
    v: Tensor | None = None,
    *,
    D: Tensor,
    z: Tensor,
) -> Tensor:
    """The same without a new tensor: D and z are scratch, like x."""
    if m_u is not None:
        m = torch.lerp(m_u, m, k.w + 1, out=z)
    torch.mul(x, k.px, out=D).add_(m, alpha=k.pm).clamp_(-k.clip, k.clip)
    if k.a:
        x.mul_(k.a).add_(D, alpha=k.b)
    else:
        torch.mul(D, k.b, out=x)
    if k.n:
        x.add_(m, alpha=k.n)
    if noisy and v is not None:
        torch.mul(v, k.l, out=D).exp_()
        return x.addcmul_(z.normal_(), D, value=k.s)
    return x.add_(z.normal_(), alpha=k.s) if noisy else x


def noising_fused(x0: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, v target) with fresh noise; alpha and sigma are [B, 1, ...]."""
    z = torch.randn_like(x0)
    return alpha * x0 + sigma * z, alpha * z - sigma * x0


def noising_in_place(
    x0: Tensor, alpha: Tensor, sigma: Tensor, *, x_t: Tensor, target: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """The same into given tensors; z is scratch."""
    z.normal_()
    torch.mul(x0, alpha, out=x_t).addcmul_(sigma, z)
    return x_t, torch.mul(z, alpha, out=target).addcmul_(sigma, x0, value=-1)


def cfg(m_cond: Tensor, m_uncond: Tensor, w: float) -> Tensor:
    """(w + 1) m_cond - w m_uncond."""
    return torch.lerp(m_uncond, m_cond, w + 1)


@lru_cache(maxsize=64)
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile of a function, for the shapes it sees."""
    return torch.compile(function, dynamic=False)
