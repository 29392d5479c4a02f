"""Every builder's table, executed in float64, equals the paper's loop to 1e-12."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from fastdiff import tables
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule

SHAPE = (2, 3, 4)
LINEAR = NoiseSchedule.linear(1000)
COSINE = NoiseSchedule.cosine(300)
KARRAS = NoiseSchedule.karras(n=9)
STEPS = [
    {"steps": 13, "spacing": "leading"},
    {"steps": 13, "spacing": "trailing"},
    {"steps": 13, "spacing": "linspace"},
    {"steps": 13, "spacing": "quadratic"},
    {"spacing": "10,5,3"},
    {"spacing": [290, 111, 7]},
    {"steps": 1, "spacing": "trailing"},
]
PREDICTIONS = ("eps", "x0", "v", "score")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed)).double()


def model(x: Tensor, t: float) -> Tensor:
    """Nonlinear in x, mixing elements, dependent on t, of the size of a network's output."""
    return torch.tanh(0.6 * x + 0.3 * x.roll(1, -1) - 0.002 * t) + 0.1 * torch.sin(2 * x)


def unconditional(x: Tensor, t: float) -> Tensor:
    return torch.cos(x + 0.001 * t)


def with_range(x: Tensor, t: float) -> Tensor:
    return torch.cat([model(x, t), torch.sin(3 * x - 0.01 * t)], 1)


def with_log_variance(x: Tensor, t: float) -> Tensor:
    return torch.cat([model(x, t), torch.sin(3 * x - 0.01 * t) - 5], 1)


NETWORKS = {
    "small": model,
    "large": model,
    "learned_range": with_range,
    "learned": with_log_variance,
}


def gradient(x: Tensor, t: float) -> Tensor:
    return torch.sin(x) - 0.5


def noises_for(table: tables.Table) -> list[Tensor]:
    return [draw(100 + i) for i in range(int((table.s != 0).sum()))]


def levels(schedule: NoiseSchedule, timesteps: np.ndarray) -> list[float]:
    return schedule.alphas_cumprod[timesteps].tolist()


def assert_same(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert got.shape == expected.shape
    assert torch.isfinite(expected).all()
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", STEPS, ids=str)
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=repr)
def test_ddim(schedule: NoiseSchedule, spacing: dict, prediction: str) -> None:
    timesteps = schedule.timesteps(**spacing)
    for eta, clip, keep_eps in itertools.product((0.0, 0.5, 1.0), (None, 0.8), (False, True)):
        options = {"eta": eta, "prediction": prediction, "clip": clip, "keep_eps": keep_eps}
        table = tables.ddim(schedule, timesteps, **options)
        assert table.noisy == (eta > 0 and len(table) > 1)
        assert table.clipped == (clip is not None)
        noises, x = noises_for(table), draw(1)
        expected = oracles.ddim(
            x, model, timesteps.tolist(), levels(schedule, timesteps), noises, **options
        )
        assert_same(oracles.execute(table, x, model, noises), expected)


