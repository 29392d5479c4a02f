"""What the tests of the ops share: every case, and the 2x rule."""

import pytest
import torch

from fastdiff.ops import OPS

CASES = [
    pytest.param(op, case, id=f"{op.name}-{case.name}")
    for op in OPS.values()
    for case in op.cases()
    if not case.large
]


def inputs_of(name, case):
    """The arguments of a case, by the op's and the case's name."""
    return next(c for c in OPS[name].cases() if c.name == case).inputs("cpu")


def poisoned(op, inputs):
    """Outputs full of NaN, so that an element that is not written shows."""
    outputs = op.allocate(*inputs)
    for out in outputs:
        if out is not None and out.is_floating_point():
            out.fill_(torch.nan)
    return outputs


def errors_of(op, case, launch, truncates=()):
    """{output: (error, allowed)}: the largest absolute errors against the reference in float64.

    Allowed is twice the error of the reference in the op's own precision; 1e-6 more where normal
    noise is made inside, which the reference has in float64; and half a unit in the last place
    more for dtypes that the backend truncates to. Integers must be exact.
    """
    inputs = case.inputs("cpu")
    wide = [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in inputs
    ]
    outputs = poisoned(op, inputs)
    launch(*inputs, *outputs)
    tensors = [a for a in inputs if isinstance(a, torch.Tensor)]
    streams = [a for a in tensors if a.dtype == torch.int64 and a.dim() == 2]
    noise = 1e-6 if streams else 0.0
    errors = {}
    every = zip(op.outputs, outputs, op.reference(*inputs), op.reference(*wide), strict=True)
    for name, ours, torchs, truth in every:
        if ours is None:
            assert truth is None
            continue
        assert ours.shape == truth.shape
        if not ours.is_floating_point() or not ours.numel():
            errors[name] = (float((ours.long() != truth.long()).sum()), 0.0)
            continue
        truth, torchs = truth.double(), torchs.to(ours.dtype)
        error, theirs = ((value.double() - truth).abs().max().item() for value in (ours, torchs))
        half_unit = torch.finfo(ours.dtype).eps / 2 * truth.abs().max().item()
        allowed = 2 * theirs + noise + (half_unit if ours.dtype in truncates else 0)
        errors[name] = (error, allowed)
    return errors
