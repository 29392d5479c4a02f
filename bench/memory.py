"""What a process holds in memory, in MB: of a GPU as torch tells, else as Linux; None elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


def resident(device: str = "cpu") -> float | None:
    """Now, when what is free has gone back to the system."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() / 2**20  # the pools of CUDA graphs included
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's
    return _status("VmRSS")


def peak(device: str = "cpu") -> float | None:
    """The most since `reset_peak`."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved() / 2**20
    return _status("VmHWM")


def reset_peak(device: str = "cpu") -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (_PROCESS / "clear_refs").exists():
        (_PROCESS / "clear_refs").write_text("5")  # see proc(5)


def _status(field: str) -> float | None:
    if not (_PROCESS / "status").exists():
        return None
    found = re.search(rf"{field}:\s+(\d+) kB", (_PROCESS / "status").read_text())
    return int(found[1]) / 1024 if found else None
