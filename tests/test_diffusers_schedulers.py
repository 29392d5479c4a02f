"""Our schedulers for diffusers give what diffusers' give, to rounding, for all their options."""

import copy
import pickle

import pytest
import torch

from fastdiff import DDIMSampler, DDPMSampler, NoiseSchedule
from fastdiff.integrations import diffusers as ours

diffusers = pytest.importorskip("diffusers")

SHAPE = 2, 4, 8, 8
STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
OPTIONS = {
    "DDIMScheduler": [
        {},
        {"timestep_spacing": "linspace"},
        {"timestep_spacing": "trailing"},
        {"clip_sample": False},
        {"clip_sample_range": 0.3, "prediction_type": "v_prediction"},
        {"thresholding": True},
        {"thresholding": True, "sample_max_value": 3.0, "prediction_type": "sample"},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
        STABLE_DIFFUSION,
        {**ZERO_SNR, "timestep_spacing": "trailing"},
    ],
    "DDPMScheduler": [
        *({"variance_type": kind} for kind in ("fixed_small", "fixed_small_log", "fixed_large")),
        {"variance_type": "learned_range"},
        {"variance_type": "learned_range", "thresholding": True},
        {"timestep_spacing": "trailing", "clip_sample": False},
        {"thresholding": True, "sample_max_value": 2.0},
        {**ZERO_SNR, "timestep_spacing": "linspace"},
        {"beta_schedule": "sigmoid", "prediction_type": "sample"},
    ],
    "DPMSolverMultistepScheduler": [
        {},
        {"solver_order": 1},
        {"solver_type": "heun"},
        {"use_karras_sigmas": True},
        {"use_lu_lambdas": True},
        {"use_exponential_sigmas": True},
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
        {"final_sigmas_type": "sigma_min", "euler_at_final": True, "timestep_spacing": "leading"},
        {"thresholding": True},
        {**ZERO_SNR, "timestep_spacing": "trailing"},
        {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
        {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "solver_order": 2},
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "steps_offset": 1},
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 1, "thresholding": True},
    ],
}
CASES = [(name, options) for name, many in OPTIONS.items() for options in many]


def pair(name, options, bug_compatible=False):
    mine = getattr(ours, name)(**options)
    mine.bug_compatible = bug_compatible
    return mine, getattr(diffusers, name)(**options)


def model(x, t, channels=4):
    mix = torch.randn(4, channels, generator=torch.Generator().manual_seed(2)) / 2
    return torch.einsum("bchw,cd->bdhw", x.float(), mix).tanh() * (1 + t / 1000)


def sampled(scheduler, steps, start=0, dtype=torch.float32, return_dict=True, **options):
    """All states, as a pipeline would make them from step `start` on, and all predictions."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    learned = scheduler.config.get("variance_type") == "learned_range"
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    states, predictions = [], []
    for t in scheduler.timesteps[start:]:
        m = model(x, t, 8 if learned else 4).to(dtype)
        out = scheduler.step(m, t, x, generator=generator, return_dict=return_dict, **options)
        x = out.prev_sample if return_dict else out[0]
        states.append(x)
        x0 = out.get("pred_original_sample") if return_dict else out[-1]
        predictions.append(x if x0 is None else x0)
    return torch.stack(states), torch.stack(predictions)


def compare(mine, theirs, steps, **options):
    """Both take each step from the same state, so that rounding does not grow over steps."""
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(steps)
    assert mine.timesteps.equal(theirs.timesteps)
    learned = theirs.config.get("variance_type") == "learned_range"
    x = start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for t in theirs.timesteps:
        m = model(x, t, 8 if learned else 4)
        got, expected = (
            s.step(m, t, x, generator=torch.Generator().manual_seed(int(t)), **options)
            for s in (mine, theirs)
        )
        assert list(got) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=2e-5, atol=2e-5)
        x = expected.prev_sample
    assert (x - start).abs().max() > 0.1


@pytest.mark.parametrize("steps", [13, 20])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_every_option_is_diffusers(name, options, steps):
    compare(*pair(name, options, bug_compatible=True), steps)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("options", OPTIONS["DDIMScheduler"], ids=str)
def test_ddims_step_takes_its_options(options, eta, follows):
    both = pair("DDIMScheduler", options, bug_compatible=True)
    compare(*both, 13, eta=eta, use_clipped_model_output=follows)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_may_begin_in_the_middle_and_return_tuples(name):
    mine, theirs = pair(name, {})
    got, expected = (sampled(s, 20, start=7, return_dict=False)[0] for s in (mine, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 13, 50])
def test_ddim_goes_to_the_next_timestep(spacing, steps):
    """What diffusers gets wrong, held to our sampler, which the textbook's loop is held to."""
    mine, _ = pair("DDIMScheduler", {"timestep_spacing": spacing, "clip_sample": False})
    got, _ = sampled(mine, steps)
    schedule = NoiseSchedule.from_alphas_cumprod(mine.alphas_cumprod.double().numpy())
    timesteps = mine.timesteps.tolist()
    sampler, x = (
        DDIMSampler(schedule, spacing=timesteps),
        torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)),
    )
    for i, t in enumerate(timesteps):
        x = sampler.step(model(x, torch.tensor(t)), i, x)
    torch.testing.assert_close(got[-1], x, rtol=1e-4, atol=1e-4)


