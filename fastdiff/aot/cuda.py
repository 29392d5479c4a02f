"""What ptxas says of the CUDA C++ kernels, where this is a checkout and nvcc is found."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def usage() -> list[Any]:
    """A row a kernel and target: kernel, target, registers, spills, shared; none without nvcc."""
    spec = importlib.util.spec_from_file_location("nvcc", CSRC / "nvcc.py")
    if spec is None or spec.loader is None or not (CSRC / "nvcc.py").exists():
        return []
    nvcc = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nvcc)
    return nvcc.usage() if nvcc.compiler() else []
