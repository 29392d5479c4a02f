"""DDPM: diffusers' scheduler on rows of `tables.ddpm`."""

from __future__ import annotations

from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from numpy.typing import NDArray
from torch import Tensor

from .... import tables
from ....schedule import NoiseSchedule
from ....table import Table
from .base import RowScheduler

VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "fixed_large_log": "large",  # diffusers takes the root of this logarithm: NaN
    "learned_range": "learned_range",
}


class DDPMScheduler(RowScheduler, diffusers.DDPMScheduler):
    """`diffusers.DDPMScheduler`, faster, and right where that is not (see `RowScheduler`).

    variance_type="learned" raises: diffusers takes a network's output for the variance itself.
    """

    SUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        **RowScheduler.SUPPORTED,
        "variance_type": tuple(VARIANCES),
    }

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """As diffusers'."""
        self._set_timesteps(num_inference_steps, device, timesteps=timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """One step from `timestep` to the next one; arguments and result are diffusers'."""
        device, channels = sample.device, sample.shape[1]
        row, x = self._row(timestep, device), self._state(sample)
        m, v, z = model_output, None, None
        if self.config.variance_type == "learned_range":
            if m.shape[1] != 2 * channels:
                raise ValueError(
                    f"model_output: has {m.shape[1]} channels, variance_type='learned_range' needs "
                    f"{2 * channels}"
                )
            m, v = m.split(channels, 1)
        # a GPU's timestep is not read back: the noise of the last row is then drawn, times 0
        if device.type != "cpu" or int(row) > 0:
            z = self._drawn(m, generator)
        x, x0 = self._advance(x, m, row, v=v, z=z)
        return self._result(DDPMSchedulerOutput, x, x0, sample.dtype, return_dict)

    def _table(self, *, preview: bool) -> Tensor:  # type: ignore[override]
        config = self.config

        def build(
            schedule: NoiseSchedule, t: NDArray[np.int64], following: NDArray[np.int64]
        ) -> Table:
            table = tables.ddpm(
                schedule,
                t,
                next_timesteps=following,
                variance=VARIANCES[config.variance_type],
                prediction=self.prediction,
                clip=self.clip,
                floor=1e-20,
            )
            return self._with_register(table, preview)

        return self._by_timestep(build)
