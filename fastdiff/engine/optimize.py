"""The public door to the engine."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .. import errors
from ..op import missing
from ..precision import bfloat16_pays
from .engine import Engine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GPU_DTYPES = {**DTYPES, "float16": torch.float16}
MEMORY = ("high", "low")


def optimize(model: nn.Module, dtype: str | None = None, memory: str = "high") -> nn.Module:
    """The network with the same call and the same results, faster, for inference.

    On the CPU it is an `Engine`. Weights are transformed and packed once for the kernels of this
    machine; the fastest algorithm of each layer is measured at the first call with a new shape of
    inputs, which therefore takes seconds. Needs no other change:

        >>> fast = optimize(model)
        >>> sampler.sample(fast, (16, 3, 32, 32))  # doctest: +SKIP
        >>> print(fast.report())  # doctest: +SKIP

    On a GPU it is a copy of the network in channels-last layout, compiled (`compile_blocks` where
    it has that, else torch.compile; without Triton neither), that takes inputs in its dtype. It
    does not follow later changes of the weights.

    Args:
        model: a U-Net in evaluation mode: fastdiff's, diffusers' UNet2DModel and
            UNet2DConditionModel, or another that takes (x, t, ...) and that torch.export traces.
            Layers without a kernel here are left to torch.
        dtype: what is computed in between layers: "float32", or "bfloat16" with float32 sums; None
            is the model's own. Inputs and outputs keep their dtype. On a CPU without bfloat16
            arithmetic (before AVX-512) "bfloat16" is computed in float32: faster there, and closer.
            On a GPU also "float16".
        memory: "high", or "low" to do without Winograd's F(4x4), whose weights take four times
            their size; of no account on a GPU.

    Raises:
        TypeError, ValueError: a model in training mode, on another kind of device, or no module.
    """
    if not isinstance(model, nn.Module) or isinstance(model, Engine):
        raise TypeError(f"model: got {type(model).__name__}, must be a torch.nn.Module")
    errors.one_of("memory", memory, MEMORY)
    if model.training:
        raise ValueError(
            "model: is in training mode, and the engine is for inference; call model.eval() first"
        )
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is not None and first.device.type == "cuda":
        return compiled(model, dtype)
    if first is not None and first.device.type != "cpu":
        raise ValueError(
            f"model: is on {first.device}, must be on the CPU or a GPU; call model.cpu() or .cuda()"
        )
    if dtype is None:
        own = None if first is None else str(first.dtype).removeprefix("torch.")
        dtype = own if own in DTYPES else "float32"
    errors.one_of("dtype", dtype, DTYPES)
    compute = DTYPES[dtype]
    if compute == torch.bfloat16 and not bfloat16_pays("cpu"):
        compute = torch.float32
    return Engine(model, compute, memory)


def compiled(model: nn.Module, dtype: str | None) -> nn.Module:
    """What `optimize` makes of a network on a GPU."""
    if dtype is not None:
        errors.one_of("dtype", dtype, GPU_DTYPES)
    mine: Any = copy.deepcopy(model).requires_grad_(False)
    mine.to(dtype=GPU_DTYPES.get(dtype or ""), memory_format=torch.channels_last)
    if missing("triton"):
        return mine
    if hasattr(mine, "compile_blocks"):
        mine.compile_blocks()
    else:
        mine.compile(dynamic=False)
    return mine
