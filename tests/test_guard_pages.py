"""No kernel touches a byte beside its tensors: every case of every record, fenced by dead pages."""

import pytest
import torch
from guarded import fenced, outputs_within
from helpers import CASES

from fastdiff import op as ops_module
from fastdiff.verify import written


@pytest.mark.skipif(ops_module.missing("cpp") is not None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("op, case", CASES)
def test_nothing_beside_the_tensors_is_touched(op, case, at_end):
    inputs = case.inputs("cpu")
    found = outputs_within(op, inputs, at_end)
    for out, expected in zip(found, written(op, inputs), strict=True):
        assert (out is None) == (expected is None)
        if out is not None:
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_the_fence_is_one():
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import sys, ctypes, torch; sys.path[:0] = [{0!r}]; from guarded import fenced\n"
        "x = fenced(torch.ones(5), {1})\n"
        "ctypes.string_at(x.data_ptr() {2}, 1)"
    )
    where = str(Path(__file__).parent)
    for at_end, place in ((True, "+ 20"), (False, "- 1")):
        script = code.format(where, at_end, place)
        assert subprocess.run([sys.executable, "-c", script]).returncode < 0
    assert fenced(torch.arange(5), True).tolist() == [0, 1, 2, 3, 4]
