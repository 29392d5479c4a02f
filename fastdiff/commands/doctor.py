"""Say what runs here, what is missing and what that costs."""

from __future__ import annotations

import argparse
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from ..checkpoint import ASSETS
from ..op import missing
from ..ops import OPS, conv3x3_available
from ..ops.layout import _C
from ..verify import fault


class Finding(NamedTuple):
    """`mark` is "ok", "--" for what is missing but not needed, or "!!" for what is wrong."""

    mark: str
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # it takes none


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if something that should work does not."""
    del args
    wrong = False
    for check in (_versions, _cpp, _engine, _openmp, _gpu, _models):
        for finding in check():
            print(f"{finding.mark}  {finding.text}")
            wrong |= finding.mark == "!!"
    return int(wrong)


def _versions() -> Iterator[Finding]:
    yield Finding("ok", f"fastdiff {version('fastdiff')}, python {platform.python_version()}")
    yield Finding("ok", f"torch {torch.__version__}, {torch.get_num_threads()} threads")


def _cpp() -> Iterator[Finding]:
    if reason := missing("cpp"):
        yield Finding("--", f"no C++ kernels: {reason}")
        yield Finding("--", "  ops run as plain torch, 5 to 40 times slower on the CPU; install")
        yield Finding("--", "  a C++ compiler (apt install g++), then install fastdiff again")
        return
    yield Finding("ok", f"C++ kernels for {_C.isa()}")
    for op in OPS.values():
        for case in op.cases():
            if not case.large and (wrong := fault(op, case)):
                yield Finding("!!", f"C++ kernel {op.name} is wrong, please report it: {wrong}")
                return
    yield Finding("ok", f"C++ kernels agree with the reference: {', '.join(OPS)}")


def _engine() -> Iterator[Finding]:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    own = [name for name, dtype in dtypes.items() if conv3x3_available(dtype)]
    if len(own) == len(dtypes):
        yield Finding("ok", "optimize: networks run on fastdiff's convolutions, in both dtypes")
    else:
        yield Finding(
            "--",
            f"optimize: fastdiff's convolutions run here in {', '.join(own) or 'no dtype'}; others "
            "need AVX-512 (bfloat16: its dot product) and go to oneDNN, no slower than torch",
        )


def _openmp() -> Iterator[Finding]:
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    names = ("libgomp", "libiomp", "libomp")
    found = {line.split()[-1] for line in lines if any(f"/{name}" in line for name in names)}
    if len(found) > 1:
        yield Finding("!!", f"{len(found)} OpenMP runtimes spin against each other: {found}")
        yield Finding("!!", "  that can cost half the speed; import torch before anything else")


def _gpu() -> Iterator[Finding]:
    if reason := missing("triton"):
        yield Finding("--", f"no Triton: {reason}; only GPUs need it (pip install triton)")
    else:
        yield Finding("ok", f"triton {version('triton')}")
    if torch.cuda.is_available():
        yield Finding("ok", f"GPU: {torch.cuda.get_device_name()}")
    else:
        yield Finding("--", "no GPU that torch can use: everything runs on the CPU")
    if not shutil.which("nvcc"):
        yield Finding("--", "no nvcc: CUDA sources are not built; Triton serves GPUs without them")


def _models() -> Iterator[Finding]:
    names = sorted(p.parent.name for p in ASSETS.glob("*/model.safetensors"))
    if names:
        yield Finding("ok", f"shipped models: {', '.join(names)}")
    else:
        yield Finding("!!", f"no shipped models in {ASSETS}: install fastdiff again")
