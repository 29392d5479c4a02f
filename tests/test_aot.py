"""Ahead-of-time compiles, without a GPU: every case, and how good the large ones are."""

import os
from importlib import import_module
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
    assert compiled == {
        (op.name, case.name) for op in OPS.values() if op.has_triton() for case in op.cases()
    }


def large(reports):
    return [row for row in reports if row.roofline is not None]


def test_large_cases_move_128_bits_an_access_and_the_fewest_bytes(reports):
    from fastdiff import aot

    rows = large(reports)
    assert {row.target for row in rows} == {target.name for target in aot.TARGETS}
    for row in rows:
        assert set(row.accesses) == {128}, row
        assert row.accesses[128] * 16 * aot.launching.THREADS == row.tile_bytes, row
        assert row.excess == 1, row


def test_large_cases_keep_everything_in_registers(reports):
    for row in large(reports):
        assert row.spills == 0 and row.shared == 0, row
        assert row.registers <= 64, row  # 64 still let an SM hold 1024 threads


def test_dense_bfloat16_moves_128_bits_an_access(reports):
    rows = [row for row in reports if row.op == "step" and "ddim-bf16" in row.cases]
    assert rows and all(set(row.accesses) == {128} and row.spills == 0 for row in rows)


NAN_KEEPING = {
    "sm_80": "max.NaN.f32",
    "sm_90": "min.NaN.xorsign.abs.f32",
    "sm_100": "min.NaN.xorsign.abs.f32",
    "gfx942": "v_cmp_u_f32",
}


@pytest.mark.parametrize("name", NAN_KEEPING)
def test_clamp_passes_nan_on(name):
    """The interpreter's clamp does so whatever the kernel asks for; GPUs have both kinds."""
    from fastdiff import aot

    op = aot.OPS["step"]
    inputs = next(case for case in op.cases() if case.name == "ddim").inputs("cpu")
    launch = import_module("fastdiff.kernels.step").plan(*inputs, *op.allocate(*inputs))
    target = next(target for target in aot.TARGETS if target.name == name)
    asm = aot.compile_for(aot.source_of(launch, target), target).asm
    assert NAN_KEEPING[name] in asm["amdgcn" if target.backend == "hip" else "ptx"]


def test_more_than_2_31_elements_compile_with_64_bit_indices():
    """Strides of 0 stand for a tensor too large to have."""
    from fastdiff import aot

    vast = torch.zeros(1).expand(1, 2**16, 2**16 + 1)
    launch = import_module("fastdiff.kernels.cfg").plan(vast, vast, None, 1.0, vast)
    source = aot.source_of(launch, aot.TARGETS[1])
    assert "i64" in source.signature["shape"]
    aot.compile_for(source, aot.TARGETS[1])


def test_table_has_a_line_for_each_kernel(reports):
    from fastdiff.aot import table

    lines = table(reports).splitlines()
    assert len(lines) == len(reports) + 1
    assert "large-ddim" in lines[1] and "6x128" in lines[1]
