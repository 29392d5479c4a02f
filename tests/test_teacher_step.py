"""Progressive distillation's targets: the tables of fastdiff.halving, run by ops.teacher_step."""

from itertools import product

import numpy as np
import pytest
import torch
from test_closed_form import MU, S, gaussian_eps

from fastdiff import DDIMSampler, NoiseSchedule, ops
from fastdiff.halving import PREDICTIONS, halve
from fastdiff.schedule import logsnr_cosine

COSINE = NoiseSchedule.logsnr_cosine(64)
LEVELS = {
    "cosine": (COSINE, 16),
    "one step": (COSINE, 2),
    "linear": (NoiseSchedule.linear(1000), 10),
    "exploding": (NoiseSchedule.geometric(0.01, 50.0, 20), 8),
}


def run(made, teacher, z_t, i):
    """Both teacher calls of sample b at row i[b], in float64."""
    step, target = torch.from_numpy(made.step), torch.from_numpy(made.target)
    reference = ops.OPS["teacher_step"].reference
    m = torch.stack([teacher(z, int(made.t[k])) for z, k in zip(z_t, i, strict=True)])
    z_m = reference(z_t, m, step, i, None, None, None, 0.0)[0]
    m = torch.stack([teacher(z, int(made.middle[k])) for z, k in zip(z_m, i, strict=True)])
    return z_m, reference(z_m, m, target, i, z_t, None, None, 0.0)[0]


def textbook(schedule, timesteps, prediction, target, teacher, z_t, i):
    """Salimans & Ho 2022, Algorithm 2, for one sample; levels as (alpha, sigma), -1 the data."""
    alpha, sigma = np.append(schedule.alpha, 1.0), np.append(schedule.sigma, 0.0)
    t, mid, s = [*timesteps, -1][2 * i : 2 * i + 3]

    def predicted(z, k):
        m = teacher(z, k)
        x, eps = {
            "x0": lambda: (m, (z - alpha[k] * m) / sigma[k]),
            "eps": lambda: ((z - sigma[k] * m) / alpha[k], m),
            "v": lambda: (alpha[k] * z - sigma[k] * m, sigma[k] * z + alpha[k] * m),
            "score": lambda: ((z + sigma[k] ** 2 * m) / alpha[k], -sigma[k] * m),
        }[prediction]()
        return x, eps

    x, eps = predicted(z_t, t)
    z_m = alpha[mid] * x + sigma[mid] * eps
    x, eps = predicted(z_m, mid)
    z_s = alpha[s] * x + sigma[s] * eps
    ratio = sigma[s] / sigma[t]
    x = x if s == -1 else (z_s - ratio * z_t) / (alpha[s] - ratio * alpha[t])
    eps = (z_t - alpha[t] * x) / sigma[t]
    targets = {"x0": x, "eps": eps, "v": alpha[t] * eps - sigma[t] * x, "score": -eps / sigma[t]}
    return z_m, targets[target]


