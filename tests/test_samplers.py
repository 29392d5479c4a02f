"""The loop: what the model sees, what it may return, and that nothing else changes the samples."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import (
    DDIMSampler,
    DDPMSampler,
    DPMSolverSampler,
    HeunSampler,
    LangevinSampler,
    NoiseSchedule,
    UNet,
    UNetConfig,
    image_to_image,
    inpaint,
    interpolate,
    ops,
)
from fastdiff.losses import bits_per_dim
from fastdiff.models.distilled import Distilled
from fastdiff.table import COLUMNS

schedule = NoiseSchedule.cosine(1000)
SHAPE = (4, 3, 8, 8)
SAMPLERS = {
    "ddim": DDIMSampler(schedule, 10, prediction="v", clip=1.0),
    "ddim-noisy": DDIMSampler(schedule, 10, eta=1.0, prediction="v"),
    "ddpm": DDPMSampler(schedule, 10, prediction="v"),
    "dpmpp": DPMSolverSampler(schedule, 10, eta=1.0, prediction="v"),
    "heun": HeunSampler(schedule, 5, spacing="leading", prediction="v", S_churn=2.0),
    "langevin": LangevinSampler(NoiseSchedule.geometric(0.1, 2.0, 4), inner=3),
}


def model(x, t, cond=None):
    """Nonlinear, and different at each timestep, so that no mix-up goes unseen."""
    t = t.reshape(-1, *(1,) * (x.dim() - 1)).float() / 1000
    out = torch.sin(2 * x + t) - 0.3 * x
    return out if cond is None else out * cond.reshape(t.shape).to(x.dtype)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(name):
    sampler = SAMPLERS[name]
    whole = sampler.sample(model, SHAPE, seed=5)
    assert torch.equal(whole[2:], sampler.sample(model, (2, *SHAPE[1:]), seed=5, first_index=2))
    assert torch.equal(whole[:1], sampler.sample(model, (1, *SHAPE[1:]), seed=[5]))
    assert not torch.equal(whole, sampler.sample(model, SHAPE, seed=6))
    assert whole.dtype is torch.float32 and bool(whole.isfinite().all())


def test_a_model_that_says_it_predicts_something_else_is_refused():
    net = UNet(UNetConfig(8, channels=8, norm_groups=2, attention_resolutions=()))
    ddim, x = DDIMSampler(schedule, 4), torch.zeros(2, 3, 8, 8)
    runs = {
        "sample": lambda: ddim.sample(net, x.shape),
        "like": lambda: DDPMSampler.like("diffusers", schedule, 4).sample(net, x.shape),
        "invert": lambda: ddim.invert(net, x),
        "image to image": lambda: image_to_image(ddim, net, x, 0.5),
        "inpaint": lambda: inpaint(ddim, net, x, x == 0),
        "bits": lambda: bits_per_dim(net, schedule, x),
    }
    for name, run in runs.items():
        net.prediction = "v"
        with pytest.raises(ValueError, match=r"prediction='eps': this model says .*'v'"):
            run()
        net.prediction = "eps"
        if name != "bits":
            run()
    net.prediction = "score"
    LangevinSampler(NoiseSchedule.geometric(0.1, 2.0, 4), inner=1).sample(net, x.shape)


@pytest.mark.parametrize("name", SAMPLERS)
def test_step_is_the_loop_of_sample(name):
    sampler, table = SAMPLERS[name], SAMPLERS[name].table
    x = ops.randn(SHAPE, seed=5) * table.init
    for i in range(len(table)):
        t = torch.full((SHAPE[0],), table.t[i])
        x = sampler.step(model(table.c_in[i] * x, t), i, x, seed=5)
    assert torch.allclose(x, sampler.sample(model, SHAPE, seed=5), rtol=1e-4, atol=1e-5)


def test_given_noise_replaces_the_streams():
    sampler = SAMPLERS["ddpm"]
    x, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    m = model(x, torch.full((4,), sampler.table.t[0]))
    s = sampler.table.s[0]
    silent = sampler.step(m, 0, x, noise=torch.zeros(SHAPE))
    assert torch.allclose(sampler.step(m, 0, x, noise=noise), silent + s * noise, atol=1e-6)


def test_guidance_is_one_doubled_batch_combined():
    seen = []

    def watched(x, t, cond):
        seen.append((len(x), cond.tolist()))
        return model(x, t, cond)

    sampler, w = SAMPLERS["ddim"], 1.5
    cond, uncond = torch.tensor([1.0, 0.9, 0.8, 0.7]), torch.full((4,), 0.2)
    ours = sampler.sample(watched, SHAPE, cond=cond, uncond=uncond, guidance=w)
    assert seen == [(8, cond.tolist() + uncond.tolist())] * 10

    def combined(x, t):
        return (w + 1) * model(x, t, cond) - w * model(x, t, uncond)

    assert torch.allclose(ours, sampler.sample(combined, SHAPE), rtol=1e-4, atol=1e-5)


def test_guidance_interval_runs_the_conditional_half_alone_outside():
    sizes = []

    def watched(x, t, cond):
        sizes.append(len(x))
        return model(x, t, cond)

    sampler, interval = SAMPLERS["ddim"], (0.2, 2.0)
    cond = torch.ones(4)
    ours = sampler.sample(
        watched, SHAPE, cond=cond, uncond=0 * cond, guidance=2.0, guidance_interval=interval
    )
    inside = [interval[0] < sigma <= interval[1] for sigma in sampler.table.sigma]
    assert sizes == [8 if i else 4 for i in inside] and {4, 8} == set(sizes)
    weights = [2.0 * i for i in inside]
    each = sampler.sample(model, SHAPE, cond=cond, uncond=0 * cond, guidance=weights)
    assert torch.equal(ours, each)


def test_guidance_asks_the_model_for_its_null_condition():
    config = UNetConfig(image_size=8, in_channels=3, channels=8, channel_mult=(1,),
                        num_res_blocks=1, attention_resolutions=(), num_classes=4,
                        norm_groups=4)  # fmt: skip
    torch.manual_seed(0)
    unet = UNet(config).eval()
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    labels = torch.tensor([0, 1, 2, 3])
    sampler = DDIMSampler(schedule, 3, prediction="v")
    ours = sampler.sample(unet, SHAPE, cond=labels, guidance=1.0)
    named = sampler.sample(unet, SHAPE, cond=labels, uncond=torch.full((4,), -1), guidance=1.0)
    assert torch.equal(ours, named)
    assert not torch.equal(ours, sampler.sample(unet, SHAPE, cond=labels))


def test_learned_variance_uses_the_second_half_of_the_channels():
    table = (sampler := DDPMSampler(schedule, 10, "learned_range", prediction="v")).table
    x, v, z = torch.randn(SHAPE), torch.rand(SHAPE) * 2 - 1, torch.randn(SHAPE)
    m = model(x, torch.full((4,), table.t[3]))
    ours = sampler.step(torch.cat([m, v], 1), 3, x, noise=z)
    silent = sampler.step(torch.cat([m, v], 1), 3, x, noise=0 * z)
    t, t_next = sampler.timesteps[3], sampler.timesteps[4]
    alphabar, alphabar_next = schedule.alphas_cumprod[[t, t_next]]
    beta = 1 - alphabar / alphabar_next
    beta_tilde = beta * (1 - alphabar_next) / (1 - alphabar)
    std = torch.exp(0.5 * ((v + 1) / 2 * torch.tensor(beta / beta_tilde).log())) * beta_tilde**0.5
    assert torch.allclose(ours - silent, std.float() * z, rtol=1e-4, atol=1e-5)
    # DDIM on the same network leaves the variance channels out
    ddim = SAMPLERS["ddim"]
    assert torch.equal(ddim.step(torch.cat([m, v], 1), 0, x), ddim.step(m, 0, x))


def test_callback_gets_the_predicted_x0():
    sampler, states, previews = SAMPLERS["ddim"], [], []

    def keep(row, x, x0):
        states.append(x.clone())
        previews.append((row, x0))

    out = sampler.sample(model, SHAPE, seed=1, callback=keep)
    assert torch.equal(out, sampler.sample(model, SHAPE, seed=1))
    assert torch.equal(states[-1], out) and [row for row, _ in previews] == list(range(10))
    table = sampler.table
    t = torch.full((4,), table.t[4])
    x = states[3]
    D = (table.px[4] * x + table.pm[4] * model(x, t)).clamp(-1, 1)
    assert torch.allclose(previews[4][1], D.float(), atol=1e-5)


def test_classifier_gradient_shifts_the_score():
    gradient_of = torch.randn(SHAPE)
    sampler = DDIMSampler(schedule, 10, prediction="eps", spacing="leading", classifier_scale=0.5)
    plain = DDIMSampler(schedule, 10, prediction="eps", spacing="leading")
    ours = sampler.sample(model, SHAPE, gradient=lambda x, t: gradient_of)

    def shifted(x, t):  # Dhariwal & Nichol 2021, Algorithm 2
        sigma = torch.tensor(schedule.sigma)[t].float()
        return model(x, t) - 0.5 * sigma[:, None, None, None] * gradient_of

    assert torch.allclose(ours, plain.sample(shifted, SHAPE), rtol=1e-3, atol=1e-3)


class Gaussian(torch.nn.Module):
    """The perfect eps for data N(mean, std^2), computed and returned in a given dtype."""

    mean, std = 0.3, 0.5

    def __init__(self, schedule, dtype):
        super().__init__()
        self.dtype_of = torch.nn.Parameter(torch.ones((), dtype=dtype))
        alpha, sigma = torch.tensor(schedule.alpha), torch.tensor(schedule.sigma)
        self.scale = (sigma / (alpha**2 * self.std**2 + sigma**2)).to(dtype)
        self.shift = (alpha * self.mean).to(dtype)

    def forward(self, x, t):
        assert x.dtype is self.dtype_of.dtype
        return (x - self.shift[t[0]]) * self.scale[t[0]]


def test_bfloat16_model_with_float32_state_stays_close_over_1000_steps():
    schedule = NoiseSchedule.linear(1000)
    sampler = DDIMSampler(schedule, 1000)
    x_T = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ours = sampler.sample(Gaussian(schedule, torch.bfloat16), x_T.shape, x_T=x_T)
    # the closed form: the deterministic map of every row is affine
    a, b, px, pm = (getattr(sampler.table, name) for name in ("a", "b", "px", "pm"))
    exact = x_T.double()
    for i, t in enumerate(sampler.timesteps):
        alpha, sigma = schedule.alpha[t], schedule.sigma[t]
        eps = sigma * (exact - alpha * Gaussian.mean) / (alpha**2 * Gaussian.std**2 + sigma**2)
        exact = a[i] * exact + b[i] * (px[i] * exact + pm[i] * eps)
    error = (ours.double() - exact).norm() / exact.norm()
    assert error <= 5e-3


class Allocations(TorchDispatchMode):
    """Counts the operators that make memory."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.seen.append(str(func))
        return out


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp", "heun"])
def test_rows_after_the_first_allocate_nothing(name):
    sampler = SAMPLERS[name]
    fixed = torch.randn(SHAPE)
    counts = []

    def free(x, t):
        counts.append(len(allocations.seen))
        return fixed

    with Allocations() as allocations:
        sampler.sample(free, SHAPE)
    assert len(counts) == len(sampler.table) and counts[1:] == counts[1:2] * (len(counts) - 1)


