"""Image to image and inpainting: textbook loops, and Gaussian data, whose answers are known."""

import doctest
import itertools

import numpy as np
import oracles
import pytest
import torch

from fastdiff import (
    DDIMSampler,
    DDPMSampler,
    DPMSolverSampler,
    HeunSampler,
    LangevinSampler,
    NoiseSchedule,
    Sampler,
    edit,
    image_to_image,
    inpaint,
    ops,
)

schedule = NoiseSchedule.cosine(1000)
SHAPE = (3, 2, 4, 5)
image = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.5


def model(x, t, cond=None):
    """Nonlinear, and different at each timestep."""
    if isinstance(t, torch.Tensor):
        t = t.reshape(-1, *(1,) * (x.dim() - 1)).to(x.dtype)
    out = torch.sin(2 * x + t / 1000) - 0.3 * x
    return out if cond is None else out * cond.reshape(-1, 1, 1, 1).to(x.dtype)


def x0_of(x, t):
    alpha, sigma = schedule.alpha[int(t)], schedule.sigma[int(t)]
    return alpha * x - sigma * model(x, t)


def noised(t, z):
    return schedule.alpha[t] * image.double() + schedule.sigma[t] * z


def test_image_to_image_is_sdedit_with_ddim():
    """Meng et al. 2022: perturb to t0, then denoise from there."""
    sampler = DDIMSampler(schedule, 10, prediction="v")
    timesteps = sampler.timesteps[-6:].tolist()
    x = noised(timesteps[0], ops.randn(SHAPE, seed=4).double())
    abars = schedule.alphas_cumprod[timesteps].tolist()
    exact = oracles.ddim(x, model, timesteps, abars, prediction="v")
    ours = image_to_image(sampler, model, image, 0.6, seed=4)
    assert torch.allclose(ours.double(), exact, atol=1e-5)


def test_image_to_image_starts_a_multistep_solver_anew():
    """2M's first row is of first order, also where it starts in the middle."""
    sampler = DPMSolverSampler(schedule, 10, prediction="v")
    timesteps = sampler.timesteps[-5:]
    x = noised(timesteps[0], ops.randn(SHAPE, seed=4).double())
    exact = oracles.dpmpp_2m(
        x, x0_of, timesteps.tolist(), schedule.alpha[timesteps], schedule.sigma[timesteps]
    )
    ours = image_to_image(sampler, model, image, 0.5, seed=4)
    assert torch.allclose(ours.double(), exact, atol=1e-4)


def test_image_to_image_with_langevin():
    schedule = NoiseSchedule.geometric(0.1, 2.0, 4)
    seen = []

    def score(x, t):
        seen.append((x.clone(), int(t[0])))
        return -x

    image_to_image(LangevinSampler(schedule, inner=2), score, image, 0.5, seed=4)
    assert [t for _, t in seen] == [1, 1, 0, 0, 0]
    assert torch.allclose(seen[0][0], image + schedule.sigma[1] * ops.randn(SHAPE, 4), atol=1e-6)


def test_every_row_is_run_as_often():
    for rows, jump in ((8, 10), (15, 10), (20, 10), (7, 3)):
        runs = [row for row, _ in edit._walk(rows, jump, 4)]
        assert runs[-1] == rows - 1 and all(runs.count(row) == 4 for row in range(rows))


@pytest.mark.parametrize("S_churn", [0.0, 1.5])
def test_image_to_image_in_the_state_of_heun(S_churn):
    """x = image + u z, at the level that churn has raised."""
    schedule = NoiseSchedule.cosine(300)
    sampler = HeunSampler(schedule, 8, "leading", prediction="v", S_churn=S_churn)
    left = sampler.tail(4)
    levels = schedule.sigma[left.timesteps] / schedule.alpha[left.timesteps]

    def denoiser(x, u):
        alpha = (1 + u**2) ** -0.5
        t = np.interp(np.log(u), np.log(schedule.sigma / schedule.alpha), np.arange(300))
        return alpha**2 * x - u * alpha * model(alpha * x, t)

    gamma = S_churn / 8  # that of the sampler's eight steps, of which four are left
    assert gamma < 2**0.5 - 1
    hat = levels[0] * (1 + gamma)
    x = image.double() + hat * ops.randn(SHAPE, seed=4).double()
    # the noise of a step's churn comes with the last row of the step before
    noises = [ops.randn(SHAPE, seed=4, row=row).double() for row in (1, 3, 5)]
    exact = oracles.edm(x, denoiser, levels.tolist(), noises if S_churn else (), S_churn / 2)
    ours = image_to_image(sampler, model, image, 0.5, seed=4)
    assert torch.allclose(ours.double(), exact, atol=1e-4)


