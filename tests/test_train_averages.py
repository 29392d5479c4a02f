"""Moving averages: their formulas, and those made afterwards from snapshots."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff.checkpoint import load
from fastdiff.data import fashion_mnist
from fastdiff.models import UNet, UNetConfig
from fastdiff.schedule import NoiseSchedule
from fastdiff.train import TrainConfig, Trainer, posthoc
from fastdiff.train.ema import SIGMA_RELS, Averages, gamma_of
from fastdiff.train.posthoc import coefficients

SAMPLE = Path(__file__).parent / "data" / "fashion-mnist"


def walk(steps):
    """A random walk, as weights make: float64 [steps, 3]."""
    return torch.randn(steps, 3, generator=torch.Generator().manual_seed(0)).double().cumsum(0)


def profile(steps, gamma, end=None):
    """What a power-function average weighs each step by, straight from its integral: [steps]."""
    end = end or steps
    edges = (np.minimum(np.arange(steps + 1), end) / end) ** (gamma + 1)
    return torch.from_numpy(np.diff(edges))


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2, 0.2886])
def test_gamma_has_the_width_asked_for(sigma_rel):
    # mean and variance of tau^gamma on [0, 1], by the midpoint rule
    tau = (np.arange(1_000_000) + 0.5) / 1_000_000
    p = tau ** gamma_of(sigma_rel)
    p /= p.sum()
    mean = (p * tau).sum()
    assert (p * (tau - mean) ** 2).sum() ** 0.5 == pytest.approx(sigma_rel, rel=1e-4)


def test_the_papers_gammas():
    # Karras et al. 2024: widths 0.05 and 0.10 are gamma = 16.97 and 6.94
    assert [round(gamma_of(s), 2) for s in SIGMA_RELS] == [16.97, 6.94]


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3, float("nan")])
def test_widths_that_no_profile_has_are_refused(sigma_rel):
    with pytest.raises(ValueError, match="sigma_rel"):
        gamma_of(sigma_rel)


def test_averages_follow_their_formulas():
    points = walk(40)
    x = points[0].clone()
    averages = Averages([x], (0.9, 0.3), (0.1,))
    expected = {decay: points[0].clone() for decay in (0.9, 0.3)}
    for step, point in enumerate(points):
        x.copy_(point)
        averages.update(step)
        for decay, value in expected.items():
            d = min(decay, (1 + step) / (10 + step))
            expected[decay] = d * value + (1 - d) * point
    for decay, value in expected.items():
        torch.testing.assert_close(averages.values[f"ema.{decay}"][0], value)
    power = profile(40, gamma_of(0.1)) @ points
    torch.testing.assert_close(averages.values["power.0.1"][0], power)


@pytest.mark.parametrize("sigma_rel", [0.06, 0.08, 0.12, 0.2])
@pytest.mark.parametrize("end", [1600, 1450])
def test_posthoc_profile_is_the_one_asked_for(sigma_rel, end):
    steps, every = 1600, 50
    times = np.repeat(np.arange(every, steps + 1, every), 2).astype(float)
    gammas = np.tile([gamma_of(s) for s in SIGMA_RELS], steps // every)
    factors = torch.from_numpy(coefficients(times, gammas, end, gamma_of(sigma_rel)))
    stored = torch.stack([profile(steps, g, int(t)) for t, g in zip(times, gammas, strict=True)])
    made, wanted = factors @ stored, profile(steps, gamma_of(sigma_rel), end)
    assert (made - wanted).norm() < 0.02 * wanted.norm()
    points = walk(steps)
    nearest = min((row @ points - wanted @ points).norm() for row in stored)
    assert (made @ points - wanted @ points).norm() < 0.05 * nearest


def test_posthoc_gives_the_average_that_was_tracked(tmp_path):
    config = TrainConfig(
        steps=32, batch_size=2, lr=3e-3, warmup=0, posthoc_every=2, save_every=0, ema=0.5
    )
    torch.manual_seed(0)
    network = UNet(
        UNetConfig(
            image_size=32,
            in_channels=1,
            channels=4,
            channel_mult=(1, 1),
            norm_groups=2,
            num_res_blocks=1,
            attention_resolutions=(),
        )
    )
    run = Trainer(network, NoiseSchedule.cosine(100), fashion_mnist(SAMPLE), config, tmp_path)
    tracked = Averages(list(run.weights.values()), (), (0.08,))
    update = run.averages.update
    run.averages.update = lambda step: (update(step), tracked.update(step))
    run.fit(progress=False)

    model, stored = posthoc(tmp_path, 0.08), posthoc(tmp_path, 0.1)
    expected = torch.cat([x.flatten() for x in tracked.values["power.0.08"]])
    moved = run.averages.values["power.0.1"]
    error = torch.cat([p.flatten() for p in model.parameters()]) - expected
    nearest = torch.cat([x.flatten() for x in moved]) - expected
    assert error.norm() < 0.1 * nearest.norm()
    # one that was stored comes back as it is, in float16
    kept = load(tmp_path / "snapshots" / "000000032-0.1.safetensors")
    for a, b, c in zip(stored.parameters(), moved, kept.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-7)
    assert model.schedule is not None and not model.training
    made = json.loads((tmp_path / "snapshots" / "000000032-0.1.json").read_text())["training"]
    assert (made["step"], made["sigma_rel"]) == (32, 0.1)

    with pytest.raises(ValueError, match=r"step=33: must be 1 \.\. 32"):
        posthoc(tmp_path, 0.08, step=33)
    with pytest.raises(FileNotFoundError, match="posthoc_every"):
        posthoc(tmp_path / "none", 0.08)
