"""ops.weighted_mse beyond its record's cases: gradients, sums by timestep, accuracy."""

import pytest
import torch

import fastdiff
from fastdiff.losses import DiffusionLoss
from fastdiff.ops import OPS, weighted_mse

BF16 = torch.bfloat16


def drawn(*size, dtype=torch.float32, target=torch.float32, times=5):
    generator = torch.Generator().manual_seed(0)
    output, other = (torch.randn(size, generator=generator) for _ in range(2))
    t = torch.randint(times, size[:1], generator=generator)
    return output.to(dtype), other.to(target), torch.rand(times, generator=generator), t


def formula(output, target, weights, t):
    """In float64."""
    output, target = output.double(), target.double()
    return weights.double()[t] * (output - target).square().flatten(1).mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("wanted", ["output", "target", "both"])
def test_gradient_is_that_of_the_formula(dtype, wanted):
    output, target, weights, t = drawn(6, 3, 7, dtype=dtype)
    asked = {"output": (output,), "target": (target,), "both": (output, target)}[wanted]
    for tensor in asked:
        tensor.requires_grad_()
    losses, sums = weighted_mse(output, target, weights, t)
    assert losses.requires_grad and not sums.requires_grad
    ours = torch.autograd.grad(losses.square().sum(), asked)
    theirs = torch.autograd.grad(formula(output, target, weights, t).square().sum(), asked)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, rtol=1e-5 if a.dtype == torch.float32 else 2**-7, atol=1e-7)


def test_second_derivatives_are_those_of_the_formula():
    output, target, weights, t = drawn(4, 9)
    both = output.requires_grad_(), target.requires_grad_()
    found = []
    for losses in (weighted_mse(output, target, weights, t)[0], formula(*both, weights, t)):
        first = torch.autograd.grad(losses.square().sum(), both, create_graph=True)
        mixed = (first[0].sin() + first[1].square()).sum()
        found.append(torch.autograd.grad(mixed, both))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_forward_and_backward_compile_as_one_graph():
    output, target, weights, t = drawn(4, 3, 5, dtype=BF16)

    def gradient(output, target):
        return torch.autograd.grad(weighted_mse(output, target, weights, t)[0].mean(), output)[0]

    output.requires_grad_()
    compiled = torch.compile(
        lambda *args: weighted_mse(*args, weights, t), fullgraph=True, backend="aot_eager"
    )
    losses, sums = compiled(output, target)
    assert torch.equal(sums, weighted_mse(output, target, weights, t)[1])
    grad = torch.autograd.grad(losses.mean(), output)[0]
    assert torch.equal(grad, gradient(output, target))


def test_sums_are_the_errors_at_each_timestep_and_add_up_over_batches():
    output, target, weights, t = drawn(300, 2, 3, times=11)
    weights[4] = 0  # its errors are known all the same
    t[t == 7] = 8
    losses, sums = weighted_mse(output, target, weights, t)
    assert torch.allclose(losses.double(), formula(output, target, weights, t), rtol=1e-6)
    errors = formula(output, target, torch.ones(11), t)
    for k in range(11):
        at = errors[t == k]
        expected = torch.stack([torch.ones_like(at), at, at**2], 1).sum(0)
        assert torch.allclose(sums[k].double(), expected, rtol=1e-6), k
    assert sums[7].tolist() == [0, 0, 0]
    halves = [
        weighted_mse(output[s], target[s], weights, t[s]) for s in (slice(170), slice(170, None))
    ]
    assert torch.equal(torch.cat([half[0] for half in halves]), losses)
    assert torch.allclose(halves[0][1] + halves[1][1], sums, rtol=1e-6)


@pytest.mark.parametrize("size", [(2, 3, 256, 256), (3, 65537), (2, 5000, 3)])
def test_sums_of_large_samples_lose_nothing(size):
    """Each loss is the float32 nearest to the sum in float64, or the next where that is a tie."""
    output, target, weights, t = drawn(*size)
    target += 30  # equal terms, of which a running float32 sum would drop a part
    truth = formula(output, target, weights, t)
    losses = weighted_mse(output, target, weights, t)[0]
    assert ((losses - truth) / truth).abs().max() < 1.01 * 2**-24


def test_results_are_the_same_bits_on_any_number_of_threads():
    args = drawn(5, 3, 101, 103)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(weighted_mse(*args))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])


def test_samples_without_elements_have_no_mean():
    losses, sums = weighted_mse(
        torch.zeros(2, 0), torch.zeros(2, 0), torch.ones(3), torch.ones(2).long()
    )
    assert losses.isnan().all() and sums[1, 0] == 2 and sums[0].tolist() == [0, 0, 0]


def test_the_losses_sums_are_those_of_its_samples():
    schedule = fastdiff.NoiseSchedule.cosine(20)
    loss, x0, t = DiffusionLoss(schedule, "v", "min_snr"), torch.randn(6, 1, 4, 4), torch.arange(6)
    found = []
    for call in (loss.with_sums, loss.per_sample):
        torch.manual_seed(0)
        found.append(call(lambda x, t: x, x0, t))
    (losses, sums), alone = found
    assert torch.equal(losses, alone)
    weights = torch.tensor(loss.weights[:6], dtype=torch.float32)
    assert torch.allclose(weights * sums[:6, 1], losses) and sums[:, 0].sum() == 6


def test_a_gradient_to_the_target_is_made_only_where_it_is_asked_for():
    output, target, weights, t = drawn(2, 3)
    grads = OPS["weighted_mse_backward"].call(torch.ones(2), output, target, weights, t, False)
    assert len(grads) == 1
