"""Samplers against data for which the perfect model, and so the right answer, is known.

Gaussian data N(MU, S^2) has the posterior mean E[x0 | x] = MU + alpha S^2 / V (x - alpha MU) with
V = alpha^2 S^2 + sigma^2; every row is then affine in x, and means and variances propagate exactly.
A Gaussian mixture has a curved flow, which a fine Runge-Kutta integration gives.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from fastdiff import tables
from fastdiff.schedule import NoiseSchedule
from fastdiff.table import Table

MU, S = 0.7, 0.4
COSINE = NoiseSchedule.cosine(5120)


def gaussian_eps(schedule: NoiseSchedule, mu: float = MU, s: float = S) -> oracles.Model:
    def eps(x: Tensor, t: float) -> Tensor:
        alpha, sigma = float(schedule.alpha[int(t)]), float(schedule.sigma[int(t)])
        return sigma * (x - alpha * mu) / (alpha**2 * s**2 + sigma**2)

    return eps


def affine_rows(table: Table, model: oracles.Model) -> list[tuple[float, float, float]]:
    """(gain, offset, noise) of every row, x' = gain x + offset + noise z, as the step computes."""
    columns, rows = torch.from_numpy(table.numpy()), []
    x = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
    z = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
    for i in range(len(table)):
        m, v = model(table.c_in[i] * x, float(table.t[i])), None
        if table.learned_variance:
            m, v = m.chunk(2, 1)
        out = oracles.reference(x, m, columns, torch.tensor(i), v=v, z=z)[0]
        zero, one, noise = out.flatten().tolist()
        rows.append((one - zero, zero, noise - zero))
    return rows


def law(table: Table, model: oracles.Model, mean: float, var: float) -> list[tuple[float, float]]:
    """Mean and variance of the state after every row, from those before the first."""
    result = []
    for gain, offset, noise in affine_rows(table, model):
        mean, var = gain * mean + offset, gain**2 * var + noise**2
        result.append((mean, var))
    return result


def slopes(errors: list[float]) -> np.ndarray:
    """log2 of the error's fall at each doubling of the steps: the order of convergence."""
    return np.log2(np.array(errors[:-1]) / np.array(errors[1:]))


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_ddim_on_gaussian_data_is_a_product_of_factors(steps: int) -> None:
    """(x' - alpha' MU) = (alpha alpha' S^2 + sigma sigma') / V (x - alpha MU), row after row."""
    timesteps = COSINE.timesteps(steps, "trailing")
    alpha, sigma = COSINE.alpha[timesteps], COSINE.sigma[timesteps]
    alpha_next, sigma_next = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    V = alpha**2 * S**2 + sigma**2
    factor = np.prod((alpha * alpha_next * S**2 + sigma * sigma_next) / V)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    got = oracles.execute(tables.ddim(COSINE, timesteps), x, gaussian_eps(COSINE))
    torch.testing.assert_close(got, MU + factor * (x - alpha[0] * MU), rtol=1e-11, atol=1e-11)


def test_ddim_converges_to_the_flow_map_at_first_order() -> None:
    """The flow keeps (x - alpha MU) / sqrt(V): x_0 = MU + S (x_T - alpha_T MU) / sqrt(V_T)."""
    alpha, sigma = COSINE.alpha[-1], COSINE.sigma[-1]
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    exact = MU + S * (x - alpha * MU) / np.sqrt(alpha**2 * S**2 + sigma**2)
    errors = []
    for steps in (20, 40, 80, 160, 320):
        table = tables.ddim(COSINE, COSINE.timesteps(steps, "trailing"))
        errors.append(float((oracles.execute(table, x, gaussian_eps(COSINE)) - exact).abs().max()))
    assert np.all((slopes(errors) > 0.9) & (slopes(errors) < 1.1)), errors
    assert errors[-1] < 0.01


@pytest.mark.parametrize(("variance", "s"), [("large", 1.0), ("small", 0.0)])
def test_ddpm_is_exact_where_its_variance_is_optimal(variance: str, s: float) -> None:
    """beta is the reverse variance of N(0, 1) data, beta~ that of a single point (DDPM, 3.2)."""
    mu = 0.0 if s else MU
    timesteps = COSINE.timesteps(10, "trailing")
    table = tables.ddpm(COSINE, timesteps, variance=variance)
    alpha, sigma = COSINE.alpha[timesteps], COSINE.sigma[timesteps]
    mean, var = alpha * mu, alpha**2 * s**2 + sigma**2
    got = law(table, gaussian_eps(COSINE, mu, s), mean[0], var[0])
    np.testing.assert_allclose(np.array(got)[:-1], np.stack([mean, var], 1)[1:], atol=1e-11)


