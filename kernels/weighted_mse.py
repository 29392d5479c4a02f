"""The training loss on the GPU; the formulas are in `fastdiff.ops.weighted_mse`.

Two launches: the sums of CHUNK elements each, then each sample's total and the sums at each
timestep, every one by one program, in one order: no atomics, and the same bits each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, Launch, launcher, tiled
from .tile import load, tile

CHUNK = 4096  # enough that its sum is little work; 16x3x256x256 still gives 768 programs
PARTS = (
    Config({"BLOCK": 1024, "TILES": 4}, threads=128),
    Config({"BLOCK": 2048, "TILES": 2}, threads=256),
    Config({"BLOCK": 2048, "TILES": 2}, threads=128),
)
FINISH = (Config({"TIMES": 16, "SAMPLES": 64, "WIDTH": 16}, threads=128),)


@triton.jit
def parts_kernel(output, target, parts, shape, BLOCK: tl.constexpr, TILES: tl.constexpr):
    sample, elements = tile(shape, BLOCK * TILES)
    count, start = shape[0], elements[0]
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TILES):
        first = start + k * BLOCK
        live = tl.arange(0, BLOCK) < count - first
        error = load(output, sample, (first, live), shape) - load(
            target, sample, (first, live), shape
        )
        total += tl.where(live, error * error, 0.0)
    # a lane's few squares lose nothing in float32; BLOCK of them would, one by one
    tl.store(parts + tl.program_id(0), tl.sum(total.to(tl.float64)))


@triton.jit(do_not_specialize=["batch", "times", "width", "count"])
def finish_kernel(
    parts,
    weights,
    t,
    losses,
    sums,
    batch,
    times,
    width,
    count,
    TIMES: tl.constexpr,
    SAMPLES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """TIMES timesteps, and the losses of the samples that are at them."""
    time = tl.program_id(0) * TIMES + tl.arange(0, TIMES)
    number = tl.zeros([TIMES], tl.float64)
    first_power = tl.zeros([TIMES], tl.float64)
    second_power = tl.zeros([TIMES], tl.float64)
    for first in range(0, batch, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)
        live = sample < batch
        at = tl.load(t + sample, live, 0)
        valid = (at >= 0) & (at < times)
        owner = tl.where(valid, at // TIMES, 0)
        mine = live & (owner == tl.program_id(0))
        total = tl.zeros([SAMPLES], tl.float64)
        row = parts + sample.to(tl.int64)[:, None] * width
        for column in range(0, width, WIDTH):
            part = column + tl.arange(0, WIDTH)[None, :]
            total += tl.sum(tl.load(row + part, mine[:, None] & (part < width), 0.0), 1)
        mse = total / count
        weight = tl.load(weights + at, mine & valid, float("nan"))  # a wrong t shows
        tl.store(losses + sample, weight * mse, mine)
        hit = (at[None, :] == time[:, None]) & mine[None, :]
        number += tl.sum(tl.where(hit, 1.0, 0.0).to(tl.float64), 1)
        first_power += tl.sum(tl.where(hit, mse[None, :], 0.0), 1)
        second_power += tl.sum(tl.where(hit, (mse * mse)[None, :], 0.0), 1)
    tl.store(sums + 3 * time, number, time < times)
    tl.store(sums + 3 * time + 1, first_power, time < times)
    tl.store(sums + 3 * time + 2, second_power, time < times)


def plan(
    output: Tensor, target: Tensor, weights: Tensor, t: Tensor, losses: Tensor, sums: Tensor
) -> list[Launch]:
    batch, count, times = len(t), output.shape[1:].numel(), len(weights)
    width = triton.cdiv(count, CHUNK)
    parts = torch.empty(batch * width, dtype=torch.float64, device=output.device)
    (summed,) = tiled(parts_kernel, {"output": output, "target": target}, parts=parts)
    args = {"parts": parts, "weights": weights, "t": t, "losses": losses, "sums": sums}
    sizes = {"batch": batch, "times": times, "width": width, "count": count}

    def programs(blocks: Mapping[str, int]) -> tuple[int]:
        return (triton.cdiv(times, blocks["TIMES"]),)

    finish = Launch(finish_kernel, FINISH, programs, args | sizes, output.device)
    return [replace(summed, configs=PARTS), finish]


launch = launcher(plan)