def test_inversion_comes_back_with_first_order_error():
    x0 = torch.rand(SHAPE) * 2 - 1
    errors = []
    for steps in (50, 100, 200):
        sampler = DDIMSampler(schedule, steps, prediction="v", spacing="trailing")
        back = sampler.sample(model, SHAPE, x_T=sampler.invert(model, x0))
        errors.append((back - x0).abs().mean().item())
    ratios = [errors[0] / errors[1], errors[1] / errors[2]]
    assert errors[2] < 0.05 and all(1.6 < ratio < 2.6 for ratio in ratios)


def test_inputs_are_left_alone():
    x_T, x0 = torch.randn(SHAPE), torch.rand(SHAPE)
    kept = copy.deepcopy((x_T, x0))
    SAMPLERS["ddim"].sample(model, SHAPE, x_T=x_T)
    SAMPLERS["ddim"].invert(model, x0)
    assert torch.equal(x_T, kept[0]) and torch.equal(x0, kept[1])


def test_state_is_float32_for_a_half_precision_network():
    config = UNetConfig(image_size=8, in_channels=3, channels=8, channel_mult=(1,),
                        num_res_blocks=1, attention_resolutions=(), norm_groups=4)  # fmt: skip
    unet = UNet(config).to(torch.bfloat16)
    assert DDIMSampler(schedule, 3, prediction="v").sample(unet, SHAPE).dtype is torch.float32


