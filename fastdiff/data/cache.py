"""Decoded images in one file: a .npy that is mapped into memory, its record after the array.

The file ends in the CRC-32, in 8 digits, of the array's bytes, the record and the header, which is
known last.
"""

from __future__ import annotations

import io
import json
import math
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..files import CHUNK, make_folder, replacing

DIGITS = 8


def read(path: Path, key: str) -> tuple[NDArray[np.uint8], dict[str, Any]] | None:
    """The images, mapped, and the record; None where there are none whole with that key.

    The file is read once, a piece at a time, for its checksum.
    """
    try:
        images = np.load(path, mmap_mode="c")  # torch wants memory that may be written; none is
        with open(path, "rb") as file:
            header = file.read(images.offset)
            rest = os.fstat(file.fileno()).st_size - DIGITS - images.offset
            checksum = zlib.crc32(header, _checksum(file, rest))
            if file.read() != b"%08x" % checksum:
                return None
            file.seek(images.offset + images.nbytes)
            record = json.loads(file.read()[:-DIGITS])
    except Exception:  # numpy raises almost anything for a damaged header
        return None
    return (images, record) if record["key"] == key else None


def write(
    path: Path,
    images: Iterable[NDArray[np.uint8]],
    shape: tuple[int, ...],
    record: dict[str, Any],
    most: int,
) -> None:
    """Write images of `shape`, `most` of them or fewer, and what `record` then holds.

    Raises:
        OSError: naming the path and what to do; what was there is as it was.
    """
    count = checksum = 0
    make_folder(path.parent)
    with (
        replacing(path, most * math.prod(shape)) as descriptor,
        os.fdopen(os.dup(descriptor), "wb") as file,
    ):
        start = file.write(_header(0, shape))
        for count, image in enumerate(images, 1):  # noqa: B007
            content = image.tobytes()
            checksum = zlib.crc32(content, checksum)
            file.write(content)
        text, header = json.dumps(record).encode(), _header(count, shape)
        assert len(header) == start  # numpy leaves room for any count
        file.write(text + b"%08x" % zlib.crc32(text + header, checksum))
        file.seek(0)
        file.write(header)


def _header(count: int, shape: tuple[int, ...]) -> bytes:
    about = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, about)
    return header.getvalue()


def _checksum(file: BinaryIO, length: int) -> int:
    """Of the next bytes of a file."""
    found, end = 0, file.tell() + length
    while chunk := file.read(min(CHUNK, end - file.tell())):
        found = zlib.crc32(chunk, found)
    return found
