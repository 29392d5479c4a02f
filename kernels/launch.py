"""The host's side of a launch: operands told as (tensor, strides), and a grid over samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..ops.layout import describe
from . import tune

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
    raise ImportError(f"Triton {triton.__version__} is too old for these kernels: must be 3.4")


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel: the sizes of its blocks, threads a program, pipeline stages."""

    blocks: Mapping[str, int]
    threads: int = 128
    stages: int = 2

    def options(self, warp: int) -> dict[str, Any]:
        """For the compiler, on a device whose warps are `warp` threads wide."""
        return {
            "num_warps": self.threads // warp,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }


# 16 elements a thread: four 128-bit accesses of fp32, and few enough of what is done once a thread
# (addresses, the noise's keys) for arithmetic to stay behind memory.
STREAMING = (
    Config({"BLOCK": 2048}, threads=128),
    Config({"BLOCK": 1024}, threads=128),
    Config({"BLOCK": 4096}, threads=256),
)
# Where accesses cannot be wide, each element has an address of its own, which takes registers.
NARROW = (Config({"BLOCK": 512}, threads=128), Config({"BLOCK": 1024}, threads=256))


@dataclass(frozen=True)
class Launch:
    """A kernel, the ways to compile it, its arguments, and its programs for given block sizes.

    `programs(blocks)` is the grid, up to three sizes; a size of 0 (an empty tensor) launches
    nothing. Of `configs` the fastest runs, measured once (`tune.py`); the first where nothing can
    be measured. What a kernel adds to instead of writing it must be zeroed by its plan.
    """

    kernel: Any
    configs: Sequence[Config]
    programs: Callable[[Mapping[str, int]], tuple[int, ...]]
    args: dict[str, Any]
    device: torch.device

    def run(self, config: Config | None = None) -> None:
        """Launch on the tensors' device and its current stream; nothing waits for it."""
        if self.device.type == "cpu" and isinstance(self.kernel, triton.JITFunction):
            raise RuntimeError(
                "backend='triton': the tensors are on the CPU, where Triton runs only in its "
                "interpreter; set TRITON_INTERPRET=1 before the first import of triton"
            )
        config = config or tune.choice(self)
        grid = self.programs(config.blocks)
        if 0 in grid:
            return
        if self.device.type == "cpu":
            self.kernel[grid](**self.args, **config.blocks)
            return
        with torch.cuda.device(self.device):
            warp = 64 if torch.version.hip else 32
            self.kernel[grid](**self.args, **config.blocks, **config.options(warp))


def launcher(plan: Callable[..., Sequence[Launch]]) -> Callable[..., None]:
    """The `launch` that goes with a `plan`: its launches, in order."""

    def launch(*args: Any) -> None:
        for each in plan(*args):
            each.run()

    return launch


def tiled(kernel: Any, operands: dict[str, Tensor | None], **args: Any) -> list[Launch]:
    """The one launch in which each program handles BLOCK elements of one sample of every operand.

    Where a configuration has TILES, so many times BLOCK.
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
    args |= {"shape": (count,) if run else (count, *inner[1:])}

    wide = run and all(s[0] % 16 == 0 for s in strides)

    def programs(blocks: Mapping[str, int]) -> tuple[int]:
        return (batch * triton.cdiv(count, blocks["BLOCK"] * blocks.get("TILES", 1)),)

    return [Launch(kernel, STREAMING if wide else NARROW, programs, args, first.device)]
