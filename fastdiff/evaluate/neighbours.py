"""Nearest neighbours in pixels: are images made, or remembered?"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from tqdm import tqdm

from .. import errors

ROWS, COLUMNS = 2000, 10_000  # of a block of distances: 80 MB
VALUES = 1 << 22  # of pixels that are converted at a time: 34 MB in fp64


def nearest(
    images: Tensor, among: Tensor, progress: bool = False, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """For each image the nearest of others: its index, and its distance.

    Args:
        images: uint8 [n, C, H, W].
        among: uint8 [m, C, H, W].
        device: where distances are computed.

    Returns:
        index: int64 [n].
        distance: fp64 [n], the root of the mean squared difference of pixels in 0 .. 1: 0 is a
            copy, and it does not depend on the images' size.

    Raises:
        ValueError: images of two shapes, or of another dtype, or none, or without pixels.
    """
    errors.is_pictures("images", images)
    errors.is_pictures("among", among)
    if images.shape[1:] != among.shape[1:] or not images.numel() or not among.numel():
        raise ValueError(
            f"among {tuple(among.shape)}: must hold one or more images of the shape of "
            f"images, {tuple(images.shape)}"
        )
    most = max(1, VALUES // images[0].numel())
    rows, columns = min(ROWS, most), min(COLUMNS, most)
    found, apart = [], []
    for part in tqdm(images.split(rows), desc="nearest", disable=not progress):
        x = part.to(device).flatten(1).float()
        best = torch.full((len(x),), math.inf, device=device)
        index = torch.zeros(len(x), dtype=torch.int64, device=device)
        for first in range(0, len(among), columns):
            y = among[first : first + columns].to(device).flatten(1).float()
            # less |x|^2, which every y has in common
            low, place = torch.addmm(y.square().sum(1), x, y.T, alpha=-2.0).min(1)
            index = torch.where(low < best, first + place, index)
            best = torch.minimum(best, low)
        found.append(index.cpu())
        # once more, of those alone, without the rounding of a difference of large sums
        off = part.double().sub_(among[found[-1]]).div_(255).square_()
        apart.append(off.flatten(1).mean(1).sqrt())
    return torch.cat(found), torch.cat(apart)
