"""Ahead-of-time compiles, without a GPU: every case, and how good the large ones are."""

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import NIGHTLY

sys.path.insert(0, str(Path(__file__).parents[1] / "csrc"))
from nvcc import Usage

from fastdiff.ops import OPS

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="an interpreter cannot compile"),
]
EACH_MAKERS = ("sm_90", "gfx942")
STREAMING = ("step", "noising", "cfg", "randn", "weighted_mse_backward", "teacher_step")
# bytes for one program: of sm_86, sm_89 and sm_120, or of a CU
PROGRAMS_SHARE = {"sm_80": 99 << 10, "sm_90": 99 << 10, "sm_100": 99 << 10, "gfx942": 64 << 10}
MAKES_NOISE = ("large-ddpm", "large-learned", "large")  # of step and noising


def chosen(op, case, target):
    """Every case for a target of each maker, the large ones for all; nightly, every one for all."""
    return NIGHTLY or case.large or target.name in EACH_MAKERS


@pytest.fixture(scope="module")
def reports():
    """Of the chosen, the large ones in every configuration."""
    from fastdiff import aot

    return aot.reports(chosen)


@pytest.fixture(scope="module")
def predictions(reports):
    from fastdiff import aot

    return aot.predictions(reports)


def test_every_case_compiles(reports):
    from fastdiff import aot

    cases = [(op, case) for op in OPS.values() if op.has_triton() for case in op.cases()]
    for target in aot.TARGETS:
        asked = {(op.name, case.name) for op, case in cases if chosen(op, case, target)}
        compiled = {(r.op.name, case) for r in reports if r.target == target for case in r.cases}
        assert compiled and compiled <= asked
        empty = {case for _, case in asked} & {"empty"}  # which some launch nothing for
        assert {case for _, case in asked - compiled} == empty


def test_everything_stays_in_registers(reports):
    """In every case, and every configuration of the large ones."""
    for row in reports:
        assert row.code.spills == 0, (row.kernel, row.target.name, row.config, row.cases)


def test_streaming_kernels_move_128_bits_an_access_and_the_fewest_bytes(reports, predictions):
    from fastdiff import aot

    rows = [row for row in reports if row.op.name in STREAMING and row.large]
    assert {row.target.name for row in rows} == {target.name for target in aot.TARGETS}
    for row in rows:
        about = row.kernel, row.target.name, row.config, row.code
        assert set(row.code.accesses) == {128}, about
        assert row.code.accesses[128] * 16 * row.config.threads == row.code.tile_bytes, about
        assert row.resident >= row.target.threads // 3, about
    assert all(p.excess == 1 for p in predictions if p.op in STREAMING)


def test_streaming_kernels_have_the_bytes_in_flight_that_bandwidth_needs(reports):
    """Little's law, at a latency of 800 ns; those that only write wait for nothing."""
    for row in reports:
        if row.op.name in STREAMING and row.op.name != "randn" and row.large and row.best:
            loaded = row.code.tile_bytes / row.config.threads / 3  # at least, of a thread
            needed = row.target.bandwidth / row.target.processors * 800e-9
            assert row.resident * loaded >= needed, (row.kernel, row.target.name)


def test_arithmetic_hides_behind_memory(predictions):
    """Instructions issue in half of memory's time: 90 % of its roofline is then in reach.

    Where noise is made inside, 48 instructions an element are more than half of what the newest
    memories leave time for; they still take less time than it.
    """
    seen = set()
    for p in predictions:
        if p.op not in STREAMING or p.op == "randn":
            continue
        noisy = p.op in ("step", "noising") and p.case in MAKES_NOISE
        limit = 0.9 if noisy and p.target.name in ("sm_100", "gfx942") else 0.5
        assert p.issue < limit * p.memory, (p.op, p.case, p.target.name, p.issue / p.memory)
        seen.add((p.op, p.target.name))
    assert len(seen) == 20


