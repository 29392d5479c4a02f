"""The CUDA kernels: every case in the emulator of csrc/tests, and compiled by nvcc where it is.

The emulator runs the same sources on the CPU, so tensors are the CPU's here. Nothing runs on a GPU.
"""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import CASES, NIGHTLY, inputs_of

import fastdiff
from fastdiff import op as ops_module
from fastdiff.ops import OPS
from fastdiff.table import COLUMNS
from fastdiff.verify import errors_of, poisoned

sys.path.insert(0, str(Path(__file__).parents[1] / "csrc"))
import ninja_build
import nvcc

CUDA_OPS = ("step", "noising", "cfg", "randn", "group_norm_silu")
needs_nvcc = pytest.mark.skipif(nvcc.compiler() is None, reason="no nvcc")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The module fastdiff._cuda, built for the emulator."""
    pybind11 = pytest.importorskip("pybind11")
    if ninja_build.compiler() is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("emulated")
    includes = [sysconfig.get_path("include"), pybind11.get_include()]
    ninja_build.extension("_cuda", folder / "_cuda.so", folder, includes, emulated=True)
    spec = importlib.util.spec_from_file_location("_cuda", folder / "_cuda.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(emulated):
    """run(op, inputs, outputs): the outputs, as the launcher of backend "cuda" writes them."""

    def run(op, inputs, outputs=None):
        outputs = poisoned(op, inputs) if outputs is None else outputs
        op._run_cuda(getattr(emulated, op.name), lambda out: (0, 0), *inputs, *outputs)
        return outputs

    return run


@pytest.mark.parametrize("op, case", [p for p in CASES if p.values[0].name in CUDA_OPS])
def test_error_is_at_most_twice_that_of_torch(op, case, run):
    for name, (error, allowed) in errors_of(op, case, run).items():
        assert error <= allowed, name


def test_the_module_has_the_ops_that_it_should(emulated):
    assert {name for name in OPS if hasattr(emulated, name)} == set(CUDA_OPS)
    assert fastdiff.ops.group_norm_silu.__globals__["_PARTS"] == emulated.PARTS


def shifted(value):
    """The same numbers, one element further from any alignment."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.numel():
        return value
    storage = value.new_empty(value.untyped_storage().nbytes() // value.element_size() + 1)
    moved = storage[1:].as_strided(value.shape, value.stride(), 1)
    return moved.copy_(value)


@pytest.mark.parametrize(
    "name, case",
    [
        ("step", "everything"),
        ("step", "ddim-bf16"),
        ("step", "guided"),
        ("step", "channels-last"),
        ("noising", "seeded"),
        ("noising", "given-fp16"),
        ("cfg", "bf16"),
        ("cfg", "fp32"),
    ],
)
def test_alignment_is_nothing_to_the_result(name, case, run):
    op, inputs = OPS[name], inputs_of(name, case)
    expected = run(op, inputs)
    moved = [shifted(value) for value in inputs]
    table = 2  # stays: the kernels read its rows as they are
    if name in ("step", "noising"):
        moved[table] = inputs[table]
    outputs = [None if out is None else shifted(out) for out in poisoned(op, inputs)]
    for ours, truth in zip(run(op, moved, outputs), expected, strict=True):
        assert ours is truth is None or torch.equal(ours, truth)


@pytest.mark.parametrize("case", ["bf16", "bf16-last", "odd", "adaptive", "fp16"])
def test_groups_may_lie_anywhere(case, run):
    """Other loops walk them, with other orders of the sums."""
    op, inputs = OPS["group_norm_silu"], inputs_of("group_norm_silu", case)
    moved = [shifted(inputs[0]), *inputs[1:]]
    (out,) = run(op, moved, [shifted(poisoned(op, inputs)[0])])
    (expected,) = run(op, inputs)
    eps = torch.finfo(out.dtype).eps
    assert torch.allclose(out, expected, rtol=eps, atol=2 * eps)


def test_large_groups_are_cut_and_a_sample_is_the_same_bits_in_any_batch(run):
    """Both loops, with more parts than one, and more than the 64 there may be."""
    op = OPS["group_norm_silu"]
    for size, groups, last in [((2, 8, 72, 128), 4, True), ((2, 8, 72, 128), 2, False)]:
        x = 50 + torch.randn(size)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        rest = (groups, None, None, 1e-5, None, None, False)
        (both,) = run(op, (x, *rest))
        (one,) = run(op, (x[1:], *rest))
        truth = op.reference(x.double(), *rest)[0]
        assert (both.double() - truth).abs().max() < 2e-5
        assert torch.equal(one, both[1:])
    long = torch.randn(1, 1, 300_000)
    (out,) = run(op, (long, 1, None, None, 1e-5, None, None, True))
    assert torch.allclose(out, op.reference(long, 1, None, None, 1e-5, None, None, True)[0])


@pytest.mark.parametrize(
    "shape, groups", [((2, 40, 6, 6), 4), ((2, 60, 5, 4), 4), ((1, 96, 9), 32)]
)
def test_groups_that_share_a_pack_of_channels(shape, groups, run):
    """10, 15 and 3 channels a group, where a thread reads 8 at a time."""
    op, x = OPS["group_norm_silu"], torch.randn(shape).transpose(1, -1).contiguous()
    x = x.transpose(1, -1)
    weight, bias = torch.randn(2, shape[1])
    inputs = (x, groups, weight, bias, 1e-5, None, None, True)
    truth = op.reference(*(v.double() if isinstance(v, torch.Tensor) else v for v in inputs))[0]
    assert (run(op, inputs)[0].double() - truth).abs().max() < 2e-6


def test_in_place_is_the_step(run):
    op, inputs = OPS["step"], inputs_of("step", "everything")
    expected = run(op, inputs)
    outputs = inputs[0], inputs[7], torch.empty_like(expected[2])
    for a, b in zip(run(op, inputs, outputs), expected, strict=True):
        assert torch.equal(a, b)


def test_noise_is_the_same_bits_in_any_batch_and_layout(run):
    x, m, table, row, *rest = inputs_of("step", "everything")
    whole = run(OPS["step"], (x, m, table, row, *rest))
    last = [a[2:] if isinstance(a, torch.Tensor) else a for a in rest]
    part = run(OPS["step"], (x[2:], m[2:], table, row, *last))
    for a, b in zip(part[:2], whole[:2], strict=True):
        assert torch.equal(a, b[2:])
    flipped = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(run(OPS["step"], (flipped, m, table, row, *rest))[0], whole[0])


def test_rows_and_timesteps_out_of_the_table_give_nan(run):
    """Nothing is read back to refuse them; h' and x' show it, and no other memory is read."""
    inputs = list(inputs_of("step", "history"))
    for row in (-1, len(inputs[2]), 1 << 40):
        inputs[3] = torch.tensor(row)
        x_next, h_next, _ = run(OPS["step"], inputs)
        assert x_next.isnan().all() and h_next.isnan().all()
    x0, _, *rest = inputs_of("noising", "seeded")
    x_t, target = run(OPS["noising"], (x0, torch.tensor([7, 0]), *rest))
    for out in (x_t, target):
        assert out[0].isnan().all() and not out[1].isnan().any()


@pytest.mark.parametrize("clip", [0.9, torch.inf])
def test_clamp_passes_nan_on(clip, run):
    x, m, table, *rest = inputs_of("step", "ddim")
    table[:, COLUMNS.index("clip")] = clip
    m[1, 2, 3, 4] = torch.nan
    (out, *_) = run(OPS["step"], (x, m, table, *rest))
    assert out.isnan().nonzero().tolist() == [[1, 2, 3, 4]]


FAR = 1 << 30  # fits 32 bits; three of it do not


@pytest.mark.parametrize(
    "size, strides",
    [
        ((4, 15), (FAR, 4)),
        ((4, 16), (FAR, 1)),
        ((1, 4, 3, 5), (0, FAR, 60, 4)),
        ((1, 3, 4, 5), (0, 60, FAR, 4)),
        ((1, 3, 5, 4), (0, 60, 4, FAR)),
    ],
)
def test_offsets_beyond_32_bits(size, strides, run):
    """By stride, over memory that the system maps only where it is touched."""
    out = torch.empty(3 * FAR + 1000, dtype=torch.bfloat16).as_strided(size, strides)
    c, u = torch.randn(size).bfloat16(), torch.randn(size).bfloat16()
    run(OPS["cfg"], (c, u, None, 1.5), (out,))
    expected = OPS["cfg"].reference(c, u, None, 1.5)[0]
    assert torch.allclose(out.float(), expected.float(), rtol=2**-7)


@pytest.mark.parametrize("channel, pixel", [(FAR, 1), (1, FAR)])
def test_groups_beyond_32_bits(channel, pixel, run):
    size = (1, 4, 16) if channel == FAR else (1, 16, 4)
    storage = torch.empty(3 * FAR + 1000, dtype=torch.bfloat16)
    x = storage.as_strided(size, (4 * FAR, channel, pixel)).copy_(torch.randn(size))
    near = (64, 16, 1) if channel == FAR else (64, 1, 16)
    out = torch.empty_strided(size, near, dtype=torch.bfloat16)
    inputs = (x, 2, None, None, 1e-5, None, None, True)
    run(OPS["group_norm_silu"], inputs, (out,))
    expected = OPS["group_norm_silu"].reference(*inputs)[0]
    assert torch.allclose(out.float(), expected.float(), rtol=2**-7, atol=2**-9)


def test_more_samples_than_a_grid_has_rows(run):
    c, u, w = torch.randn(65537, 1), torch.randn(65537, 1), torch.rand(65537)
    (out,) = run(OPS["cfg"], (c, u, w, 0.0))
    assert torch.allclose(out, OPS["cfg"].reference(c, u, w, 0.0)[0], atol=1e-6)


def test_an_error_of_the_launch_is_raised_with_advice(emulated):
    streams, out = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 4)
    with pytest.raises(RuntimeError, match=r"invalid device.*fastdiff\.backend\(\"triton\"\)"):
        emulated.randn(1, 4, streams.data_ptr(), 0, False, out.data_ptr(), 3, 0)


