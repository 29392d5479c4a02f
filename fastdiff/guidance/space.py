"""Between what a model predicts and the data it means, inside a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import errors
from ..errors import one_of
from ..ops.layout import rows
from ..prediction import PREDICTIONS, prediction_coefficients
from ..schedule import NoiseSchedule


class DataSpace(nn.Module):
    """x0 = px x + pm m at whole timesteps, and back.

    Args:
        schedule: the model's; t is an index into it.
        prediction: what the model predicts: "eps", "x0", "v" or "score".

    Raises:
        ValueError: an unknown prediction, or one that says nothing of x0 where the schedule has
            alpha = 0.
    """

    columns: Tensor

    def __init__(self, schedule: NoiseSchedule, prediction: str) -> None:
        super().__init__()
        errors.is_a("schedule", schedule, NoiseSchedule)
        one_of("prediction", prediction, [name for name in PREDICTIONS if name != "edm"])
        columns = prediction_coefficients(prediction, schedule.alpha, schedule.sigma)[:, :2]
        self.register_buffer(
            "columns", torch.tensor(columns, dtype=torch.float32), persistent=False
        )

    def x0(self, x: Tensor, t: Tensor, m: Tensor) -> Tensor:
        """The data that m, predicted at state x, means."""
        px, pm = self._at(t, x)
        return px * x + pm * m

    def moved(self, x: Tensor, t: Tensor, m: Tensor, shift: Tensor) -> Tensor:
        """The prediction, of m's dtype, that means data further by `shift` than m does."""
        return m + (shift / self._at(t, x)[1]).to(m.dtype)

    def _at(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        errors.per_sample("t", t, torch.int64, "x", x)
        self.columns = self.columns.to(x.device)
        try:
            px, pm = self.columns.index_select(0, t).unbind(1)
        except (IndexError, RuntimeError) as error:  # found while it works: nothing is read back
            raise ValueError(f"t: must be within 0 and {len(self.columns) - 1}, {error}") from None
        return rows(px, x), rows(pm, x)
