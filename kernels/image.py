"""How the group norms walk an image [samples, channels, pixels]: its strides, tiles and grids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..ops.group_norm_silu import strides_of
from .launch import Config, Launch

RESIDENT = 1 << 15  # bytes of a tile that a program keeps in its registers
TILE = 4096  # elements of a program that streams
PROGRAMS = 1024  # enough to fill a GPU: more chunks than that only lengthen the sum over them
SECTOR, LINE = 32, 128  # bytes that memory moves at least, and of a line of the cache


@dataclass(frozen=True)
class Image:
    """The sizes of an image, and whether its channels are adjacent or its pixels.

    Each `by_...` is a launch of a kernel on `args` and these sizes, with one program for what it
    is called after.
    """

    samples: int
    channels: int
    pixels: int
    groups: int
    itemsize: int
    device: torch.device
    channels_last: bool

    @property
    def width(self) -> int:
        """Channels of a group."""
        return self.channels // self.groups

    def new(self, *size: int) -> Tensor:
        """For sums: float32, not written yet."""
        return torch.empty(size, dtype=torch.float32, device=self.device)

    def by_group(self, kernel: Any, kept: int = 1, **args: Any) -> Launch | None:
        """Whole groups, in one tile that stays in registers; None where it is too large.

        `kept` is how many tiles stay. Of two, padded ones must be half as large not to spill.

        Channels-last, as many groups together as fill whole sectors of each pixel.
        """
        together = 1
        if self.channels_last:
            fill = SECTOR // math.gcd(SECTOR, self.width * self.itemsize)
            together = fill if self.groups % fill == 0 else 1
        tile = {
            "CHANNELS": triton.next_power_of_2(together * self.width),
            "PIXELS": triton.next_power_of_2(self.pixels),
        }
        padded = tile["CHANNELS"] > together * self.width
        if math.prod(tile.values()) * self.itemsize > RESIDENT // (kept if padded else 1):
            return None
        args |= {"groups": self.groups, "pixels": self.pixels}
        args |= {"WIDTH": self.width, "TOGETHER": together}
        grid = (self.samples * self.groups // together,)
        return Launch(kernel, _threads(tile), lambda _: grid, args, self.device)

    def by_tile(self, kernel: Any, **args: Any) -> Launch:
        tile = self._tile()
        grid = (self._blocks(tile) * triton.cdiv(self.pixels, tile["PIXELS"]),)
        args |= {"channels": self.channels, "pixels": self.pixels}
        return Launch(kernel, _threads(tile), lambda _: grid, args, self.device)

    def by_chunk(self, kernel: Any, **args: Any) -> Launch:
        """A chunk is a run of `tiles` tiles; what is summed over its pixels is one number."""
        tile, (chunks, tiles) = self._tile(), self.chunks()
        grid = (self._blocks(tile) * chunks,)
        args |= {"channels": self.channels, "pixels": self.pixels}
        args |= {"chunks": chunks, "tiles": tiles}
        return Launch(kernel, _threads(tile), lambda _: grid, args, self.device)

    def by_sum(self, kernel: Any, **args: Any) -> Launch:
        """A group's chunks, CHUNKS at a time."""
        chunks, tiles = self.chunks()
        across = triton.next_power_of_2(self.width)
        each = min(triton.next_power_of_2(chunks), max(1, 2048 // across))
        args |= {"groups": self.groups, "pixels": self.pixels, "WIDTH": self.width}
        args |= {"chunks": chunks, "chunk": tiles * self._tile()["PIXELS"]}
        grid = (self.samples * self.groups,)
        configs = [Config({"CHANNELS": across, "CHUNKS": each})]
        return Launch(kernel, configs, lambda _: grid, args, self.device)

    def chunks(self) -> tuple[int, int]:
        """How many chunks there are of a sample's pixels, and how many tiles each has."""
        tile = self._tile()
        each = triton.cdiv(self.pixels, tile["PIXELS"])
        tiles = min(each, triton.cdiv(each * self._blocks(tile), PROGRAMS))
        return triton.cdiv(each, tiles), tiles

    def _tile(self) -> dict[str, int]:
        """Up to a line of adjacent channels of each pixel, or long runs of pixels."""
        if self.channels_last:
            across = min(triton.next_power_of_2(self.channels), LINE // self.itemsize)
            return {"CHANNELS": across, "PIXELS": TILE // across}
        along = min(triton.next_power_of_2(self.pixels), TILE // 4)
        return {"CHANNELS": TILE // along, "PIXELS": along}

    def _blocks(self, tile: dict[str, int]) -> int:
        return self.samples * triton.cdiv(self.channels, tile["CHANNELS"])


def _threads(tile: dict[str, int]) -> list[Config]:
    """A tile at 32 elements a thread, where sums cross the fewest threads, or at 16."""
    counts = (min(max(math.prod(tile.values()) // each, 128), 512) for each in (32, 16))
    return [Config(tile, count) for count in dict.fromkeys(counts)]


def walked(groups: int, like: Tensor, *others: Tensor) -> tuple[Image, list[tuple[Any, ...]]]:
    """How kernels walk `like`; and it and the others as operands, copied where they lie unlike it.

    They are walked as `like` lies in memory; one that is alone, in the order of its pixels.
    ValueError where the pixels of a `like` that is not alone are not at one stride in any order.
    """
    order = list(range(2, like.dim()))
    if others:
        order.sort(key=like.stride, reverse=True)
    samples, channels = like.shape[:2]
    pixels = like.shape[2:].numel()

    def told(t: Tensor) -> tuple[bool, tuple[Any, ...]] | None:
        strides = strides_of(t.permute(0, 1, *order))
        if strides is None:
            return None
        last = pixels == 1 or (channels > 1 and strides[1] < strides[2])
        return last, (t, *strides[:3])

    first = told(like)
    if first is None and not others:
        return walked(groups, like.contiguous())
    if first is None:
        raise ValueError(
            f"out: has strides {like.stride()}, whose pixels are not at one stride; give a "
            "contiguous or channels-last tensor, and copy from it"
        )
    operands = [first[1]]
    for t in others:
        there = told(t)
        if there is None or there[0] != first[0]:
            there = told(torch.empty_like(like).copy_(t))
            assert there is not None
        operands.append(there[1])
    size = like.element_size()
    return Image(samples, channels, pixels, groups, size, like.device, first[0]), operands


def parameters(**given: Tensor | None) -> dict[str, Any]:
    """Operands [channels] or [samples, channels]: the tensor, and the strides of both."""
    return {name: None if t is None else (t, *(0, *t.stride())[-2:]) for name, t in given.items()}