# the choice of the backend


def choose(monkeypatch, *usable):
    monkeypatch.setattr(ops_module, "_usable", lambda name: name in usable)
    monkeypatch.setattr(ops_module.Op, "has_cuda", lambda op: op.name in CUDA_OPS)
    return lambda name: OPS[name].backend("cuda")


def test_a_gpu_gets_cuda_then_triton_then_the_reference(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        best = choose(monkeypatch, "cuda", "triton", "cpp")
        assert best("step") == "cuda" and best("linear") == "reference"
        assert choose(monkeypatch, "triton")("step") == "triton"
        assert choose(monkeypatch, "cuda")("step") == "cuda"
        assert OPS["step"].backend("cpu") == "reference"


def test_a_gpu_without_kernels_warns_once_and_runs(monkeypatch):
    best = choose(monkeypatch)
    monkeypatch.setattr(ops_module, "missing", lambda name: f"no {name} today")
    ops_module._warn_of_reference.cache_clear()
    with pytest.warns(UserWarning, match="no cuda today; triton: no triton today.*pip install"):
        assert best("step") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert best("cfg") == "reference"


def test_a_backend_does_not_get_tensors_of_another_device(monkeypatch):
    monkeypatch.setattr(ops_module, "missing", lambda name: None)
    with fastdiff.backend("cuda"), pytest.raises(RuntimeError, match="takes cuda tensors"):
        fastdiff.ops.randn((1, 2), 3)
    with fastdiff.backend("cpp"), pytest.raises(RuntimeError, match="takes cpu tensors"):
        OPS["step"].launcher("cuda")


def child(code, **environment):
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path]), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_why_cuda_is_missing():
    """Not built, not loadable, or nothing to run on; the CPU works on."""
    code = """if True:
        import importlib, sys, fastdiff
        from fastdiff.op import missing
        class Broken:
            def find_spec(self, name, *_):
                if name == "fastdiff._cuda":
                    raise {error}
        sys.meta_path.insert(0, Broken())
        print(missing("cuda"))
        fastdiff.ops.randn((1, 2), 3)
    """
    unbuilt = "ModuleNotFoundError('No module', name='fastdiff._cuda')"
    ran = child(code.format(error=unbuilt))
    assert "is not built" in ran.stdout and "install the CUDA toolkit" in ran.stdout, ran.stderr
    ran = child(code.format(error="ImportError('undefined symbol: x')"))
    assert "cannot be imported (undefined symbol: x)" in ran.stdout, ran.stderr