@pytest.mark.parametrize(
    "levels, prediction, target",
    [
        row
        for row in product(LEVELS, PREDICTIONS, PREDICTIONS)
        if row[0] != "exploding" or "v" not in row  # v is of schedules that preserve variance
    ],
)
def test_tables_are_algorithm_2(levels, prediction, target):
    schedule, steps = LEVELS[levels]
    timesteps = schedule.timesteps(steps, "trailing")
    made = halve(schedule, timesteps, prediction=prediction, target=target)
    assert made.t.tolist() == timesteps[::2].tolist() and len(made.step) == steps // 2

    def teacher(z, t):
        return (z * 0.7).sin() + t / 100

    i = torch.randperm(steps // 2).repeat(2)
    z_t = torch.randn(len(i), 5, dtype=torch.float64)
    z_m, found = run(made, teacher, z_t, i)
    for b, k in enumerate(i.tolist()):
        expected = textbook(schedule, timesteps, prediction, target, teacher, z_t[b], k)
        for a, e in zip((z_m[b], found[b]), expected, strict=True):
            assert (a - e).abs().max() < 1e-9 * (1 + e.abs().max()), k


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_target_is_the_x0_with_which_one_ddim_step_does_what_two_of_the_samplers_do(prediction):
    teacher = DDIMSampler(COSINE, steps=16, spacing="trailing", prediction=prediction)
    student = DDIMSampler(COSINE, steps=8, spacing="trailing", prediction=prediction)
    timesteps = COSINE.timesteps(16, "trailing")
    made = halve(COSINE, timesteps, prediction=prediction)
    t, middle, step, target = made.tensors()
    assert t.tolist() == student.table.t.tolist()
    z_t, first, second = torch.randn(3, 8, 2, 6, 6)
    i = torch.arange(8)
    z_m = ops.teacher_step(z_t, first, step, i)
    goal = ops.teacher_step(z_m, second, target, i, z_t=z_t)
    assert middle.tolist() == timesteps[1::2].tolist() and goal.dtype == torch.float32
    for k in range(8):
        between = teacher.step(first[k : k + 1], 2 * k, z_t[k : k + 1])
        assert torch.allclose(z_m[k : k + 1], between, atol=1e-6)
        landed = teacher.step(second[k : k + 1], 2 * k + 1, between)
        ours = student.step(goal[k : k + 1], k, z_t[k : k + 1])
        assert torch.allclose(ours, landed, atol=1e-5), k


@pytest.mark.parametrize("target", ["x0", "eps", "v"])
def test_on_gaussian_data_the_perfect_teachers_target_has_its_closed_form(target):
    """Two steps multiply z - alpha MU by f; x* = MU + (f - r) / (alpha_s - r alpha_t) (z - ..)."""
    timesteps = COSINE.timesteps(16, "trailing")
    made = halve(COSINE, timesteps, prediction="eps", target=target)
    i = torch.arange(8)
    z_t = torch.randn(8, 7, dtype=torch.float64)
    _, found = run(made, gaussian_eps(COSINE), z_t, i)
    alpha, sigma = (np.append(c[timesteps], d) for c, d in ((COSINE.alpha, 1), (COSINE.sigma, 0)))
    V = alpha**2 * S**2 + sigma**2
    f = (alpha[:-1] * alpha[1:] * S**2 + sigma[:-1] * sigma[1:]) / V[:-1]
    f, r = f[::2] * f[1::2], sigma[2::2] / sigma[:-2:2]
    gain = (f - r) / (alpha[2::2] - r * alpha[:-2:2])
    at, noise, gain = (torch.from_numpy(c)[:, None] for c in (alpha[:-2:2], sigma[:-2:2], gain))
    x = MU + gain * (z_t - at * MU)
    eps = (z_t - at * x) / noise
    expected = {"x0": x, "eps": eps, "v": at * eps - noise * x}[target]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_rows_are_the_papers_levels_and_the_last_ones_target_is_the_teachers_x():
    made = halve(COSINE, COSINE.timesteps(8, "trailing"), prediction="x0")
    logsnr = logsnr_cosine([1.0, 0.75, 0.5, 0.25])  # u = (i + 1) / N, from the noisy end
    np.testing.assert_allclose(COSINE.logsnr[made.t], logsnr, atol=1e-12)
    assert made.target[-1].tolist() == [0, 1, 0, 1, 0]


def test_guidance_is_that_of_cfg():
    z, z_t = torch.randn(2, 3, 4, 5)
    m, m_uncond = torch.randn(2, 3, 4, 5).bfloat16()
    table, i = torch.randn(6, 5), torch.tensor([4, 0, 4])
    for w in (1.5, torch.tensor([0.0, 7.5, -1.0])):
        combined = ops.cfg(m.float(), m_uncond.float(), w)
        for given in (None, z_t):
            ours = ops.teacher_step(z, m, table, i, z_t=given, m_uncond=m_uncond, w=w)
            expected = ops.teacher_step(z, combined, table, i, z_t=given)
            assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_targets_refuse_to_carry_a_gradient():
    z, m, i = torch.zeros(1, 4), torch.zeros(1, 4, requires_grad=True), torch.tensor([0])
    with pytest.raises(RuntimeError, match=r"^m: requires a gradient"):
        ops.teacher_step(z, m, torch.ones(1, 5), i)
    with torch.no_grad():
        assert ops.teacher_step(z, m, torch.ones(1, 5), i).sum() == 0


def test_zero_terminal_snr_is_for_v_and_x0():
    schedule = NoiseSchedule.cosine(20).zero_terminal_snr()
    timesteps = schedule.timesteps(4, "trailing")
    made = halve(schedule, timesteps, prediction="v")
    assert np.isfinite(made.step).all() and np.isfinite(made.target).all()
    with pytest.raises(ValueError, match="alpha = 0"):
        halve(schedule, timesteps, prediction="v", target="eps")


def test_bad_requests_are_named():
    for arguments, message in [
        ({"timesteps": [9, 5, 1]}, "timesteps: has 3, must have an even number"),
        ({"timesteps": [5, 5, 1, 0]}, r"timesteps\[1\]=5: must be below"),
        ({"timesteps": [9, 5], "prediction": "edm"}, "prediction='edm': must be one of 'eps'"),
        ({"timesteps": [9, 5], "target": "noise"}, "target='noise': must be one of 'eps'"),
    ]:
        with pytest.raises(ValueError, match=message):
            halve(COSINE, **arguments)
