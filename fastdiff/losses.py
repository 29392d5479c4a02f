"""Training objectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import ops
from .errors import one_of
from .prediction import PREDICTIONS, prediction_coefficients
from .schedule import NoiseSchedule

MIN_SNR_GAMMA = 5.0
Column = NDArray[np.float64]

# w(t) by name, from (SNR, k): SNR = alpha^2 / sigma^2; an error e in the model's output is an
# error of sqrt(k) e in x0
WEIGHTINGS: dict[str, Callable[[Column, Column], Column]] = {
    "simple": lambda snr, k: np.ones_like(snr),
    "min_snr": lambda snr, k: k * np.minimum(snr, MIN_SNR_GAMMA),
}


class DiffusionLoss:
    """Mean over elements of w(t) ||target - model(x_t, t)||^2, t uniform.

    | weighting | w(t) | source |
    |---|---|---|
    | simple | 1 | Ho et al. 2020, eq. 14 |
    | min_snr | min(SNR, 5) for an error in x0 | Hang et al. 2023, eq. 5 |

    min_snr is restated for the error in what the model predicts: min(SNR, 5) / SNR for eps,
    min(SNR, 5) / (SNR + 1) for v.

    Args:
        schedule: the noise schedule; t is an index into it.
        prediction: what the model outputs, a name in `fastdiff.schedule.PREDICTIONS`.
        weighting: a row of the table above.

    Attributes:
        weights: float64 [T], w(t).

    Raises:
        ValueError: unknown names, or a target or weight that is infinite somewhere.
    """

    def __init__(
        self, schedule: NoiseSchedule, prediction: str = "v", weighting: str = "simple"
    ) -> None:
        one_of("prediction", prediction, PREDICTIONS)
        one_of("weighting", weighting, WEIGHTINGS)
        self.schedule, self.prediction, self.weighting = schedule, prediction, weighting
        pm = prediction_coefficients(prediction, schedule.alpha, schedule.sigma)[:, 1]
        self.weights = WEIGHTINGS[weighting](np.exp(schedule.logsnr), pm**2)
        self._weights = torch.from_numpy(self.weights.astype(np.float32))

    def __call__(
        self, model: Callable[..., Any], x0: Tensor, t: Tensor | None = None, cond: Any = None
    ) -> Tensor:
        """The loss, a scalar, differentiable in the model's parameters.

        Args:
            model: called as model(x_t, t), or model(x_t, t, cond) when cond is given.
            x0: [B, ...] clean data, floating point.
            t: [B] int64 timesteps; drawn uniformly when None.
            cond: passed on to the model.
        """
        return self.per_sample(model, x0, t, cond).mean()

    def per_sample(
        self, model: Callable[..., Any], x0: Tensor, t: Tensor | None = None, cond: Any = None
    ) -> Tensor:
        """The loss of each sample, fp32 [B]; arguments as for calling."""
        return self.with_sums(model, x0, t, cond)[0]

    def with_sums(
        self, model: Callable[..., Any], x0: Tensor, t: Tensor | None = None, cond: Any = None
    ) -> tuple[Tensor, Tensor]:
        """`per_sample`'s losses, and the sums fp32 [T, 3] of `ops.weighted_mse` at each timestep.

        The sums say how large the unweighted errors are at each t, and may be added up over
        batches; nothing is read back from the device to make them.
        """
        if t is None:
            t = torch.randint(len(self.schedule), (len(x0),), device=x0.device)
        x_t, target = ops.noising(x0, t, self.schedule, prediction=self.prediction)
        output = model(x_t, t) if cond is None else model(x_t, t, cond)
        output = getattr(output, "sample", output)
        if output.shape != target.shape:
            raise ValueError(
                f"model output of shape {tuple(output.shape)}: must be {tuple(target.shape)}, "
                "as x0; a learned variance has no part in this loss"
            )
        self._weights = self._weights.to(x0.device, non_blocking=True)
        return ops.weighted_mse(output, target, self._weights, t)
