"""Image sets from torch's datasets, read once."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sized
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .. import errors
from ..errors import one_of
from ..spacing import count
from . import pixels
from .image_set import ImageSet
from .skipped import Skipped


def from_dataset(
    dataset: Any,
    channels: int | None = None,
    *,
    value_range: tuple[float, float] | None = None,
    flip: bool = False,
    pad: int = 0,
    workers: int = 0,
    strict: bool = False,
    progress: bool = True,
) -> ImageSet:
    """All images of a map-style torch Dataset, as uint8 in memory.

    Every item is read once, so what a dataset draws at random is drawn once: leave augmentation to
    `flip`. An item that cannot be read, or is of another shape than the first, is skipped, and one
    warning at the end names and counts those.

    Args:
        dataset: has a length, and items that are images or pairs of an image and a label (an int).
            An image is a picture of pillow's, a uint8 tensor [C, H, W], or a floating-point tensor
            [C, H, W] if `value_range` is given. Its attribute `classes`, if any, names the classes.
        channels: of pillow's pictures, 1 (grey) or 3 (RGB); by default what it has.
        value_range: the values of floating-point tensors that stand for 0 and 255: (0, 1) for
            torchvision's ToTensor. They are rounded; one outside is an error of its item.
        flip, pad: see ImageSet.
        workers: processes that read, as a DataLoader's; 0 reads in this one.
        strict: an unreadable item is an error.
        progress: show a bar.

    Raises:
        TypeError: no map-style dataset; items of another kind; labels of some items only.
        ValueError: no item can be read.
    """
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"dataset: {type(dataset).__name__} has no length or no items by number")
    if isinstance(dataset, Tensor) or not len(dataset):
        raise ValueError(f"dataset: {type(dataset).__name__} is empty, or a tensor")
    if channels is not None:
        one_of("channels", channels, pixels.MODES)
    count("workers", workers, 0)
    if value_range is not None:
        ends = errors.numbers("value_range", value_range)
        if ends.shape != (2,) or not -np.inf < ends[0] < ends[1] < np.inf:
            raise ValueError(f"value_range={value_range}: must be two numbers that rise")
    skipped = Skipped(type(dataset).__name__, len(dataset), strict)
    items = _Items(dataset, channels, value_range)
    loader: Iterable[Any] = DataLoader(
        items, batch_size=None, num_workers=workers, collate_fn=_as_it_is
    )
    images = np.empty((0, 0, 0, 0), np.uint8)
    labels: list[int | None] = []
    for number, item in enumerate(tqdm(loader, skipped.source, unit="image", disable=not progress)):
        if isinstance(item, str):
            skipped.add(f"item {number}", item)
            continue
        image, label = item
        if not labels:
            images = np.empty((len(dataset), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            skipped.add(f"item {number}", f"shape {image.shape}, the first {images.shape[1:]}")
            continue
        images[len(labels)] = image
        labels.append(label)
    skipped.report()
    known = [label for label in labels if label is not None]
    if len(known) not in (0, len(labels)):
        raise TypeError(f"dataset: {len(known)} of {len(labels)} items have a label; all must")
    return ImageSet(
        torch.from_numpy(images[: len(labels)]),
        torch.tensor(known) if known else None,
        tuple(getattr(dataset, "classes", ())),
        flip,
        pad,
    )


class _Items(Dataset[Any]):
    """A dataset whose items are uint8 images and labels, or what is wrong with them."""

    def __init__(
        self, dataset: Any, channels: int | None, value_range: tuple[float, float] | None
    ) -> None:
        self.dataset, self.channels, self.value_range = dataset, channels, value_range

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[NDArray[np.uint8], int | None] | str:
        try:
            item = self.dataset[number]
        except Exception as error:  # a dataset's own code may raise anything
            return str(error) or type(error).__name__
        image, label = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
        try:
            return self._pixels(image), None if label is None else operator.index(label)
        except ValueError as error:
            return str(error)
        except TypeError as error:
            raise TypeError(f"dataset: item {number}: {error}") from None

    def _pixels(self, image: Any) -> NDArray[np.uint8]:
        if isinstance(image, Image.Image):
            return pixels.of_picture(image, channels=self.channels)
        if not isinstance(image, Tensor) or image.ndim != 3:
            what = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"{what} is no image: must be pillow's, or a tensor [C, H, W]")
        if image.dtype == torch.uint8:
            return image.numpy()
        if not image.is_floating_point():
            raise TypeError(f"a tensor of {image.dtype}: must be uint8 or floating-point")
        if self.value_range is None:
            raise TypeError(
                "a floating-point tensor: pass value_range, (0, 1) for torchvision's ToTensor"
            )
        low, high = self.value_range
        if not (image.min() >= low and image.max() <= high):  # also where one is NaN
            raise ValueError(
                f"values from {image.min():g} to {image.max():g}: value_range={self.value_range}"
            )
        return image.double().sub(low).mul(255 / (high - low)).round().to(torch.uint8).numpy()


def _as_it_is(item: Any) -> Any:
    return item
