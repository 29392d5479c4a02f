"""What tests share: every case of every op, and a mark for those that need all of the data."""

import os
from pathlib import Path

import pytest

from fastdiff.ops import OPS

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"  # `make nightly`
needs_data = pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(),
    reason="needs the Debian package dataset-fashion-mnist",
)

CASES = [
    pytest.param(op, case, id=f"{op.name}-{case.name}")
    for op in OPS.values()
    for case in op.cases()
    if not case.large
]


def inputs_of(name, case):
    """The arguments of a case, by the op's and the case's name."""
    return next(c for c in OPS[name].cases() if c.name == case).inputs("cpu")
