"""The linear op against torch's, in layouts that a network has, and what its arguments may be."""

import pytest
import torch
from torch.nn import functional as F

from fastdiff import ops

BF16 = torch.bfloat16


def problem(*size, outputs=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, generator=generator).to(dtype)
    weight = torch.randn(outputs, size[-1], generator=generator) / size[-1] ** 0.5
    return x, weight, torch.randn(outputs, generator=generator)


def relative(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_error_is_torchs_own(dtype):
    x, weight, bias = problem(300, 384, dtype=dtype)
    weight = weight.to(dtype)
    truth = F.linear(x.double(), weight.double(), bias.double())
    ours = relative(ops.linear(x, ops.pack_linear(weight, dtype), bias), truth)
    torchs = relative(F.linear(x, weight, bias.to(dtype)), truth)
    assert ours < 1.1 * torchs + 1e-7, (ours, torchs)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_1x1_convolution_between_slices_of_wider_images(dtype):
    x, weight, bias = problem(2, 6, 5, 96, dtype=dtype)
    wide = torch.full((2, 6, 5, 160), 7.0, dtype=dtype)

    def tokens(image):
        return image.flatten(1, 2)

    x, out, residual = x[..., 16:64], wide[..., 32:96], x[..., :64]
    packed = ops.pack_linear(weight[:, 16:64], dtype)
    ops.OPS["linear"].write(tokens(x), packed, bias, tokens(residual), out=tokens(out))
    kernel = weight[:, 16:64].to(dtype).double()[..., None, None]
    image = x.double().permute(0, 3, 1, 2)
    truth = F.conv2d(image, kernel, bias.double()).permute(0, 2, 3, 1) + residual
    assert relative(out, truth) < (1e-6 if dtype == torch.float32 else 5e-3)
    assert bool((wide[..., :32] == 7).all() and (wide[..., 96:] == 7).all())


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_results_are_the_same_bits_on_any_number_of_threads_and_in_any_batch(dtype):
    x, weight, bias = problem(5, 333, 512, outputs=96, dtype=dtype)
    packed = ops.pack_linear(weight, dtype)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.linear(x, packed, bias))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(ops.linear(x[-1, -9:], packed, bias), results[0][-1, -9:])


x, weight, bias = problem(4, 32)
packed = ops.pack_linear(weight)
BAD = {
    "weight: has shape (30, 32)": lambda: ops.pack_linear(weight[:30]),
    "weight: has shape (64, 30)": lambda: ops.pack_linear(weight[:, :30]),
    "dtype=torch.float16": lambda: ops.pack_linear(weight, torch.float16),
    "x: must be a torch.Tensor": lambda: ops.linear(None, packed),
    "x: has dtype": lambda: ops.linear(x.half(), packed),
    "x: has shape (32,)": lambda: ops.linear(x[0], packed),
    "x: has shape (4, 32) and strides (1, 4)": lambda: ops.linear(x.T.contiguous().T, packed),
    "x: has rows of 16": lambda: ops.linear(x[:, :16], packed),
    "x: requires a gradient": lambda: ops.linear(x.clone().requires_grad_(), packed),
    "weight: has shape": lambda: ops.linear(x, weight),
    "weight: has dtype": lambda: ops.linear(x, ops.pack_linear(weight, BF16)),
    "weight: is on meta": lambda: ops.linear(x, packed.to("meta")),
    "bias: has dtype": lambda: ops.linear(x, packed, bias.to(BF16)),
    "bias: has shape": lambda: ops.linear(x, packed, bias[:32]),
    "residual: has shape": lambda: ops.linear(x, packed, residual=x),
    "residual: has dtype": lambda: ops.linear(x, packed, residual=x.to(BF16)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        BAD[message]()
    assert str(caught.value).startswith(message)
