"""The objectives of diffusion models: a weighted squared error, the variational bound, or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from .. import errors, ops
from ..errors import one_of
from ..ops.layout import rows
from ..prediction import PREDICTIONS, model_input, prediction_coefficients
from ..schedule import NoiseSchedule
from .bound import Bound
from .device import at
from .model import Model, output_of
from .timesteps import uniform_timesteps
from .weightings import WEIGHTINGS, weights

HYBRID_LAMBDA = 0.001


class Noise(TypedDict, total=False):
    """Where the noise comes from; `ops.noising` says what each is."""

    noise: Tensor | None
    seed: int | Sequence[int] | None
    row: int
    first_index: int


class DiffusionLoss:
    """Mean over elements of w(t) ||target - model(x_t, t)||^2, t uniform; or the bound itself.

    | weighting | w(t) for an error in x0 | source |
    |---|---|---|
    | simple | 1 for the model's own output | Ho et al. 2020, eq. 14 |
    | constant | 1 | Salimans & Ho 2022, section 4 |
    | snr | SNR, which is 1 for an error in eps | the same |
    | snr_trunc | max(SNR, 1) | the same, "truncated SNR" |
    | v_mse | SNR + 1 | the same, "SNR+1" |
    | min_snr | min(SNR, 5) | Hang et al. 2023, eq. 5 |
    | p2 | SNR / (1 + SNR), which is 1 / (1 + SNR) in eps | Choi et al. 2022, k = gamma = 1 |
    | vlb | T / ln 2 (SNR(t-1) - SNR(t)) / 2 | Ho et al. 2020, eq. 12, with variance beta~ |
    | hybrid | simple + 0.001 vlb, with a learned variance | Nichol & Dhariwal 2021, eq. 16 |

    All are restated for the error in what the model predicts: min_snr is min(SNR, 5) / SNR for
    eps and min(SNR, 5) / (SNR + 1) for v. "vlb" is T L_t in bits per dimension, of which the mean
    over t is the bound without its prior; `fastdiff.losses.bound` has the formulas. With a learned
    variance it is all of L_t, the discretized likelihood at t = 0 included, and the variance's part
    of the channels is learnt; "hybrid" holds the mean fixed in its second part. Without one, L_0
    is the squared error of a Gaussian of variance beta~_1. For an "edm" prediction "simple" is the
    loss of Karras et al. 2022, equation 8, at the schedule's levels.

    Args:
        schedule: the noise schedule; t is an index into it.
        prediction: what the model outputs, a name in `fastdiff.schedule.PREDICTIONS`.
        weighting: a row of the table above.
        learned_variance: the model's output has twice the channels of x0, of which the second
            half is v in [-1, 1] (Nichol & Dhariwal 2021, equation 15, with (v + 1) / 2 for v).

    Attributes:
        weights: float64 [T], w(t) of the squared error.

    Raises:
        ValueError: unknown names, a target or weight that is infinite somewhere, or a learned
            variance that the weighting does not learn, or lacks.
    """

    @torch.inference_mode(False)  # its constants serve training, wherever it is made
    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: str,
        weighting: str = "simple",
        learned_variance: bool = False,
    ) -> None:
        errors.is_a("schedule", schedule, NoiseSchedule)
        one_of("prediction", prediction, PREDICTIONS)
        one_of("weighting", weighting, WEIGHTINGS)
        if learned_variance and weighting not in ("vlb", "hybrid"):
            raise ValueError(
                f"learned_variance=True: weighting={weighting!r} would leave the variance "
                "unlearnt; use 'hybrid' or 'vlb'"
            )
        if weighting == "hybrid" and not learned_variance:
            raise ValueError(
                "weighting='hybrid': needs learned_variance=True, and a model with twice the "
                "channels of x0"
            )
        self.schedule, self.prediction, self.weighting = schedule, prediction, weighting
        self.learned_variance = learned_variance
        self.weights = weights(schedule, prediction, weighting)
        self._weights = torch.from_numpy(self.weights.astype(np.float32))
        # (c_in, what the model is told of t, pm)
        levels = schedule.alpha, schedule.sigma
        c_in, told = model_input(prediction, *levels, np.arange(len(schedule)))
        pm = prediction_coefficients(prediction, *levels)[:, 1]
        columns = np.stack(np.broadcast_arrays(c_in, told, pm), 1)
        self._columns = torch.tensor(columns, dtype=torch.float32)
        self._bound = Bound(schedule)

    def __call__(
        self,
        model: Model,
        x0: Tensor,
        t: Tensor | None = None,
        cond: Any = None,
        **noise: Unpack[Noise],
    ) -> Tensor:
        """The loss, a scalar, differentiable in the model's parameters.

        Args:
            model: called as model(x_t, t), or model(x_t, t, cond) when cond is given; for an
                "edm" prediction as `prediction.model_input` says: (c_in x_t, ln(sigma) / 4).
            x0: [B, ...] clean data, floating point.
            t: [B] int64 timesteps; drawn uniformly when None.
            cond: passed on to the model.
            noise: z, as x0.
            seed: an int, or one a sample, that decides the noise, and t where it is drawn;
                without it and noise, torch's generators do.
            row: with the seed, say the training step.
            first_index: position of the first sample in the whole batch, of which x0 is a part.
        """
        return self.per_sample(model, x0, t, cond, **noise).mean()

    def per_sample(
        self,
        model: Model,
        x0: Tensor,
        t: Tensor | None = None,
        cond: Any = None,
        **noise: Unpack[Noise],
    ) -> Tensor:
        """The loss of each sample, fp32 [B]; arguments as for calling."""
        return self.with_sums(model, x0, t, cond, **noise)[0]

    def with_sums(
        self,
        model: Model,
        x0: Tensor,
        t: Tensor | None = None,
        cond: Any = None,
        *,
        noise: Tensor | None = None,
        seed: int | Sequence[int] | None = None,
        row: int = 0,
        first_index: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """`per_sample`'s losses, and the sums fp32 [T, 3] of `ops.weighted_mse` at each timestep.

        The sums say how large the unweighted squared errors are at each t, and may be added up
        over batches; nothing is read back from the device to make them.
        """
        errors.is_batch("x0", x0)
        if self.learned_variance and x0.dim() < 2:
            raise ValueError(f"x0: has shape {tuple(x0.shape)}, must be [B, C, ...]")
        T, device = len(self.schedule), x0.device
        if t is None:
            t = uniform_timesteps(T, len(x0), seed, row, first_index, device)
        x_t, target = ops.noising(
            x0, t, self.schedule, self.prediction, noise, seed, row=row, first_index=first_index
        )
        self._weights = at(device, self._weights)
        self._columns = at(device, self._columns)
        told = t
        if self.prediction == "edm":
            told = self._columns[t, 1]
            x_t *= rows(self._columns[t, 0], x_t)
        if not self.learned_variance:
            output = output_of(model, x_t, told, cond, x0.shape)
            return ops.weighted_mse(output, target, self._weights, t)
        shape = x0.shape[0], 2 * x0.shape[1], *x0.shape[2:]
        mean, v = output_of(model, x_t, told, cond, shape).chunk(2, 1)
        hybrid, fixed = self.weighting == "hybrid", mean.detach()
        simple, judged = (mean, fixed) if hybrid else (fixed, mean)
        losses, sums = ops.weighted_mse(simple, target, self._weights, t)
        error = rows(self._columns[t, 2], x0) * (target.float() - judged.float())
        bound = T * self._bound.terms(x0, error, (v.float() + 1) / 2, t)
        return losses + HYBRID_LAMBDA * bound if hybrid else bound, sums
