"""Progressive distillation's objective: one step of a student against two of its teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .. import errors, ops
from ..errors import one_of
from ..halving import halve
from ..rollout import begin, check_conditions, placement, unconditional
from ..schedule import NoiseSchedule
from . import streams
from .device import at
from .diffusion import Noise
from .model import Model, output_of
from .timesteps import uniform_timesteps
from .weightings import WEIGHTINGS, weights

_BOUND = ("vlb", "hybrid")  # weightings that belong to a likelihood, which students have none of


class DistillationLoss:
    """Mean over elements of w(t) ||target - student(z_t, t)||^2, t uniform over its timesteps.

    z_t is noised data. From there the teacher takes two deterministic DDIM steps; the target is
    the output with which one of the student's goes as far (Salimans & Ho 2022, Algorithm 2;
    `fastdiff.halving` has the formulas). With guidance, what is distilled is the guided teacher
    (w + 1) m_cond - w m_uncond (Meng et al. 2022), and a student's step is one evaluation.

    The student's timesteps are every second of the teacher's; a row i is a place among them. So
    `weights` and sums have R rows where `DiffusionLoss`'s have T.

    Args:
        teacher: called as model(z, t[, cond]) without gradients; `fastdiff.optimize(model)` is
            faster. If it has `config.guidance_max`, as model(z, t, cond, w).
        schedule: the teacher's noise schedule.
        timesteps: those that the teacher takes, descending, even in number.
        prediction: what the teacher outputs: "eps", "x0", "v" or "score".
        target: what the student is to output, likewise; as the teacher by default.
        weighting: "snr_trunc", "snr", "v_mse", "constant", ... of `DiffusionLoss`.
        guidance: None; the weight w of a teacher that is called with the condition and without;
            or (low, high), from which a w is drawn for each sample and given to the student too,
            student(z, t, cond, w).

    Attributes:
        halving: the levels and coefficients, R rows.
        weights: float64 [R], w(t) of the squared error.
        draws_weight, takes_weight: whether student and teacher have the weight as an input.

    Raises:
        ValueError: unknown names, a teacher that says that it predicts something else, timesteps
            that do not halve, or a target or weight that is infinite somewhere.
    """

    def __init__(
        self,
        teacher: Model,
        schedule: NoiseSchedule,
        timesteps: ArrayLike,
        prediction: str = "v",
        target: str | None = None,
        weighting: str = "snr_trunc",
        guidance: float | tuple[float, float] | None = None,
    ) -> None:
        target = prediction if target is None else target
        one_of("weighting", weighting, [name for name in WEIGHTINGS if name not in _BOUND])
        if isinstance(guidance, tuple):
            ends = [errors.number("guidance", w) for w in guidance]
            if len(ends) != 2 or ends[0] > ends[1]:
                raise ValueError(f"guidance={guidance}: must be one weight, or (low, high)")
            guidance = ends[0], ends[1]
        elif guidance is not None:
            guidance = errors.number("guidance", guidance)
        self.teacher, self.schedule, self.guidance = teacher, schedule, guidance
        self.prediction, self.target, self.weighting = prediction, target, weighting
        self.halving = halve(schedule, timesteps, prediction=prediction, target=target)
        with np.errstate(divide="ignore", invalid="ignore"):
            self.weights = weights(schedule, target, weighting)[self.halving.t]
        if not np.isfinite(self.weights).all():
            raise ValueError(
                f"weighting={weighting!r}: is infinite at alpha = 0; use 'v_mse' or 'constant', "
                "or leave that timestep out"
            )
        errors.is_callable("teacher", teacher)
        begin(teacher, prediction)
        self._dtype, _ = placement(teacher)
        self.draws_weight = isinstance(guidance, tuple)
        config = getattr(teacher, "config", None)
        self.takes_weight = getattr(config, "guidance_max", None) is not None
        if self.takes_weight and not self.draws_weight:
            raise ValueError(
                f"guidance={guidance}: this teacher takes the weight as an input; give the range "
                "(low, high) that its student is to learn, or settle it: teacher.at_guidance(w)"
            )
        self._tables: tuple[Tensor, ...] = self.halving.tensors()
        self._weights = torch.from_numpy(self.weights.astype(np.float32))

    def __call__(
        self,
        student: Model,
        x0: Tensor,
        i: Tensor | None = None,
        cond: Any = None,
        **noise: Unpack[Noise],
    ) -> Tensor:
        """The loss, a scalar, differentiable in the student's parameters.

        Args:
            student: called as student(z_t, t[, cond[, w]]).
            x0: [B, ...] clean data, floating point.
            i: int64 [B] rows; drawn uniformly when None.
            cond: passed on to both networks; needed where there is guidance.
            noise: as for calling `DiffusionLoss`.
        """
        return self.with_sums(student, x0, i, cond, **noise)[0].mean()

    def with_sums(
        self,
        student: Model,
        x0: Tensor,
        i: Tensor | None = None,
        cond: Any = None,
        *,
        noise: Tensor | None = None,
        seed: int | Sequence[int] | None = None,
        row: int = 0,
        first_index: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The loss of each sample, fp32 [B], and the sums fp32 [R, 3] of `ops.weighted_mse`."""
        errors.is_callable("student", student)
        errors.is_batch("x0", x0)
        errors.has_dtype("x0", x0, errors.MODEL_DTYPES)
        device, batch = x0.device, len(x0)
        if i is None:
            i = uniform_timesteps(len(self.weights), batch, seed, row, first_index, device)
        errors.per_sample("i", i, torch.int64, "x0", x0)
        errors.in_range("i", i, len(self.weights))
        if self.guidance is not None:
            if cond is None:
                raise ValueError("cond: guidance needs a condition to strengthen; give cond")
            errors.is_tensor("cond", cond)
            check_conditions(batch, cond=cond)
        self._tables = tuple(at(device, table) for table in self._tables)
        self._weights = at(device, self._weights)
        w: float | Tensor | None = None
        if isinstance(self.guidance, tuple):
            w = self._drawn(self.guidance, batch, seed, row, first_index, device)
        elif self.guidance is not None:
            w = self.guidance
        t = self._tables[0][i]
        if noise is not None:
            errors.like("noise", noise, "x0", x0)
            errors.has_dtype("noise", noise, (x0.dtype,))
            noise = noise.float()
        z_t, _ = ops.noising(
            x0.float(), t, self.schedule, "x0", noise, seed, row=row, first_index=first_index
        )
        target = self.target_of(z_t, i, cond, w)
        taught = partial(student, w=w) if self.draws_weight else student
        output = output_of(taught, z_t, t, cond, z_t.shape)
        return ops.weighted_mse(output, target, self._weights, i)

    @torch.no_grad()
    def target_of(
        self, z_t: Tensor, i: Tensor, cond: Any = None, w: float | Tensor | None = None
    ) -> Tensor:
        """What the student is to output at z_t, fp32 [B, ...], in the rows i, int64 [B].

        w: the guidance weight, a float or fp32 [B].
        """
        t, middle, step, target = (at(z_t.device, table) for table in self._tables)
        m, guided = self._output(z_t, t[i], cond, w)
        z_m = ops.teacher_step(z_t, m, step, i, **guided)
        m, guided = self._output(z_m, middle[i], cond, w)
        return ops.teacher_step(z_m, m, target, i, z_t=z_t, **guided)

    def _output(
        self, z: Tensor, t: Tensor, cond: Any, w: float | Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Its output; with the one without condition and the weight, where these combine."""
        z = z.to(self._dtype)
        if w is None or self.takes_weight:
            teacher = self.teacher if w is None else partial(self.teacher, w=w)
            return output_of(teacher, z, t, cond, z.shape), {}
        z, t = torch.cat((z, z)), torch.cat((t, t))
        both = torch.cat((cond, unconditional(self.teacher, cond, None)))
        m, m_uncond = output_of(self.teacher, z, t, both, z.shape).chunk(2)
        return m, {"m_uncond": m_uncond, "w": w}

    def _drawn(
        self,
        bounds: tuple[float, float],
        batch: int,
        seed: int | Sequence[int] | None,
        row: int,
        first_index: int,
        device: torch.device,
    ) -> Tensor:
        """A guidance weight for each sample, uniform between the bounds: fp32 [B]."""
        low, high = bounds
        if seed is None:
            unit = torch.rand(batch, device=device)
        else:
            shape = batch, 1
            words = streams.draw(streams.GUIDANCE, shape, seed, row, first_index, device, bits=True)
            unit = words.to(torch.int64).flatten().double().mul(2**-32).float()
        return low + (high - low) * unit
