"""Precision and recall: are the images like real ones, and are they as varied?"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spacing import count
from .frechet import check_features

NEIGHBOURS = 3  # the paper's k
ROWS = 1000  # of a block of distances: 10,000 columns of it are 80 MB


def precision_recall(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """The part of fake that lies among real, and the part of real that lies among fake.

    A set's region is the union of balls around its points, each reaching to the point's k-th
    nearest neighbour in the set (Kynkäänniemi et al. 2019, "Improved Precision and Recall
    Metric for Assessing Generative Models", eq. 1 and 2). In float64, block by block: memory
    grows with the number of points, not with its square.

    Args:
        real, fake: features [n, D], n greater than k; the numbers should be equal.
        k: neighbours; the paper's is 3.

    Raises:
        TypeError, ValueError: other shapes, or values that are not finite.
    """
    for name, value in (("real", real), ("fake", fake)):
        check_features(name, value)
        if not 0 < count("k", k, 0) < len(value):
            raise ValueError(f"k={k}: must be 1 or more and less than {name}'s {len(value)} points")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"fake: has {fake.shape[1]} features, must have {real.shape[1]} as real")
    real, fake = real.double(), fake.double()
    return _among(fake, real, k), _among(real, fake, k)


def _among(points: Tensor, region: Tensor, k: int) -> float:
    # the nearest point of a set to one of its own is itself
    radius = torch.cat([_squared(x, region).kthvalue(k + 1).values for x in region.split(ROWS)])
    inside = [(_squared(x, region) <= radius).any(1) for x in points.split(ROWS)]
    return torch.cat(inside).double().mean().item()


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances [len(x), len(y)] of rows."""
    sums = x.square().sum(1)[:, None] + y.square().sum(1)
    return torch.addmm(sums, x, y.T, alpha=-2.0)
