"""NoiseSchedule: constructors against their formulas, spacings against the rules they name."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from fastdiff.schedule import CONSTRUCTORS, NoiseSchedule, logsnr_cosine

EXAMPLES = [
    NoiseSchedule.linear(1000),
    NoiseSchedule.linear(40),
    NoiseSchedule.cosine(1000),
    NoiseSchedule.scaled_linear(1000),
    NoiseSchedule.logsnr_cosine(64, 15.0),
    NoiseSchedule.from_betas([0.1, 0.3, 0.2]),
    NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.1]),
    NoiseSchedule.geometric(0.01, 50.0, 12),
    NoiseSchedule.karras(n=9),
    NoiseSchedule.linear(1000).zero_terminal_snr(),
    NoiseSchedule.from_betas([0.1, 0.3, 0.2]).zero_terminal_snr(),
]


def test_linear_is_scaled_to_its_length() -> None:
    for T in (100, 1000, 4000):
        betas = [1000 / T * (1e-4 + (0.02 - 1e-4) * t / (T - 1)) for t in range(T)]
        schedule = NoiseSchedule.linear(T)
        np.testing.assert_allclose(schedule.betas, betas, rtol=0, atol=1e-15)
        np.testing.assert_allclose(
            schedule.alphas_cumprod[-1], math.prod(1 - b for b in betas), rtol=1e-12
        )


def test_cosine_is_iddpm_equation_17() -> None:
    def f(t: int) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = NoiseSchedule.cosine(1000)
    betas = [min(1 - f(t + 1) / f(t), 0.999) for t in range(1000)]
    np.testing.assert_allclose(schedule.betas, betas, rtol=0, atol=1e-12)
    assert schedule.betas[-1] == pytest.approx(0.999)


def test_scaled_linear_is_linear_in_the_square_root() -> None:
    roots = np.sqrt(NoiseSchedule.scaled_linear(1000).betas)
    np.testing.assert_allclose(roots[[0, -1]], [0.00085**0.5, 0.012**0.5], rtol=1e-12)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots).mean(), rtol=1e-9)


def test_logsnr_cosine_is_continuous_bounded_and_halves_exactly() -> None:
    assert logsnr_cosine(0.0) == pytest.approx(20)
    assert logsnr_cosine(1.0) == pytest.approx(-20)
    assert logsnr_cosine(0.5) == pytest.approx(0, abs=1e-4)
    schedule = NoiseSchedule.logsnr_cosine(64)
    np.testing.assert_allclose(schedule.logsnr, logsnr_cosine(np.arange(1, 65) / 64), atol=1e-9)
    np.testing.assert_allclose(schedule.alpha**2, 1 / (1 + np.exp(-schedule.logsnr)), rtol=1e-12)
    half, every_other = NoiseSchedule.logsnr_cosine(32), schedule.timesteps(32, "trailing")[::-1]
    np.testing.assert_allclose(schedule.alpha[every_other], half.alpha, rtol=1e-14)
    np.testing.assert_allclose(schedule.sigma[every_other], half.sigma, rtol=1e-14)


def test_variance_exploding_sigmas() -> None:
    geometric = NoiseSchedule.geometric(0.01, 50.0, 12)
    assert np.all(geometric.alpha == 1)
    np.testing.assert_allclose(geometric.sigma[1:] / geometric.sigma[:-1], 5000 ** (1 / 11))
    karras = NoiseSchedule.karras(0.002, 80, 18, rho=7)
    expected = [
        (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)
    ]
    np.testing.assert_allclose(karras.sigma[::-1], expected, rtol=1e-12)


def test_zero_terminal_snr_keeps_the_first_level_and_ends_at_zero() -> None:
    plain, rescaled = NoiseSchedule.linear(1000), NoiseSchedule.linear(1000).zero_terminal_snr()
    assert rescaled.alpha[-1] == 0
    assert rescaled.sigma[-1] == 1
    assert rescaled.logsnr[-1] == -np.inf
    assert rescaled.alpha[0] == pytest.approx(plain.alpha[0], rel=1e-14)
    steps = np.diff(rescaled.alpha) / np.diff(plain.alpha)  # one affine map of alpha
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_properties_agree_with_their_definitions(schedule: NoiseSchedule) -> None:
    alpha, sigma = schedule.alpha, schedule.sigma
    assert len(schedule) == len(alpha) == len(sigma)
    assert alpha.dtype == sigma.dtype == np.float64
    if schedule.variance_preserving:
        np.testing.assert_allclose(np.cumprod(1 - schedule.betas), alpha**2, atol=1e-12)
        previous = np.append(1.0, schedule.alphas_cumprod[:-1])
        expected = schedule.betas * (1 - previous) / (1 - schedule.alphas_cumprod)
        np.testing.assert_allclose(schedule.beta_tilde, expected, rtol=1e-9, atol=1e-14)
    else:
        np.testing.assert_allclose(np.cumsum(schedule.betas), sigma**2, rtol=1e-12)
    assert schedule.beta_tilde[0] == 0
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(schedule.logsnr, np.log(alpha**2 / sigma**2), atol=1e-12)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score", "edm"])
@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_a_perfect_prediction_of_the_training_target_gives_x0(
    schedule: NoiseSchedule, prediction: str
) -> None:
    from fastdiff.prediction import prediction_coefficients

    if schedule.alpha[-1] == 0 and prediction == "edm":
        with pytest.raises(ValueError, match="no target at alpha = 0"):
            schedule.noising_table(prediction)
        return
    alpha, sigma, tx, tz = schedule.noising_table(prediction).T
    np.testing.assert_array_equal(alpha, schedule.alpha)
    np.testing.assert_array_equal(sigma, schedule.sigma)
    if schedule.alpha[-1] == 0 and prediction in ("eps", "score"):
        alpha, sigma, tx, tz = alpha[:-1], sigma[:-1], tx[:-1], tz[:-1]
    x0, z = 0.7, -1.3
    x_t, target = alpha * x0 + sigma * z, tx * x0 + tz * z
    expected = {"eps": z, "x0": x0, "v": alpha * z - sigma * x0, "score": -z / sigma}
    if prediction in expected:
        np.testing.assert_allclose(target, np.broadcast_to(expected[prediction], target.shape))
    px, pm = prediction_coefficients(prediction, alpha, sigma).T[:2]
    np.testing.assert_allclose(px * x_t + pm * target, x0, rtol=1e-9)


def test_edm_preconditioning_gives_unit_variance() -> None:
    """Karras et al. 2022, appendix B.6: c_in x and the training target have variance 1."""
    from fastdiff.prediction import model_input

    schedule = NoiseSchedule.karras(n=9)
    alpha, sigma, tx, tz = schedule.noising_table("edm").T
    c_in, time = model_input("edm", alpha, sigma, np.arange(9))
    np.testing.assert_allclose(c_in**2 * (0.5**2 + sigma**2), 1)
    np.testing.assert_allclose(0.5**2 * tx**2 + tz**2, 1)
    np.testing.assert_allclose(time, np.log(sigma) / 4)


@pytest.mark.parametrize("T", [1, 2, 10, 37, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quadratic"])
def test_every_number_of_steps_gives_that_many_distinct_timesteps(T: int, spacing: str) -> None:
    schedule = NoiseSchedule.cosine(T)
    for steps in range(1, T + 1):
        timesteps = schedule.timesteps(steps, spacing)
        assert timesteps.dtype == np.int64
        assert len(timesteps) == steps
        assert np.all(np.diff(timesteps) < 0)
        assert timesteps[0] < T
        assert timesteps[-1] >= 0
        if spacing == "trailing":
            assert timesteps[0] == T - 1
        elif steps > 1:
            assert timesteps[-1] == 0
        if spacing == "linspace" and steps > 1:
            assert timesteps[0] == T - 1
    assert schedule.timesteps(T, spacing).tolist() == list(range(T))[::-1]


def test_spacings_by_hand() -> None:
    schedule = NoiseSchedule.linear(1000)
    for arguments, expected in [
        ((4, "leading"), [750, 500, 250, 0]),
        ((3, "leading"), [666, 333, 0]),
        ((3, "leading", 1), [667, 334, 1]),
        ((4, "trailing"), [999, 749, 499, 249]),
        ((3, "trailing"), [999, 666, 332]),
        ((4, "linspace"), [999, 666, 333, 0]),
        ((5, "quadratic"), [800, 450, 200, 50, 0]),
        ((1, "trailing"), [999]),
        ((1, "leading"), [0]),
        ((None, "ddim4"), [750, 500, 250, 0]),
        ((None, [3, 999, 500]), [999, 500, 3]),
        ((None, np.array([3, 999])), [999, 3]),
        ((3, "2,1"), [500, 499, 0]),
    ]:
        assert schedule.timesteps(*arguments).tolist() == expected, arguments


def test_sections_are_guided_diffusions() -> None:
    """Its rules, from its documentation: both ends of each section, ties as Python rounds."""
    schedule = NoiseSchedule.linear(1000)
    fifty = schedule.timesteps(spacing="50")[::-1].tolist()
    assert fifty[:4] + fifty[-1:] == [0, 20, 41, 61, 999]
    assert len(fifty) == 50
    three = NoiseSchedule.cosine(300).timesteps(spacing="10,15,20")[::-1].tolist()
    assert three[:10] == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert [three[10], three[24], three[25], three[44]] == [100, 199, 200, 299]
    uneven = NoiseSchedule.cosine(10).timesteps(spacing="2,2,1")[::-1].tolist()
    assert uneven == [0, 3, 4, 6, 7]  # sections of 4, 3 and 3


@pytest.mark.parametrize("counts", [[1000], [333, 12, 7], [5] * 9, [100, 250]])
def test_sections_follow_the_running_sum(counts: list[int]) -> None:
    """A second writing of the rule, one timestep at a time."""
    expected, start = set(), 0
    for i, n in enumerate(counts):
        size = 1000 // len(counts) + (i < 1000 % len(counts))
        position = 0.0
        for _ in range(n):
            expected.add(start + round(position))
            position += (size - 1) / (n - 1) if n > 1 else 1
        start += size
    got = NoiseSchedule.linear(1000).timesteps(spacing=",".join(map(str, counts)))
    assert got.tolist() == sorted(expected, reverse=True)


def test_ddim_spacing_takes_any_exact_integer_stride_and_no_other() -> None:
    schedule = NoiseSchedule.linear(1000)
    possible = {len(range(0, 1000, stride)): stride for stride in range(1000, 0, -1)}
    for steps in range(1, 1001):
        if steps in possible:
            expected = list(range(0, 1000, possible[steps]))[::-1]
            assert schedule.timesteps(spacing=f"ddim{steps}").tolist() == expected
        else:
            with pytest.raises(ValueError, match=r"no integer stride.*use spacing='trailing'"):
                schedule.timesteps(spacing=f"ddim{steps}")


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_json_and_repr_round_trip(schedule: NoiseSchedule) -> None:
    again = NoiseSchedule.from_json(json.loads(json.dumps(schedule.to_json())))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again.to_json() == schedule.to_json()
    assert "values>" in repr(schedule) or eval(repr(schedule)) == schedule
    assert schedule != NoiseSchedule.linear(77)
    assert {example.recipe["name"] for example in EXAMPLES} == set(CONSTRUCTORS)


def test_a_schedule_cannot_be_changed() -> None:
    schedule = NoiseSchedule.linear(1000)
    with pytest.raises(ValueError, match="read-only"):
        schedule.alpha[0] = 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.alpha = schedule.sigma


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.timesteps(1200), r"steps=1200: must be between 1 and 1000 \(the schedule's"),
        (lambda s: s.timesteps(0), "steps=0: must be between 1 and 1000"),
        (lambda s: s.timesteps(), "steps=None: spacing='leading' needs a number"),
        (lambda s: s.timesteps(10, "uniform"), "spacing='uniform': must be one of .*'ddimN'"),
        (lambda s: s.timesteps(10, "ddim50"), "steps=10: spacing='ddim50' implies 50 steps"),
        (lambda s: s.timesteps(spacing="ddim300"), "no integer stride takes 300 steps out of 1000"),
        (lambda s: s.timesteps(spacing="600,10"), "a section's count=600: must be between 1 and"),
        (lambda s: s.timesteps(spacing="0"), "a section's count=0: must be between 1"),
        (lambda s: s.timesteps(spacing=[5, 5]), "timesteps must be distinct"),
        (lambda s: s.timesteps(spacing=[]), "at least one"),
        (lambda s: s.timesteps(spacing=[1000]), "a timestep=1000: must be between 0 and 999"),
        (lambda s: s.timesteps(1000, "leading", 1), "offset=1: timesteps 1..1000 leave 0..999"),
        (lambda s: s.noising_table("x_start"), "prediction='x_start': must be one of"),
        (lambda s: NoiseSchedule.linear(10), "T=10: must be between 20 and"),
        (
            lambda s: NoiseSchedule.from_betas([0.1, 1.5]),
            r"betas\[1\]=1.5: must be in \(1e-16, 1\]",
        ),
        (lambda s: NoiseSchedule.from_betas([0.1, math.nan]), r"betas\[1\]=nan"),
        (lambda s: NoiseSchedule.from_betas([[0.1]]), r"betas: has shape \(1, 1\); must be \[T\]"),
        (lambda s: NoiseSchedule.from_betas([]), r"betas: has shape \(0,\)"),
        (lambda s: NoiseSchedule.from_alphas_cumprod(0.5), r"alphas_cumprod: has shape \(\)"),
        (lambda s: NoiseSchedule.from_alphas_cumprod([0.5, 0.7]), "level 1: must be noisier than"),
        (lambda s: NoiseSchedule.from_alphas_cumprod([1.0, 0.7]), r"alphas_cumprod\[0\]=1.0"),
        (lambda s: NoiseSchedule.geometric(2.0, 1.0, 5), "sigma_min=2.0, sigma_max=1.0"),
        (lambda s: NoiseSchedule.karras(n=1), "n=1: must be between 2 and"),
        (lambda s: NoiseSchedule.karras().zero_terminal_snr(), "variance-preserving"),
        (lambda s: NoiseSchedule.from_json([1]), "schedule: must be an object with a name"),
        (lambda s: NoiseSchedule.from_json({"name": "sigmoid"}), "schedule name='sigmoid'"),
        (
            lambda s: NoiseSchedule.from_json({"name": "linear", "N": 3}),
            r"has no .*'N'.*; takes",
        ),
        (lambda s: NoiseSchedule.from_json({"name": "from_json"}), "schedule name='from_json'"),
    ],
)
def test_bad_input_names_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(NoiseSchedule.linear(1000))


def test_steps_must_be_an_integer() -> None:
    for steps in (2.5, "10"):
        with pytest.raises(TypeError, match=r"steps=.*must be an integer"):
            NoiseSchedule.linear(1000).timesteps(steps)


def test_steps_beside_named_sections_are_a_number():
    assert len(NoiseSchedule.cosine(50).timesteps(5, "ddim5")) == 5
    with pytest.raises(TypeError, match="steps"):
        NoiseSchedule.cosine(50).timesteps([5.0, 5.0], "ddim5")