def test_learned_variance_is_exact_for_gaussian_data() -> None:
    """Var[x' | x] = beta~ + (alpha' beta / sigma^2)^2 S^2 sigma^2 / V lies in the learned range,
    and with it ten steps already have the exact law at every level."""
    timesteps = COSINE.timesteps(10, "trailing")
    alpha, sigma = COSINE.alpha[timesteps], COSINE.sigma[timesteps]
    fractions = {}
    for i, t in enumerate(timesteps[:-1].tolist()):
        beta = 1 - (alpha[i] / alpha[i + 1]) ** 2
        tilde = beta * sigma[i + 1] ** 2 / sigma[i] ** 2
        spread = S**2 * sigma[i] ** 2 / (alpha[i] ** 2 * S**2 + sigma[i] ** 2)
        var = tilde + (alpha[i + 1] * beta / sigma[i] ** 2) ** 2 * spread
        fractions[t] = float(np.log(var / tilde) / np.log(beta / tilde))
    assert all(0 < fraction < 1 for fraction in fractions.values())

    def model(x: Tensor, t: float) -> Tensor:
        v = 2 * fractions.get(int(t), 0.0) - 1
        return torch.cat([gaussian_eps(COSINE)(x, t), torch.full_like(x, v)], 1)

    table = tables.ddpm(COSINE, timesteps, variance="learned_range")
    V = alpha**2 * S**2 + sigma**2
    got = np.array(law(table, model, alpha[0] * MU, V[0]))
    np.testing.assert_allclose(got[:-1, 0], alpha[1:] * MU, atol=1e-11)
    np.testing.assert_allclose(got[:-1, 1], V[1:], atol=1e-11)
    last = S**2 * alpha[-1] / V[-1]  # no noise: the posterior mean's own spread is what is left
    np.testing.assert_allclose(got[-1], (MU, last**2 * V[-1]), atol=1e-11)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_reaches_the_data_as_steps_grow(variance: str) -> None:
    errors = []
    for steps in (40, 80, 160, 320, 640):
        table = tables.ddpm(COSINE, COSINE.timesteps(steps, "trailing"), variance=variance)
        mean, var = law(table, gaussian_eps(COSINE), 0.0, 1.0)[-1]
        assert mean == pytest.approx(MU, abs=2 / steps)
        errors.append(abs(var - S**2))
    assert np.all(slopes(errors) > 0.8), errors
    assert errors[-1] < 0.02 * S**2


def test_ddpm_samples_have_the_law_that_the_recursion_gives() -> None:
    """20,000 chains: mean and variance within five standard errors."""
    generator = torch.Generator().manual_seed(0)
    table = tables.ddpm(COSINE, COSINE.timesteps(10, "trailing"))
    mean, var = law(table, gaussian_eps(COSINE), 0.0, 1.0)[-1]
    draws = torch.randn(10, 20_000, 1, generator=generator, dtype=torch.float64)
    got = oracles.execute(table, draws[0], gaussian_eps(COSINE), list(draws[1:]))
    assert abs(float(got.mean()) - mean) < 5 * (var / 20_000) ** 0.5
    assert abs(float(got.var()) - var) < 5 * var * (2 / 20_000) ** 0.5


@pytest.mark.filterwarnings("ignore:step_size=0.0006")
@pytest.mark.parametrize(("step_size", "levels"), [(2e-5, 6), (1e-4, 6), (6e-4, 1)])
def test_langevin_settles_at_the_law_of_its_discretisation(step_size: float, levels: int) -> None:
    """x' = x - u (x - MU) / V + sqrt(2 u) z has the stationary variance V / (1 - u / (2 V))."""
    schedule = NoiseSchedule.geometric(0.01, 0.5, 6)
    timesteps = np.arange(levels)[::-1]
    table = tables.langevin(
        schedule, timesteps, prediction="eps", inner=400, step_size=step_size, denoise=False
    )
    level, data = schedule.sigma[timesteps[0]], 0.02  # narrow data, so that every level settles
    got = np.array(law(table, gaussian_eps(schedule, MU, data), 0.0, level**2))
    for sigma, (mean, var) in zip(schedule.sigma[timesteps], got[399::400], strict=True):
        V, u = data**2 + sigma**2, step_size * (sigma / schedule.sigma[0]) ** 2
        assert mean == pytest.approx(MU, abs=1e-6)
        assert var == pytest.approx(V / (1 - u / (2 * V)), rel=1e-6)


