"""Many samples of a model, batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from ..images import to_uint8
from ..rollout import Model
from ..samplers import Sampler


def draw_samples(
    network: Model,
    sampler: Sampler,
    shape: tuple[int, int, int],
    count: int,
    labels: Tensor | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch: int = 250,
    first: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Tensor:
    """`count` images: uint8 [count, C, H, W], on the CPU.

    Image k is that of the stream (seed, first + k) whatever the batch, so that a part of a set
    can be made by itself.

    Args:
        shape: of an image, (C, H, W).
        labels: int64 [count], or None for a model without classes.
        guidance: weight w; None leaves it to the sampler's table.
        batch: images at a time.
        first: number of the first image.
    """
    parts = []
    with tqdm(total=count, desc="samples", unit="image", disable=not progress) as bar:
        for start in range(0, count, batch):
            size = min(batch, count - start)
            x = sampler.sample(
                network,
                (size, *shape),
                seed=seed,
                first_index=first + start,
                cond=None if labels is None else labels[start : start + size].to(device),
                guidance=guidance,
            )
            parts.append(to_uint8(x))
            bar.update(size)
    return torch.cat(parts)
