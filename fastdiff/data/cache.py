"""Decoded images in one file: a .npy that is mapped into memory, its record after the array."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read(path: Path, key: str) -> tuple[NDArray[np.uint8], dict[str, Any]] | None:
    """The images, mapped, and the record; None where there are none whole with that key."""
    try:
        images = np.load(path, mmap_mode="c")  # torch wants memory that may be written; none is
        with open(path, "rb") as file:
            file.seek(images.offset + images.nbytes)
            record = json.loads(file.read())
    except (OSError, ValueError, EOFError, AttributeError):
        return None
    return (images, record) if isinstance(record, dict) and record.get("key") == key else None


def write(
    path: Path, images: Iterable[NDArray[np.uint8]], shape: tuple[int, ...], record: dict[str, Any]
) -> None:
    """Write images of `shape`, however many there are, and what `record` then holds.

    The file is whole or not there: it has a temporary name until it is. OSError, naming it, where
    it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            _write_header(file, 0, shape)
            start = file.tell()
            for count, image in enumerate(images, 1):  # noqa: B007
                file.write(image.tobytes())
            file.write(json.dumps(record).encode())
            file.seek(0)
            _write_header(file, count, shape)  # numpy leaves room for any count
            assert file.tell() == start
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            error.errno, f"{path}: cannot be written ({error.strerror}); choose another cache"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _write_header(file: Any, count: int, shape: tuple[int, ...]) -> None:
    about = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(file, about)
