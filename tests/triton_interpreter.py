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


NORMS = ("group_norm_silu", "group_norm_silu_backward", "group_norm_linear")


@pytest.fixture
def no_group_fits(monkeypatch):
    """A program's registers; and little work is divided as much is, with several tiles a chunk."""
    monkeypatch.setattr("fastdiff.kernels.image.RESIDENT", 0)
    monkeypatch.setattr("fastdiff.kernels.image.PROGRAMS", 4)


@pytest.mark.parametrize("op, case", [p for p in CASES if p.values[0].name in NORMS])
def test_groups_too_large_for_a_program(op, case, no_group_fits):
    """Twice torch's error, and a rounding more of the sums, which torch has in double."""
    errors = errors_of(
        op, case, lambda op, inputs: run(op.name, inputs), truncates=[torch.bfloat16, torch.float32]
    )
    for name, (error, allowed) in errors.items():
        assert error <= allowed, name


@pytest.mark.parametrize("name", ["far", "far-last"])
@pytest.mark.parametrize("split", [False, True])
def test_group_norm_far_from_zero_is_precise(name, split, request):
    """Mean 1000, deviation 0.1: torch's own is off by 0.001, and channels-last by far more."""
    if split:
        request.getfixturevalue("no_group_fits")
    inputs = inputs_of("group_norm_silu", name)
    (out,) = run("group_norm_silu", inputs)
    x, *how = (a.double() if isinstance(a, torch.Tensor) else a for a in inputs)
    (truth,) = OPS["group_norm_silu"].reference(x.contiguous(), *how)
    assert (out - truth).abs().max() < 3e-6


@pytest.mark.parametrize("case", ["fp32", "fp32-last", "odd-last"])
def test_nan_stays_in_its_group(case):
    x, groups, *how = inputs_of("group_norm_silu", case)
    x[1, 5, 2, 3] = torch.nan
    (out,) = run("group_norm_silu", (x, groups, *how))
    width = x.shape[1] // groups
    expected = torch.zeros(x.shape, dtype=torch.bool)
    expected[1, 5 // width * width : (5 // width + 1) * width] = True
    assert torch.equal(out.isnan(), expected)


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


def test_sums_of_large_samples_lose_nothing():
    output, target = torch.randn(2, 3, 128, 131), torch.randn(2, 3, 128, 131) + 30
    weights, t = torch.tensor([0.3, 0.7]), torch.tensor([1, 0])
    losses, _ = run("weighted_mse", (output, target, weights, t))
    truth = OPS["weighted_mse"].reference(*(x.double() for x in (output, target, weights)), t)[0]
    assert ((losses - truth) / truth).abs().max() < 1.01 * 2**-24


def test_a_timestep_out_of_range_makes_its_loss_nan_and_no_other():
    output, target, weights, _ = inputs_of("weighted_mse", "fp32")
    losses, sums = torch.zeros(3), torch.zeros(7, 3)
    launch("weighted_mse", output, target, weights, torch.tensor([-1, 3, 7]), losses, sums)
    assert losses.isnan().tolist() == [True, False, True]
    assert sums[:, 0].tolist() == [0, 0, 0, 1, 0, 0, 0]


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


@pytest.mark.parametrize("far", range(4))
def test_images_are_read_beyond_32_bits(far, monkeypatch):
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *_: 0)
    size, strides = [2, 3, 4, 5], [60, 20, 5, 1]
    size[far], strides[far] = 4, FAR
    images = torch.empty(3 * FAR + 1000, dtype=torch.uint8).as_strided(size, strides)
    images.copy_(torch.randint(256, size))
    inputs = (images, torch.arange(size[0]).flip(0), None, 1, torch.float32, False)
    assert torch.equal(run("load_images", inputs)[0], OPS["load_images"].reference(*inputs)[0])


WRONG = (-1, 0, 1 << 40)  # of a table, from its first row and from its end


def among_others(table):
    """The same values with others around them in memory, which a wrong index would read."""
    return torch.cat([torch.ones_like(table), table, torch.ones_like(table)]).chunk(3)[1]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("case", ["history", "everything", "ddim-input"])
def test_a_row_out_of_the_table_makes_nan(case, wrong):
    """Nothing is read back to refuse it; each result shows it, and no other memory is read."""
    x, m, table, _, *rest = inputs_of("step", case)
    row = torch.tensor(wrong if wrong < 0 else wrong + len(table))
    outputs = run("step", (x, m, among_others(table), row, *rest))
    assert all(out.isnan().all() for out in outputs if out is not None)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    "name, case, table, t",
    [
        ("noising", "seeded", 2, 1),
        ("noising", "given-bf16", 2, 1),
        ("teacher_step", "step", 2, 3),
        ("teacher_step", "each-bf16", 2, 3),
        ("weighted_mse", "fp32", 2, 3),
        ("weighted_mse_backward", "fp32", 3, 4),
        ("weighted_mse_backward", "mixed-both", 3, 4),
    ],
)
def test_a_timestep_out_of_the_table_makes_its_sample_nan_and_no_other(name, case, table, t, wrong):
    inputs = list(inputs_of(name, case))
    inputs[t] = torch.zeros_like(inputs[t])
    inputs[t][0] = wrong if wrong < 0 else wrong + len(inputs[table])
    inputs[table] = among_others(inputs[table])
    for out in run(name, inputs)[: 1 if name == "weighted_mse" else 2]:
        if out is not None:
            assert out[0].isnan().all() and not out[1:].isnan().any()


