"""Weights of the squared error by timestep, as data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..prediction import prediction_coefficients
from ..schedule import NoiseSchedule
from .bound import error_weight

MIN_SNR_GAMMA = 5.0
Column = NDArray[np.float64]

# w(t) by name, from (SNR, k, L): SNR = alpha^2 / sigma^2; an error e in the model's output is an
# error of sqrt(k) e in x0; L weighs that one in the variational bound
WEIGHTINGS: dict[str, Callable[[Column, Column, Column], Column]] = {
    "simple": lambda snr, k, bound: np.ones_like(snr),
    "constant": lambda snr, k, bound: k,
    "snr": lambda snr, k, bound: k * snr,
    "snr_trunc": lambda snr, k, bound: k * np.maximum(snr, 1),
    "v_mse": lambda snr, k, bound: k * (snr + 1),
    "min_snr": lambda snr, k, bound: k * np.minimum(snr, MIN_SNR_GAMMA),
    "p2": lambda snr, k, bound: k * snr / (1 + snr),
    "vlb": lambda snr, k, bound: k * bound,
    "hybrid": lambda snr, k, bound: np.ones_like(snr),
}


def weights(schedule: NoiseSchedule, prediction: str, weighting: str) -> Column:
    """w(t), float64 [T], of the squared error in what the model predicts."""
    pm = prediction_coefficients(prediction, schedule.alpha, schedule.sigma)[:, 1]
    bound = len(schedule) / np.log(2) * error_weight(schedule)
    return WEIGHTINGS[weighting](np.exp(schedule.logsnr), pm**2, bound)
