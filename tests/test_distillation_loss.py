"""DistillationLoss against the paper in float64, and on Gaussian data in closed form."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from test_closed_form import MU, S, gaussian_eps

from fastdiff import NoiseSchedule, optimize
from fastdiff.losses import DistillationLoss
from fastdiff.models import UNet, UNetConfig
from fastdiff.schedule import logsnr_cosine

N = 8  # the student's steps
SCHEDULE = NoiseSchedule.logsnr_cosine(2 * N)
TIMESTEPS = SCHEDULE.timesteps(2 * N, "trailing")


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def reference(x0, z, u_step, teacher, prediction, weighting, student_output):
    """Salimans & Ho 2022, Algorithm 2 and section 4, in u and log-SNR, for one sample.

    u_step is i of u = (i + 1) / N. Returns (loss, target) for an output of the same prediction.
    """

    def level(u):
        logsnr = float(logsnr_cosine(u)) if u > 0 else math.inf
        return math.sqrt(sigmoid(logsnr)), math.sqrt(sigmoid(-logsnr)), logsnr

    def x_and_eps(z, output, alpha, sigma):
        if prediction == "x0":
            return output, (z - alpha * output) / sigma
        if prediction == "eps":
            return (z - sigma * output) / alpha, output
        return alpha * z - sigma * output, sigma * z + alpha * output

    u = (u_step + 1) / N
    alpha_t, sigma_t, logsnr = level(u)
    alpha_m, sigma_m, _ = level(u - 0.5 / N)
    z_t = alpha_t * x0 + sigma_t * z
    x, eps = x_and_eps(z_t, teacher(z_t, u), alpha_t, sigma_t)
    z_m = alpha_m * x + sigma_m * eps
    x, eps = x_and_eps(z_m, teacher(z_m, u - 0.5 / N), alpha_m, sigma_m)
    if u_step > 0:
        alpha_s, sigma_s, _ = level(u - 1 / N)
        z_s = alpha_s * x + sigma_s * eps
        x = (z_s - sigma_s / sigma_t * z_t) / (alpha_s - sigma_s / sigma_t * alpha_t)
    eps = (z_t - alpha_t * x) / sigma_t
    x_hat, eps_hat = x_and_eps(z_t, student_output(z_t, u), alpha_t, sigma_t)
    x_mse, eps_mse = ((x - x_hat) ** 2).mean(), ((eps - eps_hat) ** 2).mean()
    loss = {
        "constant": x_mse,
        "snr": eps_mse,
        "snr_trunc": max(x_mse, eps_mse),
        "v_mse": x_mse * (1 + math.exp(logsnr)),
    }[weighting]
    target = {"x0": x, "eps": eps, "v": alpha_t * eps - sigma_t * x}[prediction]
    return loss, target


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
@pytest.mark.parametrize("weighting", ["constant", "snr", "snr_trunc", "v_mse"])
def test_loss_and_target_are_the_papers(prediction, weighting):
    def teacher(z, u):
        return torch.sin(0.7 * z) + u

    def student(z, u):
        return torch.cos(z) * u

    def told(network):  # timestep t of the schedule is u = (t + 1) / 2N
        return lambda z, t: network(z, ((t + 1) / (2 * N)).reshape(-1, 1))

    loss = DistillationLoss(told(teacher), SCHEDULE, TIMESTEPS, prediction, weighting=weighting)
    x0, z = torch.randn(2, N, 50, generator=torch.Generator().manual_seed(0))
    i = torch.arange(N).flip(0)  # row 0 is the noisiest, i = N - 1
    losses, sums = loss.with_sums(told(student), x0, i, noise=z)
    z_t = torch.stack([SCHEDULE.alpha[t] * a + SCHEDULE.sigma[t] * b for a, b, t in
                       zip(x0.double(), z.double(), loss.halving.t[i], strict=True)])  # fmt: skip
    targets = loss.target_of(z_t.float(), i)
    for k in range(N):
        expected, target = reference(
            x0[k].double(),
            z[k].double(),
            N - 1 - int(i[k]),
            teacher,
            prediction,
            weighting,
            student,
        )
        assert losses[k].item() == pytest.approx(expected.item(), rel=2e-4), k
        assert (targets[k] - target).abs().max() < 1e-4 * (1 + target.abs().max()), k
    assert sums[:, 0].tolist() == [1] * N


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_a_linear_student_converges_to_the_closed_form_on_gaussian_data(prediction):
    """The perfect teacher is affine in z; so is the perfect student, which is found exactly.

    Two DDIM steps multiply z - alpha MU by f; the student's x is MU + gain (z - alpha MU).
    """
    perfect = gaussian_eps(SCHEDULE)

    def teacher(z, t):
        eps = torch.stack([perfect(a, int(k)) for a, k in zip(z.double(), t, strict=True)])
        a, s = (torch.from_numpy(c)[t][:, None] for c in (SCHEDULE.alpha, SCHEDULE.sigma))
        x = (z.double() - s * eps) / a
        return (x if prediction == "x0" else a * eps - s * x).float()

    loss = DistillationLoss(teacher, SCHEDULE, TIMESTEPS, prediction, weighting="snr_trunc")
    affine = torch.zeros(N, 2, requires_grad=True)

    def student(z, t):
        row = N - 1 - t // 2
        return affine[row, 0, None] * z + affine[row, 1, None]

    optimizer = torch.optim.LBFGS([affine], max_iter=100, tolerance_grad=1e-9)
    x0 = MU + S * torch.randn(64 * N, 8, generator=torch.Generator().manual_seed(1))
    i = torch.arange(64 * N) % N

    def closure():
        optimizer.zero_grad()
        value = loss(student, x0, i, seed=0)
        value.backward()
        return value

    first = closure().item()
    optimizer.step(closure)
    assert closure().item() < 1e-7 * first

    alpha, sigma = (
        np.append(c[TIMESTEPS], d) for c, d in ((SCHEDULE.alpha, 1), (SCHEDULE.sigma, 0))
    )
    V = alpha**2 * S**2 + sigma**2
    f = (alpha[:-1] * alpha[1:] * S**2 + sigma[:-1] * sigma[1:]) / V[:-1]
    f, r = f[::2] * f[1::2], sigma[2::2] / sigma[:-2:2]
    at, noise = alpha[:-2:2], sigma[:-2:2]
    gain = (f - r) / (alpha[2::2] - r * at)
    slope, offset = gain, MU * (1 - gain * at)  # of x in z
    if prediction == "v":  # v = (alpha z - x) / sigma
        slope, offset = (at - slope) / noise, -offset / noise
    found = affine.detach().double().numpy()
    np.testing.assert_allclose(found, np.stack((slope, offset), 1), rtol=2e-3, atol=2e-3)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    config = UNetConfig(
        image_size=16,
        in_channels=1,
        channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        num_classes=4,
        norm_groups=8,
    )
    model = UNet(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def batch(size=6):
    generator = torch.Generator().manual_seed(2)
    x0 = torch.rand(size, 1, 16, 16, generator=generator) * 2 - 1
    return x0, torch.arange(size) % N, torch.arange(size) % 4


def test_guidance_is_the_guided_teachers(network):
    x0, i, cond = batch()
    guided = DistillationLoss(network, SCHEDULE, TIMESTEPS, guidance=1.5)

    def combined(z, t, c):
        return 2.5 * network(z, t, c) - 1.5 * network(z, t, network.null_cond(c))

    plain = DistillationLoss(combined, SCHEDULE, TIMESTEPS)
    ours, theirs = (loss.with_sums(network, x0, i, cond, seed=3)[0] for loss in (guided, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ours, DistillationLoss(network, SCHEDULE, TIMESTEPS).with_sums(
        network, x0, i, cond, seed=3)[0], rtol=1e-2)  # fmt: skip
    with pytest.raises(ValueError, match="cond: guidance needs a condition"):
        guided(network, x0, i)


def test_a_weight_is_drawn_for_each_sample_and_given_to_the_student(network):
    x0, i, cond = batch()
    loss = DistillationLoss(network, SCHEDULE, TIMESTEPS, guidance=(1.0, 3.0))
    given = []

    def student(z, t, c, w):
        given.append(w)
        return network(z, t, c)

    losses, _ = loss.with_sums(student, x0, i, cond, seed=3, row=7)
    w = given[0]
    assert w.shape == (6,) and w.dtype == torch.float32
    assert w.min() >= 1.0 and w.max() <= 3.0 and len(w.unique()) == 6
    for k in range(6):  # each is the loss at a fixed weight, and parts of a batch are those of it
        fixed = DistillationLoss(network, SCHEDULE, TIMESTEPS, guidance=w[k].item())
        part = slice(k, k + 1)
        same = fixed.with_sums(
            network, x0[part], i[part], cond[part], seed=3, row=7, first_index=k
        )[0]
        torch.testing.assert_close(same[0], losses[k], rtol=1e-4, atol=1e-6)
        loss.with_sums(student, x0[part], i[part], cond[part], seed=3, row=7, first_index=k)
        assert given[-1] == w[k]
    many = torch.cat([loss._drawn((1.0, 3.0), 1000, 3, row, 0, "cpu") for row in range(20)])
    assert many.mean() == pytest.approx(2.0, abs=0.02)
    assert many.std() == pytest.approx(2 / math.sqrt(12), abs=0.01)


def test_an_optimized_teacher_gives_the_same_targets_also_under_autocast(network):
    x0, i, cond = batch()
    plain = DistillationLoss(network, SCHEDULE, TIMESTEPS, guidance=1.0).target_of(x0, i, cond, 1.0)
    loss = DistillationLoss(optimize(network), SCHEDULE, TIMESTEPS, guidance=1.0)
    torch.testing.assert_close(loss.target_of(x0, i, cond, 1.0), plain, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss.target_of(x0, i, cond, 1.0), plain, rtol=1e-3, atol=1e-3)


def test_a_bfloat16_teacher_gets_states_of_its_dtype(network):
    x0, i, cond = batch()
    plain = DistillationLoss(network, SCHEDULE, TIMESTEPS, guidance=1.0).target_of(x0, i, cond, 1.0)
    half = copy.deepcopy(network).bfloat16()
    ours = DistillationLoss(half, SCHEDULE, TIMESTEPS, guidance=1.0).target_of(x0, i, cond, 1.0)
    assert ours.dtype == torch.float32 and 0 < (ours - plain).norm() < 0.05 * plain.norm()


def test_a_teacher_whose_weight_is_settled_is_a_plain_one(network):
    x0, i, cond = batch()
    weighted = UNet(dataclasses.replace(network.config, guidance_max=2.0)).eval()
    weighted.load_state_dict(network.state_dict(), strict=False)
    with pytest.raises(ValueError, match=r"settle it: teacher.at_guidance\(w\)"):
        DistillationLoss(weighted, SCHEDULE, TIMESTEPS)
    with torch.no_grad():
        weighted.guidance_embed[2].weight.normal_()
    settled = weighted.at_guidance(1.5)
    ours = DistillationLoss(settled, SCHEDULE, TIMESTEPS).target_of(x0, i, cond)
    drawn = DistillationLoss(weighted, SCHEDULE, TIMESTEPS, guidance=(0.0, 2.0))
    theirs = drawn.target_of(x0, i, cond, torch.full((len(x0),), 1.5))
    torch.testing.assert_close(ours, theirs)


def test_only_the_student_gets_gradients(network):
    x0, i, cond = batch()
    student = UNet(network.config)
    student.load_state_dict(network.state_dict())
    DistillationLoss(network, SCHEDULE, TIMESTEPS, guidance=1.0)(
        student, x0, i, cond, seed=0
    ).backward()
    assert all(p.grad is None for p in network.parameters())
    assert any(p.grad.abs().sum() > 0 for p in student.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weighting": "vlb"}, "weighting='vlb': must be one of 'simple'"),
        ({"prediction": "edm"}, "prediction='edm': must be one of"),
        ({"timesteps": [9, 5, 1]}, "must have an even number"),
    ],
)
def test_bad_requests_are_named(network, change, message):
    arguments = {"schedule": SCHEDULE, "timesteps": TIMESTEPS, **change}
    with pytest.raises(ValueError, match=message):
        DistillationLoss(network, **arguments)


def test_infinite_weights_are_refused():
    schedule = NoiseSchedule.cosine(20).zero_terminal_snr()
    timesteps = schedule.timesteps(4, "trailing")
    DistillationLoss(lambda z, t: z, schedule, timesteps, "x0", weighting="snr_trunc")
    with pytest.raises(ValueError, match="alpha = 0"):
        DistillationLoss(None, schedule, timesteps, "eps")
