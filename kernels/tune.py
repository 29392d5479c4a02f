"""Which way to compile a kernel is the fastest: measured once for each kind of launch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

if TYPE_CHECKING:
    from .launch import Config, Launch

_chosen: dict[Any, Config] = {}


def choice(launch: Launch) -> Config:
    """The fastest of the launch's configurations, measured on copies of its tensors.

    The first, unmeasured: on the CPU, where there is only one, while a CUDA graph is captured,
    and where FASTDIFF_TUNE=0 is set. Launches of like tensors share the choice.
    """
    first = launch.configs[0]
    if len(launch.configs) == 1 or launch.device.type == "cpu":
        return first
    blocks = tuple(first.blocks.values())  # they may follow from numbers, as a group's width
    key = (launch.kernel, launch.device, blocks, *map(_kind, launch.args.values()))
    if key not in _chosen:
        if os.environ.get("FASTDIFF_TUNE") == "0" or torch.cuda.is_current_stream_capturing():
            return first
        _chosen[key] = _fastest(launch)
    return _chosen[key]


def _fastest(launch: Launch) -> Config:
    from .launch import Launch

    args = {name: _copied(value) for name, value in launch.args.items()}
    trial = Launch(launch.kernel, launch.configs, launch.programs, args, launch.device)
    with torch.cuda.device(launch.device):
        times = [_milliseconds(lambda c=c: trial.run(c)) for c in launch.configs]
    return launch.configs[times.index(min(times))]


def _milliseconds(run: Callable[[], None]) -> float:
    try:
        return do_bench(run, warmup=5, rep=20)
    except OutOfResources:  # too large for this GPU
        return math.inf


def _kind(value: Any) -> Any:
    """What of an argument decides the speed: dtype, shape and strides of tensors, no number."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride()
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    return value if isinstance(value, bool) else type(value)


def _copied(value: Any) -> Any:
    """An argument whose tensors may be written to; integers and views that repeat are only read."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or 0 in value.stride():
            return value
        copy = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
        return copy.copy_(value)
    return tuple(map(_copied, value)) if isinstance(value, tuple) else value
