"""What a network predicts, as data: eps, x0, v, score or EDM's preconditioned output."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import one_of

Array = NDArray[np.float64]

SIGMA_DATA = 0.5  # EDM's standard deviation of the data


def _edm(alpha: Array, sigma: Array) -> tuple[Array, ...]:
    s, d = sigma / alpha, SIGMA_DATA
    skip, out = d**2 / (s**2 + d**2), s * d / np.sqrt(s**2 + d**2)
    return skip / alpha, out, (1 - skip) / out, -skip * s / out


# What a network may be asked to predict, as (px, pm, tx, tz): the predicted data is
# x0 = px x_t + pm m for an output m, and the training target is tx x0 + tz z.
PREDICTIONS: dict[str, Callable[[Array, Array], tuple[ArrayLike, ...]]] = {
    "eps": lambda alpha, sigma: (1 / alpha, -sigma / alpha, 0.0, 1.0),
    "x0": lambda alpha, sigma: (0.0, 1.0, 1.0, 0.0),
    # Salimans & Ho 2022, v = alpha z - sigma x0; the divisor is 1 when variance is preserved.
    "v": lambda alpha, sigma: (
        alpha / (alpha**2 + sigma**2),
        -sigma / (alpha**2 + sigma**2),
        -sigma,
        alpha,
    ),
    "score": lambda alpha, sigma: (1 / alpha, sigma**2 / alpha, 0.0, -1 / sigma),
    # Karras et al. 2022, Table 1: c_skip and c_out, at sigma / alpha.
    "edm": _edm,
}


def prediction_coefficients(prediction: str, alpha: ArrayLike, sigma: ArrayLike) -> Array:
    """The columns (px, pm, tx, tz) of `PREDICTIONS` at levels (alpha, sigma): float64 [R, 4].

    Raises ValueError for an unknown prediction, or where the predicted x0 does not exist: at
    alpha = 0 an eps, score or edm output says nothing about x0.
    """
    one_of("prediction", prediction, PREDICTIONS)
    alpha, sigma = np.asarray(alpha, np.float64), np.asarray(sigma, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        columns = np.stack(np.broadcast_arrays(*PREDICTIONS[prediction](alpha, sigma), alpha), -1)
    if not np.isfinite(columns).all():
        raise ValueError(
            f"prediction={prediction!r}: undefined at alpha = 0 (zero terminal SNR); "
            "use prediction='v' or 'x0', or leave that timestep out (for example "
            "spacing='leading', or 'trailing' without its first timestep)"
        )
    return columns[..., :4]


def model_input(
    prediction: str, alpha: ArrayLike, sigma: ArrayLike, t: ArrayLike
) -> tuple[Array | float, Array]:
    """(c_in, time): a model is called with (c_in x, time) at level (alpha, sigma), timestep t.

    EDM's network takes x / sqrt(sigma^2 + SIGMA_DATA^2) and ln(sigma) / 4, at sigma / alpha
    (Karras et al. 2022, Table 1); every other takes x and t as they are.
    """
    if prediction != "edm":
        return 1.0, np.asarray(t, np.float64)
    alpha, sigma = np.asarray(alpha, np.float64), np.asarray(sigma, np.float64)
    level = sigma / alpha
    return 1 / (alpha * np.sqrt(level**2 + SIGMA_DATA**2)), np.log(level) / 4
