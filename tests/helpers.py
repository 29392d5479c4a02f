"""What the tests of the ops share: every case."""

import pytest

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
