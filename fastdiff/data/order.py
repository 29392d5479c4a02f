"""The order in which training sees data: functions of (seed, step, position in the batch).

A batch is of `size` samples, dealt to `world` processes: each has the neighbours of its rank. So
two processes see in a step what one would, and a resumed run what the uninterrupted one would.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import errors
from ..spacing import count

LARGEST = 1 << 24  # samples of a batch


def positions(size: int, rank: int, world: int) -> slice:
    """The places of a process's samples in a batch of `size`.

    ValueError unless `world` divides `size` and `rank` is in [0, world).
    """
    count("world", world, 1)
    if count("rank", rank, 0) >= world:
        raise ValueError(f"rank={rank}: must be in [0, world), world={world} being 1 or more")
    if count("size", size, 1, LARGEST) % world:
        raise ValueError(f"size={size}: must be a multiple of world={world}, and 1 or more")
    return slice(size // world * rank, size // world * (rank + 1))


def indices(length: int, step: int, size: int, seed: int, part: slice) -> Tensor:
    """int64: which of `length` samples are at the places `part` of batch number `step`.

    Each epoch is a fresh permutation, and batches run on across its end, so every sample is seen
    once before any is seen twice.
    """
    count("step", step, 0, 1 << 38)  # times size it is still an int64
    count("seed", seed, 0)
    places = np.arange(step * size + part.start, step * size + part.stop)
    epochs, offsets = np.divmod(places, length)
    return torch.cat(
        [
            _permutation(length, seed, int(epoch))[torch.from_numpy(offsets[epochs == epoch])]
            for epoch in np.unique(epochs)
        ]
    )


def flips(step: int, seed: int, part: slice) -> Tensor:
    """bool: which places of a batch are mirrored; each is with probability 1/2."""
    return torch.from_numpy(_uniform(seed, step, 1, part) < 0.5)


def drop_labels(
    labels: Tensor,
    probability: float,
    seed: int,
    step: int,
    first: int = 0,
    null: Tensor | None = None,
) -> Tensor:
    """Labels [B], each replaced by -1, "no class", with a probability.

    For classifier-free guidance (Ho & Salimans 2022, algorithm 1). `first` is the place of
    labels[0] in the whole batch of this step. `null` is what replaces them, like labels, as a
    model's `null_cond` says: empty captions. Nothing is read back from a GPU.
    """
    errors.is_batch("labels", labels)
    errors.has_dtype("labels", labels, (torch.int64,))
    if null is not None:
        errors.like("null", null, "labels", labels)
        errors.has_dtype("null", null, (torch.int64,))
    seed, step = count("seed", seed, 0), count("step", step, 0)
    first = count("first", first, 0, LARGEST)
    if not 0.0 <= errors.number("probability", probability) <= 1.0:
        raise ValueError(f"probability={probability}: must be in [0, 1]")
    dropped = _uniform(seed, step, 2, slice(first, first + len(labels))) < probability
    mask = torch.from_numpy(dropped).to(labels.device, non_blocking=True)
    mask = mask.reshape(-1, *[1] * (labels.ndim - 1))
    return labels.masked_fill(mask, -1) if null is None else labels.where(~mask, null)


@lru_cache(maxsize=4)  # a batch spans two epochs, and each epoch serves many batches
def _permutation(length: int, seed: int, epoch: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, epoch, 0]).permutation(length))


def _uniform(seed: int, step: int, stream: int, part: slice) -> NDArray[np.float64]:
    """Numbers in [0, 1) that belong to places of a batch, whatever the batch's size."""
    return np.random.default_rng([seed, step, stream]).random(part.stop)[part.start :]
