"""The claim about score networks: its exact scores are right, and its errors are zero for them."""

import base64
import io

import benches  # noqa: F401, which sets the path
import numpy as np
import pytest
import torch
from PIL import Image

from bench.claims import score_networks as claim
from bench.claims.quality import Quality
from fastdiff import DDIMSampler, NoiseSchedule


@pytest.mark.parametrize("sigma", [0.0, 0.7, 20.0])
def test_the_true_score_is_the_gradient_of_the_log_density(sigma):
    x = (6 * torch.randn(50, 2, dtype=torch.float64)).requires_grad_()
    cov = (1 + sigma**2) * torch.eye(2, dtype=torch.float64)
    parts = [torch.distributions.MultivariateNormal(m.double(), cov) for m in claim.MEANS]
    weights = (claim.SMALL, 1 - claim.SMALL)
    density = sum(w * p.log_prob(x).exp() for w, p in zip(weights, parts, strict=True))
    (wanted,) = torch.autograd.grad(density.log().sum(), x)
    assert torch.allclose(claim.true_score(x.detach(), sigma), wanted, rtol=1e-5, atol=1e-6)


def test_the_mixture_has_its_weights():
    x = claim.mixture(20_000, torch.Generator().manual_seed(0))
    assert claim.weight_found(x) == pytest.approx(claim.SMALL, abs=0.015)


def test_errors_are_relative_to_the_true_score():
    schedule = NoiseSchedule.geometric(0.3, 20.0, 10)
    x = claim.mixture(100, torch.Generator().manual_seed(0))
    exact = lambda x, t: claim.true_score(x, float(schedule.sigma[int(t[0])]))  # noqa: E731
    assert claim.error(exact, schedule, 3, x)[0] == 0
    assert claim.error(lambda x, t: 0 * x, schedule, 3, x)[0] == pytest.approx(1, rel=1e-5)


def test_levels_are_the_nearest():
    schedule = NoiseSchedule.cosine(1000)
    found = claim.nearest(schedule, 10, 2.0, 0.02)
    levels = (schedule.sigma / schedule.alpha)[found]
    assert len(found) == 10
    np.testing.assert_allclose(levels, np.geomspace(2.0, 0.02, 10), rtol=0.1)


def test_images_are_of_every_seed_and_their_errors_are_told():
    """Of a network that says noise is all there is: each seed's images are its own noise."""
    sampler = DDIMSampler(NoiseSchedule.cosine(100), 2, spacing="trailing")
    point = claim.drawn(Quality(40), lambda x, t: 0.1 * x, sampler, range(2))
    assert point["fd"] > 10 and 0 < point["fd_sd"] < point["fd"]
    assert point["evaluations"] == 2
    assert Image.open(io.BytesIO(base64.b64decode(point["picture"]))).size[0] > 6 * 32


@pytest.mark.filterwarnings("ignore:step_size=0.05")
def test_at_one_level_chains_end_at_the_nearest_mode(monkeypatch):
    """Started evenly in the square, half of them are nearer to the small one."""
    monkeypatch.setattr(claim, "CHAINS", 300)
    point = claim.two_dimensions("exact", False, [0])
    assert point["weight"] == pytest.approx(0.5, abs=0.1) and point["between"] == 0
    assert point["weight_sd"] == 0 and len(point["chains"]) == 300
