"""The Triton kernels in Triton's interpreter; tests/test_triton.py runs this in its own process."""

import math
from importlib import import_module

import pytest
import torch
import triton
import triton.language as tl
from helpers import CASES, inputs_of

import fastdiff
from fastdiff.ops import OPS
from fastdiff.verify import errors_of, poisoned

philox = import_module("fastdiff.kernels.philox")


def launch(name, *args):
    import_module(f"fastdiff.kernels.{name}").launch(*args)


def run(name, inputs):
    """The outputs of one launch."""
    outputs = poisoned(OPS[name], inputs)
    launch(name, *inputs, *outputs)
    return outputs


@pytest.mark.parametrize("op, case", [p for p in CASES if p.values[0].has_triton()])
def test_error_is_at_most_twice_that_of_torch(op, case):
    """The interpreter cuts bfloat16 off where a GPU rounds it."""
    errors = errors_of(
        op, case, lambda op, inputs: run(op.name, inputs), truncates=[torch.bfloat16]
    )
    for name, (error, allowed) in errors.items():
        assert error <= allowed, name


@triton.jit
def normals_kernel(r0, r1, z0, z1, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    length = philox.radius(tl.load(r0 + lane).to(tl.uint32, bitcast=True))
    x, y = philox.direction(tl.load(r1 + lane).to(tl.uint32, bitcast=True))
    tl.store(z0 + lane, length * x)
    tl.store(z1 + lane, length * y)


def test_normals_are_within_a_millionth_over_the_whole_range():
    """Radii from words of every size, angles at random and around each octant's edge."""
    generator = torch.Generator().manual_seed(0)
    count, block = 1 << 18, 1 << 15
    r0 = (2 ** (32 * torch.rand(count, generator=generator, dtype=torch.float64))).long()
    r0[:2] = torch.tensor([0, (1 << 32) - 1])
    edges = torch.arange(8).repeat_interleave(4096) * (1 << 29) + torch.arange(4096).repeat(8)
    r1 = torch.cat(
        [edges - 2048, torch.randint(1 << 32, (count - len(edges),), generator=generator)]
    )
    r1 &= 0xFFFFFFFF
    signed = [torch.where(r < 1 << 31, r, r - (1 << 32)).int() for r in (r0, r1)]
    z0, z1 = torch.full((2, count), torch.nan)
    normals_kernel[(count // block,)](*signed, z0, z1, BLOCK=block)
    u = (r0.float() * 2.0**-32 + 2.0**-33).double()
    assert u.min() == 2.0**-33 and u.max() == 1
    length, angle = (-2 * u.log()).sqrt(), r1.double() * (2 * math.pi * 2.0**-32)
    assert (z0.double() - length * angle.cos()).abs().max() < 1e-6
    assert (z1.double() - length * angle.sin()).abs().max() < 1e-6


@pytest.mark.skipif(bool(fastdiff.op.missing("cpp")), reason="needs the C++ kernels")
def test_noise_is_that_of_the_cpp_kernels():
    """The same function; equal bits where both fuse multiply-add."""
    drawn = []
    for name in ("triton", "cpp"):
        with fastdiff.backend(name):
            drawn.append(fastdiff.ops.randn((3, 3, 337), seed=9, row=4))
    assert torch.allclose(*drawn, rtol=0, atol=5e-7)


def test_noise_does_not_depend_on_the_batch_or_the_layout():
    x, m, table, row, *rest = inputs_of("step", "everything")
    whole = run("step", (x, m, table, row, *rest))
    last = [a[2:] if isinstance(a, torch.Tensor) else a for a in rest]
    part = run("step", (x[2:], m[2:], table, row, *last))
    for a, b in zip(part[:2], whole[:2], strict=True):
        assert torch.equal(a, b[2:])
    flipped = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(run("step", (flipped, m, table, row, *rest))[0], whole[0])


def test_row_is_read_from_its_tensor():
    """c_in is that of the next row, and of the last row at the last."""
    inputs = list(inputs_of("step", "guided"))
    for row in range(3):
        inputs[3] = torch.tensor(row)
        for ours, truth in zip(run("step", inputs), OPS["step"].reference(*inputs), strict=True):
            assert ours is truth is None or torch.allclose(ours, truth, rtol=1e-6, atol=1e-6)


def test_in_place_is_the_step():
    inputs = inputs_of("step", "everything")
    expected = run("step", inputs)
    x, h, model_input = inputs[0], inputs[7], torch.empty_like(expected[2])
    launch("step", *inputs, x, h, model_input)
    for a, b in zip((x, h, model_input), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("clip", [0.9, torch.inf])
def test_clamp_passes_nan_on(clip):
    x, m, table, *rest = inputs_of("step", "ddim")
    table[:, fastdiff.table.COLUMNS.index("clip")] = clip
    m[1, 2, 3, 4] = torch.nan
    assert run("step", (x, m, table, *rest))[0].isnan().nonzero().tolist() == [[1, 2, 3, 4]]


FAR = 1 << 30  # fits 32 bits; three of it do not


@pytest.mark.parametrize(
    "size, strides",
    [
        ((4, 15), (FAR, 4)),
        ((1, 4, 3, 5), (0, FAR, 60, 4)),
        ((1, 3, 4, 5), (0, 60, FAR, 4)),
        ((1, 3, 5, 4), (0, 60, 4, FAR)),
    ],
)
def test_offsets_beyond_32_bits(size, strides, monkeypatch):
    """By stride, over memory that the system maps only where it is touched."""
    # the interpreter copies all of an argument's memory onto itself
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *_: 0)
    out = torch.empty(3 * FAR + 1000, dtype=torch.bfloat16).as_strided(size, strides)
    c, u = torch.randn(size).bfloat16(), torch.randn(size).bfloat16()
    launch("cfg", c, u, None, 1.5, out)
    expected = OPS["cfg"].reference(c, u, None, 1.5)[0]
    assert torch.allclose(out.float(), expected.float(), rtol=2**-7)


def test_noising_and_its_gradient_through_the_dispatcher():
    schedule = fastdiff.NoiseSchedule.cosine(50)
    x0 = torch.randn(2, 3, 4, requires_grad=True)
    t = torch.tensor([3, 40])
    results = {}
    for name in ("triton", "reference"):
        with fastdiff.backend(name):
            outputs = fastdiff.ops.noising(x0, t, schedule, "v", seed=5)
            grad = torch.autograd.grad((outputs[0] * outputs[1]).sum(), x0)[0]
        results[name] = [*outputs, grad]
    for a, b in zip(results["triton"], results["reference"], strict=True):
        assert torch.allclose(a, b, atol=2e-6)


def test_sampling_is_the_references():
    """A whole sampler on the Triton backend, with its noise."""
    schedule = fastdiff.NoiseSchedule.cosine(100)
    sampler = fastdiff.DDIMSampler(schedule, steps=5, eta=1.0, prediction="v", clip=1.0)
    drawn = []
    for name in ("triton", "reference"):
        with fastdiff.backend(name):
            drawn.append(sampler.sample(lambda x, t: x.sin(), (2, 3, 4, 4), seed=3))
    assert torch.allclose(*drawn, atol=1e-5)