def test_the_mended_step_differs_where_diffusers_is_wrong_and_only_there():
    for spacing, steps, wrong in (
        ("trailing", 13, True),
        ("linspace", 10, True),
        ("trailing", 20, False),
        ("leading", 13, False),
    ):
        mine, theirs = pair("DDIMScheduler", {"timestep_spacing": spacing})
        far = (sampled(mine, steps)[0][-1] - sampled(theirs, steps)[0][-1]).abs().max()
        assert (far > 1e-2) == wrong, (spacing, steps, far)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("steps", [61, 103, 122])
def test_a_trailing_list_has_the_steps_asked_for(name, steps):
    mine, theirs = pair(name, {"timestep_spacing": "trailing"})
    theirs.set_timesteps(steps)
    assert len(theirs.timesteps) == steps + 1
    mine.set_timesteps(steps)
    assert mine.timesteps.tolist() == NoiseSchedule.linear().timesteps(steps, "trailing").tolist()
    assert sampled(mine, steps)[0].isfinite().all()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_sample_keeps_its_float32_state(name, dtype):
    """1000 steps in bfloat16 lose the sample in diffusers, not here."""
    steps = 1000 if name == "DDPMScheduler" else 100
    error = {}
    for which, scheduler in zip(("mine", "theirs"), pair(name, {}), strict=True):
        exact = getattr(diffusers, name)()
        for each in (scheduler, exact):
            each.set_timesteps(steps)
        noises = [torch.Generator().manual_seed(1) for _ in range(2)]
        y = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype).float()
        x = y.to(dtype)
        for t in scheduler.timesteps:
            m = model(y, t).to(dtype)  # the same outputs and noise: only the states differ
            x = scheduler.step(m, t, x, generator=noises[0]).prev_sample
            y = exact.step(m, t, y, generator=noises[1]).prev_sample.float()
            assert x.dtype is dtype
        error[which] = ((x.float() - y).norm() / y.norm()).item()
    assert error["mine"] < 2 * torch.finfo(dtype).eps
    if name == "DDPMScheduler" and dtype is torch.bfloat16:
        assert error["theirs"] > 0.1


def test_a_half_precision_sample_that_was_changed_is_taken_as_it_is():
    scheduler, m = ours.DDIMScheduler(), torch.zeros(SHAPE, dtype=torch.bfloat16)
    scheduler.set_timesteps(10)
    x = torch.randn(SHAPE).bfloat16()
    for change in (lambda x: x.mul_(0.5), lambda x: x + 1):
        t, following = scheduler.timesteps[:2]
        x = change(scheduler.step(m, t, x).prev_sample)
        fresh = ours.DDIMScheduler()
        fresh.set_timesteps(10)
        expected = fresh.step(m, following, x.clone()).prev_sample
        assert scheduler.step(m, following, x).prev_sample.equal(expected)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("call", ["add_noise", "get_velocity"])
