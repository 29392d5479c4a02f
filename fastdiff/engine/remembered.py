"""The engine's choices from process to process, so that a network computes the same bits in each.

They lie in engine-<what they depend on>.json of $FASTDIFF_CACHE, by default ~/.cache/fastdiff;
FASTDIFF_CACHE=off keeps none. What cannot be read or written is measured again.
"""

from __future__ import annotations

import json
import os
import platform
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..files import make_folder, write_bytes
from ..version import __version__


def path() -> Path | None:
    """The file of this machine and these versions; None where nothing is to be kept."""
    folder = os.environ.get("FASTDIFF_CACHE", "")
    if folder == "off":
        return None
    if not folder:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        with suppress(RuntimeError):  # no home
            return Path(base).expanduser() / "fastdiff" / _name()
        return None
    return Path(folder) / _name()


def read() -> list[Any]:
    """What earlier processes have measured, as `tune.recall` takes it."""
    place = path()
    with suppress(OSError, ValueError):
        if place is not None:
            return read_choices(place)
    return []


def read_choices(path: Path) -> list[Any]:
    """Those of a file that must be whole, as `tune.recall` takes them.

    Raises:
        ValueError: it is damaged; without it networks would round otherwise.
    """
    with suppress(ValueError):
        found = json.loads(path.read_text())
        if isinstance(found, list) and all(_is_choice(row) for row in found):
            return found
    raise ValueError(
        f"{path}: damaged; without it networks round otherwise: restore it, or begin another folder"
    )


def write(choices: list[Any]) -> None:
    """Keep choices beside those that are there, which stay."""
    place = path()
    if place is None:
        return
    with suppress(OSError):
        make_folder(place.parent)
        kept = {json.dumps(row[:2]): row for row in [*choices, *read()]}
        write_bytes(place, (json.dumps(list(kept.values())) + "\n").encode())


def _is_choice(row: Any) -> bool:
    return (
        isinstance(row, list)
        and len(row) == 3
        and isinstance(row[0], str)
        and isinstance(row[1], list)
        and all(isinstance(name, str) for name in row[1:2][0])
        and isinstance(row[2], str)
    )


def _name() -> str:
    cpu = platform.processor()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line for line in lines if line.startswith("model name"))
    said = f"{__version__} {torch.__version__} {platform.machine()} {cpu}"
    return f"engine-{zlib.crc32(said.encode()):08x}.json"
