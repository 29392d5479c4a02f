"""What a process holds in memory, in MB, as Linux tells; None elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from pathlib import Path

_PROCESS = Path("/proc/self")


def resident() -> float | None:
    """Now, when what is free has gone back to the system."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's
    return _status("VmRSS")


def peak() -> float | None:
    """The most since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    if (_PROCESS / "clear_refs").exists():
        (_PROCESS / "clear_refs").write_text("5")  # see proc(5)


def _status(field: str) -> float | None:
    if not (_PROCESS / "status").exists():
        return None
    found = re.search(rf"{field}:\s+(\d+) kB", (_PROCESS / "status").read_text())
    return int(found[1]) / 1024 if found else None
