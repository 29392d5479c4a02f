"""Ahead-of-time compiles, without a GPU: every case, and how good the large ones are."""

import os
from importlib.util import find_spec

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="an interpreter cannot compile"),
]


@pytest.fixture(scope="module")
def reports():
    """Large cases for every target, the others for one."""
    from fastdiff import aot

    return aot.reports(lambda op, case, target: case.large or target.name == "sm_90")


def test_every_case_compiles(reports):
    from fastdiff.ops import OPS

    compiled = {(row.op, case) for row in reports if row.target == "sm_90" for case in row.cases}
    assert compiled == {(op.name, case.name) for op in OPS.values() for case in op.cases()}


def large(reports):
    return [row for row in reports if row.roofline is not None]


def test_large_cases_move_128_bits_an_access_and_the_fewest_bytes(reports):
    from fastdiff.aot import TARGETS
    from fastdiff.kernels.launch import THREADS

    rows = large(reports)
    assert {row.target for row in rows} == {target.name for target in TARGETS}
    for row in rows:
        assert set(row.accesses) == {128}, row
        assert row.accesses[128] * 16 * THREADS == row.tile_bytes, row
        assert row.excess == 1, row


def test_large_cases_keep_everything_in_registers(reports):
    for row in large(reports):
        assert row.spills == 0 and row.shared == 0, row
        assert row.registers <= 64, row  # 64 still let an SM hold 1024 threads


def test_dense_bfloat16_moves_128_bits_an_access(reports):
    rows = [row for row in reports if row.op == "step" and "ddim-bf16" in row.cases]
    assert rows and all(set(row.accesses) == {128} and row.spills == 0 for row in rows)


def test_more_than_2_31_elements_compile_with_64_bit_indices():
    """Strides of 0 stand for a tensor too large to have."""
    from fastdiff import aot
    from fastdiff.kernels.cfg import plan

    vast = torch.zeros(1).expand(1, 2**16, 2**16 + 1)
    launch = plan(vast, vast, None, 1.0, vast)
    source = aot.source_of(launch, aot.TARGETS[1])
    assert "i64" in source.signature["shape"]
    aot.compile_for(source, aot.TARGETS[1])


def test_table_has_a_line_for_each_kernel(reports):
    from fastdiff.aot import table

    lines = table(reports).splitlines()
    assert len(lines) == len(reports) + 2
    assert "large-ddim" in lines[2] and "6x128" in lines[2]
