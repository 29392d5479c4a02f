"""What a run measures, and on what: the records that the table, the JSON and the picture show."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff import gpu
from fastdiff.op import missing
from fastdiff.ops import OPS
from fastdiff.precision import bfloat16_pays

from .timing import Contender, Spread

FASTDIFF, PLAIN = "fastdiff", "plain PyTorch"
COPY, UNGUIDED = "copy", "unguided"
CONVOLUTION = "as convolutions"  # the time that a network's FLOPs take in oneDNN's convolution
OWN = "the dtype's own"  # PyTorch's eager error in the dtype
RATE = "images/s"  # a metric
NO_BFLOAT16 = "left out: this CPU does not compute in bfloat16"
LACKS = (torch.OutOfMemoryError, ModuleNotFoundError)  # of the machine, no fault of ours
YARDSTICKS = {  # providers fastdiff is measured in, and the column that shows it
    COPY: "copies",
    UNGUIDED: "x unguided",
    CONVOLUTION: "x as convolutions",
    OWN: "x the dtype's own",
}


@dataclass(frozen=True)
class Settings:
    """What the command line asked for; `quick` cuts sizes and repeats to a smoke run."""

    steps: int = 50
    device: str = "cpu"
    quick: bool = False

    @property
    def seconds(self) -> float:
        """How long the rounds of one row go on."""
        return 0.0 if self.quick else 1.5

    @property
    def rounds(self) -> int:
        """The fewest rounds of a row."""
        return 2 if self.quick else 9

    @property
    def compile(self) -> bool:
        """Whether peers may try torch.compile, which takes most of a minute in all."""
        return not self.quick


@dataclass(frozen=True)
class Record:
    """One measurement. `p50` is None where there is none; `note` then says why.

    `ratio` is this provider's time over fastdiff's in the same round, the median over rounds:
    above 1, fastdiff is faster. `how` is the option of the provider that was fastest. `gflop` is
    the work of a row in 1e9 FLOPs, as direct algorithms do it.
    """

    section: str
    row: str
    provider: str
    metric: str
    p50: float | None
    p20: float | None = None
    p80: float | None = None
    ratio: float | None = None
    gb_s: float | None = None
    gflop: float | None = None
    how: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    note: str = ""


def of_race(
    raced: dict[str, tuple[Contender, NDArray[np.float64]]], metric: str = "us", **about: Any
) -> list[Record]:
    """The records of a `timing.race`, the ratio of each provider to fastdiff included."""
    ours = raced[FASTDIFF][1]
    return [
        Record(
            provider=provider,
            metric=metric,
            ratio=float(np.median(us / ours)),
            how=contender.how,
            **vars(Spread.of(us)),
            **about,
        )
        for provider, (contender, us) in raced.items()
    ]


def without_time(section: str, row: str, note: str, provider: str = FASTDIFF) -> Record:
    """The record of a row that was refused or skipped."""
    return Record(section, row, provider, "", None, note=note)


def in_dtype(
    section: str, row: str, dtype: torch.dtype, device: str, records: Iterator[Record]
) -> Iterator[Record]:
    """The records of a row, as `surviving` has them, where the device computes in its dtype."""
    if dtype == torch.bfloat16 and not bfloat16_pays(device):
        return iter([without_time(section, row, NO_BFLOAT16)])
    return surviving(section, row, records)


def surviving(section: str, row: str, records: Iterator[Record]) -> Iterator[Record]:
    """The records of a row, to the error that ends it, which is told and ends no other row."""
    try:
        yield from records
    except Exception as error:
        what = "left out" if isinstance(error, LACKS) else "refused"
        said = (str(error).splitlines() or [""])[0]
        yield without_time(section, row, f"{what}: {type(error).__name__}: {said}")


def machine(settings: Settings) -> dict[str, Any]:
    """What the figures depend on, for the head of the report."""
    packages = ("fastdiff", "torch", "triton", "diffusers", "openvino", "onnxruntime", "numpy")
    return {
        "device": str(gpu.found()[0]) if settings.device == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": _kernels(settings.device),
        "versions": {p: version_of(p) for p in packages} | {"python": platform.python_version()},
        "revision": _revision(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "steps": settings.steps,
        "quick": settings.quick,
    }


def _revision() -> str | None:
    """The commit that is measured, and whether files differ from it; None outside a checkout."""
    command = ("git", "describe", "--always", "--dirty", "--exclude=*")
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def _kernels(device: str) -> str:
    """Whose kernels run, and on what."""
    if device == "cpu":
        if reason := missing("cpp"):
            return f"reference ({reason})"
        from fastdiff import _C  # type: ignore[attr-defined]

        return f"cpp, {_C.isa()}"
    by_backend: dict[str, list[str]] = {}
    for op in OPS.values():
        by_backend.setdefault(op.backend(device), []).append(op.name)
    kernels = "; ".join(f"{name}: {', '.join(ops)}" for name, ops in by_backend.items())
    tf32 = "with" if torch.backends.cudnn.allow_tf32 else "without"
    driver = gpu.driver() or "unknown"
    return f"{kernels}\ndriver {driver}, {gpu.runtime()}, convolutions {tf32} TF32"


def version_of(package: str) -> str:
    """The installed version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines: Sequence[str] = path.read_text().splitlines() if path.exists() else ()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
