"""Samplers by name: each builds its table from a schedule and inherits the loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import errors, presets, tables
from . import graph as graphs
from .rollout import Model, Rollout, begin, check_conditions, check_images, placement
from .sampler import Sampler
from .schedule import NoiseSchedule
from .spacing import SPACINGS, count

Spacing = str | Iterable[int]


class ScheduledSampler(Sampler):
    """A sampler whose table a builder of `tables` makes from a schedule and its timesteps."""

    solver: ClassVar[str]

    def _build(self, schedule: NoiseSchedule, timesteps: NDArray[np.int64], **options: Any) -> Self:
        builder = getattr(tables, self.solver)
        super().__init__(builder(schedule, timesteps, **options))
        self.schedule, self.timesteps, self.options = schedule, timesteps, options
        self.prediction = options.get("prediction", builder.__kwdefaults__["prediction"])
        self._classifier |= bool(options.get("classifier_scale"))
        return self

    @classmethod
    def like(
        cls, peer: str, schedule: NoiseSchedule, steps: int | None = None, **options: Any
    ) -> Self:
        """This sampler with a peer's conventions exactly: "guided-diffusion" or "diffusers".

        `options` override the peer's defaults, which `fastdiff.presets` lists: spacing, offset,
        set_alpha_to_one, and the options of the builder in `fastdiff.tables`.
        """
        timesteps, options = presets.like(peer, cls.solver, schedule, steps, **options)
        return cls.__new__(cls)._build(schedule, timesteps, **options)

    def tail(self, steps: int) -> Self:
        """This sampler, of its last `steps` timesteps alone: for data that is noisy already."""
        count("steps", steps, 1, len(self.timesteps))
        options = dict(self.options)
        if options.get("next_timesteps") is not None:
            options["next_timesteps"] = options["next_timesteps"][-steps:]
        if options.get("S_churn"):  # which is of all the steps together
            options["S_churn"] *= steps / len(self.timesteps)
        made = self.__class__.__new__(self.__class__)
        return made._build(self.schedule, self.timesteps[-steps:], **options)


def _timesteps(
    schedule: NoiseSchedule,
    steps: int | None,
    spacing: Spacing,
    offset: int,
    usual: int | None = None,
) -> NDArray[np.int64]:
    """The schedule's timesteps; `usual` is how many a spacing that implies none gets, or all."""
    errors.is_a("schedule", schedule, NoiseSchedule)
    if steps is None and isinstance(spacing, str) and spacing in SPACINGS:
        steps = min(usual or len(schedule), len(schedule))
    return schedule.timesteps(steps, spacing, offset)


class DDIMSampler(ScheduledSampler):
    """Denoising diffusion implicit models (Song et al. 2021): few steps, or exact inversion.

    eta: 0 is deterministic, 1 as noisy as DDPM. steps: 50 where the spacing implies no number.
    spacing, offset: see `NoiseSchedule.timesteps`. prediction: "eps", "x0", "v", "score", "edm".
    clip: clamp predicted x0 to [-clip, clip]; eps then follows it, unless keep_eps.
    classifier_scale: of a classifier's gradient.

    Example:
        >>> sampler = DDIMSampler(NoiseSchedule.cosine(1000), steps=10, prediction="v")
        >>> sampler.sample(lambda x, t: torch.zeros_like(x), (2, 1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """

    solver = "ddim"

    def __init__(
        self,
        schedule: NoiseSchedule,
        steps: int | None = None,
        eta: float = 0.0,
        spacing: Spacing = "leading",
        prediction: str = "eps",
        clip: float | None = None,
        *,
        offset: int = 0,
        keep_eps: bool = False,
        classifier_scale: float = 0.0,
    ) -> None:
        timesteps = _timesteps(schedule, steps, spacing, offset, 50)
        self._build(
            schedule, timesteps, eta=eta, prediction=prediction, clip=clip, keep_eps=keep_eps,
            classifier_scale=classifier_scale,
        )  # fmt: skip

    @torch.no_grad()
    def invert(
        self, model: Model, x0: Tensor, cond: Tensor | None = None, *, graph: bool | None = None
    ) -> Tensor:
        """Encode clean data as the noise it comes from: the deterministic ODE, backwards.

        x0: float32 [B, C, ...]. `sample(model, x_T=invert(model, x0), ...)` with eta = 0 comes
        back to x0, to first order in the step (Song et al. 2021, section 5.4). graph: as `sample`.
        """
        check_images("x0", x0, model)
        check_conditions(len(x0), cond=cond)
        begin(model, self.prediction)
        given = {k: v for k, v in self.options.items() if k in ("prediction", "clip")}
        table = tables.ddim_inverse(self.schedule, self.timesteps, **given)
        rollout = Rollout(table, placement(model)[0], x0.clone(), cond=cond)
        with graphs.stepping(model, rollout, None, graph) as advance:
            for i in range(len(table)):
                advance(i)
        return rollout.x / self.table.init


