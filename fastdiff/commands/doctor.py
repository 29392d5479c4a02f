"""Say what runs here, what is missing and what that costs."""

from __future__ import annotations

import argparse
import importlib.util
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .. import gpu
from ..checkpoint import ASSETS
from ..engine import remembered
from ..op import BACKENDS, missing
from ..ops import OPS, conv3x3_available
from ..ops.layout import _C
from ..precision import bfloat16_pays
from ..verify import fault
from ..version import __version__

GPU_BACKENDS = {"triton": "Triton", "cuda": "CUDA"}


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
    yield Finding("ok", f"fastdiff {__version__}, python {platform.python_version()}")
    yield Finding("ok", f"torch {torch.__version__}, {torch.get_num_threads()} threads")


def _cpp() -> Iterator[Finding]:
    if reason := missing("cpp"):
        yield Finding("--", f"no C++ kernels: {reason}")
        yield Finding("--", "  ops run as plain torch, 5 to 40 times slower on the CPU; install")
        yield Finding("--", "  a C++ compiler (apt install g++), then install fastdiff again")
        return
    yield Finding("ok", f"C++ kernels for {_C.isa()}")
    ops = [op for op in OPS.values() if op.cpp or op.described]
    for op in ops:
        for case in op.cases():
            if not case.large and (wrong := fault(op, case)):
                yield Finding("!!", f"C++ kernel {op.name} is wrong, please report it: {wrong}")
                return
    names = ", ".join(op.name for op in ops)
    yield Finding("ok", f"C++ kernels agree with the reference: {names}")


def _engine() -> Iterator[Finding]:
    place = remembered.path()
    kept = f"remembered in {place}" if place else "not remembered: FASTDIFF_CACHE=off"
    yield Finding("ok", f"optimize: which kernel is fastest for each layer is {kept}")
    needs = {torch.float32: "AVX2", torch.bfloat16: "AVX-512's dot product of bfloat16"}
    for dtype, need in needs.items():
        name = str(dtype).removeprefix("torch.")
        if conv3x3_available(dtype):
            yield Finding("ok", f"optimize: own convolutions in {name}")
        elif dtype == torch.bfloat16 and not bfloat16_pays("cpu"):
            yield Finding("--", f"{name} is computed in float32 on this CPU, where that is faster")
        else:
            serve = "oneDNN's serve, no slower than torch"
            yield Finding("--", f"optimize: own convolutions in {name} need {need}; {serve}")


def _openmp() -> Iterator[Finding]:
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    names = ("libgomp", "libiomp", "libomp")
    found = {line.split()[-1] for line in lines if any(f"/{name}" in line for name in names)}
    if len(found) > 1:
        yield Finding("!!", f"{len(found)} OpenMP runtimes spin against each other: {found}")
        yield Finding("!!", "  that can cost half the speed; import torch before anything else")


def _gpu() -> Iterator[Finding]:
    if reason := gpu.why_none():
        yield Finding("--", f"no GPU that torch can use: {reason}; everything runs on the CPU")
    for device in gpu.found():
        yield Finding("ok", f"GPU {device.index}: {device}")
        yield _memory(device)
    if not reason:
        yield Finding("ok", f"GPU driver {gpu.driver() or 'unknown'}, torch with {gpu.runtime()}")
    for name in (b for b in BACKENDS if b in GPU_BACKENDS):
        # without a GPU, what is built cannot run, and lacks nothing else
        built = bool(reason) and name == "cuda" and importlib.util.find_spec("fastdiff._cuda")
        if not built and (lacking := missing(name)):
            cost = "only GPUs need them" if reason else "GPUs do without, slower"
            yield Finding("--", f"no {GPU_BACKENDS[name]} kernels: {lacking}; {cost}")
        else:
            yield Finding("ok", f"{GPU_BACKENDS[name]} kernels are installed, for GPUs")
    if not reason:
        yield from _ops_on_gpus()


def _memory(device: gpu.Gpu) -> Finding:
    """The bandwidth of a copy, which shows whether torch's kernels run there at all."""
    try:
        reached = gpu.copy_bandwidth(f"cuda:{device.index}")
    except torch.OutOfMemoryError:
        return Finding("--", "  too little of its memory is free to measure its bandwidth")
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        return Finding("!!", f"  torch cannot use it ({said}); the CPU works: device='cpu'")
    text = f"  a copy reaches {reached / 1e9:.0f} GB/s"
    if device.bandwidth is None:
        return Finding("ok", text)
    share = reached / device.bandwidth
    return Finding("ok", f"{text}, {share:.0%} of its memory's {device.bandwidth / 1e9:.0f}")


def _ops_on_gpus() -> Iterator[Finding]:
    by_backend: dict[str, list[str]] = {}
    for op in OPS.values():
        by_backend.setdefault(op.backend("cuda"), []).append(op.name)
    for name, ops in by_backend.items():
        yield Finding("ok", f"ops on GPUs by {name}: {', '.join(ops)}")
    if by_backend.keys() != {"reference"}:
        yield Finding("--", "GPU kernels are not checked here: `make gpu-check` does")
    else:
        yield Finding("--", "  plain torch, several times slower on a GPU; pip install triton")


def _models() -> Iterator[Finding]:
    names = sorted(p.parent.name for p in ASSETS.glob("*/model.safetensors"))
    if names:
        yield Finding("ok", f"shipped models: {', '.join(names)}")
    else:
        yield Finding("!!", f"no shipped models in {ASSETS}: install fastdiff again")