@pytest.mark.parametrize("variance", NETWORKS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", STEPS[:-1], ids=str)
def test_ddpm(spacing: dict, prediction: str, variance: str) -> None:
    timesteps = COSINE.timesteps(**spacing)
    network = NETWORKS[variance]
    for clip in (None, 0.8):
        options = {"prediction": prediction, "variance": variance, "clip": clip}
        table = tables.ddpm(COSINE, timesteps, **options)
        assert table.noisy and not table.s[-1]
        assert table.learned_variance == variance.startswith("learned")
        noises, x = noises_for(table), draw(1)
        expected = oracles.ddpm(
            x, network, timesteps.tolist(), levels(COSINE, timesteps), noises, **options
        )
        assert_same(oracles.execute(table, x, network, noises), expected)


def test_ddpm_is_algorithm_2_to_the_letter() -> None:
    timesteps = LINEAR.timesteps(1000)
    table = tables.ddpm(LINEAR, timesteps, variance="large")
    noises, x = noises_for(table), draw(1)
    expected = oracles.ddpm_algorithm_2(
        x, model, timesteps.tolist(), levels(LINEAR, timesteps), noises
    )
    assert_same(oracles.execute(table, x, model, noises), expected)


def test_ddim_with_eta_1_is_ddpm_with_the_small_variance() -> None:
    timesteps = COSINE.timesteps(25, "trailing")
    ddim = tables.ddim(COSINE, timesteps, eta=1)
    ddpm = tables.ddpm(COSINE, timesteps)
    for column in ("px", "pm", "a", "b", "s"):
        np.testing.assert_allclose(getattr(ddim, column), getattr(ddpm, column), atol=1e-12)


@pytest.mark.parametrize("variance", NETWORKS)
def test_classifier_guidance_shifts_the_mean_of_ddpm(variance: str) -> None:
    timesteps = COSINE.timesteps(12)
    network = NETWORKS[variance]
    options = {"variance": variance, "clip": 1.0}
    table = tables.ddpm(COSINE, timesteps, classifier_scale=2.5, **options)
    assert table.classifier
    noises, x = noises_for(table), draw(1)
    expected = oracles.ddpm(
        x,
        network,
        timesteps.tolist(),
        levels(COSINE, timesteps),
        noises,
        gradient=gradient,
        scale=2.5,
        **options,
    )
    assert_same(oracles.execute(table, x, network, noises, gradient=gradient), expected)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_classifier_guidance_shifts_the_score_of_ddim(prediction: str, eta: float) -> None:
    timesteps = COSINE.timesteps(12)
    options = {"eta": eta, "prediction": prediction, "clip": 0.7}
    table = tables.ddim(COSINE, timesteps, classifier_scale=2.5, **options)
    noises, x = noises_for(table), draw(1)
    expected = oracles.ddim(
        x,
        model,
        timesteps.tolist(),
        levels(COSINE, timesteps),
        noises,
        gradient=gradient,
        scale=2.5,
        **options,
    )
    assert_same(oracles.execute(table, x, model, noises, gradient=gradient), expected)


@pytest.mark.parametrize("interval", [None, (0.4, 5.0)])
def test_guidance_in_an_interval_of_noise_levels(interval: tuple | None) -> None:
    timesteps = COSINE.timesteps(20)
    table = tables.ddim(COSINE, timesteps, clip=1.0).with_guidance(1.5, interval)
    level = dict(zip(timesteps.tolist(), (COSINE.sigma / COSINE.alpha)[timesteps], strict=True))
    low, high = interval or (-1.0, np.inf)

    def weight(t: float) -> float:
        return 1.5 if low < level[t] <= high else 0.0

    assert 0 < sum(weight(t) > 0 for t in level) <= 20
    expected = oracles.ddim(
        draw(1),
        oracles.guided(model, unconditional, weight),
        timesteps.tolist(),
        levels(COSINE, timesteps),
        clip=1.0,
    )
    got = oracles.execute(table, draw(1), model, unconditional=unconditional)
    assert_same(got, expected)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", STEPS, ids=str)
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=repr)
def test_dpmpp_2m(schedule: NoiseSchedule, spacing: dict, prediction: str, eta: float) -> None:
    timesteps = schedule.timesteps(**spacing)
    for clip in (None, 0.8):

        def x0_model(x: Tensor, t: int, clip: float | None = clip) -> Tensor:
            abar = float(schedule.alphas_cumprod[t])
            x0 = oracles.predicted_x0(prediction, x, model(x, t), abar)
            return x0 if clip is None else x0.clamp(-clip, clip)

        table = tables.dpmpp_2m(schedule, timesteps, eta=eta, prediction=prediction, clip=clip)
        noises, x = noises_for(table), draw(1)
        expected = oracles.dpmpp_2m(
            x,
            x0_model,
            timesteps.tolist(),
            schedule.alpha[timesteps].tolist(),
            schedule.sigma[timesteps].tolist(),
            noises if eta else None,
        )
        assert_same(oracles.execute(table, x, model, noises), expected)


def edm_denoiser(x: Tensor, sigma: float) -> Tensor:
    """EDM, Table 1, with sigma_data = 0.5, around `model`."""
    total = sigma**2 + 0.25
    c_in, c_noise = 1 / total**0.5, float(np.log(sigma)) / 4
    return 0.25 / total * x + 0.5 * sigma / total**0.5 * model(c_in * x, c_noise)


CHURN = {"S_churn": 3.0, "S_tmin": 0.05, "S_tmax": 20.0, "S_noise": 1.003}


