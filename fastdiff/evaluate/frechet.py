"""The Fréchet distance between two sets of features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import errors

LARGEST = 1e100  # whose products float64 still holds


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The distance of two sets of features, each taken for a Gaussian; 0 if they are alike.

        FD = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    (Dowson & Landau 1982; for images Heusel et al. 2017), S the unbiased covariances. In
    float64, and without a square root of a matrix: where S = R'R, the trace of
    (S_a S_b)^(1/2) is the sum of the singular values of R_a R_b', and R is a factor of the
    centred features themselves (QR), so that nothing is squared. Features that span fewer
    dimensions than they have are no special case.

    It is biased upwards by the noise in mu and S, about as 1 / n: compare distances of equal
    numbers of images alone.

    Args:
        a, b: features [n, D], of any floating dtype; n may differ, and is 2 or more.

    Raises:
        TypeError, ValueError: other shapes or dtypes, or values that are not finite.
    """
    check_features("a", a)
    check_features("b", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"b: has {b.shape[1]} features, must have {a.shape[1]} as a has")
    (mean_a, root_a), (mean_b, root_b) = _moments(a), _moments(b)
    common = torch.linalg.matrix_norm(root_a @ root_b.T, "nuc")
    spread = root_a.square().sum() + root_b.square().sum() - 2 * common
    # rounding may leave a little less than nothing
    return max(0.0, ((mean_a - mean_b).square().sum() + spread).item())


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and R of the covariance R'R, in float64."""
    x = x.double()
    mean = x.mean(0)
    return mean, torch.linalg.qr(x - mean, mode="r").R / math.sqrt(len(x) - 1)


def check_features(name: str, value: Tensor) -> None:
    """Raise unless `value` is floating, finite, [n, D] with n of 2 or more."""
    errors.is_tensor(name, value)
    errors.has_dtype(name, value, (*errors.MODEL_DTYPES, torch.float64))
    if value.ndim != 2 or len(value) < 2 or not value.shape[1]:
        raise ValueError(f"{name}: has shape {tuple(value.shape)}, must be [n, D], n of 2 or more")
    if not (value.double().abs() <= LARGEST).all():
        raise ValueError(
            f"{name}: has values that are not finite, or beyond {LARGEST:g}; look at what made them"
        )
