"""DPM-Solver++: diffusers' multistep scheduler on rows of `tables.dpmpp_2m`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from .... import tables
from ....rollout import previews
from ....schedule import NoiseSchedule
from ....table import Table
from .base import RowScheduler, run


class DPMSolverMultistepScheduler(RowScheduler, diffusers.DPMSolverMultistepScheduler):
    """`diffusers.DPMSolverMultistepScheduler` of orders 1 and 2, in its "++" forms, faster.

    All spacings of its noise levels (Karras, exponential, ...) but those of flow matching. Also
    right here and not there: `add_noise` before `set_timesteps`, which takes a wrong level there.
    """

    SUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        **RowScheduler.SUPPORTED,
        "solver_order": (1, 2),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "use_flow_sigmas": (False,),
    }

    sigmas: Tensor
    lower_order_nums: int
    _step_index: int | None
    _register: Tensor | None
    _init_step_index: Callable[[Any], None]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """As diffusers'."""
        self._set_timesteps(num_inference_steps, device, mu=mu, timesteps=timesteps)
        self._made["second order"], self._sources = self._second_order(), self._sources_now()

    def _retime(self, timesteps: list[int]) -> None:
        diffusers.DPMSolverMultistepScheduler.set_timesteps(self, timesteps=timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step from `timestep` to the next one; arguments and result are diffusers'."""
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps: not set; call set_timesteps(steps) first")
        if self._step_index is None:
            self._init_step_index(timestep)
        i, config, device = self._step_index or 0, self.config, sample.device
        m = model_output
        if config.variance_type is not None:
            m = m[:, : sample.shape[1]]
        x, z = self._state(sample), None
        if config.algorithm_type == "sde-dpmsolver++":
            z = variance_noise
            z = self._drawn(m, generator, torch.float32) if z is None else z.to(device).float()
        first, second, predict, rows = self._tables(device)
        if config.thresholding:
            m = self._threshold_sample(run(x, m, predict, rows[i])[0])
        h = x if self._register is None else self._register
        table = first if self._is_first_order(i) else second
        x, self._register = run(x, m, table, rows[i], h, z=z)
        self.lower_order_nums = min(self.lower_order_nums + 1, config.solver_order)
        self._step_index = i + 1
        prev = self._rounded(x, model_output.dtype)
        return SchedulerOutput(prev_sample=prev) if return_dict else (prev,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """As diffusers': at the level of the step that is next, where a pipeline has begun."""
        if self.bug_compatible:
            return diffusers.DPMSolverMultistepScheduler.add_noise(
                self, original_samples, noise, timesteps
            )
        if self.num_inference_steps is None:
            return super().add_noise(original_samples, noise, timesteps)
        x0, z = original_samples.float(), noise.float()
        noisy = diffusers.DPMSolverMultistepScheduler.add_noise(self, x0, z, timesteps)
        return noisy.to(original_samples.dtype)

    def _forget(self) -> None:
        super()._forget()
        self._register = None

    def _is_first_order(self, i: int) -> bool:
        config, steps = self.config, len(self.timesteps)
        if config.solver_order == 1 or self.lower_order_nums < 1:
            return True
        return i == steps - 1 and (
            config.euler_at_final
            or config.final_sigmas_type == "zero"
            or (config.lower_order_final and steps < 15)
        )

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Rows of first order, of second, those that predict x0, and their numbers."""
        self._forget_others()
        found = self._made.get(device)
        if found is None:
            second = self._made.get("second order") or self._second_order()
            first = replace(second, b=second.b + second.c, c=0.0)
            rows = torch.arange(len(second), device=device).unbind()
            given = [table.tensor(device) for table in (first, second, previews(second))]
            if self.config.thresholding:  # what is given is x0 already
                given[:2] = [
                    replace(table, px=0.0, pm=1.0).tensor(device) for table in (first, second)
                ]
            found = self._made[device] = (*given, rows)
        return found

    def _second_order(self) -> Table:
        sigmas = self.sigmas.double().numpy()
        ends_at_data = sigmas[-1] == 0
        noisy = sigmas[:-1] if ends_at_data else sigmas
        if len(noisy) > 1 and noisy[-1] == noisy[-2]:  # with Karras' sigmas: a step to where it is
            noisy = np.append(noisy[:-1], noisy[-1] * (1 - 1e-7))
        levels = NoiseSchedule.from_alphas_cumprod(1 / (1 + noisy[::-1] ** 2))
        t = np.arange(len(noisy))[::-1]
        return tables.dpmpp_2m(
            levels,
            t if ends_at_data else t[:-1],
            next_timesteps=None if ends_at_data else t[1:],
            eta=float(self.config.algorithm_type == "sde-dpmsolver++"),
            prediction=self.prediction,
            solver_type=self.config.solver_type,
        )