@pytest.mark.parametrize("churn", [{}, CHURN, CHURN | {"S_churn": 80, "S_tmax": np.inf}], ids=str)
@pytest.mark.parametrize("clip", [None, 0.8])
def test_heun_is_edm_algorithm_2(clip: float | None, churn: dict) -> None:
    timesteps = KARRAS.timesteps(9)
    table = tables.heun(KARRAS, timesteps, prediction="edm", clip=clip, **churn)
    assert len(table) == 17
    noises, x = noises_for(table), 80 * draw(1)

    def denoiser(x: Tensor, sigma: float) -> Tensor:
        x0 = edm_denoiser(x, sigma)
        return x0 if clip is None else x0.clamp(-clip, clip)

    expected = oracles.edm(x, denoiser, KARRAS.sigma[timesteps].tolist(), noises, **churn)
    assert_same(oracles.execute(table, x, model, noises), expected)


def test_heun_starts_from_the_first_churn() -> None:
    churned = tables.heun(KARRAS, KARRAS.timesteps(9), prediction="edm", S_churn=80, S_noise=1.1)
    hat = 80 * 2**0.5
    assert churned.init == pytest.approx(np.sqrt(80**2 + 1.1**2 * (hat**2 - 80**2)), rel=1e-14)
    assert tables.heun(KARRAS, KARRAS.timesteps(9), prediction="edm").init == pytest.approx(80)