@pytest.mark.parametrize("parameters, output", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_network_may_give_another_dtype_than_it_takes(parameters, output):
    """As under autocast, where float32 networks give bfloat16."""
    parameters, output = getattr(torch, parameters), getattr(torch, output)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.ones((), dtype=parameters))

        def forward(self, x, t, cond):
            assert x.dtype is parameters
            return model(x.float(), t, cond).to(output)

    cond = torch.ones(4)
    run = {"cond": cond, "uncond": 0.5 * cond, "guidance": 1.0}
    ours = SAMPLERS["ddim"].sample(Net(), SHAPE, **run)
    exact = SAMPLERS["ddim"].sample(model, SHAPE, **run)
    assert (ours - exact).norm() < 0.05 * exact.norm()


def test_interpolation_stays_on_the_sphere_and_meets_both_ends():
    a, b = torch.randn(2, 5, 3, 8, 8, dtype=torch.float64)
    out = interpolate(a, b, [0, 0.25, 0.5, 1])
    assert out.shape == (4, 5, 3, 8, 8)
    assert torch.allclose(out[0], a) and torch.allclose(out[3], b)
    unit_a, unit_b = (x / x.flatten(1).norm(dim=1)[:, None, None, None] for x in (a, b))
    quarter = interpolate(unit_a, unit_b, [0.25])[0]
    angle = lambda p, q: torch.arccos((p * q).flatten(1).sum(1))  # noqa: E731
    assert torch.allclose(quarter.flatten(1).norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert torch.allclose(angle(unit_a, quarter), angle(unit_a, unit_b) / 4)
    assert torch.equal(interpolate(a, a, [0.5])[0], a)
    with pytest.raises(ValueError, match="opposite"):
        interpolate(a, -a, [0.5])


def test_diffusers_models_run_as_they_are():
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    ours = DDIMSampler(schedule, 3, prediction="v").sample(unet, SHAPE, seed=1)
    plain = DDIMSampler(schedule, 3, prediction="v").sample(
        lambda x, t: unet(x, t, return_dict=False)[0].detach(), SHAPE, seed=1
    )
    assert torch.equal(ours, plain)


def test_tables_are_printed_and_named_by_column():
    text = repr(SAMPLERS["ddim"])
    assert "DDIMSampler" in text and "10 rows" in text
    assert SAMPLERS["ddim"].table.tensor().shape == (10, len(COLUMNS))


def test_spacings_may_imply_the_steps():
    assert len(DDIMSampler(schedule, spacing="ddim25").table) == 25
    assert DDIMSampler(schedule, spacing=[999, 500, 0], prediction="v").timesteps[1] == 500
    assert [len(s(schedule, prediction="v").timesteps) for s in (DDIMSampler, DDPMSampler)] == [
        50,
        1000,
    ]


sampler, x = SAMPLERS["ddim"], torch.zeros(SHAPE)
noise_model = lambda x, t: x  # noqa: E731
BAD = {
    "shape=(4,)": lambda: sampler.sample(model, (4,)),
    "shape=(0, 3)": lambda: sampler.sample(model, (0, 3)),
    "x_T: has shape": lambda: sampler.sample(model, SHAPE, x_T=x[:1]),
    "x_T: has dtype": lambda: sampler.sample(model, SHAPE, x_T=x.half()),
    "guidance: needs": lambda: sampler.sample(model, SHAPE, guidance=1.0),
    "uncond: guidance needs": lambda: sampler.sample(model, SHAPE, cond=x[:, 0], guidance=1.0),
    "guidance_interval: was": lambda: sampler.sample(model, SHAPE, guidance_interval=(0, 1)),
    "cond: has batch 3": lambda: sampler.sample(model, SHAPE, cond=torch.zeros(3)),
    "gradient: is needed": lambda: sampler.sample(model, SHAPE, gradient=model),
    "seed=-3": lambda: sampler.sample(model, SHAPE, seed=-3),
    "model: its output has shape": lambda: sampler.sample(lambda x, t: x[:1], SHAPE),
    "model: its output: has dtype": lambda: sampler.sample(lambda x, t: x.double(), SHAPE),
    "model: its output: must be": lambda: sampler.sample(lambda x, t: (x,), SHAPE),
    "model: its parameters": lambda: sampler.sample(torch.nn.Linear(8, 8).double(), SHAPE),
    "model: its output has 3 channels": lambda: DDPMSampler(
        schedule, variance="learned_range"
    ).sample(noise_model, SHAPE),
    "i=10": lambda: sampler.step(x, 10, x),
    "i=1": lambda: DPMSolverSampler(schedule, 3, prediction="v").step(x, 1, x),
    "x: has dtype": lambda: sampler.step(x, 0, x.half()),
    "noise: has shape": lambda: sampler.step(x, 0, x, noise=x[0]),
    "steps=1001": lambda: DDIMSampler(schedule, 1001),
    "steps=0": lambda: DDIMSampler(schedule, 0),
    "eta=1.5": lambda: DDIMSampler(schedule, 10, eta=1.5),
    "prediction='noise'": lambda: DDIMSampler(schedule, 10, prediction="noise"),
    "variance='tiny'": lambda: DDPMSampler(schedule, 10, variance="tiny"),
    "spacing='even'": lambda: DDIMSampler(schedule, spacing="even"),
    "clip[0]=-1.0": lambda: DDIMSampler(schedule, 10, clip=-1.0),
    "peer='mine'": lambda: DDIMSampler.like("mine", schedule, 10),
    "x_a": lambda: interpolate(x[:, 0, 0, 0], x[:, 0, 0, 0], [0.5]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises((ValueError, TypeError)) as caught:
        BAD[message]()
    assert str(caught.value).startswith(message)


def test_first_indices_are_integers_also_where_an_equal_one_was_seen_before():
    sampler, x = DDPMSampler(NoiseSchedule.cosine(50), 3), torch.zeros(2, 1, 4)
    sampler.step(x, 0, x, first_index=1)
    for wrong in (1.0, [1.0, 2.0]):
        with pytest.raises(TypeError, match="first_index"):
            sampler.step(x, 0, x, first_index=wrong)


def test_what_is_refused_has_the_name_that_the_user_gave():
    sampler, cond = DDIMSampler(schedule, 2, prediction="v"), torch.ones(4)
    for said, how in {
        "guidance: w: has shape": {"guidance": [1.0, 2.0, 3.0]},
        "guidance: w: must be a number": {"guidance": "1"},
        "guidance_interval: interval=0.3: must be a pair": {
            "guidance": 1.0,
            "guidance_interval": 0.3,
        },
        "seed=None: must be an int, or one a sample": {"seed": None},
        "cond: must be a torch.Tensor, got str": {"cond": "boot"},
        r"shape: is a Tensor \(4, 3, 8, 8\), must be a sequence": {"shape": torch.zeros(SHAPE)},
    }.items():
        with pytest.raises((TypeError, ValueError), match=said):
            sampler.sample(model, **{"shape": SHAPE, "cond": cond, "uncond": cond, **how})


def test_a_student_that_has_its_guidance_is_not_guided_again():
    student = UNet(
        UNetConfig(8, channels=8, norm_groups=2, attention_resolutions=(), num_classes=3)
    )
    student.distilled = Distilled((99, 49), 0.5)
    sampler, labels = DDIMSampler(NoiseSchedule.cosine(100), 2), torch.tensor([0, 1])
    sampler.sample(student, (2, 3, 8, 8), cond=labels)
    with pytest.raises(ValueError, match=r"guidance: this student has learned the weight 0\.5"):
        sampler.sample(student, (2, 3, 8, 8), cond=labels, guidance=1.0)