class DDPMSampler(ScheduledSampler):
    """Ancestral sampling (Ho et al. 2020), on any timesteps (Nichol & Dhariwal 2021).

    variance: "small" (beta~), "large" (beta) or "learned_range" (the model's extra channels).
    steps: all of the schedule's where the spacing implies no number. Others as `DDIMSampler`.
    """

    solver = "ddpm"

    def __init__(
        self,
        schedule: NoiseSchedule,
        steps: int | None = None,
        variance: str = "small",
        spacing: Spacing = "leading",
        prediction: str = "eps",
        clip: float | None = None,
        *,
        offset: int = 0,
        classifier_scale: float = 0.0,
    ) -> None:
        timesteps = _timesteps(schedule, steps, spacing, offset)
        self._build(
            schedule, timesteps, variance=variance, prediction=prediction, clip=clip,
            classifier_scale=classifier_scale,
        )  # fmt: skip


class DPMSolverSampler(ScheduledSampler):
    """DPM-Solver++ 2M (Lu et al. 2022): second order at one evaluation a step.

    eta: 0 is the ODE, 1 the SDE variant. steps: 20 where the spacing implies no number. Others as
    `DDIMSampler`.
    """

    solver = "dpmpp_2m"

    def __init__(
        self,
        schedule: NoiseSchedule,
        steps: int | None = None,
        eta: float = 0.0,
        spacing: Spacing = "trailing",
        prediction: str = "eps",
        clip: float | None = None,
        *,
        offset: int = 0,
    ) -> None:
        timesteps = _timesteps(schedule, steps, spacing, offset, 20)
        self._build(schedule, timesteps, eta=eta, prediction=prediction, clip=clip)


class HeunSampler(ScheduledSampler):
    """Heun's method with churn (Karras et al. 2022, Algorithm 2): two evaluations a step.

    S_churn, S_tmin, S_tmax, S_noise: the paper's. steps: 18 where the spacing implies no number.
    The state is x / alpha. Others as `DDIMSampler`.
    """

    solver = "heun"

    def __init__(
        self,
        schedule: NoiseSchedule,
        steps: int | None = None,
        spacing: Spacing = "trailing",
        prediction: str = "eps",
        clip: float | None = None,
        *,
        offset: int = 0,
        S_churn: float = 0.0,
        S_tmin: float = 0.0,
        S_tmax: float = float("inf"),
        S_noise: float = 1.0,
    ) -> None:
        timesteps = _timesteps(schedule, steps, spacing, offset, 18)
        self._build(
            schedule, timesteps, prediction=prediction, clip=clip,
            S_churn=S_churn, S_tmin=S_tmin, S_tmax=S_tmax, S_noise=S_noise,
        )  # fmt: skip


class LangevinSampler(ScheduledSampler):
    """Annealed Langevin dynamics (Song & Ermon 2019): `inner` rows at each noise level.

    step_size: u of x + u score + sqrt(2 u) z at the last level, sigma_L: epsilon of Song & Ermon
    2020, step_lr of both papers' code, half of epsilon in the first one's Algorithm 1. From
    2 sigma_L^2 on the chain diverges where the data are constant, and a warning says so. denoise:
    end with predicted x0. steps: all of the schedule's levels where the spacing implies no number.
    """

    solver = "langevin"

    def __init__(
        self,
        schedule: NoiseSchedule,
        steps: int | None = None,
        spacing: Spacing = "leading",
        prediction: str = "score",
        clip: float | None = None,
        *,
        offset: int = 0,
        inner: int = 100,
        step_size: float = 2e-5,
        denoise: bool = True,
    ) -> None:
        timesteps = _timesteps(schedule, steps, spacing, offset)
        self._build(
            schedule, timesteps, prediction=prediction, clip=clip, inner=inner,
            step_size=step_size, denoise=denoise,
        )  # fmt: skip
