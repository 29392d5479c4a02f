"""Labelled images in memory, served in a reproducible order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import errors
from ..ops.load_images import check_pad, load_images
from . import order


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images in uint8 memory, and the order in which training sees them.

    The memory may be a mapped file, of which only what a batch is made of is read: the set need not
    fit in RAM. Conversion, mirroring and padding are done on the way to the network, in one pass
    (`ops.load_images`).

    Attributes:
        images: uint8 [N, C, H, W], 0 .. 255.
        labels: what a network is told of each: int64 [N], or, of captions, their tokens [N, L];
            or None.
        class_names: one a label; of captions, the words by token; may be empty.
        flip: mirror each image left to right with probability 1/2.
        pad: black pixels added on each side of an image.
    """

    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    flip: bool = False
    pad: int = 0

    def __post_init__(self) -> None:
        errors.is_tensor("images", self.images)
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or not len(self.images):
            raise ValueError(
                f"images {self.images.dtype} {tuple(self.images.shape)}: "
                "must be uint8 [N, C, H, W] with N of 1 or more"
            )
        errors.is_a("flip", self.flip, bool)
        errors.is_a("class_names", self.class_names, tuple)
        check_pad(self.pad)
        if self.labels is None:
            return
        errors.is_tensor("labels", self.labels)
        given = self.labels
        if given.dtype != torch.int64 or given.ndim not in (1, 2) or len(given) != len(self):
            raise ValueError(
                f"labels {given.dtype} {tuple(given.shape)}: "
                f"must be int64 [{len(self)}], one an image, or tokens [{len(self)}, L]"
            )
        if given.numel() and int(given.min()) < 0:
            raise ValueError(f"labels with {int(self.labels.min())}: must be 0 or more")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image as the network gets it, padded."""
        _, channels, height, width = self.images.shape
        return channels, height + 2 * self.pad, width + 2 * self.pad

    def batch(
        self,
        step: int,
        size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        *,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """A process's part of batch number `step` of `size` images, and its labels.

        The images are [size / world, *shape] in [-1, 1]. A pure function of (step, size, seed): the
        parts of all ranks are, in order, the batch of a single process. Each epoch is a fresh
        permutation, and batches run on across its end, so every image is seen once before any is
        seen twice.

        Raises:
            ValueError: `world` does not divide `size`, or `rank` is not in [0, world).
        """
        index = self.indices(step, size, seed, rank, world)
        mirrored = None
        if self.flip:
            mirrored = order.flips(step, seed, order.positions(size, rank, world))
        x0 = self.load(index, mirrored, dtype=dtype, channels_last=channels_last)
        return x0, None if self.labels is None else self.labels[index]

    def indices(self, step: int, size: int, seed: int, rank: int = 0, world: int = 1) -> Tensor:
        """int64 [size / world]: which images `batch` of the same arguments is made of."""
        part = order.positions(size, rank, world)
        return order.indices(len(self), step, size, seed, part)

    def load(
        self,
        index: Tensor,
        flips: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> Tensor:
        """The images at `index`, int64 [B], as the network takes them: [B, *shape] in [-1, 1].

        `flips`, bool [B], says which are mirrored. Errors are those of `ops.load_images`.
        """
        return load_images(
            self.images, index, flips, self.pad, dtype=dtype, channels_last=channels_last
        )
