"""The variational bound: losses, gradients and bits per dimension against a textbook."""

import math

import loss_oracles
import numpy as np
import pytest
import torch
from torch.distributions import Normal

from fastdiff import DiffusionLoss, NoiseSchedule, UNet, UNetConfig, ops, optimize
from fastdiff.losses import WEIGHTINGS, bits_per_dim
from fastdiff.losses.bound import log_likelihood, prior

SCHEDULES = {"linear": NoiseSchedule.linear(100), "cosine": NoiseSchedule.cosine(50)}
PREDICTIONS = ("eps", "x0", "v", "score")
SHAPE = (2, 3, 4)


def at(t, column):
    return torch.from_numpy(column.copy())[t].view(-1, *[1] * len(SHAPE))


def drawn(schedule, prediction, batch=12):
    """Data with pixels at both ends, t with 0 and T - 1, noise, and a model's plausible answer."""
    generator = torch.Generator().manual_seed(0)

    def normal():
        return torch.randn(batch, *SHAPE, generator=generator)

    x0 = ((normal().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    t = torch.linspace(0, len(schedule) - 1, batch).long()
    t[1] = 0
    noise = normal()
    columns = schedule.noising_table(prediction)
    # off by about 0.01 in x0 near the data, and by 0.3 far from it
    off = 0.3 * np.minimum(schedule.sigma, 1) * normal().numpy()[:1].std()
    target = at(t, columns[:, 2]) * x0 + at(t, columns[:, 3]) * noise
    pm = loss_pm(schedule, prediction)
    output = target + at(t, off / pm) * normal()
    return x0, t, noise, output.float(), torch.tanh(normal())


def loss_pm(schedule, prediction):
    alpha, sigma = schedule.alpha, schedule.sigma
    by_name = {"eps": sigma / alpha, "x0": 1 + 0 * alpha, "v": sigma, "score": sigma**2 / alpha}
    return by_name[prediction]


def textbook(schedule, prediction, x0, t, noise, output, v, **how):
    """L_t of each sample, in float64."""
    x0, noise, output, v = (x.double() for x in (x0, noise, output, v))
    terms = []
    for i, k in enumerate(t.tolist()):
        one = slice(i, i + 1)
        abar = float(schedule.alphas_cumprod[k])
        x_t = abar**0.5 * x0[one] + (1 - abar) ** 0.5 * noise[one]
        given = schedule, k, x0[one], x_t, output[one], v[one], prediction
        terms.append(loss_oracles.bound_term(*given, **how))
    return torch.cat(terms)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_weights_are_the_papers(prediction, name):
    schedule = SCHEDULES[name]
    for weighting in set(WEIGHTINGS) - {"hybrid"}:
        expected = [
            loss_oracles.weight(schedule, t, prediction, weighting) for t in range(len(schedule))
        ]
        if weighting == "vlb":  # Ho's form of L_0's weight, written for beta~_1
            tilde, pm = loss_oracles.at(schedule, 0)[3], loss_pm(schedule, prediction)[0]
            expected[0] = len(schedule) / math.log(2) * pm**2 / (2 * tilde)
        got = DiffusionLoss(schedule, prediction, weighting).weights
        np.testing.assert_allclose(got, expected, rtol=1e-9, err_msg=weighting)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("weighting", ["hybrid", "vlb"])
def test_losses_and_gradients_with_a_learned_variance(prediction, name, weighting):
    schedule = SCHEDULES[name]
    x0, t, noise, output, v = drawn(schedule, prediction)
    wide = torch.cat([output, v], 1).requires_grad_()
    loss = DiffusionLoss(schedule, prediction, weighting, learned_variance=True)
    losses, sums = loss.with_sums(lambda x, t: wide, x0, t, noise=noise)
    (grad,) = torch.autograd.grad(losses.sum(), wide)

    exact = wide.detach().double().requires_grad_()
    mean, variance = exact.chunk(2, 1)
    columns = schedule.noising_table(prediction)
    target = at(t, columns[:, 2]) * x0.double() + at(t, columns[:, 3]) * noise.double()
    mse = (mean - target).square().flatten(1).mean(1)
    if weighting == "hybrid":  # Nichol & Dhariwal 2021, eq. 16, on a sum over T timesteps
        bound = textbook(schedule, prediction, x0, t, noise, mean.detach(), variance)
        expected = mse + 0.001 * len(schedule) * bound
    else:
        expected = len(schedule) * textbook(schedule, prediction, x0, t, noise, mean, variance)
    (truth,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-4, atol=0)
    for ours, theirs in zip(grad.chunk(2, 1), truth.chunk(2, 1), strict=True):
        size = theirs.abs().flatten(1).amax(1).view(-1, 1, 1, 1)
        # of a float32 score a few digits are left in the error, where noise is most
        assert ((ours - theirs).abs() <= 5e-4 * size + 1e-6 * size.max()).all()
        assert (size > 0).all()
    spread = torch.zeros(len(schedule), dtype=torch.float64).index_add_(0, t, mse.detach())
    torch.testing.assert_close(sums[:, 1].double(), spread, rtol=1e-4, atol=1e-9)


def test_learned_variance_at_its_lower_end_is_the_weighted_error():
    """With var = beta~ all of L_t, t > 0, is Ho's equation 12."""
    schedule = SCHEDULES["cosine"]
    x0, t, noise, output, _ = drawn(schedule, "v")
    wide = torch.cat([output, torch.full_like(output, -1)], 1)
    learned = DiffusionLoss(schedule, "v", "vlb", learned_variance=True)
    fixed = DiffusionLoss(schedule, "v", "vlb")
    losses = learned.per_sample(lambda x, t: wide, x0, t, noise=noise)
    weighted = fixed.per_sample(lambda x, t: output, x0, t, noise=noise)
    torch.testing.assert_close(losses[t > 0], weighted[t > 0], rtol=1e-5, atol=0)


def test_the_extra_channels_are_not_copied():
    schedule, seen = SCHEDULES["cosine"], []
    x0, t, noise, output, v = drawn(schedule, "v")
    wide = torch.cat([output, v], 1)
    op = ops.OPS["weighted_mse"]
    launch = op.launcher("cpu")
    key = next(k for k, value in op._launchers.items() if value is launch)
    try:
        op._launchers[key] = lambda *args: seen.append(args[0]) or launch(*args)
        loss = DiffusionLoss(schedule, "v", "hybrid", learned_variance=True)
        loss(lambda x, t: wide, x0, t, noise=noise)
    finally:
        op._launchers[key] = launch
    assert [x.data_ptr() for x in seen] == [wide.data_ptr()]


@pytest.mark.parametrize("std", [3e-3, 0.02, 0.3])
def test_likelihood_of_a_bin(std):
    values = torch.linspace(-1, 1, 256)
    x, mean = (g.flatten() for g in torch.meshgrid(values, values, indexing="ij"))
    exact = loss_oracles.log_bin(Normal(mean.double(), std), x.double())
    near = ((x - mean).abs() < 6 * std) & exact.isfinite()  # beyond, the oracle has no digits
    got = log_likelihood(x, x - mean, torch.tensor(std))
    assert got.isfinite().all() and near.sum() > 1000
    torch.testing.assert_close(got[near].double(), exact[near], rtol=1e-4, atol=2e-5)
    # all bins together have all of the mass
    total = got.exp().view(256, 256).sum(0)
    torch.testing.assert_close(total, torch.ones(256), rtol=1e-4, atol=0)


@pytest.mark.parametrize("variance", ["small", "large", "learned_range"])
@pytest.mark.parametrize("clip", [None, 0.9])
def test_bits_per_dim_is_the_textbooks_sum(variance, clip):
    schedule = SCHEDULES["cosine"]
    x0 = drawn(schedule, "v", 3)[0]

    def model(x, t):
        wave = torch.sin(3 * x + t.view(-1, 1, 1, 1) / 50)
        return torch.cat([wave, wave.flip(3)], 1) if variance == "learned_range" else wave

    got = bits_per_dim(model, schedule, x0, "v", variance, clip=clip, seed=4, batch_size=2)
    terms, mse = [], []
    for k in range(len(schedule)):
        noise = ops.randn(x0.shape, 4, row=k).double()
        abar, t = float(schedule.alphas_cumprod[k]), torch.full((3,), k)
        x_t = abar**0.5 * x0.double() + (1 - abar) ** 0.5 * noise
        m, v = (model(x_t, t) if variance == "learned_range" else model(x_t, t).repeat(1, 2, 1, 1)
                ).chunk(2, 1)  # fmt: skip
        terms.append(textbook(schedule, "v", x0, t, noise, m, v, variance=variance, clip=clip))
        x = loss_oracles.predicted_x0("v", x_t, m, abar)
        x = x if clip is None else x.clamp(-clip, clip)
        eps = (x_t - abar**0.5 * x) / (1 - abar) ** 0.5
        mse.append([float((x - x0).square().mean()), float((eps - noise).square().mean())])
    terms, (x0_mse, eps_mse) = torch.stack(terms), torch.tensor(mse).double().T
    last = loss_oracles.prior_term(schedule, x0.double())
    torch.testing.assert_close(got.terms, terms.mean(1), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(got.samples, terms.sum(0) + last, rtol=1e-5, atol=0)
    assert got.total == pytest.approx(float(terms.sum(0).mean() + last.mean()), rel=1e-5)
    assert got.prior == pytest.approx(float(last.mean()), rel=1e-6)
    torch.testing.assert_close(got.x0_mse, x0_mse, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(got.mse, eps_mse, rtol=1e-4, atol=1e-8)


def test_conditions_go_with_their_samples():
    schedule, x0 = NoiseSchedule.cosine(8), drawn(SCHEDULES["cosine"], "v", 5)[0]
    seen = []

    def model(x, t, cond):
        seen.append(len(x))
        return torch.sin(x) * cond.view(-1, 1, 1, 1) / 5

    cond = torch.arange(5)
    whole = bits_per_dim(model, schedule, x0, "v", cond=cond, seed=2, progress=False)
    parts = bits_per_dim(model, schedule, x0, "v", cond=cond, seed=2, batch_size=2)
    torch.testing.assert_close(whole.samples, parts.samples, rtol=1e-6, atol=0)
    last = bits_per_dim(model, schedule, x0[3:], "v", cond=cond[3:], seed=2, first_index=3)
    torch.testing.assert_close(whole.samples[3:], last.samples, rtol=1e-6, atol=0)
    assert seen == [5] * 8 + [2] * 16 + [1] * 8 + [2] * 8


def test_networks_in_bfloat16_and_optimized_ones_are_taken():
    """What a network computes in is what it is given; the rest stays float32."""
    config = UNetConfig(image_size=8, in_channels=3, channels=32, channel_mult=(1,),
                        attention_resolutions=(), num_res_blocks=1, norm_groups=8,
                        learned_variance=True)  # fmt: skip
    torch.manual_seed(0)
    model, schedule = UNet(config).eval(), NoiseSchedule.cosine(6)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    x0 = ((torch.rand(2, 3, 8, 8) * 255).round() / 127.5) - 1
    plain, fast = (
        bits_per_dim(network, schedule, x0, "v", "learned_range").total
        for network in (model, optimize(model))
    )
    assert fast == pytest.approx(plain, rel=1e-4)
    half = bits_per_dim(model.to(torch.bfloat16), schedule, x0, "v", "learned_range").total
    assert half != plain and half == pytest.approx(plain, rel=0.05)
    assert bits_per_dim(model, schedule, x0, "v").total > 0  # without the variance's channels


MU, S = 0.1, 0.15


def perfect(schedule, learned):
    """The exact posterior mean of x0 for data N(MU, S^2), and the exact variance of each step."""

    def model(x, t):
        alpha, sigma = at(t, schedule.alpha), at(t, schedule.sigma)
        V = alpha**2 * S**2 + sigma**2
        mean = MU + alpha * S**2 / V * (x - alpha * MU)
        if not learned:
            return mean.float()
        before = at(t, np.append(1.0, schedule.alpha[:-1]))
        beta, spread = at(t, schedule.betas), S**2 * sigma**2 / V
        floor = at(t, np.append(schedule.beta_tilde[1], schedule.beta_tilde[1:]))
        var = at(t, schedule.beta_tilde) + (before * beta / sigma**2) ** 2 * spread
        v = 2 * torch.log(var / floor) / torch.log(beta / floor) - 1
        return torch.cat([mean, v.expand_as(mean)], 1).float()

    return model


def gaussian(count):
    generator = torch.Generator().manual_seed(1)
    return (MU + S * torch.randn(count, *SHAPE, generator=generator)).clamp(-0.99, 0.99)


def test_bits_of_gaussian_data_under_its_perfect_model_are_its_entropy():
    """With every step's exact mean and variance the bound is tight: -log2 of the bin's mass."""
    schedule, x0 = NoiseSchedule.cosine(60), gaussian(6000)
    got = bits_per_dim(
        perfect(schedule, True), schedule, x0, "x0", "learned_range", clip=None, batch_size=3000
    )
    law = Normal(torch.tensor(MU).double(), S)
    mass = law.cdf(x0.double() + 1 / 255) - law.cdf(x0.double() - 1 / 255)
    over = got.samples + torch.log2(mass).flatten(1).mean(1)
    error = float(over.std()) / 6000**0.5
    assert error < 0.004 and abs(float(over.mean())) < 3 * error
    # a fixed variance costs bits, and each in its own way
    fixed = {
        v: bits_per_dim(perfect(schedule, False), schedule, x0[:500], "x0", v, clip=None).total
        for v in ("small", "large")
    }
    assert all(bits > got.total + 0.02 for bits in fixed.values()), fixed


def test_terms_of_gaussian_data_have_their_closed_form():
    """E L_t = (SNR' - SNR) / 2 Var[x0 | x_t] / ln 2, t > 0, with the variance beta~."""
    schedule, x0 = NoiseSchedule.cosine(20), gaussian(4000)
    got = bits_per_dim(perfect(schedule, False), schedule, x0, "x0", clip=None, batch_size=4000)
    snr = (schedule.alpha / schedule.sigma) ** 2
    posterior = S**2 * schedule.sigma**2 / (schedule.alpha**2 * S**2 + schedule.sigma**2)
    expected = (snr[:-1] - snr[1:]) / 2 * posterior[1:] / math.log(2)
    np.testing.assert_allclose(got.terms[1:].numpy(), expected, rtol=0.03)
    np.testing.assert_allclose(got.x0_mse.numpy(), posterior, rtol=0.03)


def test_prior_in_closed_form_also_where_variance_explodes():
    x0 = drawn(SCHEDULES["linear"], "v")[0]
    schedule = NoiseSchedule.linear(20)
    expected = loss_oracles.prior_term(schedule, x0.double())
    torch.testing.assert_close(prior(schedule, x0), expected)
    exploding = NoiseSchedule.geometric(0.01, 50.0, 10)
    by_hand = x0.double().square().flatten(1).mean(1) / (2 * 50.0**2 * math.log(2))
    torch.testing.assert_close(prior(exploding, x0), by_hand)


def test_a_batch_is_the_sum_of_its_parts():
    """Two processes' losses are one's: noise and t follow the position in the whole batch."""
    x0, loss = drawn(SCHEDULES["cosine"], "v")[0], DiffusionLoss(SCHEDULES["cosine"], "v")
    whole = loss.per_sample(lambda x, t: torch.sin(x), x0, seed=3, row=9)
    parts = [
        loss.per_sample(lambda x, t: torch.sin(x), x0[k : k + 6], seed=3, row=9, first_index=k)
        for k in (0, 6)
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, loss.per_sample(lambda x, t: torch.sin(x), x0, seed=3, row=8))


def test_bad_input_is_refused():
    schedule, x0 = SCHEDULES["cosine"], torch.zeros(2, *SHAPE)
    with pytest.raises(ValueError, match="weighting='hybrid': needs learned_variance=True"):
        DiffusionLoss(schedule, "v", "hybrid")
    with pytest.raises(ValueError, match="weighting='simple' would leave the variance unlearnt"):
        DiffusionLoss(schedule, "v", learned_variance=True)
    loss = DiffusionLoss(schedule, "v", "hybrid", learned_variance=True)
    with pytest.raises(ValueError, match=r"model output of shape \(2, 2, 3, 4\): must be \(2, 4"):
        loss(lambda x, t: x, x0)
    for how, message in [
        ({"variance": "learned"}, "variance='learned': must be one of 'small'"),
        ({"prediction": "edm"}, "prediction='edm'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"clip": 0.0}, "clip=0.0: must be positive"),
        ({"cond": torch.zeros(3)}, "cond: has batch 3, must be 2"),
        ({"variance": "learned_range"}, "2 channels, variance='learned_range' needs 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            bits_per_dim(lambda x, t: x, schedule, x0, **how)
    with pytest.raises(ValueError, match=r"x0: spans 0.0 to 255.0"):
        bits_per_dim(lambda x, t: x, schedule, torch.tensor([[0.0, 255.0]]))
    with pytest.raises(TypeError, match="x0: has dtype uint8"):
        bits_per_dim(lambda x, t: x, schedule, torch.zeros(1, 2, dtype=torch.uint8))
