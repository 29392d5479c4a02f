"""Image sets in .npz and .npy files, mapped into memory where they lie there as they are."""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import errors
from ..files import refuse_bombs, replacing
from .image_set import ImageSet


def npz_images(path: str | Path, flip: bool = False, pad: int = 0) -> ImageSet:
    """An image set from an .npz file: `images` uint8 [N, C, H, W] and, at will, `labels` int [N].

    Or from an .npy file of images alone. [N, H, W, C], as `fastdiff sample` writes them, is told by
    a last axis of 1 or 3 where the second has neither. Images that are not compressed (numpy.savez,
    not savez_compressed) are mapped, not read: the set need not fit in RAM.

    Args:
        path: the file.
        flip, pad: see ImageSet.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or damaged, has no `images`, or arrays of the wrong kind.
    """
    path = errors.path("path", path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; takes an .npz with an array `images`")
    labels = None
    try:
        if path.suffix == ".npy":
            images = np.load(path, mmap_mode="c")  # torch wants memory that may be written
        else:
            with zipfile.ZipFile(path) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
                images = _array(path, archive, "images") if "images" in names else None
                labels = _array(path, archive, "labels") if "labels" in names else None
    except Exception as error:  # numpy and zipfile raise almost anything for a damaged file
        raise ValueError(f"{path}: cannot be read ({error}); make or fetch it again") from error
    if images is None:
        raise ValueError(f"{path}: has {sorted(names)}; must have `images` uint8 [N, C, H, W]")
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: images {images.dtype} {images.shape}; must be uint8")
    if images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)  # in place, mapped as it may be
    if labels is not None and labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: labels {labels.dtype} {labels.shape}; must be integers")
    classes = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    try:
        return ImageSet(torch.from_numpy(images), classes, flip=flip, pad=pad)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_npz(path: Path) -> None:
    """Raise ValueError where an .npz is not what it was written as; mapping it reads no checksum.

    All of it is read, a piece at a time. An .npy carries no checksum.
    """
    if path.suffix == ".npy":
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises almost anything for a damaged file
        raise ValueError(f"{path}: cannot be read ({error}); make or fetch it again") from error
    if damaged:
        raise ValueError(
            f"{path}: damaged: {damaged} does not have its checksum; make or fetch it again"
        )


@contextmanager
def npz_writer(
    path: Path, shape: Sequence[int], labels: Tensor | None = None
) -> Iterator[Callable[[Tensor], None]]:
    """Write an .npz, not compressed, as its images come: the set need not fit in memory.

    Yields a function that takes the next images, uint8 [b, C, H, W]; they are stored as `images`
    [N, H, W, C], with `labels` beside them. The file takes its name when all are written.

    Args:
        path: the file.
        shape: (N, H, W, C) of all images together.
        labels: int64 [N] or, of captions, their tokens [N, L].

    Raises:
        ValueError: there were more images than N, or fewer.
        OSError: naming the path and what to do; what was there is as it was.
    """
    written, total = 0, math.prod(shape)
    with (
        replacing(path, total) as descriptor,
        os.fdopen(os.dup(descriptor), "wb") as whole,
        zipfile.ZipFile(whole, "w") as archive,
    ):
        with archive.open("images.npy", "w", force_zip64=True) as file:
            head = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(file, head)

            def add(images: Tensor) -> None:
                nonlocal written
                content = images.permute(0, 2, 3, 1).contiguous().numpy()
                written += content.nbytes
                file.write(content.data)

            yield add
        if written != total:
            raise ValueError(f"{path}: got {written} bytes of images, must be {total}")
        if labels is not None:
            with archive.open("labels.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, labels.numpy(), allow_pickle=False)


def _array(path: Path, archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """An array of an .npz; mapped if it is a plain slice of the file."""
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"{name}.npy is of version {version}, must be (1, 0) or (2, 0)")
        shape, by_columns, dtype = read_header(stream)
        start = stream.tell()
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or member.file_size - start != size:
            raise ValueError(
                f"{name}: holds {member.file_size - start:,} bytes, its header says {shape} {dtype}"
            )
        if member.compress_type != zipfile.ZIP_STORED:
            refuse_bombs(name, member.compress_size, size)
            flat = np.frombuffer(bytearray(stream.read(size)), dtype)
            return flat.reshape(shape, order="F" if by_columns else "C")
    with open(path, "rb") as file:
        # a member's header: 30 bytes that end in the lengths of its name and of an extra field
        file.seek(member.header_offset)
        lengths = struct.unpack("<26xHH", file.read(30))
    offset = member.header_offset + 30 + sum(lengths) + start
    return np.memmap(path, dtype, "c", offset, shape, "F" if by_columns else "C")
