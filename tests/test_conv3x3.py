"""The Winograd convolution against torch's direct one, and what its arguments may be."""

import pytest
import torch
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.ops.conv3x3 import matrices

LAST = torch.channels_last
BF16 = torch.bfloat16


def problem(*size, outputs=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, generator=generator).to(dtype).contiguous(memory_format=LAST)
    weight = torch.randn(outputs, size[1], 3, 3, generator=generator) / (9 * size[1]) ** 0.5
    return x, weight


def relative(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("tile", [2, 4])
def test_the_transforms_make_a_convolution(tile):
    """A^T [(G g) * (B^T d)] is the correlation of d with g: along one line, in float64."""
    B, G, A = matrices(tile)
    d, g = torch.randn(tile + 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    expected = [d[i : i + 3] @ g for i in range(tile)]
    assert torch.allclose(A @ ((G @ g) * (B @ d)), torch.stack(expected), atol=1e-13)


@pytest.mark.parametrize(
    "tile, dtype, error, ratio",  # to a direct convolution in the same dtype
    [
        (4, torch.float32, 1.5e-6, 3.0),
        (2, torch.float32, 5e-7, 1.0),
        (2, BF16, 5e-3, 2.0),
        (4, BF16, 1.5e-2, 6.0),
    ],
)
def test_error_against_the_direct_convolution(tile, dtype, error, ratio):
    x, weight = problem(2, 256, 16, 16)
    truth = F.conv2d(x.double(), weight.double(), padding=1)
    ours = relative(ops.conv3x3(x.to(dtype), ops.pack_conv3x3(weight, tile, dtype)), truth)
    direct = relative(F.conv2d(x.to(dtype), weight.to(dtype), padding=1), truth)
    assert ours < error and ours < ratio * direct, (ours, direct)


@pytest.mark.parametrize("tile, dtype", [(4, torch.float32), (2, torch.float32), (2, BF16)])
def test_upsampling_bias_and_residual_of_tensors_that_are_parts_of_others(tile, dtype):
    x, weight = problem(3, 96, 7, 9, dtype=dtype)
    residual = problem(3, 160, 14, 18, dtype=dtype)[0][:, 32:96]
    bias = torch.randn(3, 96)[:, 16:80]
    whole = F.interpolate(x.double(), scale_factor=2, mode="nearest")
    truth = F.conv2d(whole, weight.double(), padding=1) + bias[:, :, None, None] + residual
    part = torch.cat([residual[:, :32, :7, :9], x], 1)[:, 32:]  # a view: its pixels lie apart
    packed = ops.pack_conv3x3(weight, tile, dtype)
    ours = ops.conv3x3(part, packed, bias, residual=residual, upsample=True)
    assert ours.is_contiguous(memory_format=LAST) and ours.dtype == dtype
    assert relative(ours, truth) < (2e-6 if dtype == torch.float32 else 5e-3)


def test_the_result_can_be_written_into_a_part_of_the_channels():
    """Also where the residual is what stands there, and by a call that was bound before."""
    x, weight = problem(2, 32, 6, 6)
    packed = ops.pack_conv3x3(weight, 4)
    wide = torch.full((2, 192, 6, 6), 7.0).contiguous(memory_format=LAST)
    part = wide[:, 64:128]
    ops.OPS["conv3x3"].write(x, packed, None, None, False, out=part)
    expected = ops.conv3x3(x, packed)
    assert torch.equal(part, expected)
    if ops.conv3x3_available(x.dtype):
        run = ops.OPS["conv3x3"].bind(x, packed, None, part, False, part)
        for _ in range(2):
            run()
            expected = ops.conv3x3(x, packed, residual=expected)
            assert torch.equal(part, expected)
    assert bool((wide[:, :64] == 7).all() and (wide[:, 128:] == 7).all())


@pytest.mark.parametrize("size", [(5, 64, 33, 18), (1, 512, 8, 8)])  # blocks, panels for threads
@pytest.mark.parametrize("tile, dtype", [(4, torch.float32), (2, BF16)])
def test_results_are_the_same_bits_on_any_number_of_threads_and_in_any_batch(size, tile, dtype):
    x, weight = problem(*size, dtype=dtype)
    packed = ops.pack_conv3x3(weight, tile, dtype)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.conv3x3(x, packed))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(ops.conv3x3(x[-1:], packed), results[0][-1:])


def test_nan_stays_where_it_can_be_seen():
    """In its tile and those that read it; bfloat16 too, whose rounding must not lose it."""
    for dtype in (torch.float32, BF16):
        x, weight = problem(1, 16, 16, 16, dtype=dtype)
        x[0, 3, 5, 5] = torch.nan
        out = ops.conv3x3(x, ops.pack_conv3x3(weight, 2, dtype))
        assert out[..., 4:7, 4:7].isnan().all() and not out[..., 10:, 10:].isnan().any()


x, weight = problem(2, 32, 6, 6)
packed = ops.pack_conv3x3(weight, 4)
BAD = {
    "weight: has shape (30, 32, 3, 3)": lambda: ops.pack_conv3x3(weight[:30], 4),
    "weight: has shape (64, 30, 3, 3)": lambda: ops.pack_conv3x3(weight[:, :30], 4),
    "tile=3": lambda: ops.pack_conv3x3(weight, 3),
    "dtype=torch.float16": lambda: ops.pack_conv3x3(weight, 4, torch.float16),
    "x: must be a torch.Tensor": lambda: ops.conv3x3(None, packed),
    "x: has dtype": lambda: ops.conv3x3(x.half(), packed),
    "x: has shape (2, 32, 6, 6) and strides": lambda: ops.conv3x3(x.contiguous(), packed),
    "x: has 20 channels": lambda: ops.conv3x3(x[:, :20], packed),
    "x: requires a gradient": lambda: ops.conv3x3(x.clone().requires_grad_(), packed),
    "weight: has shape": lambda: ops.conv3x3(x, weight),
    "weight: is packed for 32 channels": lambda: ops.conv3x3(x[:, :16], packed),
    "weight: has dtype": lambda: ops.conv3x3(x, ops.pack_conv3x3(weight, 2, BF16)),
    "residual: has shape": lambda: ops.conv3x3(x, packed, residual=x),
    "residual: has dtype": lambda: ops.conv3x3(x, packed, residual=x.to(BF16)),
    "bias: has dtype": lambda: ops.conv3x3(x, packed, torch.ones(64).to(BF16)),
    "bias: has shape (32,)": lambda: ops.conv3x3(x, packed, torch.ones(32)),
    "bias: has shape (64,) and": lambda: ops.conv3x3(x, packed, torch.ones(128)[::2]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        BAD[message]()
    assert str(caught.value).startswith(message)
