"""Guidance rescale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..rollout import Model
from .guided import Guided


class GuidanceRescale(Guided):
    """Guidance whose result has the conditional prediction's standard deviation, or part of it.

        m = phi m_cfg std(m_c) / std(m_cfg) + (1 - phi) m_cfg

    of what the model predicts, each sample by itself: large weights no longer overexpose. Lin et
    al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", equations 15 and 16.

    Args:
        model, w, null_cond: as `Guided`.
        phi: 0 is plain guidance, 1 all of it; the paper's is 0.7.

    Raises:
        ValueError: phi outside [0, 1]; others as `Guided`.
    """

    def __init__(
        self,
        model: Model,
        w: float,
        phi: float = 0.7,
        *,
        null_cond: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(model, w, null_cond=null_cond)
        if not 0 <= errors.number("phi", phi) <= 1:
            raise ValueError(f"phi={phi}: must be in [0, 1]")
        self.phi = phi

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, phi={self.phi}"

    def combine(self, x: Tensor, t: Tensor, m: Tensor, m_u: Tensor) -> Tensor:
        guided = super().combine(x, t, m, m_u)
        wanted, found = (_std(each) for each in (m, guided))
        scale = torch.where(found > 0, wanted / found, 1.0)  # a constant has nothing to rescale
        return guided * (self.phi * scale + 1 - self.phi)


def _std(m: Tensor) -> Any:
    return m.std(tuple(range(1, m.dim())), correction=0, keepdim=True)  # also of one value