def test_an_index_out_of_range_makes_its_image_nan_and_no_other():
    images, _, flips, *how = inputs_of("load_images", "flip-pad")
    (x0,) = run("load_images", (images, torch.tensor([-1, 6, 7]), flips, *how))
    assert x0.isnan().flatten(1).all(1).tolist() == [True, False, True]
    assert not x0[1].isnan().any()


@pytest.mark.parametrize("far", range(4))
def test_attention_offsets_beyond_32_bits(far, monkeypatch):
    """By stride, of a result in each dimension and of keys that are read from it."""
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *_: 0)
    size, strides = [2, 2, 3, 8], [48, 24, 8, 1]
    size[far], strides[far] = 4, FAR
    out = torch.empty(3 * FAR + 1000, dtype=torch.bfloat16).as_strided(size, strides)
    q, k, v = (torch.randn(size).bfloat16() for _ in range(3))
    launch("attention", q, k, v, 0.3, False, out, None)
    expected = OPS["attention"].reference(q, k, v, 0.3, False)[0]
    assert torch.allclose(out.float(), expected.float(), atol=2**-6)
    near, _ = run("attention", (q, out.contiguous(), v, 0.3, False))
    assert torch.equal(run("attention", (q, out, v, 0.3, False))[0], near)


def test_attention_and_its_gradient_through_the_dispatcher():
    """Cross attention; and of one key, where the gradient of q and k is 0."""
    for keys in (21, 1):
        q, k, v = (torch.randn(1, 2, n, 24, requires_grad=True) for n in (9, keys, keys))
        results = {}
        for name in ("triton", "reference"):
            with fastdiff.backend(name):
                out = fastdiff.ops.attention(q, k, v)
                results[name] = [out, *torch.autograd.grad(out.sin().sum(), (q, k, v))]
        for a, b in zip(results["triton"], results["reference"], strict=True):
            assert torch.allclose(a, b, atol=2e-6)


@pytest.mark.parametrize(
    "size, strides",
    [
        ((4, 2, 15), (FAR, 16, 1)),
        ((1, 4, 15), (0, FAR, 1)),
        ((1, 2, 4), (0, 1, FAR)),
    ],
)
@pytest.mark.parametrize("split", [False, True])
def test_group_norms_beyond_32_bits(size, strides, split, monkeypatch, request):
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *_: 0)
    if split:
        request.getfixturevalue("no_group_fits")
    x, out, grad, grad_x = (
        torch.empty(3 * FAR + 1000, dtype=torch.bfloat16).as_strided(size, strides)
        for _ in range(4)
    )
    x.copy_(torch.randn(size))
    grad.copy_(torch.randn(size))
    how = (2, None, None, 1e-5, None, None, True)
    launch("group_norm_silu", x, *how, out)
    assert torch.allclose(out, OPS["group_norm_silu"].reference(x, *how)[0], atol=0.02)
    launch("group_norm_silu_backward", grad, x, *how, False, grad_x, *[None] * 4)
    expected = OPS["group_norm_silu_backward"].reference(grad, x, *how, False)[0]
    assert torch.allclose(grad_x, expected, atol=0.02)
    layer = (2, None, None, 1e-5, torch.eye(size[1]).bfloat16(), None)
    tokens = torch.empty(size[0], size[2], size[1], dtype=torch.bfloat16)
    launch("group_norm_linear", x, *layer, tokens)
    expected = OPS["group_norm_linear"].reference(x, *layer)[0]
    assert torch.allclose(tokens, expected, atol=0.02)


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


def test_training_through_group_norm_is_the_references():
    x, weight, scale = (torch.randn(*n, requires_grad=True) for n in ((2, 8, 3, 5), (8,), (2, 8)))
    results = {}
    for name in ("triton", "reference"):
        with fastdiff.backend(name):
            out = fastdiff.ops.group_norm_silu(x, 4, weight, None, 1e-5, scale)
            results[name] = out, *torch.autograd.grad(out.square().sum(), (x, weight, scale))
    for a, b in zip(results["triton"], results["reference"], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_sampling_is_the_references():
    """A whole sampler on the Triton backend, with its noise."""
    schedule = fastdiff.NoiseSchedule.cosine(100)
    sampler = fastdiff.DDIMSampler(schedule, steps=5, eta=1.0, prediction="v", clip=1.0)
    drawn = []
    for name in ("triton", "reference"):
        with fastdiff.backend(name):
            drawn.append(sampler.sample(lambda x, t: x.sin(), (2, 3, 4, 4), seed=3))
    assert torch.allclose(*drawn, atol=1e-5)
