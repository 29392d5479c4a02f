"""The 2x rule: how right a kernel must be. Tests, `fastdiff doctor` and the benchmark share it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from .op import Case, Op

NOISE = 1e-6  # normals made inside may differ by this from the reference's, made in float64


def poisoned(op: Op, inputs: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """The op's outputs, full of NaN, so that an element that is not written shows."""
    outputs = op.allocate(*inputs)
    for out in outputs:
        if out is not None and out.is_floating_point():
            out.fill_(torch.nan)
    return outputs


def written(op: Op, inputs: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """The op's outputs, as torch's dispatcher and the active backend write them."""
    outputs = poisoned(op, inputs)
    names = [name.rstrip("?") for name in op.outputs]
    op.write(*inputs, **dict(zip(names, outputs, strict=True)))
    return outputs


def errors_of(
    op: Op,
    case: Case,
    run: Callable[[Op, tuple[Any, ...]], tuple[Tensor | None, ...]] = written,
    device: str = "cpu",
    truncates: Collection[torch.dtype] = (),
) -> dict[str, tuple[float, float]]:
    """{output: (error, allowed)}: the largest absolute errors of a case, against float64.

    Allowed is twice the error of the reference in the op's own precision; NOISE more where normal
    noise is made inside; and half a unit in the last place more for dtypes that the backend
    truncates to. Integers must be exact. `run(op, inputs)` returns the outputs.
    """
    inputs = case.inputs(device)
    wide = [_double(value) for value in inputs]
    outputs = run(op, inputs)
    tensors = [a for a in inputs if isinstance(a, Tensor)]
    makes_noise = any(a.dtype == torch.int64 and a.dim() == 2 for a in tensors)  # has streams
    errors = {}
    every = zip(op.outputs, outputs, op.reference(*inputs), op.reference(*wide), strict=True)
    for name, ours, torchs, truth in every:
        if ours is None or torchs is None or truth is None:
            if ours is not None or truth is not None:
                errors[name] = (float("inf"), 0.0)
            continue
        if ours.shape != truth.shape:
            errors[name] = (float("inf"), 0.0)
        elif not ours.is_floating_point() or not ours.numel():
            errors[name] = (float((ours.long() != truth.long()).sum()), 0.0)
        else:
            truth = truth.double()
            error = float((ours.double() - truth).abs().max())
            theirs = float((torchs.to(ours.dtype).double() - truth).abs().max())
            half_unit = torch.finfo(ours.dtype).eps / 2 * float(truth.abs().max())
            allowed = 2 * theirs + NOISE * makes_noise + half_unit * (ours.dtype in truncates)
            errors[name] = (error, allowed)
    return errors


def fault(op: Op, case: Case, device: str = "cpu") -> str | None:
    """What is wrong with the op in this case, as the active backend runs it; None if nothing."""
    for name, (error, allowed) in errors_of(op, case, device=device).items():
        if not error <= allowed:  # also where it is NaN
            output = name.rstrip("?")
            return f"error {error:.1e} of {output} in case {case.name!r}, allowed {allowed:.1e}"
    return None


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