def test_strength_says_how_many_rows_are_run():
    seen = []

    def watched(x, t, cond=None):
        seen.append(int(t[0]))
        return model(x, t)

    sampler = DDIMSampler(schedule, 10, prediction="v")
    for strength, rows in ((0.01, 1), (0.3, 3), (1.0, 10)):
        seen.clear()
        image_to_image(sampler, watched, image, strength)
        assert seen == sampler.timesteps[-rows:].tolist()


def test_image_to_image_keeps_gaussian_data():
    """Perfect data, noised and denoised by an exact sampler, has its own law again, and at a low
    strength stays near where it was."""
    mu, s, n = 0.7, 0.4, 20_000
    data = mu + s * ops.randn((n, 1), seed=9)
    alpha, sigma = torch.tensor(schedule.alpha), torch.tensor(schedule.sigma)

    def eps(x, t):
        a, b = alpha[t[0]], sigma[t[0]]
        return (b * (x - a * mu) / (a**2 * s**2 + b**2)).float()

    sampler = DDIMSampler(schedule, 400, spacing="trailing")
    for strength in (0.2, 0.8):
        out = image_to_image(sampler, eps, data, strength, seed=1)
        assert abs(out.mean() - mu) < 5 * s / n**0.5
        assert abs(out.var() - s**2) < 5 * s**2 * (2 / n) ** 0.5 + 0.01 * s**2
        # the flow is affine: out - mu is s times the normalised x_t, so that with the data it has
        # the correlation of x_t
        t = sampler.tail(round(400 * strength)).timesteps[0]
        wanted = alpha[t] * s / (alpha[t] ** 2 * s**2 + sigma[t] ** 2) ** 0.5
        got = torch.corrcoef(torch.stack([out[:, 0], data[:, 0]]))[0, 1]
        assert abs(got - wanted) < 5 * (1 - wanted**2) / n**0.5 + 0.002


