"""Many samples of a model, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from .images import to_uint8
from .rollout import Model
from .sampler import Sampler


def draw_batches(
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
    frames: list[list[Tensor]] | None = None,
) -> Iterator[Tensor]:
    """`count` images, a batch at a time: uint8 [b, C, H, W], on the CPU.

    Image k is that of the stream (seed, first + k) whatever the batch, so that a part of a set
    can be made by itself.

    Args:
        shape: of an image, (C, H, W).
        labels: int64 [count], or captions' tokens [count, L]; None for a model told nothing.
        guidance: weight w; None leaves it to the sampler's table.
        batch: images at a time.
        first: number of the first image.
        progress: show a bar.
        frames: gets the predicted images of every row of a batch, a list a batch.
    """
    with tqdm(total=count, desc="samples", unit="image", disable=not progress) as bar:
        for start in range(0, count, batch):
            size = min(batch, count - start)
            rows: list[Tensor] = []

            def keep(row: int, x: Tensor, x0: Tensor, rows: list[Tensor] = rows) -> None:
                rows.append(to_uint8(x0))

            x = sampler.sample(
                network,
                (size, *shape),
                seed=seed,
                first_index=first + start,
                cond=None if labels is None else labels[start : start + size].to(device),
                guidance=guidance,
                callback=None if frames is None else keep,
            )
            if frames is not None:
                frames.append(rows)
            yield to_uint8(x)
            bar.update(size)