def test_noising_is_diffusers(name, call):
    mine, theirs = pair(name, {})
    x0, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    for t in (torch.tensor([0, 500, 999]), torch.tensor([7])):
        expected = getattr(theirs, call)(x0, noise, t)
        torch.testing.assert_close(getattr(mine, call)(x0, noise, t), expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_noise_in_bfloat16_is_not_lost(name):
    """diffusers casts alphas_cumprod first, so that at small timesteps 1 - 1 is left."""
    mine, theirs = pair(name, {})
    x0, noise, t = torch.zeros(1, 4, 64, 64), torch.randn(1, 4, 64, 64), torch.tensor([3])
    exact = diffusers.DDPMScheduler().add_noise(x0, noise, t)
    got = mine.add_noise(x0.bfloat16(), noise.bfloat16(), t)
    torch.testing.assert_close(got.float(), exact, rtol=2**-7, atol=1e-4)
    if name != "DPMSolverMultistepScheduler":
        assert theirs.add_noise(x0.bfloat16(), noise.bfloat16(), t).std() < 0.8 * exact.std()
        mine.bug_compatible = True
        got = mine.add_noise(x0.bfloat16(), noise.bfloat16(), t)
        assert got.equal(theirs.add_noise(x0.bfloat16(), noise.bfloat16(), t))


def test_dpmsolver_noises_to_the_step_that_is_next():
    mine, theirs = pair("DPMSolverMultistepScheduler", {"use_karras_sigmas": True})
    x0, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(20)
        scheduler.set_begin_index(5)
    t = mine.timesteps[5:6].repeat(2)
    torch.testing.assert_close(mine.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t))
    half = mine.add_noise(x0.bfloat16(), noise.bfloat16(), t)
    torch.testing.assert_close(half.float(), mine.add_noise(x0, noise, t), rtol=2e-2, atol=2e-2)


def test_dpmsolver_noises_before_timesteps_are_set():
    """For training: at the timestep asked for; diffusers takes the level at T - 1 - t."""
    mine, theirs = pair("DPMSolverMultistepScheduler", {})
    x0, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    expected = diffusers.DDPMScheduler().add_noise(x0, noise, t)
    torch.testing.assert_close(mine.add_noise(x0, noise, t), expected)
    mine.bug_compatible = True
    assert mine.add_noise(x0, noise, t).equal(theirs.add_noise(x0, noise, t))
    assert (theirs.add_noise(x0, noise, t) - expected).abs().max() > 0.5


def test_large_log_is_large_not_nan():
    mine, theirs = pair("DDPMScheduler", {"variance_type": "fixed_large_log"})
    large = diffusers.DDPMScheduler(variance_type="fixed_large")
    got, expected = (sampled(s, 13)[0] for s in (mine, large))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert sampled(theirs, 13)[0].isnan().any()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "solver_order=3"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type='dpm"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "prediction_type"),
        ("DDPMScheduler", {"variance_type": "learned"}, "variance_type='learned'"),
        ("DDIMScheduler", {"prediction_type": "x0"}, "prediction_type='x0'"),
    ],
)
def test_an_option_that_is_not_supported_raises(name, options, said):
    with pytest.raises(ValueError, match=said):
        getattr(ours, name)(**options)


def test_eps_at_zero_signal_raises_where_it_is_asked_for():
    scheduler = ours.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    x = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="prediction='eps': undefined at alpha = 0"):
        scheduler.step(x, scheduler.timesteps[0], x)
    scheduler = ours.DDIMScheduler(rescale_betas_zero_snr=True)  # leading: T - 1 is not visited
    assert sampled(scheduler, 10)[0].isfinite().all()


