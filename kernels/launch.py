"""The host's side of a launch: operands told as (tensor, strides), and a grid over samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..ops.layout import describe

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
    raise ImportError(f"Triton {triton.__version__} is too old for these kernels: must be 3.4")

# 8 elements a thread: 128 bits of bf16, and two 128-bit accesses of fp32 in flight an operand.
BLOCK = 1024
THREADS = 128


def options(warp: int) -> dict[str, Any]:
    """Compiler options for a device whose warps are `warp` threads wide."""
    return {"num_warps": THREADS // warp, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """A kernel, the number of its programs (0 for empty tensors), and its arguments."""

    kernel: Any
    programs: int
    args: dict[str, Any]
    device: torch.device

    def run(self) -> None:
        """Launch on the tensors' device and its current stream; nothing waits for it."""
        if not self.programs:
            return
        if self.device.type == "cpu":
            if isinstance(self.kernel, triton.JITFunction):
                raise RuntimeError(
                    "backend='triton': the tensors are on the CPU, where Triton runs only in its "
                    "interpreter; set TRITON_INTERPRET=1 before the first import of triton"
                )
            self.kernel[(self.programs,)](**self.args)
            return
        with torch.cuda.device(self.device):
            warp = 64 if torch.version.hip else 32
            self.kernel[(self.programs,)](**self.args, **options(warp))


def launcher(plan: Callable[..., Launch]) -> Callable[..., None]:
    """The `launch` that goes with a `plan`."""
    return lambda *args: plan(*args).run()


def tiled(kernel: Any, operands: dict[str, Tensor | None], **args: Any) -> Launch:
    """A launch in which each program handles BLOCK elements of one sample of every operand.

    An operand reaches the kernel as (tensor, its four strides), or as None. `shape` is (elements
    of a sample,) where each sample is one run of memory in every operand, else with d2 and d3.
    Only noise depends on the elements' order: without it they are walked as they lie in memory.
    """
    present = {name: t for name, t in operands.items() if t is not None}
    first = next(iter(present.values()))
    order = sorted(range(1, first.dim()), key=first.stride, reverse=True)
    if args.get("streams") is None and order != list(range(1, first.dim())):
        present = {name: t.permute(0, *order) for name, t in present.items()}
    (batch, *inner), described = describe(*present.values())
    strides = [operand[2] for operand in described if operand]
    told = {n: (t, *s) for (n, t), s in zip(present.items(), strides, strict=True)}
    count = math.prod(inner)
    run = count == 1 or (inner[:2] == [1, 1] and all(s[3] == 1 for s in strides))
    args |= dict.fromkeys(operands) | told
    args |= {"shape": (count,) if run else (count, *inner[1:]), "BLOCK": BLOCK}
    return Launch(kernel, batch * triton.cdiv(count, BLOCK), args, first.device)