MEANS = torch.tensor([-1.2, 0.3, 1.5], dtype=torch.float64)
SPREADS = torch.tensor([0.2, 0.35, 0.15], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)


def mixture_eps(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """-sigma times the score of sum_i w_i N(alpha mu_i, alpha^2 s_i^2 + sigma^2)."""
    V, d = alpha**2 * SPREADS**2 + sigma**2, x[..., None] - alpha * MEANS
    share = torch.softmax(WEIGHTS.log() - V.log() / 2 - d**2 / (2 * V), -1)
    return sigma * (share * d / V).sum(-1)


def mixture_model(schedule: NoiseSchedule) -> oracles.Model:
    return lambda x, t: mixture_eps(x, float(schedule.alpha[int(t)]), float(schedule.sigma[int(t)]))


def flow(x: Tensor, u: float, steps: int = 500) -> Tensor:
    """dx/du = eps from noise level u to the data, alpha = 1: classic Runge-Kutta in arcsinh u."""
    h = -np.arcsinh(u) / steps

    def f(x: Tensor, w: float) -> Tensor:
        return np.cosh(w) * mixture_eps(x, 1.0, np.sinh(w))

    for i in range(steps):
        w = -h * (steps - i)
        k1 = f(x, w)
        k2 = f(x + h / 2 * k1, w + h / 2)
        k3 = f(x + h / 2 * k2, w + h / 2)
        k4 = f(x + h * k3, w + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


START = 80 * torch.linspace(-2, 2, 41, dtype=torch.float64)


@pytest.fixture(scope="module")
def landed() -> Tensor:
    fine, coarse = flow(START, 80.0), flow(START, 80.0, 250)
    assert (fine - coarse).abs().max() < 1e-5  # well under every error measured against it
    return fine


@pytest.mark.parametrize(
    ("build", "order"), [(tables.ddim, 1), (tables.dpmpp_2m, 2), (tables.heun, 2)]
)
def test_order_of_convergence_on_a_mixture(
    build: Callable[..., Table], order: int, landed: Tensor
) -> None:
    errors = []
    for n in (16, 32, 64, 128):
        schedule = NoiseSchedule.karras(0.002, 80.0, n)
        table = build(schedule, schedule.timesteps(n))
        assert table.init == pytest.approx(80)
        got = oracles.execute(table, START, mixture_model(schedule))
        errors.append(float((got - landed).abs().mean()))
    fall = slopes(errors)
    assert np.all((fall > order - 0.1) & (fall < order + 0.5)), (errors, fall)


def test_inverting_and_sampling_comes_back_at_first_order() -> None:
    schedule = NoiseSchedule.linear(1000)
    model, x0 = mixture_model(schedule), torch.linspace(-1.5, 1.8, 31, dtype=torch.float64)
    errors = []
    for steps in (50, 100, 200):
        timesteps = schedule.timesteps(steps)
        x_T = oracles.execute(tables.ddim_inverse(schedule, timesteps), x0, model)
        assert 0.5 < float(x_T.std()) < 1.5
        back = oracles.execute(tables.ddim(schedule, timesteps), x_T, model)
        errors.append(float((back - x0).abs().mean()))
    assert errors[-1] < 0.01
    assert np.all(slopes(errors) > 0.85), errors


def test_heun_of_a_variance_preserving_schedule_solves_the_same_flow() -> None:
    """x / alpha of the cosine schedule follows the flow of the variance-exploding one."""
    timesteps = COSINE.timesteps(128)
    u = float(COSINE.sigma[timesteps[0]] / COSINE.alpha[timesteps[0]])
    assert u > 40
    x = torch.linspace(-2, 2, 11, dtype=torch.float64) * u
    got = oracles.execute(tables.heun(COSINE, timesteps), x, mixture_model(COSINE))
    assert (got - flow(x, u)).abs().mean() < 2e-3
