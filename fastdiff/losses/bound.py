"""The variational bound L_vlb = L_0 + ... + L_{T-1} + L_T, term by term.

With primes for the level below, L_t is the divergence of the posterior N(mu~, beta~) of x' given
x_t and x0 from the model's N(mu, var), which an error e in the predicted x0 moves by
mu~ - mu = alpha' beta / sigma^2 e, with d = ln(var / beta~) (Ho et al. 2020, equations 5 to 8):

    L_t = (d + exp(-d) - 1) / 2 + w_t exp(-d) e^2,   w_t = (alpha' beta / sigma^2)^2 / (2 beta~)

which is (SNR' - SNR) / 2 for t > 0. L_0 is the negative log-likelihood of x0's bin of 256 under
N(x0 - e, var) (equation 13, with the exact Phi), and there beta~_0 = 0 is replaced by beta~_1.

var = beta~^(1 - f) beta^f: f = 0 is the variance "small"; f = 1 is "large", but for t = 0, where
iDDPM keeps beta~_1; and f = (v + 1) / 2 is "learned_range", v being the model's extra channels
(Nichol & Dhariwal 2021, equation 15).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.special import log_ndtr

from ..ops.layout import rows
from ..schedule import Array, NoiseSchedule
from .device import at

HALF_BIN = 1 / 255


def posterior_variance(schedule: NoiseSchedule) -> Array:
    """beta~, float64 [T], with beta~_1 in place of beta~_0 = 0."""
    tilde = schedule.beta_tilde
    return np.append(tilde[1] if len(tilde) > 1 else schedule.betas[0], tilde[1:])


def error_weight(schedule: NoiseSchedule) -> Array:
    """w_t, float64 [T]."""
    shift = np.append(1.0, schedule.alpha[:-1]) * schedule.betas / schedule.sigma**2
    return shift**2 / (2 * posterior_variance(schedule))


class Bound:
    """L_0 .. L_{T-1} of a schedule, in bits per dimension."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        tilde = posterior_variance(schedule)
        columns = error_weight(schedule), np.log(schedule.betas / tilde), np.sqrt(tilde)
        self._columns = torch.tensor(np.stack(columns, 1), dtype=torch.float32)

    def terms(self, x0: Tensor, error: Tensor, fraction: Tensor, t: Tensor) -> Tensor:
        """L_t of each sample, fp32 [B], differentiable in the error and the fraction.

        Args:
            x0: [B, ...] the data, in [-1, 1].
            error: fp32, as x0: x0 less the predicted x0.
            fraction: f, fp32, as x0 or [B, 1, ...].
            t: int64 [B].
        """
        self._columns = at(t.device, self._columns)
        weight, ratio, std = (rows(column, error) for column in self._columns[t].unbind(1))
        d = fraction * ratio
        each = (d + torch.expm1(-d)) / 2 + weight * torch.exp(-d) * error.square()
        # the likelihood of all, chosen from by t: a GPU's t is not read back
        if torch.compiler.is_compiling() or t.device.type != "cpu" or bool((t == 0).any()):
            first = rows(t == 0, error)
            # of the others, one without an error: an infinite gradient times 0 would be NaN
            wrong = torch.where(first, error, 0.0)
            likelihood = log_likelihood(x0, wrong, torch.where(first, std * torch.exp(d / 2), 1.0))
            each = torch.where(first, -likelihood, each)
        return each.reshape(len(t), -1).mean(1) / math.log(2)


def log_likelihood(x0: Tensor, error: Tensor, std: Tensor) -> Tensor:
    """ln of the mass that N(x0 - error, std^2) has in x0's bin, the outermost reaching infinity.

    By symmetry a bin below the mean has the mass of its mirror image, so that differences of Phi
    are taken in the lower tail, where logarithms lose nothing.
    """
    below = -error.abs()
    upper, lower = log_ndtr((below + HALF_BIN) / std), log_ndtr((below - HALF_BIN) / std)
    inside = upper + torch.log(-torch.expm1(lower - upper))
    edge = log_ndtr((HALF_BIN - x0.sign() * error) / std)
    return torch.where(x0.abs() > 0.999, edge, inside)


def prior(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """L_T of each sample in bits per dimension, [B]: q(x_T | x0) against N(0, p).

    p is 1, and where variance explodes that of x_T itself (Ho et al. 2020, section 3.1).
    """
    alpha, var = float(schedule.alpha[-1]), float(schedule.sigma[-1]) ** 2
    p = 1.0 if schedule.variance_preserving else var
    square = x0.double().square().reshape(len(x0), -1).mean(1)
    return (var / p - 1 - math.log(var / p) + alpha**2 / p * square) / (2 * math.log(2))
