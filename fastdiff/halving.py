"""One halving of progressive distillation as tables: a student's step for two of its teacher's.

At each of the student's levels t the teacher takes two deterministic DDIM steps, unclipped, from
z_t to z_m and on to z_s. The student's target is the x* with which one step goes from z_t to z_s:

    x* = (z_s - r z_t) / (alpha_s - r alpha_t),   r = sigma_s / sigma_t

(Salimans & Ho 2022, "Progressive Distillation", Algorithm 2). In the last row s is the data, r = 0,
and x* the x that the teacher predicts at z_m: the paper's case i = 0. A student that predicts eps
or v is given those of x* and z_t. All this is linear, so that `ops.teacher_step` makes z_m after
the teacher's first call, and the target after its second, by one row of five numbers each.

The divisor is small where steps are short, and its inverse magnifies the float32 rounding of the
states: with 8 teacher steps x* is right to 1e-6, with 1000 to 2e-4 (cosine) or 2e-3 (linear).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .errors import one_of
from .levels import integers, levels
from .prediction import prediction_coefficients
from .schedule import Array, NoiseSchedule
from .tables import ddim

PREDICTIONS = ("eps", "x0", "v", "score")  # whose model takes the state as it is


@dataclass(frozen=True)
class Halving:
    """The student's levels, noisiest first, and what the teacher does at each; R rows.

    t, middle   int64 [R], where the teacher is called: with z_t, then with z_m. t are the
                student's timesteps
    step        float64 [R, 5], `ops.teacher_step`'s rows that make z_m of z_t
    target      float64 [R, 5], its rows that make the student's target of z_m and z_t
    """

    t: NDArray[np.int64]
    middle: NDArray[np.int64]
    step: Array
    target: Array

    def tensors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(t, middle, step, target) as int64 and float32 tensors, for a loop on a device."""
        integer, real = torch.int64, torch.float32
        return (
            torch.tensor(self.t, dtype=integer, device=device),
            torch.tensor(self.middle, dtype=integer, device=device),
            torch.tensor(self.step, dtype=real, device=device),
            torch.tensor(self.target, dtype=real, device=device),
        )


def halve(
    schedule: NoiseSchedule,
    timesteps: ArrayLike,
    *,
    prediction: str = "eps",
    target: str | None = None,
) -> Halving:
    """The tables by which a student of half the steps learns from a teacher that takes `timesteps`.

    Args:
        schedule: the noise schedule.
        timesteps: the teacher's, descending and even in number; `schedule.timesteps` gives them.
            `NoiseSchedule.logsnr_cosine` with trailing timesteps is the paper's.
        prediction: what the teacher's output is: "eps", "x0", "v" or "score".
        target: what the student's is to be, likewise; as the teacher's by default.

    Raises:
        ValueError: timesteps out of order or range or odd in number, an unknown prediction, or one
            that says nothing about x0 at alpha = 0.
    """
    target = prediction if target is None else target
    one_of("prediction", prediction, PREDICTIONS)
    one_of("target", target, PREDICTIONS)
    teacher = ddim(schedule, timesteps, prediction=prediction)
    if len(teacher) % 2:
        raise ValueError(f"timesteps: has {len(teacher)}, must have an even number, two a row")
    t, middle = integers("timesteps", timesteps).reshape(-1, 2).T
    at = levels(schedule, t)
    r = at.sigma_next / at.sigma
    gap = at.alpha_next - r * at.alpha
    # from x* to the output m that says so at z_t: x* = px z_t + pm m
    px, pm = prediction_coefficients(target, at.alpha, at.sigma).T[:2]
    step = np.stack([teacher.px, teacher.pm, teacher.a, teacher.b, np.zeros(len(teacher))], 1)
    last = step[1::2].copy()
    last[:, 2:4] /= (gap * pm)[:, None]
    last[:, 4] = (-r / gap - px) / pm
    return Halving(t=t, middle=middle, step=step[::2], target=last)
