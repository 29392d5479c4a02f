"""A model's call, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import errors

Model = Callable[..., Any]


def output_of(model: Model, x: Tensor, t: Tensor, cond: Any, shape: Sequence[int]) -> Tensor:
    """model(x, t), or model(x, t, cond) when cond is given, which must have this shape."""
    errors.is_callable("model", model)
    output: Any = model(x, t) if cond is None else model(x, t, cond)
    output = getattr(output, "sample", output)
    errors.is_tensor("model: its output", output)
    if output.shape != tuple(shape):
        raise ValueError(
            f"model output of shape {tuple(output.shape)}: must be {tuple(shape)}; twice the "
            "channels of x0 are a learned variance, and come with learned_variance=True alone"
        )
    return output
