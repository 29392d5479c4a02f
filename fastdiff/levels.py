"""Levels: where each row of a table starts and where it goes, looked up and checked."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import errors
from .schedule import Array, NoiseSchedule


class Levels(NamedTuple):
    """Each row's level and the level it goes to, float64 [R]."""

    t: NDArray[np.int64]
    alpha: Array
    sigma: Array
    alpha_next: Array
    sigma_next: Array

    @property
    def beta(self) -> Array:
        """Variance of x_t given x_t': sigma^2 - (alpha / alpha')^2 sigma'^2."""
        return self.sigma**2 - (self.alpha / self.alpha_next * self.sigma_next) ** 2

    @property
    def beta_tilde(self) -> Array:
        """Variance of x_t' given x_t and x0: beta sigma'^2 / sigma^2."""
        return self.beta * (self.sigma_next / self.sigma) ** 2


def levels(
    schedule: NoiseSchedule, timesteps: ArrayLike, next_timesteps: ArrayLike | None = None
) -> Levels:
    """Look up both ends of every row, after checking them."""
    errors.is_a("schedule", schedule, NoiseSchedule)
    t = integers("timesteps", timesteps)
    after = np.append(t[1:], -1)
    to = after if next_timesteps is None else integers("next_timesteps", next_timesteps)
    if t.size == 0 or to.shape != t.shape:
        raise ValueError(
            f"timesteps: has {t.size} and next_timesteps {to.size}; give one of each a row, "
            "at least one"
        )
    _refuse("timesteps", t, (t < 0) | (t >= len(schedule)), f"must be in 0..{len(schedule) - 1}")
    _refuse("timesteps", t, np.append(False, np.diff(t) >= 0), "must be below the one before it")
    _refuse("next_timesteps", to, (to > t) | (to < -1), "must be in -1..its row's timestep")
    return Levels(t, *level_at(schedule, t), *level_at(schedule, to))


def level_at(schedule: NoiseSchedule, t: NDArray[np.int64]) -> tuple[Array, Array]:
    """(alpha, sigma) at timesteps t, where -1 is the data."""
    return np.append(schedule.alpha, 1.0)[t], np.append(schedule.sigma, 0.0)[t]


def integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = errors.numbers(name, values, "iu")
    if array.ndim != 1:
        raise TypeError(f"{name}: must be a list of integers, got {values!r}")
    return array.astype(np.int64)


def _refuse(name: str, values: NDArray[np.int64], bad: NDArray[np.bool_], wanted: str) -> None:
    if bad.any():
        i = int(bad.argmax())
        raise ValueError(
            f"{name}[{i}]={values[i]}: {wanted}; schedule.timesteps() gives such lists"
        )
