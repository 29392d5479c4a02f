"""Files that are written whole or not at all, and that tell when they are damaged."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# the first metadata of a file: a CRC-32 of all its bytes, its own digits taken as zeros. crc32 is
# the quickest hash of the standard library, and misses no damage of up to 32 bits in a row
STAMP = "crc32 %08x of %015d bytes"
STAMPED = re.compile(rb'\{"__metadata__":\{"fastdiff":"crc32 ([0-9a-f]{8}) of (\d{15}) bytes"')
CHUNK = 1 << 20
BOMB_FROM, BOMB_RATIO = 1 << 26, 250  # bytes; images are packed to a hundredth at most

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: naming the path and what to do; what was there is as it was.
    """
    with replacing(path, len(content)) as file:
        _write(file, content)


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> str:
    """Write a safetensors file whole or not at all, one tensor in memory at a time.

    The format (safetensors' README, "Format"): the length of the header as a little-endian uint64,
    the header in JSON, padded with spaces, and the tensors' bytes.

    Returns:
        The file's stamp: its checksum and size, which its metadata carry as "fastdiff".

    Raises:
        TypeError: a tensor's dtype or layout is none that the format has.
        OSError: naming the path and what to do; what was there is as it was.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
            takes = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise TypeError(f"{name}: {tensor.dtype}, {tensor.layout}; must be dense, of {takes}")
    # wide types first, so that every tensor is aligned in a mapped file
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    ends = list(accumulate((tensors[name].nbytes for name in order), initial=0))
    entries = {
        name: {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": span,
        }
        for name, span in zip(order, pairwise(ends), strict=True)
    }

    def header(size: int) -> bytes:
        said = {"fastdiff": STAMP % (0, size), **(metadata or {})}
        text = json.dumps({"__metadata__": said, **entries}, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)

    length = len(header(0))
    size = 8 + length + ends[-1]
    start = length.to_bytes(8, "little") + header(size)
    checksum = zlib.crc32(start)
    digits = STAMPED.match(start, 8)
    assert digits
    with replacing(path, size) as file:
        _write(file, start)
        for name in order:
            plain = tensors[name].detach().cpu().contiguous()  # in logical order: not channels-last
            content = plain.reshape(-1).view(torch.uint8).numpy().data
            for at in range(0, len(content), CHUNK):
                _write(file, content[at : at + CHUNK])
                checksum = zlib.crc32(content[at : at + CHUNK], checksum)
        os.lseek(file, digits.start(1), os.SEEK_SET)
        _write(file, f"{checksum:08x}".encode())
    return STAMP % (checksum, size)


def read_tensors(path: Path, stamped: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata, checked if it carries a checksum.

    Args:
        path: the file.
        stamped: refuse a file that carries none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, damaged, or no such file.
    """
    if not _stamped(path) and stamped:
        raise ValueError(f"{path}: carries no checksum; it was damaged or written elsewhere")
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path}: truncated, or no safetensors file ({error}); copy or train it again"
        ) from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ValueError: naming the file: it is damaged, or holds something else.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: damaged, or no JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold an object, holds a {type(found).__name__}")
    return found


def stamp_of(path: Path) -> str | None:
    """The stamp that a safetensors file carries, unchecked; None where it carries none."""
    with open(path, "rb") as file:
        found = STAMPED.match(file.read(CHUNK), 8)
    return f"crc32 {found[1].decode()} of {found[2].decode()} bytes" if found else None


def refuse_bombs(name: str, packed: int, size: int) -> None:
    """Raise ValueError where `packed` bytes would become so many more that they are no images."""
    if size > BOMB_FROM and size > BOMB_RATIO * packed:
        raise ValueError(
            f"{name}: {packed:,} bytes would become {size:,}: a decompression bomb? "
            "if it is not, store it uncompressed"
        )


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, if it is missing.

    Raises:
        OSError: naming it and what to do.
    """
    if folder.is_file():
        message = f"{folder}: not written: is a file, must be a folder; choose another"
        raise FileExistsError(errno.EEXIST, message)
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            _sync(folder.parent)
    except OSError as error:
        explain(folder, 0, error)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what processes now dead have left of writing files of this name (a glob pattern)."""
    for path in folder.glob(f".{name}.????????.tmp"):
        with suppress(OSError):  # being written: the lock is taken; or its process removed it
            file = os.open(path, os.O_WRONLY)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(file)


def explain(path: Path, size: int, error: OSError) -> NoReturn:
    """Raise `error` again with what was to be written, and what to do."""
    said = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = "an unknown number"
        with suppress(OSError):
            free = f"{shutil.disk_usage(path.parent).free / 1e6:,.1f} MB"
        said += f": needs {size / 1e6:,.1f} MB, {free} free; make room or choose another folder"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        said += "; allow writing in its folder or choose another"
    elif error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST):
        said += "; its folder is gone or is none: mount or make it, or choose another"
    message = f"{path}: not written: {said}; files already there are whole"
    raise OSError(error.errno or errno.EIO, message) from error


@contextmanager
def replacing(path: Path, size: int) -> Iterator[int]:
    """A temporary file beside `path`, which takes its name once its bytes are on the disk.

    Yields a file descriptor. `size`, in bytes, is what an error says was needed.
    """
    try:
        file, temporary = _temporary(path)
        try:
            yield file
            os.fsync(file)
            os.replace(temporary, path)  # before it is closed and unlocked: sweep takes no other
        finally:
            os.close(file)
            with suppress(OSError):
                temporary.unlink()
        _sync(path.parent)
    except OSError as error:
        explain(path, size, error)


def _temporary(path: Path) -> tuple[int, Path]:
    # locked while it is written: a process id would mislead where containers reuse them
    sweep(path.parent, glob.escape(path.name))
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # a file system without locks: nothing is swept there either
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_nlink:  # not swept between its making and its locking
            return file, temporary
        os.close(file)


def _sync(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that cannot, and need not
            raise
    finally:
        os.close(file)


def _write(file: int, content: bytes | memoryview) -> None:
    left = memoryview(content)
    while left:
        written = os.write(file, left)
        if not written:
            raise OSError(errno.ENOSPC, "nothing more is taken")
        left = left[written:]


def _stamped(path: Path) -> bool:
    """Whether a file carries a stamp; raises ValueError if its bytes do not agree with it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing")
    with open(path, "rb") as file:
        start = file.read(CHUNK)
        found = STAMPED.match(start, 8)
        if not found:
            return False
        written, size = found[1].decode(), os.fstat(file.fileno()).st_size
        if size != int(found[2]):
            raise ValueError(
                f"{path}: truncated, or no safetensors file: {size:,} bytes, must be "
                f"{int(found[2]):,}; copy or train it again"
            )
        checksum = zlib.crc32(start[: found.start(1)] + b"0" * 8 + start[found.end(1) :])
        while chunk := file.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    if f"{checksum:08x}" != written:
        raise ValueError(
            f"{path}: damaged: its checksum is {checksum:08x}, must be {written}; "
            "copy or train it again"
        )
    return True
