"""The convolution that trains, and its gradients, against torch's in float64."""

import copy

import pytest
import torch
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.models.conv import Conv3x3, conv3x3_train

LAST = torch.channels_last
FP32, BF16 = torch.float32, torch.bfloat16
SIZES = {  # N, C, H, W, K
    "f4": (2, 64, 24, 24, 96),
    "f2": (2, 96, 8, 8, 64),
    "odd": (3, 32, 7, 13, 32),
    "odd-f4": (5, 32, 17, 15, 32),
    "one": (1, 32, 1, 1, 32),
}
# to torch's error in the same dtype. For a weight's gradient in bfloat16, two transformed operands
# are rounded where torch rounds one result; in float32, terms of F(4x4) are larger than the sum.
RATIO, RATIO_F4 = 2.8, 6.0


def draw(*size, dtype=FP32, seed=0):
    made = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return made.contiguous(memory_format=LAST) if len(size) == 4 else made


def problem(size, dtype, each):
    """x, weight, bias and residual, and the gradient of the result."""
    N, C, H, W, K = size
    weight = draw(K, C, 3, 3, seed=1).contiguous() / (9 * C) ** 0.5
    bias = draw(*((N, K) if each else (K,)), seed=2)
    residual = draw(N, K, H, W, dtype=dtype, seed=3)
    operands = draw(N, C, H, W, dtype=dtype), weight, bias, residual
    return operands, draw(N, K, H, W, dtype=dtype, seed=4)


def torchs(x, weight, bias, residual):
    out = F.conv2d(x, weight.to(x.dtype), padding=1) + residual
    return out + bias.to(x.dtype).reshape(-1, out.shape[1], 1, 1)


