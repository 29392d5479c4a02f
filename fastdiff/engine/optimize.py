"""The public door to the engine."""

from __future__ import annotations

import torch
from torch import nn

from .. import errors
from .engine import Engine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEMORY = ("high", "low")


def optimize(model: nn.Module, dtype: str | None = None, memory: str = "high") -> Engine:
    """The network with the same call and the same results, faster, for inference on the CPU.

    Weights are transformed and packed once for the kernels of this machine; the fastest
    algorithm of each layer is measured at the first call with a new shape of inputs, which
    therefore takes seconds. Needs no other change:

        >>> fast = optimize(model)
        >>> sampler.sample(fast, (16, 3, 32, 32))  # doctest: +SKIP
        >>> print(fast.report())  # doctest: +SKIP

    Args:
        model: a U-Net in evaluation mode: fastdiff's, diffusers' UNet2DModel and
            UNet2DConditionModel, or another that takes (x, t, ...) and that torch.export traces.
            Layers without a kernel here are left to torch.
        dtype: what is computed in between layers: "float32", or "bfloat16" with float32 sums; None
            is the model's own. Inputs and outputs keep their dtype. On a CPU without bfloat16
            arithmetic (before AVX-512) "bfloat16" is computed in float32: faster there, and closer.
        memory: "high", or "low" to do without Winograd's F(4x4), whose weights take four times
            their size.

    Raises:
        TypeError, ValueError: a model in training mode, on another device, or of another kind.
    """
    if not isinstance(model, nn.Module) or isinstance(model, Engine):
        raise TypeError(f"model: got {type(model).__name__}, must be a torch.nn.Module")
    errors.one_of("memory", memory, MEMORY)
    if model.training:
        raise ValueError(
            "model: is in training mode, and the engine is for inference; call model.eval() first"
        )
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is not None and first.device.type != "cpu":
        raise ValueError(f"model: is on {first.device}, must be on the CPU; call model.cpu()")
    if dtype is None:
        own = None if first is None else str(first.dtype).removeprefix("torch.")
        dtype = own if own in DTYPES else "float32"
    errors.one_of("dtype", dtype, DTYPES)
    compute = DTYPES[dtype]
    if compute == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        compute = torch.float32
    return Engine(model, compute, memory)
