"""Dynamic thresholding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import errors
from ..ops.layout import rows
from ..rollout import Model, placement
from ..schedule import NoiseSchedule
from .outputs import check_call, joined, parts
from .space import DataSpace


class DynamicThreshold(nn.Module):
    """A model whose predicted x0 is clipped to its own percentile, and scaled back to [-1, 1].

        s = max(1, the percentile p of |D|),   D = clamp(D, -s, s) / s      D: predicted x0

    of each sample by itself. Saharia et al. 2022, "Imagen", section 2.3. Around a `Guided` model
    it keeps large weights from saturating; it also goes around a model without guidance. To be
    sampled without a clip. Called as the model; returns float32.

    Example:
        >>> from fastdiff import DDIMSampler, load
        >>> from fastdiff.guidance import Guided
        >>> net = load("fashion-mnist")
        >>> model = DynamicThreshold(Guided(net, w=4.0), net.schedule, net.prediction)
        >>> sampler = DDIMSampler(net.schedule, 10, prediction=net.prediction)
        >>> sampler.sample(model, (2, 1, 32, 32), cond=torch.tensor([0, 9])).shape
        torch.Size([2, 1, 32, 32])

    Args:
        model: called as model(x, t) or model(x, t, cond).
        schedule, prediction: the model's, as `DataSpace` takes them.
        percentile: p, as a fraction; the paper's is 0.995.

    Raises:
        ValueError, TypeError: percentile outside (0, 1], others as `DataSpace`; at the call, t
            that is not int64 [B].
    """

    model: Any
    input_dtype = torch.float32

    def __init__(
        self, model: Model, schedule: NoiseSchedule, prediction: str, percentile: float = 0.995
    ) -> None:
        super().__init__()
        errors.is_callable("model", model)
        if not 0 < errors.number("percentile", percentile) <= 1:
            raise ValueError(f"percentile={percentile}: must be in (0, 1]")
        self.model, self.percentile = model, percentile
        self.space = DataSpace(schedule, prediction)

    def forward(self, x: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        check_call(x, t)
        m, _, v = parts(self.model(x.to(placement(self.model)[0]), t, *cond), x, guided=False)
        data = self.space.x0(x, t, m)
        s = rows(_quantile(data.abs().flatten(1), self.percentile).clamp(min=1), x)
        return joined(self.space.moved(x, t, m, data.clamp(-s, s) / s - data), v)

    def extra_repr(self) -> str:
        return f"percentile={self.percentile}"

    @property
    def prediction(self) -> str | None:
        """What the model says that it predicts, as this one does then."""
        return getattr(self.model, "prediction", None)

    @property
    def prepare_rows(self) -> Callable[..., None]:
        """An optimized model's, which is told what calls will come; others have none."""
        return self.model.prepare_rows


def _quantile(values: Tensor, fraction: float) -> Tensor:
    """Of each row, linear between the two nearest; torch.quantile refuses 2^24 elements."""
    place = fraction * (values.shape[1] - 1)
    low = math.floor(place)
    top = values.topk(values.shape[1] - low, dim=1).values
    return torch.lerp(top[:, -1], top[:, max(-2, -top.shape[1])], place - low)
