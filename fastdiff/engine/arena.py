"""Memory: where the values of a program lie, and pages that are large where they can be."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 64
_LARGE = 2**21  # a huge page
_SLAB = 32 * _LARGE


@dataclass(eq=False)
class Block:
    """Bytes that are in use from step `first` to step `last`, both included."""

    size: int
    first: int
    last: int
    offset: int = -1


def place(blocks: Sequence[Block]) -> int:
    """Set each block's offset so that no two in use at a time overlap; return the bytes needed.

    The largest first, each at the lowest place that is free while it is in use.
    """
    for block in blocks:
        block.size = -(-block.size // ALIGNMENT) * ALIGNMENT
    placed: list[Block] = []
    for block in sorted(blocks, key=lambda b: (-b.size, b.first)):
        end = 0
        for other in placed:
            if other.first > block.last or other.last < block.first:
                continue
            if other.offset >= end + block.size:
                break
            end = max(end, other.offset + other.size)
        block.offset = end
        placed.append(block)
        placed.sort(key=lambda b: b.offset)
    return max((b.offset + b.size for b in blocks), default=0)


def pages(size: int) -> Tensor:
    """uint8 [size], zero, in pages of 2 MB where the system grants them."""
    memory = mmap.mmap(-1, max(size, 1) + _LARGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    start = -tensor.data_ptr() % _LARGE
    return tensor[start : start + size]


class Pool:
    """Tensors that stay: packed weights, one after the other in large pages."""

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, value: Tensor) -> Tensor:
        """A copy of a contiguous tensor in the pool."""
        size = value.numel() * value.element_size()
        if self._used + size > len(self._slab):
            self._slab, self._used = pages(max(size, _SLAB)), 0
        kept = self._slab[self._used : self._used + size].view(value.dtype).view(value.shape)
        kept.copy_(value)
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return kept
