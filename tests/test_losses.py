"""Losses against closed forms."""

import re

import numpy as np
import pytest
import torch

from fastdiff import ops
from fastdiff.losses import (
    MIN_SNR_GAMMA,
    WEIGHTINGS,
    DiffusionLoss,
    denoising_score_matching,
)
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


def test_snr_is_diffusers():
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    theirs = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    snr = compute_snr(theirs, torch.arange(1000)).double().numpy()
    ours = NoiseSchedule.from_betas(theirs.betas.double().numpy())
    # an error in eps weighs 1, which is SNR for one in x0; of alphabar float32 has few digits
    np.testing.assert_allclose(DiffusionLoss(ours, "x0", "snr").weights, snr, rtol=2e-3)
    v = DiffusionLoss(ours, "v", "min_snr").weights
    np.testing.assert_allclose(v, np.minimum(snr, 5) / (snr + 1), rtol=2e-3)


def test_of_a_preconditioned_network_is_karras():
    """Karras et al. 2022, equation 8 with Table 1, in float64."""
    schedule, d = NoiseSchedule.karras(0.01, 20.0, 12), 0.5
    generator = torch.Generator().manual_seed(0)
    x0, z = (torch.randn(12, 3, 4, generator=generator) for _ in range(2))
    t = torch.arange(12)

    def network(x, c_noise):
        return torch.sin(2 * x) + c_noise.view(-1, 1, 1) ** 2

    sigma = torch.from_numpy(schedule.sigma.copy()).view(-1, 1, 1)
    y = x0.double() + sigma * z.double()
    skip, out = d**2 / (sigma**2 + d**2), sigma * d / (sigma**2 + d**2).sqrt()
    told = (sigma.log() / 4).flatten()
    denoised = skip * y + out * network(y / (sigma**2 + d**2).sqrt(), told)
    weight = (sigma**2 + d**2) / (sigma * d) ** 2
    expected = (weight * (denoised - x0.double()).square()).flatten(1).mean(1)
    losses = DiffusionLoss(schedule, "edm").per_sample(network, x0, t, noise=z)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_of_a_part_is_that_of_the_whole_batch(dtype):
    x0, t = torch.linspace(-1, 1, 7 * 15).view(7, 15).to(dtype), torch.arange(7) * 100
    whole = ops.noising(x0, t, COSINE, "v", seed=3, row=5)
    for k in (1, 4):
        part = ops.noising(x0[k:], t[k:], COSINE, "v", seed=3, row=5, first_index=k)
        assert all(torch.equal(a, b[k:]) for a, b in zip(part, whole, strict=True))


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
    DiffusionLoss(COSINE, "v")(
        lambda x, t, cond: given.append(cond) or Output(x), torch.zeros(2, 1), cond="labels"
    )
    assert given == ["labels"]


def test_what_inference_has_made_serves_training():
    schedule, x0 = NoiseSchedule.cosine(30), torch.rand(3, 1, 4, 4)
    weight, t = torch.ones((), requires_grad=True), torch.arange(3)

    def model(x, t):
        return weight * x

    for run in (
        lambda: DiffusionLoss(schedule, "edm")(model, x0, t),
        lambda: denoising_score_matching(model, x0, schedule, t).mean(),
        lambda: ops.noising(x0 * weight, t, schedule, seed=1)[0].square().mean(),
    ):
        with torch.inference_mode():
            run()
        run().backward()
    with torch.inference_mode():
        losses = [DiffusionLoss(schedule, "v", "min_snr"), DiffusionLoss(schedule, "edm")]
        losses.append(DiffusionLoss(schedule, "v", "vlb"))
    for loss in losses:
        loss(model, x0, t).backward()


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="prediction"):
        DiffusionLoss(COSINE)
    with pytest.raises(ValueError, match="prediction='noise': must be one of 'eps'"):
        DiffusionLoss(COSINE, "noise")
    names = ", ".join(map(repr, WEIGHTINGS))
    with pytest.raises(ValueError, match=re.escape(f"weighting='none': must be one of {names}")):
        DiffusionLoss(COSINE, "v", "none")
    with pytest.raises(ValueError, match="alpha = 0"):
        DiffusionLoss(COSINE.zero_terminal_snr(), "eps")
    with pytest.raises(ValueError, match=r"model output of shape \(2, 2, 4, 4\)"):
        DiffusionLoss(COSINE, "v")(lambda x, t: torch.cat((x, x), 1), torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="t: spans 0 to 1000"):
        DiffusionLoss(COSINE, "v")(lambda x, t: x, torch.zeros(2, 1), torch.tensor([0, 1000]))


@pytest.mark.parametrize("weighting", ["vlb", "hybrid"])
def test_the_first_timestep_leaves_the_gradients_of_the_noisiest_alone(weighting):
    """An error in eps is thousands of times as large in x0 at t = T - 1, where t = 0 has a tail."""
    schedule = NoiseSchedule.cosine(1000)
    loss = DiffusionLoss(schedule, "eps", weighting, learned_variance=True)
    x0, t = torch.rand(2, 1, 8, 8) * 2 - 1, torch.tensor([0, 999])
    noise = torch.randn(2, 1, 8, 8)
    output = 4 * torch.randn(2, 2, 8, 8)

    def gradient(part):
        given = output[part].clone().requires_grad_()
        losses, _ = loss.with_sums(lambda *_: given, x0[part], t[part], noise=noise[part])
        losses.sum().backward()
        return given.grad

    together = gradient(slice(0, 2))
    assert together.isfinite().all()
    torch.testing.assert_close(together, torch.cat([gradient(slice(k, k + 1)) for k in (0, 1)]))
