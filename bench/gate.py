"""The gate: an op that is wrong in any case is not timed.

A kernel passes a case if its largest error against the float64 reference is at most twice that of
the same computation by plain torch in the case's own dtype, plus 1e-6 where it makes noise, which
the reference makes in float64. Integers must be exact.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from fastdiff.op import Case, Op

NOISE = 1e-6


def refused(ops: Iterable[Op], timed: Collection[str], device: str) -> dict[str, str]:
    """By the name of each op that is wrong: in which case, and by how much.

    Every small case is run, and of the large ones those named "op/case" in `timed`.
    """
    wrong = {}
    for op in ops:
        for case in op.cases():
            if case.large and f"{op.name}/{case.name}" not in timed:
                continue
            if complaint := fault(op, case, device):
                wrong[op.name] = complaint
                break
    return wrong


def fault(op: Op, case: Case, device: str) -> str | None:
    """What is wrong with the op in this case, as the device's backend runs it; None if nothing."""
    inputs = case.inputs(device)
    result = op.call(*inputs)
    got = iter((result,) if isinstance(result, Tensor) else result)
    tensors = [a for a in inputs if isinstance(a, Tensor)]
    makes_noise = any(a.dtype == torch.int64 and a.dim() == 2 for a in tensors)  # has streams
    plain, exact = op.reference(*inputs), op.reference(*map(_double, inputs))
    for name, same, true in zip(op.outputs, plain, exact, strict=True):
        if same is None or true is None:
            continue
        ours = next(got)
        if not true.is_floating_point():
            if not torch.equal(ours, same):
                return f"{name} differs in case {case.name!r}"
        elif true.numel():
            error, allowed = _error(ours, true), 2 * _error(same, true) + NOISE * makes_noise
            if not error <= allowed:  # also where it is NaN
                return f"error {error:.1e} of {name} in case {case.name!r}, allowed {allowed:.1e}"
    return None


def _error(value: Tensor, true: Tensor) -> float:
    return float((value.double() - true).abs().max())


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
