"""Models that are guided, and weights by row: each against its paper, written out in float64."""

import doctest
import importlib
import itertools

import numpy as np
import oracles
import pytest
import torch
from tape import TapeLane
from test_no_sync import NoWaiting

from fastdiff import (
    DDIMSampler,
    DDPMSampler,
    DPMSolverSampler,
    HeunSampler,
    NoiseSchedule,
    graph,
    image_to_image,
    ops,
)
from fastdiff.guidance import (
    APG,
    ClassifierGuidance,
    DynamicThreshold,
    GuidanceRescale,
    Guided,
    cfg_plus_plus,
)

schedule = NoiseSchedule.cosine(1000)
SHAPE = (4, 3, 6, 5)
COND = torch.tensor([1.0, 0.9, 0.8, 0.7])
W = 3.0


def model(x, t, cond):
    """Nonlinear in x, and different at each timestep and condition."""
    t, cond = (v.reshape(-1, 1, 1, 1).to(x.dtype) for v in (torch.as_tensor(t), cond))
    return torch.sin((1 + cond) * x + t / 1000) - 0.3 * x + 0.2 * cond


def no_cond(cond):
    return 0.1 * cond


def pair(x, t):
    """The conditional and the unconditional output."""
    return model(x, t, COND), model(x, t, no_cond(COND))


def x0(x, t, v):
    return schedule.alpha[int(t)] * x - schedule.sigma[int(t)] * v


def v_of(x, t, D):
    return (schedule.alpha[int(t)] * x - D) / schedule.sigma[int(t)]


def ddim_of(guided, steps=10):
    """DDIM from seed 2 with a textbook's guided v, (x, t) -> v, in float64."""
    timesteps = schedule.timesteps(steps, "trailing").tolist()
    abars = schedule.alphas_cumprod[timesteps].tolist()
    start = ops.randn(SHAPE, seed=2).double()
    return oracles.ddim(start, guided, timesteps, abars, prediction="v")


def sampled(guided, sampler=None, **how):
    sampler = sampler or DDIMSampler(schedule, 10, spacing="trailing", prediction="v")
    return sampler.sample(guided, SHAPE, seed=2, cond=COND, **how)


def close(ours, exact):
    return torch.allclose(ours.double(), exact.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "sampler",
    [
        DDIMSampler(schedule, 10, prediction="v"),
        DDPMSampler(schedule, 10, prediction="v"),
        DPMSolverSampler(schedule, 10, prediction="v"),
        HeunSampler(schedule, 5, spacing="leading", prediction="v"),
    ],
    ids=lambda sampler: sampler.solver,
)
def test_a_guided_model_is_guidance_for_any_sampler(sampler):
    calls = []

    def watched(x, t, cond):
        calls.append(len(x))
        return model(x, t, cond)

    ours = sampled(Guided(watched, W, null_cond=no_cond), sampler)
    assert calls == [8] * len(sampler.table)
    assert close(ours, sampled(model, sampler, uncond=no_cond(COND), guidance=W))


def test_rescale_is_that_of_the_paper():
    def guided(x, t):
        m_c, m_u = pair(x, t)
        cfg = m_u + (W + 1) * (m_c - m_u)
        ratio = m_c.flatten(1).std(1) / cfg.flatten(1).std(1)
        return 0.7 * cfg * ratio.reshape(-1, 1, 1, 1) + 0.3 * cfg

    ours = sampled(GuidanceRescale(model, W, null_cond=no_cond))
    assert close(ours, ddim_of(guided))
    plain = sampled(Guided(model, W, null_cond=no_cond))
    assert close(sampled(GuidanceRescale(model, W, 0.0, null_cond=no_cond)), plain)
    assert not close(ours, plain)


@pytest.mark.filterwarnings("error")
def test_one_value_has_nothing_to_rescale():
    x, t = torch.ones(4, 1, 1, 1), torch.full((4,), 3)
    plain, rescaled = (
        kind(model, W, null_cond=no_cond)(x, t, COND) for kind in (Guided, GuidanceRescale)
    )
    assert torch.equal(rescaled, plain)


