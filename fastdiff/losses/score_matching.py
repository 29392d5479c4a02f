"""Score matching for noise conditional score networks (Song & Ermon 2019).

    denoising   1/2 |s(x_t) + z / sigma|^2                      x_t = alpha x0 + sigma z
    sliced      1/2 |s(x_t)|^2 + v' grad(v' s(x_t))             with variance reduction
                1/2 (v' s(x_t))^2 + v' grad(v' s(x_t))          without; v ~ N(0, I)

each times sigma^2, which makes all levels count alike. s = grad ln p(x_t) minimises both: their
expectations differ by a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import errors, ops
from ..schedule import NoiseSchedule
from . import streams
from .device import at
from .diffusion import DiffusionLoss, Noise
from .model import Model, output_of
from .timesteps import uniform_timesteps


@lru_cache(maxsize=8)
def _error_in_noise(schedule: NoiseSchedule) -> DiffusionLoss:
    return DiffusionLoss(schedule, "score", "snr")


def denoising_score_matching(
    model: Model,
    x0: Tensor,
    schedule: NoiseSchedule,
    t: Tensor | None = None,
    cond: Any = None,
    **noise: Unpack[Noise],
) -> Tensor:
    """The denoising loss of each sample, fp32 [B], summed over dimensions.

    Vincent 2011; Song & Ermon 2019, equations 5 and 6. The target -(x_t - alpha x0) / sigma^2 and
    x_t are made in one pass, the loss in another.

    Args:
        model: the score, called as model(x_t, t), or model(x_t, t, cond).
        x0: [B, ...] clean data.
        schedule: the levels, as `NoiseSchedule.geometric`; t is an index into it, 0 least noisy.
        t, cond, noise, seed, row, first_index: as `DiffusionLoss` takes them.

    Raises:
        ValueError, TypeError: other shapes, dtypes, or t out of range.
    """
    errors.is_a("schedule", schedule, NoiseSchedule)
    mean = _error_in_noise(schedule).per_sample(model, x0, t, cond, **noise)
    return x0.shape[1:].numel() / 2 * mean


def sliced_score_matching(
    model: Model,
    x0: Tensor,
    schedule: NoiseSchedule,
    t: Tensor | None = None,
    cond: Any = None,
    *,
    variance_reduction: bool = True,
    noise: Tensor | None = None,
    projection: Tensor | None = None,
    seed: int | Sequence[int] | None = None,
    row: int = 0,
    first_index: int = 0,
) -> Tensor:
    """The sliced loss of each sample, fp32 [B], summed over dimensions; it knows no noise target.

    Song et al. 2019, equations 8 (with variance reduction) and 7, at each noise level as in Song &
    Ermon 2019, section 3. One projection a sample. The gradient with respect to x_t is taken of
    the model itself, so that training differentiates it twice: our U-Net as it is made does, one
    with compiled blocks or an optimized one does not.

    Args:
        model, x0, schedule, t, cond, seed, row, first_index: as `denoising_score_matching`.
        variance_reduction: 1/2 |s|^2, the expectation, in place of 1/2 (v' s)^2.
        noise: z, as x0.
        projection: v, as x0; made of the seed when None, apart from the noise.

    Raises:
        ValueError, TypeError: other shapes, dtypes, or t out of range.
        RuntimeError: the model cannot be differentiated twice.
    """
    errors.is_batch("x0", x0)
    errors.is_a("schedule", schedule, NoiseSchedule)
    if seed is None:
        seed = int(torch.randint(1 << 62, ()))
    if t is None:
        t = uniform_timesteps(len(schedule), len(x0), seed, row, first_index, x0.device)
    if projection is None:
        projection = streams.draw(
            streams.PROJECTION, x0.shape, seed, row, first_index, x0.device, bits=False
        )
    errors.like("projection", projection, "x0", x0)
    errors.has_dtype("projection", projection, errors.MODEL_DTYPES)
    flat = len(x0), x0.shape[1:].numel()
    with torch.no_grad():
        given = {"noise": noise} if noise is not None else {"seed": seed}
        where = {"row": row, "first_index": first_index}
        x_t, _ = ops.noising(x0, t, schedule, "score", **given, **where)  # type: ignore[arg-type]
    x_t.requires_grad_()
    with torch.enable_grad():
        try:
            # the other kernels of attention have no second derivative
            with sdpa_kernel(SDPBackend.MATH):
                score = output_of(model, x_t, t, cond, x0.shape).float()
            along = (score * projection).reshape(flat).sum(1)
            (slope,) = torch.autograd.grad(along.sum(), x_t, create_graph=True)
        except RuntimeError as error:
            raise RuntimeError(
                "model: sliced score matching differentiates it twice, which it does not allow "
                f"({error}); use a network of plain torch layers, not compiled, or "
                "denoising_score_matching"
            ) from error
        curved = (slope.float() * projection).reshape(flat).sum(1)
        square = score.square().reshape(flat).sum(1) if variance_reduction else along**2
    variance = torch.tensor(np.square(schedule.sigma), dtype=torch.float32)
    return at(t.device, variance)[t] * (square / 2 + curved)
