"""DDIM: diffusers' scheduler on rows of `tables.ddim`."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from numpy.typing import NDArray
from torch import Tensor

from .... import tables
from ....schedule import NoiseSchedule
from ....table import Table
from .base import RowScheduler


class DDIMScheduler(RowScheduler, diffusers.DDIMScheduler):
    """`diffusers.DDIMScheduler`, faster, and right where that is not (see `RowScheduler`)."""

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """As diffusers'."""
        self._set_timesteps(num_inference_steps, device)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step from `timestep` to the next one; arguments and result are diffusers'."""
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps: not set; call set_timesteps(steps) first")
        z = None
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError("variance_noise: was given with generator; give one of them")
            z = variance_noise
            z = self._drawn(model_output, generator) if z is None else z.float()
        row, x = self._row(timestep, sample.device), self._state(sample)
        x, x0 = self._advance(x, model_output, row, (eta, use_clipped_model_output), z=z)
        return self._result(DDIMSchedulerOutput, x, x0, sample.dtype, return_dict)

    def _table(self, eta: float, use_clipped: bool, *, preview: bool) -> Tensor:  # type: ignore[override]
        config = self.config

        def build(
            schedule: NoiseSchedule, t: NDArray[np.int64], following: NDArray[np.int64]
        ) -> Table:
            if self.bug_compatible:
                following = t - len(schedule) // self.num_inference_steps
            end = -1 if config.set_alpha_to_one else 0
            table = tables.ddim(
                schedule,
                t,
                next_timesteps=np.where(following < 0, end, following),
                eta=eta,
                prediction=self.prediction,
                clip=self.clip,
                keep_eps=not use_clipped,
            )
            return self._with_register(table, preview)

        return self._by_timestep(build)