def results(function, operands, grad, dtype=None):
    """What the function returns, and the gradient of each operand."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in operands]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def trained(x, weight, bias, residual):
    return conv3x3_train(x, weight, bias, residual=residual)


def relative(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_result_and_gradients_are_those_of_the_direct_convolution(size, dtype, each):
    operands, grad = problem(size, dtype, each)
    truth = results(torchs, operands, grad, torch.float64)
    ours = results(trained, operands, grad)
    theirs = results(torchs, operands, grad)
    floor = torch.finfo(dtype).eps / 4  # where torch's sum of one pixel is exact
    ratio = RATIO_F4 if size[0] * size[2] * size[3] >= 1024 and dtype == FP32 else RATIO
    for mine, other, true, leaf in zip(ours, theirs, truth, [grad, *operands], strict=True):
        assert mine.dtype == leaf.dtype and mine.shape == leaf.shape
        assert relative(mine, true) <= ratio * max(relative(other, true), floor)


@pytest.mark.parametrize("dtype, error", [(FP32, 1.5e-6), (BF16, 5e-3)])
def test_error_at_the_size_of_a_network(dtype, error):
    operands, grad = problem((4, 128, 16, 16, 128), dtype, False)
    truth = results(torchs, operands, grad, torch.float64)
    for mine, true in zip(results(trained, operands, grad), truth, strict=True):
        assert relative(mine, true) < error


@pytest.mark.parametrize("wanted", range(4))
def test_one_gradient_alone_is_the_same_bits(wanted):
    operands, grad = problem(SIZES["f2"], FP32, True)
    expected = results(trained, operands, grad)[1 + wanted]
    leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(operands)]
    trained(*leaves).backward(grad)
    assert torch.equal(leaves[wanted].grad, expected)
    assert [i for i, leaf in enumerate(leaves) if leaf.grad is not None] == [wanted]


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_gradients_of_layouts_that_are_not_channels_last(dtype):
    """Contiguous x, a part as residual, the expanded gradient of a sum, a channels-last weight."""
    operands, _ = problem(SIZES["f4"], dtype, False)
    x, weight, bias, residual = operands
    expected = results(trained, operands, torch.ones_like(residual))
    wide = torch.cat([residual, residual], 1).contiguous(memory_format=LAST)[:, 96:]
    others = x.contiguous(), weight.contiguous(memory_format=LAST), bias, wide
    ones = torch.ones((), dtype=dtype).expand(residual.shape)
    for mine, other in zip(results(trained, others, ones), expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.skipif(not ops.conv3x3_available(BF16), reason="torch's own sums depend on threads")
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_results_are_the_same_bits_on_any_number_of_threads(dtype):
    operands, grad = problem((3, 288, 24, 24, 64), dtype, False)
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(results(trained, operands, grad)[:3])
    torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_nan_of_one_pixel_reaches_its_gradients_alone():
    (x, weight, bias, residual), grad = problem(SIZES["f2"], BF16, True)
    x[0, 3, 5, 5] = grad[1, 7, 2, 2] = torch.nan
    out, grad_x, grad_weight, grad_bias, _ = results(trained, (x, weight, bias, residual), grad)
    assert out[0, :, 5, 5].isnan().all() and not out[1].isnan().any()
    assert grad_x[1, :, 2, 2].isnan().all() and not grad_x[0].isnan().any()
    assert grad_weight[:, 3].isnan().all() and grad_weight[7].isnan().all()
    assert not grad_weight[8:, 4:].isnan().any()
    assert grad_bias.isnan().nonzero().tolist() == [[1, 7]]


def test_a_second_derivative_is_refused():
    operands, grad = problem(SIZES["f2"], FP32, False)
    x = operands[0].requires_grad_()
    with pytest.raises(RuntimeError, match=r"^conv3x3_train: has no second derivative"):
        torch.autograd.grad(trained(*operands), x, grad, create_graph=True)


@pytest.mark.parametrize(
    "message, change",
    {
        "x: has dtype float16": {"x": draw(2, 64, 8, 8).half()},
        "weight: has dtype bfloat16": {"weight": draw(32, 64, 3, 3).to(BF16)},
        "weight: has shape (32, 48, 3, 3)": {"weight": draw(32, 48, 3, 3)},
        "weight: has shape (48, 64, 3, 3)": {"weight": draw(48, 64, 3, 3)},
        "weight: is packed for 32 channels": {"weight": draw(32, 32, 3, 3)},
        "bias: has shape (64,)": {"bias": draw(64)},
        "residual: has shape": {"residual": draw(2, 64, 8, 8)},
    }.items(),
)
def test_bad_arguments_are_named(message, change):
    given = {"x": draw(2, 64, 8, 8), "weight": draw(32, 64, 3, 3), "bias": draw(32)} | change
    with pytest.raises((TypeError, ValueError)) as raised:
        conv3x3_train(**given)
    assert str(raised.value).startswith(message)


# the module


def modules(channels=64, outputs=32):
    """One in plain torch, and the same fused."""
    torch.manual_seed(0)
    plain = Conv3x3(channels, outputs)
    fused = copy.deepcopy(plain)
    fused.fused = True
    return plain, fused


def stepped(module, x, each, residual, grad):
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, each, residual)]
    module.zero_grad()
    out = module(leaves[0], leaves[1], residual=leaves[2])
    out.backward(grad.to(out.dtype))
    gradients = [t.grad for t in leaves if t is not None]
    return [out.detach(), *gradients, module.weight.grad, module.bias.grad]


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_the_fused_module_is_the_plain_one(cast, adds, monkeypatch):
    plain, fused = modules()
    x, grad = draw(2, 64, 12, 12), draw(2, 32, 12, 12, seed=1)
    given = (draw(2, 32, seed=2), draw(2, 32, 12, 12, seed=3)) if adds else (None, None)
    with torch.autocast("cpu", BF16, enabled=cast):
        expected, ours = (stepped(m, x, *given, grad) for m in (plain, fused))
    if not cast or ops.conv3x3_available(BF16):
        assert ours[0].dtype == (BF16 if cast else FP32)
    truth = stepped(
        copy.deepcopy(plain).double(),
        *(None if t is None else t.double() for t in (x, *given)),
        grad.double(),
    )
    for mine, other, true in zip(ours, expected, truth, strict=True):
        assert mine.dtype == other.dtype or cast
        assert relative(mine, true) < (1e-2 if cast else 2e-6)


def test_gradients_add_up_and_the_state_dict_is_that_of_a_convolution():
    plain, fused = modules()
    assert list(fused.state_dict()) == list(torch.nn.Conv2d(64, 32, 3).state_dict())
    x = draw(2, 64, 12, 12)
    fused(x).sum().backward()
    once = fused.weight.grad.clone()
    fused(x).sum().backward()
    assert torch.equal(fused.weight.grad, 2 * once)
    plain.load_state_dict(fused.state_dict())


def test_what_it_does_not_take_or_is_slow_at_stays_torchs(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("called")

    monkeypatch.setattr("fastdiff.models.conv.conv3x3_train", refuse)
    for channels, x in {
        64: draw(1, 64, 8, 8),  # few pixels
        48: draw(2, 48, 12, 12),
    }.items():
        plain, fused = modules(channels)
        assert torch.equal(fused(x), plain(x))
    fused.double()(draw(2, 48, 12, 12).double())
    if ops.conv3x3_available(FP32):
        with pytest.raises(AssertionError, match="called"):
            modules()[1](draw(2, 64, 12, 12))


@pytest.mark.parametrize("cast", [False, True])
def test_compiles_as_one_graph_with_its_gradient(cast):
    torch.compiler.reset()
    _, fused = modules()
    x, each, residual = draw(2, 64, 12, 12), draw(2, 32, seed=2), draw(2, 32, 12, 12, seed=3)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    grad = draw(2, 32, 12, 12, seed=1)
    with torch.autocast("cpu", BF16, enabled=cast):
        expected = [t.clone() for t in stepped(fused, x, each, residual, grad)]
        ours = stepped(compiled, x, each, residual, grad)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)
