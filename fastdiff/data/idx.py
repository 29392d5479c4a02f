"""IDX files, and Fashion-MNIST, which comes in them."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .. import errors
from ..errors import one_of
from ..files import refuse_bombs
from ..spacing import count
from .image_set import ImageSet

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


def fashion_mnist(
    folder: str | Path | None = None,
    split: str = "train",
    pad: int = 2,
    flip: bool = False,
    captions: bool = False,
) -> ImageSet:
    """Fashion-MNIST (Xiao, Rasul & Vollgraf 2017), 28x28 padded with black to 32x32.

    Args:
        folder: where the IDX files are, gzipped or not; by default the Debian package's.
        split: "train" (60,000 images) or "test" (10,000).
        pad: black pixels added on each side, on the way to the network.
        flip: see ImageSet; shoes all point left, so mirrored ones are new to the set.
        captions: say of each image what its class, brightness and size are ("a dark wide dress");
            then the labels are the captions' tokens, and the class names the words.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: a file is truncated or is no IDX file of the right kind.
    """
    prefixes = {"train": "train", "test": "t10k"}
    one_of("split", split, prefixes)
    root = _FASHION_FOLDER if folder is None else errors.path("folder", folder)
    images, labels = (
        _find(root, f"{prefixes[split]}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")
    )
    found = replace(idx_images(images, labels, flip, pad), class_names=FASHION_CLASSES)
    if not captions:
        return found
    from .captions import WORDS, Captions, tokenize

    training = found if split == "train" else fashion_mnist(folder)
    assert found.labels is not None and training.labels is not None
    said = Captions(training.images, training.labels).of(found.images, found.labels)
    return replace(found, labels=tokenize(said), class_names=WORDS)


def idx_images(
    images: str | Path, labels: str | Path | None = None, flip: bool = False, pad: int = 0
) -> ImageSet:
    """Grey images, and their labels, from IDX files, as MNIST and its likes come in.

    Args:
        images, labels: the files, gzipped or not; one without `.gz` is mapped into memory.
        flip, pad: see ImageSet.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated or is no IDX file of the right kind, or they do not agree.
    """
    errors.path("images", images)
    pixels = torch.from_numpy(read_idx(images, ndim=3))
    classes = None if labels is None else torch.from_numpy(read_idx(labels, ndim=1)).long()
    if classes is not None and len(pixels) != len(classes):
        raise ValueError(f"{images}: {len(pixels)} images, but {labels}: {len(classes)} labels")
    return ImageSet(pixels[:, None], classes, flip=flip, pad=pad)


def read_idx(path: str | Path, ndim: int) -> NDArray[np.uint8]:
    """A uint8 array of `ndim` axes from an IDX file: mapped, or read if its name ends in .gz.

    The header is two zero bytes, the type (8 is uint8), the number of axes, then each axis as a
    big-endian uint32 (LeCun, "The MNIST database").

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: wrong magic number, or another length than the header says.
    """
    path = errors.path("path", path)
    count("ndim", ndim, 1, 255)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; takes an IDX file, gzipped (.gz) or not")
    try:
        # torch wants memory that may be written: a copy, or a mapping that is copied on a write
        if path.suffix == ".gz":
            raw = np.frombuffer(_unpacked(path, ndim), np.uint8)
        else:
            raw = np.memmap(path, np.uint8, "c") if path.stat().st_size else np.empty(0, np.uint8)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: truncated or damaged gzip file ({error}); fetch it again"
        ) from None
    magic, expected = raw[:4].tobytes(), bytes((0, 0, 8, ndim))
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
    return raw[header:].reshape(shape)


def _unpacked(path: Path, ndim: int) -> bytearray:
    """What the gzip file holds, as far as its header says, and one byte more if there is one."""
    with gzip.open(path) as file:
        header = bytearray(file.read(4 + 4 * ndim))
        said = len(header) == 4 + 4 * ndim  # else it is truncated, as the caller says
        size = math.prod(struct.unpack_from(f">{ndim}I", header, 4)) if said else 0
        refuse_bombs(str(path), path.stat().st_size, size)
        return header + file.read(size + 1)


def _find(root: Path, name: str) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder of Fashion-MNIST; {_FASHION_ADVICE}")
    for candidate in (root / name, root / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{root}: has neither {name} nor {name}.gz; {_FASHION_ADVICE}")