def test_a_triton_that_imports_but_fails_is_missing(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    class Active:
        def get_current_target(self):
            raise RuntimeError("Failed to find C compiler.\nSet CC")

    monkeypatch.setattr(triton.runtime.driver, "_active", Active())
    assert "does not work here (RuntimeError: Failed to find C compiler.)" in (
        ops_module.missing("triton")
    )


@pytest.mark.skipif(find_spec("fastdiff._cuda") is None, reason="built without nvcc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_the_built_module_says_what_it_lacks_here(monkeypatch):
    from fastdiff import _cuda

    assert ops_module.missing("cuda") == "torch can use no GPU here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert f"({_cuda.problem()})" in ops_module.missing("cuda")
    with pytest.raises(RuntimeError, match=r"backend='cuda': fastdiff\._cuda cannot"):
        fastdiff.backend("cuda").__enter__()
    with pytest.raises(RuntimeError, match="fastdiff's CUDA kernels: "):
        _cuda.randn(1, 4, 0, 0, False, 0, 0, 0)


# compiled code


@pytest.fixture(scope="module")
def targets():
    """Those that are shipped; nightly, every one."""
    return nvcc.targets() if NIGHTLY else nvcc.shipped()


@pytest.fixture(scope="module")
def compiled(targets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubins")
    return nvcc.usage(targets, folder), folder


@needs_nvcc
def test_targets_are_of_every_generation():
    assert {"sm_75", "sm_80", "sm_90"} <= set(nvcc.targets())
    real = re.findall(r"code=sm_(\d+)", nvcc.gencode())
    assert len({n[:-1] for n in real}) == len(real) and set(real) <= {t[3:] for t in nvcc.targets()}
    assert {t[3:-1] for t in nvcc.targets()} == {n[:-1] for n in real}
    assert nvcc.shipped() == [f"sm_{n}" for n in real]
    assert f"code=compute_{real[-1]}" in nvcc.gencode()


@needs_nvcc
def test_kernels_keep_everything_in_registers(compiled, targets):
    rows, _ = compiled
    assert {row.target for row in rows} == set(targets)
    assert len(rows) == len(targets) * 16
    for row in rows:
        assert row.spills == 0, row
        assert row.shared == (14336 if re.match("map|moments", row.kernel) else 0), row
        assert row.registers <= 80, row  # an SM then holds three blocks of 256 threads


# 128-bit loads and stores: two for each float32 operand, one for each of 16 bits
WIDE = {
    "step_kernel<1, 0>": (17, 7),
    "step_kernel<1, 1>": (15, 7),  # z is made
    "noising_kernel<1>": (6, 6),
    "cfg_kernel<1>": (6, 3),
    "randn_kernel": (0, 4),
    "moments_kernel<float32>": (4, 0),  # of a slab, and of a group
    "moments_kernel<bfloat16>": (2, 0),
    "moments_kernel<float16>": (2, 0),
    "map_kernel<float32>": (4, 4),
    "map_kernel<bfloat16>": (2, 2),
    "map_kernel<float16>": (2, 2),
}


@needs_nvcc
def test_memory_is_moved_128_bits_at_a_time(compiled, targets):
    """In every kernel but those that walk along strides."""
    knobs = pytest.importorskip("triton").knobs
    _, folder = compiled
    found = {}
    for cubin in folder.glob("*.cubin"):
        command = [knobs.nvidia.cuobjdump.path, "--dump-sass", cubin]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for function in said.split("Function : ")[1:]:
            wide = re.findall(r"(LDG|STG)\.E\.128", function)
            name, target = nvcc._name(function.split()[0]), cubin.suffixes[0][1:]
            found[name, target] = wide.count("LDG"), wide.count("STG")
    for target in targets:
        for name, (loads, stores) in WIDE.items():
            have = found[name, target]
            assert have[0] >= loads and have[1] >= stores, (name, target, have)