@pytest.mark.parametrize("name", OPTIONS)
def test_configurations_and_copies(name, tmp_path):
    mine, theirs = pair(name, {"beta_schedule": "scaled_linear"})
    theirs.save_pretrained(tmp_path / "theirs")
    mine.save_pretrained(tmp_path / "mine")
    one, other = ((tmp_path / d / "scheduler_config.json").read_text() for d in ("mine", "theirs"))
    assert one == other
    expected = sampled(theirs, 13)[0]
    for made in (
        type(mine).from_pretrained(tmp_path / "theirs"),
        type(mine).from_config(theirs.config),
        copy.deepcopy(mine),
        pickle.loads(pickle.dumps(mine)),
    ):
        torch.testing.assert_close(sampled(made, 13)[0], expected, rtol=1e-4, atol=1e-4)
    assert (len(mine), mine.order, mine.init_noise_sigma) == (1000, 1, theirs.init_noise_sigma)
    x = torch.zeros(SHAPE)
    assert mine.scale_model_input(x, 3) is x


def test_sixteen_steps_of_ours_are_the_samplers():
    """The rows are those of the samplers' tables."""
    schedule = NoiseSchedule.linear()
    scheduler = ours.DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(16)
    sampler = DDPMSampler(schedule, spacing=scheduler.timesteps.tolist())
    x = torch.randn(SHAPE)
    for i in (0, 8, 15):
        m, noise = torch.randn(SHAPE), torch.Generator().manual_seed(i)
        got = scheduler.step(m, scheduler.timesteps[i], x, generator=noise).prev_sample
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close(got, sampler.step(m, i, x, noise=z), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_is_differentiable_as_there(name):
    """For guidance by the gradient of a loss of the next sample, or of x0."""
    gradients = []
    for scheduler in pair(name, {}):
        scheduler.set_timesteps(20)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
        generator = torch.Generator().manual_seed(1)
        for t in scheduler.timesteps[10:12]:
            out = scheduler.step(model(x, t), t, x, generator=generator)
            loss = sum((value * value.detach().cos()).sum() for value in out.values())
            gradients.append(torch.autograd.grad(loss, x)[0])
            x = out.prev_sample.detach().requires_grad_()
    torch.testing.assert_close(gradients[:2], gradients[2:], rtol=1e-3, atol=1e-3)
    assert gradients[0].std() > 0.1


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("change", ["levels", "timesteps", "sigmas"])
def test_what_a_user_sets_is_followed(name, change):
    """As diffusers does, also where rows were made of what was there before."""
    if (change == "sigmas") != (name == "DPMSolverMultistepScheduler"):
        pytest.skip("it has no such thing, or not on its own")
    x, m = torch.randn(SHAPE), torch.randn(SHAPE)
    found = []
    # by its number of steps diffusers' DDIM knows where it goes, whatever the timesteps are
    for scheduler in pair(name, {}, bug_compatible=name == "DDIMScheduler"):
        scheduler.set_timesteps(10)
        for again in (False, True):
            if again and change == "levels":
                scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
            if again and change == "timesteps":
                scheduler.timesteps = torch.tensor([900, 300, 0])
            if again and change == "sigmas":
                scheduler.sigmas = scheduler.sigmas * 0.5
                scheduler._step_index, scheduler.lower_order_nums = None, 0
            t, how = scheduler.timesteps[0], {}
            if name == "DDPMScheduler":
                how["generator"] = torch.Generator().manual_seed(0)
            out = scheduler.step(m, t, x, **how).prev_sample
        noisy = scheduler.add_noise(x, m, t.reshape(1)) if change == "levels" else out
        found.append((out, noisy))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_copy_made_in_the_middle_of_a_run_goes_on(name):
    scheduler, x = pair(name, {})[0], torch.randn(SHAPE)
    scheduler.set_timesteps(6)
    for i, t in enumerate(scheduler.timesteps):
        if i == 3:
            again = pickle.loads(pickle.dumps(scheduler))
            y = x
        how = {"generator": torch.Generator().manual_seed(i)} if name == "DDPMScheduler" else {}
        x = scheduler.step(0.3 * x, t, x, **how).prev_sample
        if i >= 3:
            if how:
                how["generator"].manual_seed(i)
            y = again.step(0.3 * y, t, y, **how).prev_sample
            assert torch.equal(x, y)
