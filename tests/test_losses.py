"""Losses against closed forms."""

import re

import numpy as np
import pytest
import torch

from fastdiff.losses import MIN_SNR_GAMMA, WEIGHTINGS, DiffusionLoss
from fastdiff.schedule import NoiseSchedule

COSINE = NoiseSchedule.cosine(1000)


def at(t, column):
    return torch.from_numpy(column.copy()).float()[t].view(-1, 1, 1, 1)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
def test_zero_for_a_model_that_knows_the_data(prediction):
    x0 = torch.full((64, 1, 4, 4), 0.3)

    def oracle(x_t, t):
        alpha, sigma = at(t, COSINE.alpha), at(t, COSINE.sigma)
        z = (x_t - alpha * 0.3) / sigma
        return {
            "eps": z,
            "x0": torch.full_like(z, 0.3),
            "v": alpha * z - sigma * 0.3,
            "score": -z / sigma,
        }[prediction]

    t = torch.arange(10, 650, 10)
    losses = DiffusionLoss(COSINE, prediction).per_sample(oracle, x0, t)
    scale = at(t, 1 / COSINE.sigma).flatten() ** (4 if prediction == "score" else 2)
    assert (losses < 1e-9 * scale).all()


def test_of_standard_normal_data_without_a_model():
    # v = alpha z - sigma x0 has unit variance at every t, and is independent of x_t
    torch.manual_seed(0)
    loss = DiffusionLoss(COSINE, "v").per_sample(
        lambda x, t: torch.zeros_like(x), torch.randn(2000, 1, 16, 16)
    )
    assert loss.mean() == pytest.approx(1.0, abs=4 * 2**0.5 / (2000 * 256) ** 0.5)
    assert loss.shape == (2000,) and loss.dtype == torch.float32


def test_timesteps_are_uniform_over_the_whole_schedule():
    seen = []
    torch.manual_seed(0)
    schedule = NoiseSchedule.cosine(20)
    DiffusionLoss(schedule, "v")(
        lambda x, t: seen.append(t) or torch.zeros_like(x), torch.zeros(20_000, 1)
    )
    counts = torch.cat(seen).bincount(minlength=20).double()
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-squared, 19 degrees, p = 0.001


@pytest.mark.parametrize(
    ("prediction", "in_its_terms"),
    [
        ("x0", lambda snr: 1.0),
        ("eps", lambda snr: snr),
        ("v", lambda snr: snr + 1),
        ("score", lambda snr: snr * (snr + 1)),
    ],
)
def test_min_snr_is_hangs_in_each_predictions_terms(prediction, in_its_terms):
    snr = COSINE.alphas_cumprod / (1 - COSINE.alphas_cumprod)
    loss = DiffusionLoss(COSINE, prediction, "min_snr")
    expected = np.minimum(snr, MIN_SNR_GAMMA) / in_its_terms(snr)
    assert loss.weights.dtype == np.float64
    np.testing.assert_allclose(loss.weights, expected, rtol=1e-9)
    t, x0 = torch.tensor([0, 500, 999]), torch.zeros(3, 1, 2, 2)
    torch.manual_seed(0)
    weighted = loss.per_sample(lambda x, t: torch.zeros_like(x), x0, t)
    torch.manual_seed(0)
    plain = DiffusionLoss(COSINE, prediction).per_sample(lambda x, t: torch.zeros_like(x), x0, t)
    torch.testing.assert_close(weighted, plain * torch.from_numpy(expected).float()[t])


def test_gradient_is_that_of_the_mean_square():
    weight = torch.tensor(0.5, requires_grad=True)
    torch.manual_seed(0)
    x0, t = torch.randn(8, 1, 4, 4), torch.full((8,), 300)
    pairs = []
    loss = DiffusionLoss(COSINE, "x0")(lambda x, t: pairs.append(x) or weight * x, x0, t)
    loss.backward()
    expected = (2 * pairs[0] * (0.5 * pairs[0] - x0)).mean()
    torch.testing.assert_close(weight.grad, expected)


def test_condition_is_passed_on_and_wrapped_outputs_unwrapped():
    class Output:
        def __init__(self, sample):
            self.sample = sample

    given = []
    DiffusionLoss(COSINE)(
        lambda x, t, cond: given.append(cond) or Output(x), torch.zeros(2, 1), cond="labels"
    )
    assert given == ["labels"]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="prediction='noise': must be one of 'eps'"):
        DiffusionLoss(COSINE, "noise")
    names = ", ".join(map(repr, WEIGHTINGS))
    with pytest.raises(ValueError, match=re.escape(f"weighting='snr': must be one of {names}")):
        DiffusionLoss(COSINE, weighting="snr")
    with pytest.raises(ValueError, match="alpha = 0"):
        DiffusionLoss(COSINE.zero_terminal_snr(), "eps")
    with pytest.raises(ValueError, match=r"model output of shape \(2, 2, 4, 4\)"):
        DiffusionLoss(COSINE)(lambda x, t: torch.cat((x, x), 1), torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="t: spans 0 to 1000"):
        DiffusionLoss(COSINE)(lambda x, t: x, torch.zeros(2, 1), torch.tensor([0, 1000]))