def test_the_loss_reads_its_operands_once_by_128_bits_and_arithmetic_hides_behind_that(reports):
    rows = [row for row in reports if row.kernel == "parts_kernel" and row.large]
    assert len({row.target.name for row in rows}) == 4
    for row in rows:
        about = row.target.name, row.config, row.code
        assert row.code.accesses[128] * 16 * row.config.threads == row.code.tile_bytes, about
        assert set(row.code.accesses) <= {128, 64}, about  # 64: a program's sum
        for use in row.uses:
            if use.case.large:
                fewest = row.op.moved(*use.case.inputs("cpu"))
                assert use.programs * row.code.tile_bytes == fewest, about
                issued = use.programs * row.config.threads * row.code.instructions
                share = issued / row.target.issue / (fewest / row.target.bandwidth)
                assert share < 0.6 or not row.best, about


def test_attention_multiplies_on_tensor_cores(reports):
    """In every case; and in shared memory that AMD's and the smaller NVIDIA processors have."""
    rows = [row for row in reports if row.op.name.startswith("attention")]
    assert {row.target.name for row in rows if row.large} == set(PROGRAMS_SHARE)
    for row in rows:
        about = row.kernel, row.target.name, row.config, row.cases
        assert row.code.tensor > 0, about
        assert row.code.shared <= PROGRAMS_SHARE[row.target.name], about
        if row.large:
            assert 128 in row.code.accesses and 16 not in row.code.accesses, about


def test_dense_bfloat16_moves_128_bits_an_access(reports):
    rows = [row for row in reports if row.op.name == "step" and "ddim-bf16" in row.cases]
    assert rows and all(set(row.code.accesses) == {128} for row in rows)


NAN_KEEPING = {
    "sm_80": "max.NaN.f32",
    "sm_90": "min.NaN.xorsign.abs.f32",
    "sm_100": "min.NaN.xorsign.abs.f32",
    "gfx942": "v_cmp_u_f32",
}


@pytest.mark.parametrize("name", NAN_KEEPING)
def test_clamp_passes_nan_on(name):
    """The interpreter's clamp does so whatever the kernel asks for; GPUs have both kinds."""
    from fastdiff.aot import TARGETS, compiler

    case = next(case for case in OPS["step"].cases() if case.name == "ddim")
    (launch,) = compiler.plan_of(OPS["step"], case.inputs("cpu"))
    target = next(target for target in TARGETS if target.name == name)
    asm = compiler.Source.of(launch, target).compile().asm
    assert NAN_KEEPING[name] in asm["amdgcn" if target.backend == "hip" else "ptx"]


def test_more_than_2_31_elements_compile_with_64_bit_indices():
    """Strides of 0 stand for a tensor too large to have."""
    from fastdiff.aot import TARGETS, compiler

    vast = torch.zeros(1).expand(1, 2**16, 2**16 + 1)
    (launch,) = import_module("fastdiff.kernels.cfg").plan(vast, vast, None, 1.0, vast)
    source = compiler.Source.of(launch, TARGETS[1])
    assert "i64" in source.ast.signature["shape"]
    source.compile()


def test_registers_and_shared_memory_limit_the_threads_of_a_processor():
    """Against NVIDIA's occupancy rules worked by hand."""
    from fastdiff.aot import TARGETS

    a100 = TARGETS[0]
    assert a100.resident(threads=128, registers=32, shared=0) == 2048
    assert a100.resident(threads=128, registers=64, shared=0) == 1024
    assert a100.resident(threads=128, registers=65, shared=0) == 7 * 128
    assert a100.resident(threads=128, registers=32, shared=48 << 10) == 3 * 128
    assert a100.resident(threads=32, registers=16, shared=0) == 1024  # 32 programs at most


def test_the_page_has_every_case_and_a_picture(reports, predictions, tmp_path):
    from fastdiff.aot import document, picture

    # every case, of the target that needs no disassembler, which would take minutes
    rows = [r for r in reports if r.target.name == "gfx942" or (r.best and r.large)]
    page = document.page(rows, predictions, [Usage("cfg_kernel<1>", "sm_90", 40, 0, 16)])
    assert "| `cfg_kernel<1>` | 40 | 0 | 16 |" in page
    for row in reports:
        assert all(case in page for case in row.cases)
    assert "| step | large-ddim | 37.7 | 1.00 | 15 / 14 / 15 / 17 | 18.5 us, issue 13% |" in page
    picture.draw(tmp_path / "times.png", predictions)
    assert (tmp_path / "times.png").stat().st_size > 10_000