EDITS = {
    "image_to_image": lambda image, mask, **how: image_to_image(
        DDPMSampler(schedule, 10, prediction="v"), model, image, 0.5, **how
    ),
    "inpaint": lambda image, mask, **how: inpaint(
        DDPMSampler(schedule, 6, prediction="v"), model, image, mask, jump=2, resamplings=2, **how
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_sample_does_not_depend_on_its_batch(name):
    whole = EDITS[name](image, mask, seed=5)
    part = EDITS[name](image[1:], mask[1:], seed=5, first_index=1)
    assert torch.equal(whole[1:], part)
    assert torch.equal(whole[:1], EDITS[name](image[:1], mask[:1], seed=[5]))
    assert not torch.equal(whole, EDITS[name](image, mask, seed=6))


@pytest.mark.parametrize("name", EDITS)
def test_guidance_is_that_of_the_samplers(name):
    cond, w = torch.tensor([1.0, 0.9, 0.8]), 1.5
    ours = EDITS[name](image, mask, cond=cond, uncond=0.2 * cond, guidance=w)

    def combined(x, t):
        return (w + 1) * model(x, t, cond) - w * model(x, t, 0.2 * cond)

    plain = {
        "image_to_image": lambda: image_to_image(
            DDPMSampler(schedule, 10, prediction="v"), combined, image, 0.5
        ),
        "inpaint": lambda: inpaint(
            DDPMSampler(schedule, 6, prediction="v"), combined, image, mask, jump=2, resamplings=2
        ),
    }[name]()
    assert torch.allclose(ours, plain, atol=1e-4)


def repaint_times(T, jump, resamplings):
    """RePaint, appendix B: how many steps are left, time after time; a jump may reach T, or be
    cut there."""
    jumps = dict.fromkeys(range(0, T, jump), resamplings - 1)
    t, times = T, [T]
    while t >= 1:
        t -= 1
        times.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            t = min(t + jump, T)
            times.append(t)
    return times


@pytest.mark.parametrize("jump, resamplings", [(1, 1), (1, 3), (3, 2), (7, 4), (10, 2)])
@pytest.mark.parametrize("kind", [DDIMSampler, DDPMSampler])
def test_inpainting_is_repaint(kind, jump, resamplings):
    """Lugmayr et al. 2022, Algorithm 1, in float64, with the noise that is ours."""
    steps = 7
    sampler = kind(schedule, steps, prediction="v", clip=1.0)
    abars = [1.0, *schedule.alphas_cumprod[sampler.timesteps][::-1].tolist()]
    labels = [None, *sampler.timesteps[::-1].tolist()]
    times = repaint_times(steps, jump, resamplings)
    down = sum(b < a for a, b in itertools.pairwise(times))
    x, k = ops.randn(SHAPE, seed=3).double(), 0
    noise = lambda row: ops.randn(SHAPE, seed=3, row=row).double()  # noqa: E731
    for now, to in itertools.pairwise(times):
        abar, after = abars[now], abars[to]
        if to < now:
            x0 = oracles.predicted_x0("v", x, model(x, labels[now]), abar).clamp(-1, 1)
            beta = 1 - abar / after
            if kind is DDPMSampler:
                mean = after**0.5 * beta / (1 - abar) * x0
                mean = mean + (1 - beta) ** 0.5 * (1 - after) / (1 - abar) * x
                x = mean + (beta * (1 - after) / (1 - abar)) ** 0.5 * noise(k)
            else:
                eps = (x - abar**0.5 * x0) / (1 - abar) ** 0.5
                x = after**0.5 * x0 + (1 - after) ** 0.5 * eps
            known = after**0.5 * image.double() + (1 - after) ** 0.5 * noise(down + k)
            x = torch.where(mask, known, x)
            k += 1
        else:
            beta = 1 - after / abar
            x = (1 - beta) ** 0.5 * x + beta**0.5 * noise(2 * down + k - 1)
    ours = inpaint(sampler, model, image, mask, seed=3, jump=jump, resamplings=resamplings)
    assert torch.allclose(ours.double(), x, atol=1e-4)
    assert torch.equal(ours[mask], image[mask])


COV = np.array([[1.0, 0.8], [0.8, 1.0]])  # two pixels, the first of which is known
MU, KNOWN = np.array([0.3, -0.2]), 1.3


class Correlated:
    """The perfect eps of N(MU, COV): sigma (alpha^2 COV + sigma^2 I)^-1 (x - alpha MU)."""

    def __init__(self):
        variance = schedule.alpha[:, None, None] ** 2 * COV
        variance = variance + schedule.sigma[:, None, None] ** 2 * np.eye(2)
        self.gain = schedule.sigma[:, None, None] * np.linalg.inv(variance)

    def __call__(self, x, t):
        t = int(t[0])
        flat = x.flatten(1) - torch.tensor(schedule.alpha[t] * MU).float()
        return (flat @ torch.tensor(self.gain[t]).float()).view_as(x)


def repaint_law(sampler, eps, jump, resamplings):
    """Mean and variance of the unknown pixel: every row is affine, and the law goes along."""
    t = sampler.timesteps
    alpha, sigma = np.append(schedule.alpha[t], 1.0), np.append(schedule.sigma[t], 0.0)
    times = [len(t) - left for left in repaint_times(len(t), jump, resamplings)]
    mean, cov = np.zeros(2), np.eye(2)
    for now, to in itertools.pairwise(times):
        keep = alpha[to] / alpha[now] if to < now else alpha[now] / alpha[to]
        if to > now:
            beta = sigma[now] ** 2 - (keep * sigma[to]) ** 2
            gain = eps.gain[t[now]]
            # DDPM, equations 7 and 11: the posterior mean is (x - beta / sigma eps) / keep
            step = (np.eye(2) - beta / sigma[now] * gain) / keep
            mean = step @ mean + beta / sigma[now] * gain @ (alpha[now] * MU) / keep
            cov = step @ cov @ step.T + beta * (sigma[to] / sigma[now]) ** 2 * np.eye(2)
            mean[0], cov[0], cov[:, 0] = alpha[to] * KNOWN, 0.0, 0.0
            cov[0, 0] = sigma[to] ** 2
        else:
            mean, cov = keep * mean, keep**2 * cov
            cov += (sigma[to] ** 2 - (keep * sigma[now]) ** 2) * np.eye(2)
    return mean[1], cov[1, 1]


def test_inpainting_of_correlated_pixels_nears_the_conditional_law():
    """The samples have the law that RePaint has; it is not the conditional one, but resampling
    takes it there: with 100 rows the mean's error falls from 0.31 to 0.04."""
    exact = MU[1] + COV[0, 1] * (KNOWN - MU[0]), 1 - COV[0, 1] ** 2
    sampler, eps, n = DDPMSampler(schedule, 100, spacing="trailing"), Correlated(), 4000
    laws = {r: repaint_law(sampler, eps, 10, r) for r in (1, 10)}
    known, where = torch.full((n, 1, 2), KNOWN), torch.zeros(n, 1, 2, dtype=torch.bool)
    where[..., 0] = True
    for resamplings, (mean, var) in laws.items():
        how = {"jump": 10, "resamplings": resamplings, "seed": 2}
        drawn = inpaint(sampler, eps, known, where, **how)[:, 0, 1].double()
        assert abs(drawn.mean() - mean) < 5 * (var / n) ** 0.5
        assert abs(drawn.var() - var) < 5 * var * (2 / n) ** 0.5
    assert abs(laws[1][0] - exact[0]) > 0.3
    assert abs(laws[10][0] - exact[0]) < 0.06
    assert abs(laws[10][1] - exact[1]) < 0.1 * exact[1]


def test_half_precision_networks_get_the_state_that_was_put():
    """The model's input is made anew after the known part is replaced."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, x, t):
            assert x.dtype is torch.bfloat16
            return model(x.float(), t).bfloat16()

    sampler = DDPMSampler(schedule, 10, prediction="v")
    ours = inpaint(sampler, Net(), image, mask, jump=5, resamplings=2)
    exact = inpaint(sampler, model, image, mask, jump=5, resamplings=2)
    assert (ours - exact).norm() < 0.05 * exact.norm()


def test_a_preset_keeps_where_its_rows_go():
    """diffusers' strides are not the timesteps' own; the tail has them too."""
    sampler = DDIMSampler.like("diffusers", schedule, 13, spacing="trailing", prediction="v")
    tail = sampler.tail(5)
    assert np.array_equal(tail.table.numpy(), sampler.table.numpy()[-5:])


def test_the_examples_in_the_docstrings_run():
    failed, tried = doctest.testmod(edit)
    assert tried and not failed


ddim = DDIMSampler(schedule, 10, prediction="v")
classifier = DDIMSampler(schedule, 10, prediction="v", classifier_scale=1.0)
BAD = {
    "image: has dtype": lambda: image_to_image(ddim, model, image.double(), 0.5),
    "image: must be": lambda: image_to_image(ddim, model, [image], 0.5),
    "image: has shape": lambda: inpaint(ddim, model, image[0, 0, 0], mask),
    "strength=0": lambda: image_to_image(ddim, model, image, 0),
    "strength=1.1": lambda: image_to_image(ddim, model, image, 1.1),
    "mask: has shape": lambda: inpaint(ddim, model, image, mask[:, :1]),
    "mask: has dtype": lambda: inpaint(ddim, model, image, mask.float()),
    "jump=0": lambda: inpaint(ddim, model, image, mask, jump=0),
    "resamplings=0": lambda: inpaint(ddim, model, image, mask, resamplings=0),
    "cond: has batch": lambda: inpaint(ddim, model, image, mask, cond=torch.ones(2)),
    "guidance: needs": lambda: inpaint(ddim, model, image, mask, guidance=1.0),
    "sampler: must be a DDIM": lambda: inpaint(DPMSolverSampler(schedule), model, image, mask),
    "sampler: must be one": lambda: image_to_image(Sampler(ddim.table), model, image, 0.5),
    "sampler: inpainting": lambda: inpaint(classifier, model, image, mask),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises((ValueError, TypeError)) as caught:
        BAD[message]()
    assert str(caught.value).startswith(message)
