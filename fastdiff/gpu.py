"""The GPUs that torch can use here, or why it can use none, in words a user can act on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

TRACES = ("/dev/nvidia0", "/proc/driver/nvidia/version", "/dev/kfd")  # kfd: AMD's
COPIED = 2**28  # bytes, out of every cache
COPIES, TURNS = 5, 4


@dataclass(frozen=True)
class Gpu:
    """What a GPU says of itself. `memory` in bytes, `bandwidth` in bytes/s, `l2` in bytes; None
    where this torch does not tell."""

    index: int
    name: str
    capability: tuple[int, int]
    memory: int
    bandwidth: float | None
    l2: int | None

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name}, compute capability {major}.{minor}, {self.memory / 2**30:.0f} GiB"


def found() -> list[Gpu]:
    """Every GPU that torch can use."""
    if why_none():
        return []
    return [_of(index) for index in range(torch.cuda.device_count())]


def _of(index: int) -> Gpu:
    told = torch.cuda.get_device_properties(index)
    clock, width = getattr(told, "memory_clock_rate", 0), getattr(told, "memory_bus_width", 0)
    return Gpu(
        index=index,
        name=told.name,
        capability=(told.major, told.minor),
        memory=told.total_memory,
        # kHz and bits; two transfers a cycle. It is what the data sheet of each kind says
        bandwidth=2 * clock * 1e3 * width / 8 or None,
        l2=getattr(told, "L2_cache_size", None),
    )


def why_none() -> str | None:
    """Why torch can use no GPU here, and what to do; None if it can use one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is told below
        if torch.cuda.is_available():
            return None
    trace = next((path for path in TRACES if Path(path).exists()), shutil.which("nvidia-smi"))
    if torch.version.cuda is None and torch.version.hip is None:
        if trace is None:
            return "there is none, and this torch is for the CPU alone"
        return (
            f"torch {torch.__version__} is for the CPU alone, though this machine has a GPU's "
            f"driver ({trace}); install a torch with CUDA or ROCm"
        )
    try:
        torch.cuda.init()
        reason = "torch counts none"
    except (RuntimeError, AssertionError) as error:  # too old a driver, say
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return reason if hidden is None else f"{reason} (CUDA_VISIBLE_DEVICES={hidden!r})"


def driver() -> str | None:
    """The version of NVIDIA's driver, None where there is none."""
    path = Path("/proc/driver/nvidia/version")
    text = path.read_text() if path.exists() else ""
    if not text and (command := shutil.which("nvidia-smi")):
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        text = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    version = re.search(r"\d+\.\d+(\.\d+)?", text)
    return version[0] if version else None


def runtime() -> str:
    """What this torch was built with."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"


def copy_bandwidth(device: str, size: int = COPIED) -> float:
    """Bytes/s, read and written, that copies of `size` bytes reach on a device: the best turn."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    seconds = []
    for _ in range(TURNS):
        began = _now(device)
        for _ in range(COPIES):
            to.copy_(source)
        seconds.append((_now(device) - began) / COPIES)
    return 2 * size / min(seconds)


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
