"""Image sets that fit in memory, served in a reproducible order."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import one_of

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_FASHION_ADVICE = (
    "install the Debian package dataset-fashion-mnist, or download the four IDX files named at "
    "https://github.com/zalandoresearch/fashion-mnist and pass their folder"
)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images in memory, and the order in which training sees them.

    Attributes:
        images: uint8 [N, C, H, W], 0 .. 255.
        labels: int64 [N], or None.
        class_names: one a label; may be empty.
        flip: mirror each image left to right with probability 1/2.
    """

    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    flip: bool = False

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or not len(self.images):
            raise ValueError(
                f"images {self.images.dtype} {tuple(self.images.shape)}: "
                "must be uint8 [N, C, H, W] with N of 1 or more"
            )
        if self.labels is None:
            return
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels {self.labels.dtype} {tuple(self.labels.shape)}: "
                f"must be int64 [{len(self.images)}], one an image"
            )
        if int(self.labels.min()) < 0:
            raise ValueError(f"labels with {int(self.labels.min())}: must be 0 or more")

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor | None]:
        """Batch number `step` of `size` images: fp32 [size, C, H, W] in [-1, 1], and labels.

        A pure function of (step, size, seed). Each epoch is a fresh permutation, and batches
        run on across its end, so every image is seen once before any is seen twice.
        """
        positions = np.arange(step * size, (step + 1) * size)
        epochs, offsets = np.divmod(positions, len(self))
        index = torch.cat(
            [
                _permutation(len(self), seed, int(epoch))[
                    torch.from_numpy(offsets[epochs == epoch])
                ]
                for epoch in np.unique(epochs)
            ]
        )
        x = self.images[index].float().div_(127.5).sub_(1.0)
        if self.flip:
            coins = np.random.default_rng([seed, step, 1]).random(size) < 0.5
            x = torch.where(torch.from_numpy(coins)[:, None, None, None], x.flip(3), x)
        return x, None if self.labels is None else self.labels[index]


@lru_cache(maxsize=4)  # a batch spans two epochs, and each epoch serves many batches
def _permutation(length: int, seed: int, epoch: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, epoch, 0]).permutation(length))


def fashion_mnist(
    folder: str | Path | None = None, split: str = "train", pad: int = 2, flip: bool = False
) -> ImageSet:
    """Fashion-MNIST (Xiao, Rasul & Vollgraf 2017), 28x28 padded with black to 32x32.

    Args:
        folder: where the IDX files are, gzipped or not; by default the Debian package's.
        split: "train" (60,000 images) or "test" (10,000).
        pad: black pixels added on each side.
        flip: see ImageSet; shoes all point left, so mirrored ones are new to the set.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: a file is truncated or is no IDX file of the right kind.
    """
    prefixes = {"train": "train", "test": "t10k"}
    one_of("split", split, prefixes)
    if type(pad) is not int or pad < 0:
        raise ValueError(f"pad={pad!r}: must be an int of 0 or more")
    root = _FASHION_FOLDER if folder is None else Path(folder)
    images = read_idx(_find(root, f"{prefixes[split]}-images-idx3-ubyte"), ndim=3)
    labels = read_idx(_find(root, f"{prefixes[split]}-labels-idx1-ubyte"), ndim=1)
    if len(images) != len(labels):
        raise ValueError(f"{root}: {len(images)} images but {len(labels)} labels; they must agree")
    padded = np.pad(images[:, None], ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    return ImageSet(
        torch.from_numpy(padded), torch.from_numpy(labels.astype(np.int64)), FASHION_CLASSES, flip
    )


def npz_images(path: str | Path, flip: bool = False) -> ImageSet:
    """An image set from an .npz file: `images` uint8 [N, C, H, W] and, at will, `labels` [N].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no `images`, or arrays of the wrong kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; takes an .npz with an array `images`")
    with np.load(path, allow_pickle=False) as arrays:
        if "images" not in arrays:
            raise ValueError(f"{path}: has {sorted(arrays)}; must have `images` uint8 [N, C, H, W]")
        images = torch.from_numpy(arrays["images"])
        labels = torch.from_numpy(arrays["labels"]).long() if "labels" in arrays else None
    return ImageSet(images, labels, flip=flip)


def read_idx(path: str | Path, ndim: int) -> NDArray[np.uint8]:
    """A uint8 array of `ndim` axes from an IDX file, gzipped if its name ends in .gz.

    The header is two zero bytes, the type (8 is uint8), the number of axes, then each axis as a
    big-endian uint32 (LeCun, "The MNIST database").

    Raises:
        ValueError: wrong magic number, or another length than the header says.
    """
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}: truncated or damaged gzip file ({error}); fetch it again"
        ) from None
    magic, expected = raw[:4], bytes((0, 0, 8, ndim))
    if magic != expected:
        raise ValueError(
            f"{path}: starts with {magic.hex(' ') or 'nothing'}; a uint8 IDX file of {ndim} axes "
            f"starts with {expected.hex(' ')}"
        )
    header = 4 + 4 * ndim
    if len(raw) < header:
        raise ValueError(f"{path}: truncated in its header ({len(raw)} bytes); fetch it again")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", ndim, offset=4))
    if len(raw) - header != math.prod(shape):
        raise ValueError(
            f"{path}: holds {len(raw) - header} values, its header says {shape}; "
            "truncated? fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _find(root: Path, name: str) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder of Fashion-MNIST; {_FASHION_ADVICE}")
    for candidate in (root / name, root / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{root}: has neither {name} nor {name}.gz; {_FASHION_ADVICE}")
