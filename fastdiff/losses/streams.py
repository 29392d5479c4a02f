"""Random numbers of a training step besides its noise, by the same generator.

All are functions of (seed, row, position in the whole batch). Of the generator's counter
(block, row, index), noise uses the indices below 2^61, `PROJECTION` those from 2^61, `TIMESTEP`
those from 2^62 and `GUIDANCE` those from 3 2^61: for one key no two counters are equal, and Philox
is a bijection, so that no block serves two of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.randn import OP, check_row, streams_of
from ..spacing import count

PROJECTION, TIMESTEP, GUIDANCE = 1 << 61, 2 << 61, 3 << 61


def draw(
    domain: int,
    shape: Sequence[int],
    seed: int | Sequence[int],
    row: int,
    first_index: int,
    device: torch.device | str,
    bits: bool,
) -> Tensor:
    """Standard normal fp32, or random bits as uint32, [B, ...]; arguments as `ops.randn`'s."""
    batch = count("batch", shape[0], 0)
    count("first_index", first_index, 0, PROJECTION - batch)
    row = check_row(row)
    streams = streams_of(seed, batch, first_index, device=device)
    streams[:, 1] += domain
    return OP(tuple(shape), streams, row, bits)
