"""Adaptive projected guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .. import errors
from ..rollout import Model
from ..schedule import NoiseSchedule
from .guided import Guided
from .space import DataSpace


class _Run(NamedTuple):
    """What is remembered of a run: tensors that stay where a captured graph has seen them."""

    average: Tensor  # [B, elements]
    first: Tensor  # timesteps [B]
    last: Tensor


class APG(Guided):
    """Guidance by the part of the update that is orthogonal to the conditional prediction.

        U = D_c - D_u + momentum U_before         D: predicted x0
        U = U min(1, radius / |U|)
        D = D_c + w (U - (1 - eta) (U . D_c) D_c / |D_c|^2)

    The parallel part is what oversaturates. Sadat et al. 2024, "Eliminating Oversaturation and
    Artifacts of High Guidance Scales in Diffusion Models", Algorithm 1; each sample by itself.
    U_before is the average of the call before in the same run, 0 in its first. A run's timesteps
    descend: a call at a later one than before, or not below the run's first, starts another run;
    so does every run of a sampler.

    Example:
        >>> from fastdiff import DDIMSampler, load
        >>> net = load("fashion-mnist")
        >>> model = APG(net, 4.0, net.schedule, net.prediction, radius=15.0)
        >>> sampler = DDIMSampler(net.schedule, 10, prediction=net.prediction)
        >>> sampler.sample(model, (2, 1, 32, 32), cond=torch.tensor([0, 9])).shape
        torch.Size([2, 1, 32, 32])

    Args:
        model, w, null_cond: as `Guided`.
        schedule, prediction: the model's, as `DataSpace` takes them.
        eta: how much of the parallel part is kept; 1 is all.
        radius: the longest update, inf for any; its scale is that of a sample's norm.
        momentum: of the update, in (-1, 1); the paper's is negative, away from those before.

    Raises:
        ValueError, TypeError: others than these; at the call, t that is not int64 [B].
    """

    def __init__(
        self,
        model: Model,
        w: float,
        schedule: NoiseSchedule,
        prediction: str,
        *,
        eta: float = 0.0,
        radius: float = float("inf"),
        momentum: float = -0.5,
        null_cond: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(model, w, null_cond=null_cond)
        if not 0 <= errors.number("eta", eta) <= 1:
            raise ValueError(f"eta={eta}: must be in [0, 1]")
        radius = errors.number("radius", radius, infinite=True)
        if not radius > 0:
            raise ValueError(f"radius={radius}: must be positive, or inf for none")
        if not -1 < errors.number("momentum", momentum) < 1:
            raise ValueError(f"momentum={momentum}: must be in (-1, 1)")
        self.space = DataSpace(schedule, prediction)
        self.eta, self.radius, self.momentum = eta, radius, momentum
        self._runs: dict[tuple[torch.Size, torch.device], _Run] = {}

    def extra_repr(self) -> str:
        settings = f"eta={self.eta}, radius={self.radius}, momentum={self.momentum}"
        return f"{super().extra_repr()}, {settings}"

    def combine(self, x: Tensor, t: Tensor, m: Tensor, m_u: Tensor) -> Tensor:
        data = self.space.x0(x, t, m)
        update = (data - self.space.x0(x, t, m_u)).flatten(1)
        if self.momentum:
            update = self._averaged(t, update)
        if self.radius < float("inf"):
            update = update * (self.radius / update.norm(dim=1, keepdim=True)).clamp(max=1)
        direction = normalize(data.flatten(1), dim=1)
        along = (update * direction).sum(1, keepdim=True)
        update = update - (1 - self.eta) * along * direction
        return self.space.moved(x, t, m, self.w * update.view_as(x))

    def _averaged(self, t: Tensor, update: Tensor) -> Tensor:
        key = update.shape, update.device
        if key not in self._runs:
            with torch.inference_mode(False):  # for runs in either mode
                none = torch.full_like(t, -1)
                self._runs[key] = _Run(torch.zeros_like(update), none, none.clone())
        run = self._runs[key]
        goes_on = (t <= run.last) & (t < run.first)
        average = update + (self.momentum * goes_on)[:, None] * run.average
        run.average.copy_(average.detach())
        run.first.copy_(torch.where(goes_on, run.first, t))
        run.last.copy_(t)
        return average

    def forget_run(self) -> None:
        """Let the next call be the first of a run, as a sampler does when it starts."""
        for run in self._runs.values():
            run.last.fill_(-1)
