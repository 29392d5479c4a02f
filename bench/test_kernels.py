"""The large cases of every op through pytest-benchmark: `pytest bench/`, not part of `make test`.

bench/run.py compares with others; this with what was: `make bench-compare` holds it to the stored
baseline, which `make bench-baseline` measures anew on a machine.
"""

import pytest

from fastdiff.ops import OPS
from fastdiff.verify import fault

CASES = {(op.name, case.name): case for op in OPS.values() for case in op.cases() if case.large}


@pytest.mark.parametrize("op, case", CASES)  # by their names, which a baseline can hold
def test_speed(benchmark, op, case):
    op, case = OPS[op], CASES[op, case]
    assert fault(op, case) is None
    inputs = case.inputs("cpu")
    outputs = dict(zip((o.rstrip("?") for o in op.outputs), op.allocate(*inputs), strict=True))
    benchmark.group = op.name
    benchmark.extra_info["bytes"] = op.moved(*inputs)
    benchmark(op.write, *inputs, **outputs)