def apg_of(eta=0.0, radius=float("inf"), momentum=0.0):
    """Sadat et al. 2024, Algorithm 1, sample by sample; the average is a run's."""
    averages = [0.0] * len(COND)

    def guided(x, t):
        D_c, D_u = (x0(x, t, m) for m in pair(x, t))
        out = []
        for k in range(len(x)):
            averages[k] = D_c[k] - D_u[k] + momentum * averages[k]
            update = averages[k] * min(1.0, radius / float(averages[k].norm()))
            along = (update * D_c[k]).sum() / (D_c[k] ** 2).sum() * D_c[k]
            out.append(D_c[k] + W * (update - along + eta * along))
        return v_of(x, t, torch.stack(out))

    return guided


SETTINGS = [{"eta": 0.0}, {"eta": 0.3, "radius": 2.0}, {"momentum": -0.5, "radius": 5.0}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_apg_is_that_of_the_paper(settings):
    settings = {"momentum": 0.0, **settings}
    ours = sampled(APG(model, W, schedule, "v", null_cond=no_cond, **settings))
    assert close(ours, ddim_of(apg_of(**settings)))


def test_apg_with_all_of_the_update_is_plain_guidance():
    guided = APG(model, W, schedule, "v", eta=1.0, momentum=0.0, null_cond=no_cond)
    assert close(sampled(guided), sampled(Guided(model, W, null_cond=no_cond)))


def test_the_momentum_of_a_run_ends_with_it():
    """Whatever was run before, to its end or not, and of one row or many."""
    guided = APG(model, W, schedule, "v", momentum=-0.5, null_cond=no_cond)
    fresh = lambda: APG(model, W, schedule, "v", momentum=-0.5, null_cond=no_cond)  # noqa: E731
    first = sampled(guided)
    assert torch.equal(sampled(guided), first)
    part = DDIMSampler(schedule, 10, spacing="trailing", prediction="v")
    part.sample(guided, (2, *SHAPE[1:]), cond=COND[:2])
    for i in range(3):  # a run that is left half-way
        guided(torch.randn(SHAPE), torch.full((4,), int(part.timesteps[i])), COND)
    assert torch.equal(sampled(guided), first)
    one = DDIMSampler(schedule, 1, spacing="trailing", prediction="v")
    sampled(guided, one)
    assert torch.equal(sampled(guided, one), sampled(fresh(), one))


def test_a_run_takes_nothing_from_one_that_ended_above_it():
    sampler = DDIMSampler(schedule, 20, spacing="trailing", prediction="v")
    fresh, guided = (APG(model, W, schedule, "v", null_cond=no_cond) for _ in range(2))
    guided(torch.randn(SHAPE), torch.full((4,), 900), COND)
    late = [
        image_to_image(sampler, each, torch.zeros(SHAPE), 0.2, cond=COND)
        for each in (guided, fresh)
    ]
    assert torch.equal(*late)


def test_apg_serves_runs_in_inference_mode_and_out_of_it():
    guided = APG(model, W, schedule, "v", null_cond=no_cond)
    with torch.inference_mode():
        first = sampled(guided)
    assert torch.equal(sampled(guided), first)
    x = torch.randn(SHAPE, requires_grad=True)
    for now in (500, 400):  # a loop that differentiates
        (gradient,) = torch.autograd.grad(guided(x, torch.full((4,), now), COND).sum(), x)
        assert gradient.isfinite().all()


def test_the_momentum_goes_through_the_two_rows_of_a_step():
    """Heun's method asks at each level twice, and both belong to one run."""
    averages, seen = [], []

    def watched(x, t, cond):
        D_c, D_u = (x0(x[i : i + 4], t[0], model(x[i : i + 4], t[:4], c)) for i, c in halves)
        averages.append(D_c - D_u - 0.5 * (averages[-1] if averages else 0.0))
        seen.append(int(t[0]))
        return model(x, t, cond)

    halves = ((0, COND), (4, no_cond(COND)))
    guided = APG(watched, W, schedule, "v", momentum=-0.5, null_cond=no_cond)
    sampled(guided, HeunSampler(schedule, 4, spacing="leading", prediction="v"))
    assert len(seen) == 7 and len(set(seen)) == 4
    (run,) = guided._runs.values()
    assert close(run.average, averages[-1].flatten(1))


@pytest.mark.parametrize("percentile", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_thresholding_is_that_of_the_paper(percentile):
    """Saharia et al. 2022, section 2.3, of a model without guidance and of one with."""

    def thresholded(m):
        def guided(x, t):
            D = x0(x, t, m(*pair(x, t)))
            flat = D.abs().flatten(1).numpy()
            s = torch.from_numpy(np.maximum(np.quantile(flat, percentile, axis=1), 1.0))
            s = s.reshape(-1, 1, 1, 1)
            return v_of(x, t, torch.minimum(torch.maximum(D, -s), s) / s)

        return guided

    plain = sampled(DynamicThreshold(model, schedule, "v", percentile))
    assert close(plain, ddim_of(thresholded(lambda m_c, m_u: m_c)))
    guided = Guided(model, W, null_cond=no_cond)
    ours = sampled(DynamicThreshold(guided, schedule, "v", percentile))
    assert close(ours, ddim_of(thresholded(lambda m_c, m_u: m_c + W * (m_c - m_u))))
    assert ours.abs().max() <= 1 + 1e-5 and sampled(guided).abs().max() > 1.05


def test_a_sample_alone_has_a_threshold():
    """One element a sample is its own percentile."""
    x = torch.tensor([[3.0], [-0.5]])
    out = DynamicThreshold(lambda x, t: x, schedule, "x0")(x, torch.tensor([5, 5]))
    assert out.tolist() == [[1.0], [-0.5]]


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
def test_the_data_space_is_that_of_the_table(prediction):
    """The x0 that a sampler reads from the guided prediction is the thresholded one."""
    sampler = DDIMSampler(schedule, 5, spacing="leading", prediction=prediction)
    model = lambda x, t: 3 * torch.sin(2 * x)  # noqa: E731
    seen = []
    sampler.sample(
        DynamicThreshold(model, schedule, prediction),
        SHAPE,
        callback=lambda row, x, x0: seen.append(x0.abs().amax(dim=(1, 2, 3))),
    )
    assert all(bool((most <= 1 + 1e-4).all()) for most in seen)
    assert (seen[0] > 1 - 1e-4).all()


WRAPPED = {
    "guided": lambda net: Guided(net, W),
    "rescale": lambda net: GuidanceRescale(net, W),
    "apg": lambda net: APG(net, W, schedule, "v"),
    "threshold": lambda net: DynamicThreshold(Guided(net, W), schedule, "v"),
}


class Net(torch.nn.Module):
    """Takes its parameters' dtype, and gives a learned variance if asked."""

    def __init__(self, dtype=torch.float32, learned=False):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones((), dtype=dtype))
        self.learned = learned

    def null_cond(self, cond):
        return no_cond(cond)

    def forward(self, x, t, cond):
        assert x.dtype is self.gain.dtype
        out = (self.gain * model(x.float(), t, cond)).to(x.dtype)
        return torch.cat([out, 0.1 * out], 1) if self.learned else out


@pytest.mark.parametrize("name", WRAPPED)
def test_all_but_the_network_is_in_float32(name):
    """A bfloat16 network's own rounding is all that is lost: outputs of one value each, so that
    it loses nothing, give what float32 gives, bit for bit."""

    class Coarse(Net):
        def forward(self, x, t, cond):
            sign = torch.sign(super().forward(x, t, cond).float().mean((1, 2, 3), keepdim=True))
            return (self.gain * (sign * torch.linspace(-1, 1, 5).sign() / 2)).expand_as(x)

    wrap = WRAPPED[name]
    ours, exact = (sampled(wrap(Coarse(d))) for d in (torch.bfloat16, torch.float32))
    assert ours.dtype is torch.float32 and torch.equal(ours, exact)
    out = wrap(Net(torch.bfloat16))(torch.randn(SHAPE), torch.full((4,), 500), COND)
    assert out.dtype is torch.float32


@pytest.mark.parametrize("name", WRAPPED)
def test_a_learned_variance_passes_through(name):
    x, t = torch.randn(SHAPE), torch.full((4,), 500)
    plain, learned = (WRAPPED[name](Net(learned=each))(x, t, COND) for each in (False, True))
    assert torch.equal(learned[:, :3], plain)
    assert torch.allclose(learned[:, 3:], 0.1 * model(x, t, COND))
    sampler = DDPMSampler(schedule, 10, "learned_range", prediction="v")
    assert sampled(WRAPPED[name](Net(learned=True)), sampler).isfinite().all()


@pytest.mark.parametrize("name", WRAPPED)
def test_a_sample_does_not_depend_on_its_batch(name):
    sampler = DDPMSampler(schedule, 10, prediction="v")
    whole = sampled(WRAPPED[name](Net()), sampler)
    how = {"seed": 2, "cond": COND[2:], "first_index": 2}
    part = sampler.sample(WRAPPED[name](Net()), (2, *SHAPE[1:]), **how)
    assert torch.allclose(part, whole[2:], atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", WRAPPED)
def test_nothing_is_read_back(name, device):
    """Also on a device that has no data to read."""
    guided = WRAPPED[name](Net()).to(device)
    sampler = DDIMSampler(schedule, 4, prediction="v")
    with NoWaiting():
        out = sampler.sample(guided, SHAPE, cond=torch.ones(4, device=device), graph=False)
    assert out.device.type == device


@pytest.mark.parametrize("name", WRAPPED)
def test_rows_are_captured_as_graphs(name, monkeypatch):
    """APG's average is in memory that stays, and a replayed run starts its own."""
    lane = type("Lane", (TapeLane,), {"on": torch.device("cpu")})
    monkeypatch.setitem(graph.LANES, "cpu", lane)
    guided = WRAPPED[name](Net())
    exact = sampled(WRAPPED[name](Net()), graph=False)
    for _ in range(3):
        assert torch.equal(sampled(guided, graph=True), exact)


def test_settings_that_change_are_captured_anew(monkeypatch):
    lane = type("Lane", (TapeLane,), {"on": torch.device("cpu")})
    monkeypatch.setitem(graph.LANES, "cpu", lane)
    changes = {"w": 1.0, "phi": 0.2, "eta": 0.5, "radius": 0.5, "momentum": 0.5, "percentile": 0.5}
    for name, wrap in WRAPPED.items():
        guided = wrap(Net())
        sampled(guided, graph=True)
        for part in guided.modules():
            for setting in changes.keys() & vars(part).keys():
                setattr(part, setting, changes[setting])
                ours = sampled(guided, graph=True)
                assert torch.equal(ours, sampled(guided, graph=False)), (name, setting)
    guide = ClassifierGuidance(lambda x, t: x.mean((2, 3)), torch.tensor([0, 1, 0, 1]))
    before, guide.labels = graph._state(guide), torch.tensor([1, 1, 0, 0])
    assert graph._state(guide) != before


def test_an_optimized_model_is_told_of_the_doubled_batch():
    told = []

    class Optimized(Net):
        def prepare_rows(self, x, t, cond):
            told.append((x.shape, t.shape, cond))

    for name, wrap in WRAPPED.items():
        sampled(wrap(Optimized()))
        shape, t, cond = told.pop()
        assert (shape, t) == ((8, *SHAPE[1:]), (10, 8)) and not told, name
        assert torch.equal(cond, torch.cat([COND, no_cond(COND)]))
    with pytest.raises(ValueError, match="guidance: needs a condition"):
        DDIMSampler(schedule, 10, prediction="v").sample(Guided(Optimized(), W), SHAPE)


def cfg_pp(x, eps_c, eps_u, timesteps, abars, scale, eta, noises):
    """Chung et al. 2024, Algorithm 2, in eps, with DDIM's noise beside it."""
    draws = iter(noises)
    for t, abar, prev in zip(timesteps, abars, [*abars[1:], 1.0], strict=True):
        plain = eps_u(x, t)
        guided = plain + scale * (eps_c(x, t) - plain)
        denoised = (x - (1 - abar) ** 0.5 * guided) / abar**0.5
        s = eta * ((1 - prev) / (1 - abar)) ** 0.5 * (1 - abar / prev) ** 0.5
        x = prev**0.5 * denoised + max(1 - prev - s**2, 0.0) ** 0.5 * plain
        x = x + s * next(draws) if s else x
    return x


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_cfg_plus_plus_is_guidance_by_row(steps, scale, eta):
    """The identity is exact: in float64 the two loops agree to rounding."""
    sampler = DDIMSampler(schedule, steps, eta, "trailing", "eps")
    weights = cfg_plus_plus(sampler, scale)
    timesteps = sampler.timesteps.tolist()
    u = [*(schedule.sigma / schedule.alpha)[timesteps], 0.0]
    if eta == 0:
        wanted = [scale / (1 - after / now) - 1 for now, after in itertools.pairwise(u)]
        assert np.allclose(weights, wanted)
    start = torch.randn(SHAPE, dtype=torch.float64)
    noises = [torch.randn(SHAPE, dtype=torch.float64) for _ in timesteps[1:]] if eta else []
    eps_c, eps_u = lambda x, t: pair(x, t)[0], lambda x, t: pair(x, t)[1]
    table = sampler.table.with_guidance(weights)
    ours = oracles.execute(table, start, eps_c, noises, eps_u)
    abars = schedule.alphas_cumprod[timesteps].tolist()
    exact = cfg_pp(start, eps_c, eps_u, timesteps, abars, scale, eta, noises)
    assert (ours - exact).abs().max() < 1e-9 * exact.abs().max()


def test_cfg_plus_plus_is_sampled():
    sampler = DDIMSampler(schedule, 10, spacing="trailing", prediction="v")

    def eps(half):
        return lambda x, t: schedule.sigma[t] * x + schedule.alpha[t] * pair(x, t)[half]

    abars = schedule.alphas_cumprod[sampler.timesteps].tolist()
    start = ops.randn(SHAPE, seed=2).double()
    exact = cfg_pp(start, eps(0), eps(1), sampler.timesteps.tolist(), abars, 0.6, 0.0, [])
    how = {"uncond": no_cond(COND), "guidance": cfg_plus_plus(sampler, 0.6)}
    assert torch.allclose(sampled(model, sampler, **how).double(), exact, rtol=1e-3, atol=1e-3)


def test_guidance_in_an_interval_is_that_of_the_paper():
    """Kynkaanniemi et al. 2024, equation 4: guided where lo < sigma <= hi, else conditional."""
    low, high = 0.3, 3.0
    u = schedule.sigma / schedule.alpha

    def guided(x, t):
        m_c, m_u = pair(x, t)
        return m_u + (W + 1) * (m_c - m_u) if low < u[int(t)] <= high else m_c

    timesteps = schedule.timesteps(10, "trailing")
    inside = [low < u[t] <= high for t in timesteps]
    assert 0 < sum(inside) < 10 and not inside[0] and not inside[-1]
    how = {"guidance": W, "guidance_interval": (low, high), "uncond": no_cond(COND)}
    assert close(sampled(model, **how), ddim_of(guided))
    # both ends as they are said to be: the lower one is left out
    edge = {**how, "guidance_interval": (u[timesteps[5]], u[timesteps[2]])}
    weights = [W if i in (2, 3, 4) else 0.0 for i in range(10)]
    each = sampled(model, guidance=weights, uncond=no_cond(COND))
    assert torch.equal(sampled(model, **edge), each)


def test_zero_terminal_snr():
    """v and x0 are guided from pure noise on; eps is refused with advice."""
    zero = schedule.zero_terminal_snr()
    sampler = DDIMSampler(zero, 10, spacing="trailing", prediction="v")
    assert sampler.table.sigma[0] == np.inf
    for guided in (
        APG(model, W, zero, "v", null_cond=no_cond),
        DynamicThreshold(Guided(model, W, null_cond=no_cond), zero, "v"),
    ):
        assert sampled(guided, sampler).isfinite().all()
    weights = cfg_plus_plus(sampler, 0.6)
    assert weights[0] == pytest.approx(0.6 - 1)
    for build in (
        lambda: APG(model, W, zero, "eps"),
        lambda: DynamicThreshold(model, zero, "eps"),
        lambda: DDIMSampler(zero, 10, spacing="trailing", prediction="eps"),
    ):
        with pytest.raises(ValueError, match=r"alpha = 0.*use prediction='v'"):
            build()


def test_zero_terminal_snr_draws_data_whose_mean_is_not_zero():
    """What it is for (Lin et al. 2023, section 3): started from pure noise, a schedule that ends
    short of it draws data N(1, 0.5^2) with a mean that is off, this one does not."""
    mu, s, n = 1.0, 0.5, 4000
    means = {}
    for made in (
        NoiseSchedule.scaled_linear(1000),
        NoiseSchedule.scaled_linear().zero_terminal_snr(),
    ):
        alpha, sigma = torch.tensor(made.alpha), torch.tensor(made.sigma)

        def v(x, t, alpha=alpha, sigma=sigma):
            a, b = alpha[t[0]], sigma[t[0]]
            D = mu + a * s**2 / (a**2 * s**2 + b**2) * (x - a * mu)
            return ((a * x - D) / b).float()

        sampler = DDIMSampler(made, 500, spacing="trailing", prediction="v")
        out = sampler.sample(v, (n, 1), seed=1)
        means[made.alpha[-1] == 0] = (float(out.mean()) - mu) / s, float(out.std()) / s
    assert abs(means[True][0]) < 5 / n**0.5 and abs(means[True][1] - 1) < 0.08
    assert abs(means[False][0]) > 0.04


def test_the_examples_in_the_docstrings_run():
    for name in ("guided", "rescale", "apg", "threshold", "cfg_plus_plus"):
        module = importlib.import_module(f"fastdiff.guidance.{name}")
        failed, _ = doctest.testmod(module)
        assert not failed


x, t = torch.zeros(SHAPE), torch.full((4,), 5)
ddim = DDIMSampler(schedule, 10, prediction="v")
BAD = {
    "w=inf": lambda: Guided(model, float("inf")),
    "phi=1.5": lambda: GuidanceRescale(model, W, 1.5),
    "eta=2": lambda: APG(model, W, schedule, "v", eta=2),
    "radius=0": lambda: APG(model, W, schedule, "v", radius=0),
    "momentum=1": lambda: APG(model, W, schedule, "v", momentum=1),
    "prediction='edm'": lambda: APG(model, W, schedule, "edm"),
    "percentile=0": lambda: DynamicThreshold(model, schedule, "v", 0),
    "t: has dtype": lambda: APG(Net(), W, schedule, "v")(x, t.float(), COND),
    "guidance: needs": lambda: Guided(Net(), W)(x, t),
    "uncond: guidance needs": lambda: Guided(model, W)(x, t, COND),
    "uncond: has shape": lambda: Guided(model, W, null_cond=lambda c: c[:1])(x, t, COND),
    "model: its output has shape": lambda: Guided(
        lambda x, t, c: x[:4], W, null_cond=no_cond
    )(x, t, COND),
    "scale=1.5": lambda: cfg_plus_plus(ddim, 1.5),
    "sampler: must": lambda: cfg_plus_plus(DDPMSampler(schedule, 10, prediction="v"), 0.5),
    "sampler: CFG++": lambda: cfg_plus_plus(
        DDIMSampler(schedule, 10, prediction="v", clip=1.0), 0.5
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises((ValueError, TypeError)) as caught:
        BAD[message]()
    assert str(caught.value).startswith(message)


def test_of_a_float64_state_the_prediction_is_float32():
    schedule, x = NoiseSchedule.cosine(50), torch.ones(2, 1, 4, dtype=torch.float64)
    t, cond = torch.tensor([10, 40]), torch.tensor([0.0, 1.0])
    assert DynamicThreshold(lambda x, t: x, schedule, "v")(x, t).dtype == torch.float32
    model = APG(
        lambda x, t, c: x + c[:, None, None], 2.0, schedule, "v", null_cond=torch.zeros_like
    )
    assert model(x, t, cond).dtype == torch.float32
