"""Score matching against its definitions in float64, and on data whose score is known."""

import math

import pytest
import torch
from networks import network

import fastdiff
from fastdiff import NoiseSchedule, ops
from fastdiff.losses import denoising_score_matching, sliced_score_matching

LEVELS = NoiseSchedule.geometric(0.05, 3.0, 6)
MU, S = 0.3, 0.5


class Small(torch.nn.Module):
    """A score with curvature, in any dtype."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(12, 20), torch.nn.Linear(20, 12)

    def forward(self, x, t):
        wave = torch.tanh(self.a(x.flatten(1)) + t[:, None].to(x) / 5)
        return self.b(wave).view_as(x)


def drawn(batch=5):
    generator = torch.Generator().manual_seed(1)
    x0, z, v = (torch.randn(batch, 3, 4, generator=generator) for _ in range(3))
    return x0, z, v, torch.arange(batch) % len(LEVELS)


def sigma_at(t, schedule=LEVELS):
    return torch.from_numpy(schedule.sigma.copy())[t].view(-1, 1, 1)


def denoising(model, x0, z, v, t):
    """Song & Ermon 2019, equations 5 and 6."""
    sigma = sigma_at(t)
    noisy = x0.double() + sigma * z.double()
    target = -(noisy - x0.double()) / sigma**2
    return (sigma**2 * (model(noisy, t) - target) ** 2).flatten(1).sum(1) / 2


def sliced(reduced):
    def losses(model, x0, z, v, t):
        """Song et al. 2019, with the whole Jacobian."""
        sigma = sigma_at(t)
        noisy, results = x0.double() + sigma * z.double(), []
        for i in range(len(t)):
            jacobian = torch.autograd.functional.jacobian(
                lambda x, i=i: model(x[None], t[i : i + 1])[0].flatten(),
                noisy[i],
                create_graph=True,
            ).flatten(1)
            s, w = model(noisy[i : i + 1], t[i : i + 1]).flatten(), v[i].double().flatten()
            square = s.square().sum() if reduced else (w @ s) ** 2
            results.append(float(sigma[i]) ** 2 * (square / 2 + w @ jacobian @ w))
        return torch.stack(results)

    return losses


KINDS = {
    "denoising": (denoising, denoising_score_matching, {}),
    "sliced": (sliced(False), sliced_score_matching, {"variance_reduction": False}),
    "sliced-reduced": (sliced(True), sliced_score_matching, {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradient_are_the_definitions(name):
    textbook, ours, how = KINDS[name]
    x0, z, v, t = drawn()
    if ours is sliced_score_matching:
        how = {**how, "projection": v}
    model = Small()
    losses = ours(model, x0, LEVELS, t, noise=z, **how)
    grads = torch.autograd.grad(losses.sum(), model.parameters(), allow_unused=True)
    exact = Small().double()
    truth = textbook(exact, x0, z, v, t)
    expected = torch.autograd.grad(truth.sum(), exact.parameters(), allow_unused=True)
    torch.testing.assert_close(losses.double(), truth, rtol=1e-4, atol=1e-5)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("schedule", [LEVELS, NoiseSchedule.cosine(20)], ids=["ncsn", "ddpm"])
def test_of_gaussian_data_and_its_score(schedule):
    """D / 2 (1 - sigma^2 / V) and -D sigma^2 / (2 V), V = alpha^2 S^2 + sigma^2, as integrals."""
    generator, D = torch.Generator().manual_seed(0), 12
    x0 = MU + S * torch.randn(20_000, 3, 4, generator=generator)

    def score(x, t):
        alpha = torch.from_numpy(schedule.alpha.copy())[t].view(-1, 1, 1)
        V = alpha**2 * S**2 + sigma_at(t, schedule) ** 2
        return (-(x - alpha * MU) / V).float()

    for level in (0, len(schedule) - 1):
        t = torch.full((len(x0),), level)
        alpha, sigma = schedule.alpha[level], schedule.sigma[level]
        part = sigma**2 / (alpha**2 * S**2 + sigma**2)
        for losses, expected in (
            (denoising_score_matching(score, x0, schedule, t, seed=3), D / 2 * (1 - part)),
            (sliced_score_matching(score, x0, schedule, t, seed=3), -D / 2 * part),
            (
                sliced_score_matching(score, x0, schedule, t, seed=3, variance_reduction=False),
                -D / 2 * part,
            ),
        ):
            losses = losses.detach()
            error = float(losses.std()) / math.sqrt(len(x0))
            assert abs(float(losses.mean()) - expected) < 4 * error + 1e-6


def test_variance_reduction_reduces_it():
    x0, z, _, t = drawn(300)
    spread = [
        sliced_score_matching(Small(), x0, LEVELS, t * 0 + 5, noise=z, seed=k,
                              variance_reduction=reduced).detach().mean()
        for reduced in (False, True) for k in range(20)
    ]  # fmt: skip
    plain, reduced = torch.stack(spread).view(2, 20).var(1)
    assert reduced < 0.5 * plain


def test_a_seed_decides_all_and_projections_are_not_the_noise():
    x0 = drawn(6)[0]
    first, again = (sliced_score_matching(Small(), x0, LEVELS, seed=4, row=2) for _ in range(2))
    assert torch.equal(first, again)
    parts = [
        sliced_score_matching(Small(), x0[k : k + 3], LEVELS, seed=4, row=2, first_index=k)
        for k in (0, 3)
    ]
    torch.testing.assert_close(torch.cat(parts), first, rtol=1e-5, atol=1e-6)
    with_noise = sliced_score_matching(
        Small(), x0, LEVELS, seed=4, row=2, projection=ops.randn(x0.shape, 4, row=2)
    )
    assert not torch.allclose(with_noise, first, rtol=0.01)


@pytest.mark.parametrize("name", ["ddpm", "UNet2DModel"])
def test_our_network_and_diffusers_are_differentiated_twice(name):
    """In float32 against finite differences of the slope, in float64."""
    model, x0 = network(name), torch.randn(2, 3, 16, 16).clamp(-1, 1)
    t, v = torch.tensor([0, 5]), torch.randn(2, 3, 16, 16)
    how = {"noise": torch.randn(2, 3, 16, 16), "projection": v}
    losses = sliced_score_matching(model, x0, LEVELS, t, **how)
    losses.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    weight = next(p for p in model.parameters() if p.dim() == 4)
    direction, found = torch.randn_like(weight).double(), weight.grad.double()
    exact = network(name).double()
    sigma = sigma_at(t).view(-1, 1, 1, 1)
    noisy = x0.double() + sigma * how["noise"].double()

    def output(x):
        out = exact(x, t)
        return getattr(out, "sample", out)

    def total(moved):
        moved_weight = next(p for p in exact.parameters() if p.dim() == 4)
        with torch.no_grad():
            moved_weight += moved * direction
            h, w = 1e-5, v.double()
            slope = (w * (output(noisy + h * w) - output(noisy - h * w))).flatten(1).sum(1) / (
                2 * h
            )
            value = sigma.flatten() ** 2 * (output(noisy).square().flatten(1).sum(1) / 2 + slope)
            moved_weight -= moved * direction
        return value

    torch.testing.assert_close(losses.detach().double(), total(0.0), rtol=1e-3, atol=1e-3)
    slope = (total(1e-4).sum() - total(-1e-4).sum()) / 2e-4
    expected = float((direction * found).sum())
    assert float(slope) == pytest.approx(expected, rel=2e-3)


def test_a_network_without_second_derivatives_is_refused():
    model, x0 = network("ddpm"), torch.zeros(1, 3, 16, 16)
    fused = network("ddpm")
    for module in fused.modules():
        if hasattr(module, "fused"):
            module.fused = True
    for other in (fused, fastdiff.optimize(model)):
        with pytest.raises(RuntimeError, match=r"model: sliced score matching differentiates it"):
            sliced_score_matching(other, x0, LEVELS, seed=0)


def test_bad_input_is_refused():
    x0 = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="model output of shape"):
        sliced_score_matching(lambda x, t: x[:, :1], x0, LEVELS)
    with pytest.raises(ValueError, match="projection: has shape"):
        sliced_score_matching(Small(), x0, LEVELS, projection=x0[:1])
    with pytest.raises(ValueError, match="noise: has shape"):
        sliced_score_matching(Small(), x0, LEVELS, noise=x0[:1])
    with pytest.raises(ValueError, match="t: spans 0 to 6"):
        denoising_score_matching(Small(), x0, LEVELS, torch.tensor([0, 6]))
