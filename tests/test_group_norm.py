"""Group norm's gradients, through torch's dispatcher and against autograd; and its fused forms."""

import pytest
import torch

import fastdiff
from fastdiff.ops import OPS

CASES = {c.name: c for c in OPS["group_norm_silu_backward"].cases() if not c.large}


def trained(name):
    """grad and inputs of a case in float64, contiguous, and the leaves among the inputs."""
    grad, *inputs, _ = (
        v.double().contiguous() if isinstance(v, torch.Tensor) else v
        for v in CASES[name].inputs("cpu")
    )
    return grad, inputs, [v.requires_grad_() for v in inputs if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("name", CASES)
def test_formulas_of_the_gradients_are_autograds(name):
    grad, inputs, leaves = trained(name)
    (out,) = OPS["group_norm_silu"].reference(*inputs)
    ours = OPS["group_norm_silu_backward"].reference(grad, *inputs, True)
    theirs = torch.autograd.grad(out, leaves, grad)
    for a, b in zip((a for a in ours if a is not None), theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-8)


def test_gradients_of_the_op_are_autograds():
    """In float32 and bfloat16, of the public call, with a gradient of another layout."""
    for name in ("adaptive", "mixed", "plain", "vectors", "tokens"):
        _, *given, _ = CASES[name].inputs("cpu")
        leaves = [v.requires_grad_() for v in given if isinstance(v, torch.Tensor)]
        wide = [v.detach().double() if isinstance(v, torch.Tensor) else v for v in given]
        truths = [v.requires_grad_() for v in wide if isinstance(v, torch.Tensor)]
        out, truth = fastdiff.ops.group_norm_silu(*given), OPS["group_norm_silu"].reference(*wide)
        grad = torch.randn(out.shape)
        ours = torch.autograd.grad(out, leaves, grad.to(out.dtype))
        theirs = torch.autograd.grad(truth, truths, grad.double())
        for leaf, a, b in zip(leaves, ours, theirs, strict=True):
            assert a.dtype == leaf.dtype and a.shape == leaf.shape
            error = (a - b).abs().max() / b.abs().max()
            assert error < (2e-6 if out.dtype == torch.float32 else 2e-2), name


@pytest.mark.parametrize("name", ["adaptive", "mixed", "plain", "empty"])
def test_opcheck_with_gradients(name):
    _, *inputs, _ = CASES[name].inputs("cpu")
    for value in inputs:
        if isinstance(value, torch.Tensor):
            value.requires_grad_()
    torch.library.opcheck(OPS["group_norm_silu"].call, tuple(inputs))


def test_training_compiles_as_one_graph():
    x, weight, bias, scale = (
        torch.randn(*size, requires_grad=True) for size in ((2, 8, 5, 5), (8,), (8,), (2, 8))
    )

    def loss(*args):
        x, weight, bias, scale = args
        return fastdiff.ops.group_norm_silu(x, 4, weight, bias, 1e-5, scale).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    args = x, weight, bias, scale
    ours = torch.autograd.grad(compiled(*args), args)
    for a, b in zip(ours, torch.autograd.grad(loss(*args), args), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_second_derivative_is_refused():
    x = torch.randn(2, 4, 3, requires_grad=True)
    out = fastdiff.ops.group_norm_silu(x, 2, None, None, 1e-5)
    with pytest.raises(RuntimeError, match="group_norm_silu: has no second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_group_norm_linear_is_the_two_layers():
    x = torch.randn(2, 16, 3, 5)
    norm, qkv = torch.nn.GroupNorm(4, 16), torch.nn.Linear(16, 48)
    torch.nn.init.normal_(norm.weight)
    args = x, 4, norm.weight, norm.bias, norm.eps, qkv.weight, qkv.bias
    with pytest.raises(RuntimeError, match=r"^norm_weight: requires a gradient"):
        fastdiff.ops.group_norm_linear(*args)
    with torch.no_grad():
        expected = qkv(norm(x).flatten(2).transpose(1, 2))
        assert torch.allclose(fastdiff.ops.group_norm_linear(*args), expected, atol=1e-6)


@pytest.mark.parametrize(
    "message, changed",
    {
        "groups=3": {"groups": 3},
        "norm_bias: has shape (3,), must be (4,)": {"norm_bias": torch.zeros(3)},
        "weight: has shape (6, 3), must be [K, 4]": {"weight": torch.zeros(6, 3)},
        "weight: has dtype float16, must be float32": {"weight": torch.zeros(6, 4).half()},
        "bias: has shape (4,), must be (6,)": {"bias": torch.zeros(4)},
    }.items(),
)
def test_group_norm_linear_names_bad_input(message, changed):
    good = {"x": torch.zeros(2, 4, 3), "groups": 2, "norm_weight": None, "norm_bias": None}
    good |= {"eps": 1e-5, "weight": torch.zeros(6, 4)}
    with pytest.raises((ValueError, TypeError)) as caught:
        fastdiff.ops.group_norm_linear(**(good | changed))
    assert str(caught.value).startswith(message)
