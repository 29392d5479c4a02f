"""The objective of a classifier of noisy images: cross entropy at every timestep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import errors, ops
from ..schedule import NoiseSchedule
from .diffusion import Noise
from .model import Model
from .timesteps import uniform_timesteps


class ClassifierLoss:
    """Mean over samples of -ln p(y | x_t), t uniform (Dhariwal & Nichol 2021, section 4).

    Args:
        schedule: the noise schedule; t is an index into it.

    Attributes:
        weights: float64 [T], all 1: of the timesteps.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        errors.is_a("schedule", schedule, NoiseSchedule)
        self.schedule, self.weights = schedule, np.ones(len(schedule))

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
            model: called as model(x_t, t); gives logits [B, classes].
            x0: [B, ...] clean data, floating point.
            t: [B] int64 timesteps; drawn uniformly when None.
            cond: int64 [B], the classes.
            noise: as for calling `DiffusionLoss`.

        Raises:
            ValueError, TypeError: no classes, or logits and classes that do not fit.
        """
        return self.with_sums(model, x0, t, cond, **noise)[0].mean()

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
        """The losses, fp32 [B]; at each t their number, sum and sum of squares, [T, 3]."""
        errors.is_callable("model", model)
        errors.is_batch("x0", x0)
        if cond is None:
            raise ValueError("cond: is None; a classifier learns from the classes, int64 [B]")
        errors.per_sample("cond", cond, torch.int64, "x0", x0)
        T, device = len(self.schedule), x0.device
        if t is None:
            t = uniform_timesteps(T, len(x0), seed, row, first_index, device)
        x_t, _ = ops.noising(
            x0, t, self.schedule, "x0", noise, seed, row=row, first_index=first_index
        )
        logits = model(x_t, t)
        errors.is_tensor("model: its output", logits)
        if logits.dim() != 2 or len(logits) != len(x0):
            raise ValueError(
                f"model: its output has shape {tuple(logits.shape)}, must be "
                f"({len(x0)}, classes): logits"
            )
        errors.in_range("cond", cond, logits.shape[1])  # torch leaves out a class of -100
        losses = F.cross_entropy(logits.float(), cond, reduction="none")
        seen = losses.detach()
        terms = torch.stack((torch.ones_like(seen), seen, seen.square()), 1)
        return losses, terms.new_zeros(T, 3).index_add(0, t, terms)
