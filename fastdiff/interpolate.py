"""Spherical interpolation between noises, for pictures of what lies between two samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import errors


def interpolate(x_a: Tensor, x_b: Tensor, fractions: Sequence[float] | Tensor) -> Tensor:
    """Walk from x_a to x_b along the great circle of each sample (Shoemake 1985; DDIM, eq. 67).

        x_f = sin((1 - f) theta) / sin(theta) x_a + sin(f theta) / sin(theta) x_b

    x_a, x_b: [B, ...], floating point. fractions: F numbers, 0 is x_a and 1 is x_b. Returns
    [F, B, ...] in x_a's dtype; theta is the angle between the two, sample by sample (a straight
    line where it is 0). ValueError for other shapes, or opposite samples: no one way between them.
    """
    errors.is_tensor("x_a", x_a)
    errors.like("x_b", x_b, "x_a", x_a)
    errors.has_dtype("x_b", x_b, (x_a.dtype,))
    f = fractions
    if not isinstance(f, Tensor):
        f = torch.from_numpy(errors.numbers("fractions", f).astype(np.float64))
    if f.dim() != 1 or f.is_complex() or not f.isfinite().all():
        raise ValueError(
            f"fractions: is {f.dtype} of shape {tuple(f.shape)}, must be a list of finite numbers"
        )
    f = f.to(x_a.device, torch.float64)
    if x_a.dim() < 2 or not x_a.is_floating_point():
        raise ValueError(
            f"x_a: is {x_a.dtype} of shape {tuple(x_a.shape)}, must be floating point [B, ...]"
        )
    a, b = x_a.double().flatten(1), x_b.double().flatten(1)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1, eps=0).clamp(-1, 1)
    theta = torch.arccos(cosine.nan_to_num(1.0))[:, None]
    if bool((torch.pi - theta < 1e-6).any()):
        raise ValueError("x_a, x_b: are opposite, so no shortest way joins them; change one a bit")
    f = f.reshape(-1, 1, 1)
    near = theta < 1e-6
    sine = torch.where(near, 1.0, theta.sin())
    weight_a = torch.where(near, 1 - f, ((1 - f) * theta).sin() / sine)
    weight_b = torch.where(near, f, (f * theta).sin() / sine)
    return (weight_a * a + weight_b * b).to(x_a.dtype).reshape(len(f), *x_a.shape)