@pytest.mark.parametrize("churn", [{}, {"S_churn": 2.0, "S_tmax": 20.0}], ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_heun_on_a_variance_preserving_schedule(prediction: str, churn: dict) -> None:
    timesteps = COSINE.timesteps(11)
    level = COSINE.sigma / COSINE.alpha

    def denoiser(scaled: Tensor, sigma: float) -> Tensor:
        """The model sees x = alpha (x / alpha), at the (fractional) timestep of this sigma."""
        abar = 1 / (1 + sigma**2)
        t = float(np.interp(np.log(sigma), np.log(level), np.arange(len(level))))
        x = abar**0.5 * scaled
        return oracles.predicted_x0(prediction, x, model(x, t), abar)

    table = tables.heun(COSINE, timesteps, prediction=prediction, **churn)
    if not churn:
        assert table.init == pytest.approx(1 / COSINE.alpha[timesteps[0]], rel=1e-14)
    noises, x = noises_for(table), table.init * draw(1)
    expected = oracles.edm(x, denoiser, level[timesteps].tolist(), noises, **churn)
    assert_same(oracles.execute(table, x, model, noises), expected)


@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize("prediction", ["score", "eps", "x0"])
def test_langevin(prediction: str, denoise: bool) -> None:
    schedule = NoiseSchedule.geometric(0.01, 1.0, 5)
    timesteps = schedule.timesteps(5)
    options = {"inner": 7, "step_size": 2e-5, "denoise": denoise}
    table = tables.langevin(schedule, timesteps, prediction=prediction, **options)
    assert len(table) == 35 + denoise

    def score(x: Tensor, t: int) -> Tensor:
        sigma, m = float(schedule.sigma[t]), model(x, t)
        return {"score": m, "eps": -m / sigma, "x0": (m - x) / sigma**2}[prediction]

    noises, x = noises_for(table), draw(1)
    expected = oracles.langevin(
        x,
        score,
        timesteps.tolist(),
        schedule.sigma[timesteps].tolist(),
        noises,
        inner=7,
        epsilon=2 * 2e-5,  # their step is twice the drift's coefficient
        denoise=denoise,
    )
    assert_same(oracles.execute(table, x, model, noises), expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_inverse_follows_the_same_ode(prediction: str) -> None:
    """In x / alpha, dx = eps d(sigma / alpha): Euler up the levels (DDIM eq. 14)."""
    timesteps = COSINE.timesteps(10)
    x = draw(1)
    scaled, u, alpha = x, 0.0, 1.0
    for t in timesteps[::-1].tolist():
        abar, seen = float(COSINE.alphas_cumprod[t]), alpha * scaled
        x0 = oracles.predicted_x0(prediction, seen, model(seen, t), abar)
        eps = (seen - abar**0.5 * x0) / (1 - abar) ** 0.5
        target = float(COSINE.sigma[t] / COSINE.alpha[t])
        scaled, u, alpha = scaled + (target - u) * eps, target, abar**0.5
    table = tables.ddim_inverse(COSINE, timesteps, prediction=prediction)
    assert_same(oracles.execute(table, x, model), COSINE.alpha[timesteps[0]] * scaled)


@pytest.mark.parametrize(
    "build", [tables.ddim, tables.ddpm, tables.dpmpp_2m, tables.ddim_inverse, tables.heun]
)
def test_eps_at_zero_terminal_snr_is_refused_with_advice(build) -> None:
    schedule = LINEAR.zero_terminal_snr()
    with pytest.raises(ValueError, match=r"alpha = 0.*(use prediction='v'|leave it out)"):
        build(schedule, schedule.timesteps(10, "trailing"))
    table = build(schedule, schedule.timesteps(10))  # leading does not start at T - 1
    assert np.isfinite(table.numpy()[:, :5]).all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("build", [tables.ddim, tables.dpmpp_2m])
def test_v_at_zero_terminal_snr(build, eta: float) -> None:
    """The first state is pure noise; the model's -m is x0 there, and eps is x itself."""
    schedule = LINEAR.zero_terminal_snr()
    table = build(schedule, schedule.timesteps(10, "trailing"), prediction="v", eta=eta)
    alpha, sigma = schedule.alpha[899], schedule.sigma[899]
    x, m = draw(1), draw(2)
    columns = torch.from_numpy(table.numpy())
    got = oracles.reference(x, m, columns, torch.tensor(0), h=torch.zeros_like(x), z=draw(3))[0]
    direction = draw(3) if eta else x
    assert_same(got, -alpha * m + sigma * direction)


def test_bad_requests_name_the_argument() -> None:
    good = COSINE.timesteps(10)
    for arguments, options, message in [
        ((COSINE, good[::-1]), {}, r"timesteps\[1\]=30: must be below the one before"),
        ((COSINE, [300, 1]), {}, r"timesteps\[0\]=300: must be in 0..299"),
        ((COSINE, [5, -1]), {}, r"timesteps\[1\]=-1: must be in 0..299"),
        ((COSINE, []), {}, "timesteps: has 0"),
        ((COSINE, good), {"eta": 1.5}, "eta=1.5: must be between 0"),
        ((COSINE, good), {"prediction": "x1"}, "prediction='x1': must be one of"),
        ((COSINE, good), {"clip": 0.0}, "clip"),
        ((COSINE, good), {"next_timesteps": good[:-1]}, "10 and next_timesteps 9;"),
        (
            (COSINE, good),
            {"next_timesteps": good + 1},
            r"next_timesteps\[0\]=271: must be in -1..its",
        ),
        ((COSINE, good), {"keep_eps": True, "classifier_scale": 1.0}, "use keep_eps=False"),
    ]:
        with pytest.raises(ValueError, match=message):
            tables.ddim(*arguments, **options)
    with pytest.raises(TypeError, match="timesteps: must be a list of integers"):
        tables.ddim(COSINE, [9.5, 1.0])
    with pytest.raises(ValueError, match="variance='medium': must be one of"):
        tables.ddpm(COSINE, good, variance="medium")
    with pytest.raises(ValueError, match="S_churn=-1"):
        tables.heun(COSINE, good, S_churn=-1)
    with pytest.raises(ValueError, match="step_size=0"):
        tables.langevin(COSINE, good, step_size=0)


def test_a_step_of_langevin_too_large_for_constant_data_is_warned_of() -> None:
    bound = 2 * COSINE.sigma[0] ** 2
    with pytest.warns(UserWarning, match="stay below"):
        found = tables.langevin(COSINE, [9, 0], step_size=1.01 * bound)
    assert (np.abs(found.a[:-1]) > 1).all()  # of a constant x0 the distance grows each row
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tables.langevin(COSINE, [9, 0], step_size=0.99 * bound)
    assert (np.abs(found.a[:-1]) < 1).all()


def test_a_register_is_kept_only_where_a_later_row_reads_it() -> None:
    assert tables.heun(KARRAS, KARRAS.timesteps(9)).history
    assert not tables.heun(KARRAS, KARRAS.timesteps(1, "trailing")).history
    assert tables.dpmpp_2m(COSINE, COSINE.timesteps(9)).history
    assert not tables.ddim(COSINE, COSINE.timesteps(9)).history


def test_an_inversion_starts_from_the_data_as_they_are():
    schedule = NoiseSchedule.geometric(0.01, 20.0, 12)
    table = tables.ddim_inverse(schedule, schedule.timesteps(12))
    x0 = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    seen = []
    Sampler(table).sample(lambda x, t: seen.append(x.clone()) or 0 * x, x0.shape, x_T=x0)
    assert torch.equal(seen[0], x0)


def test_a_ddpm_row_that_stays_is_refused():
    with pytest.raises(ValueError, match="next_timesteps: must be below"):
        tables.ddpm(LINEAR, [500, 0], next_timesteps=[500, -1])
