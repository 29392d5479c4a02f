"""Parity with diffusers' schedulers, run in float64 on the same levels.

`like("diffusers")` reproduces them to rounding, errors included; a test names each error and shows
that fastdiff's own convention gives the paper's sampler instead.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from fastdiff import presets, tables
from fastdiff.schedule import NoiseSchedule
from fastdiff.table import Table

diffusers = pytest.importorskip("diffusers")
from diffusers.schedulers import scheduling_dpmsolver_multistep  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

T = 30
SCHEDULE = NoiseSchedule.linear(T)
NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SPACINGS = ["leading", "trailing", "linspace"]
VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learned_range": "learned_range"}


class InFloat64:
    """torch, with float64 where diffusers asks for float32: its multistep solver rounds to that."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (2, 3, 4), generator=generator, dtype=torch.float64)


def model(x: Tensor, t: float) -> Tensor:
    return torch.tanh(0.6 * x + 0.3 * x.roll(1, -1) - 0.02 * t) + 0.1 * torch.sin(2 * x)


def with_variance(x: Tensor, t: float) -> Tensor:
    return torch.cat([model(x, t), torch.sin(3 * x - 0.1 * t)], 1)


def scheduler(kind: str, steps: int, schedule: NoiseSchedule = SCHEDULE, **config):
    """One of diffusers' schedulers on our levels, in float64."""
    made = getattr(diffusers, kind)(
        num_train_timesteps=len(schedule), trained_betas=schedule.betas.tolist(), **config
    )
    made.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod)
    if not config.get("set_alpha_to_one", True):
        made.final_alpha_cumprod = made.alphas_cumprod[0]
    made.set_timesteps(steps)
    return made


def run(made, network: oracles.Model, x: Tensor, **step: object) -> Tensor:
    for t in made.timesteps:
        x = made.step(network(x, int(t)), t, x, **step).prev_sample
    return x


def drawn(steps: int) -> list[Tensor]:
    """What `steps` calls with a generator of seed 0 draw."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(steps)]


def execute(table: Table, x: Tensor, network: oracles.Model) -> Tensor:
    return oracles.execute(table, x, network, drawn(int((table.s != 0).sum())))


def like(solver: str, steps: int, **options) -> Table:
    timesteps, options = presets.like("diffusers", solver, SCHEDULE, steps, **options)
    return getattr(tables, solver)(SCHEDULE, timesteps, **options)


def difference(got: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(expected).all()
    return float((got - expected).abs().max() / expected.abs().max())


def emits_minus_one(made) -> bool:
    """Its trailing spacing may round to one timestep too many, which is -1."""
    return int(made.timesteps[-1]) < 0


@pytest.mark.parametrize(
    ("ours", "config"),
    [
        (NoiseSchedule.linear(1000), {"beta_schedule": "linear"}),
        (
            NoiseSchedule.scaled_linear(1000),
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
        (NoiseSchedule.cosine(1000), {"beta_schedule": "squaredcos_cap_v2"}),
        (NoiseSchedule.cosine(200), {"beta_schedule": "squaredcos_cap_v2"}),
        (
            NoiseSchedule.linear(1000).zero_terminal_snr(),
            {"beta_schedule": "linear", "rescale_betas_zero_snr": True},
        ),
    ],
    ids=str,
)
def test_schedules(ours: NoiseSchedule, config: dict) -> None:
    theirs = diffusers.DDIMScheduler(num_train_timesteps=len(ours), **config)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=0, atol=2e-6)


@pytest.mark.parametrize("length", [30, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_for_every_number_of_steps(spacing: str, length: int) -> None:
    schedule = NoiseSchedule.cosine(length)
    theirs = diffusers.DDIMScheduler(length, timestep_spacing=spacing)
    for steps in range(1, length + 1):
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.numpy()
        if emits_minus_one(theirs):
            assert spacing == "trailing"
            expected = expected[:-1]
        np.testing.assert_array_equal(schedule.timesteps(steps, spacing), expected)


def test_diffusers_emits_timestep_minus_1_at_103_trailing_steps() -> None:
    """Rounding gives its arange one element more than it was asked for."""
    theirs = diffusers.DDIMScheduler(1000, timestep_spacing="trailing")
    theirs.set_timesteps(103)
    assert len(theirs.timesteps) == 104
    assert theirs.timesteps[-1] == -1
    ours = NoiseSchedule.linear(1000).timesteps(103, "trailing")
    assert len(ours) == 103
    assert ours[-1] == 9


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_preset_for_every_number_of_steps(spacing: str, prediction: str) -> None:
    for steps in range(1, T + 1):
        made = scheduler(
            "DDIMScheduler", steps, timestep_spacing=spacing, prediction_type=NAMES[prediction]
        )
        if emits_minus_one(made):
            continue
        eta, x = (0.0, 0.5, 1.0)[steps % 3], draw(1)
        expected = run(made, model, x, eta=eta, generator=torch.Generator().manual_seed(0))
        table = like("ddim", steps, spacing=spacing, prediction=prediction, eta=eta)
        # theirs draws at every step, ours only where the noise has a weight
        noises = [z for z, s in zip(drawn(steps), table.s, strict=True) if s]
        assert difference(oracles.execute(table, x, model, noises), expected) < 1e-10, steps


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_preset_for_every_option(spacing: str, prediction: str) -> None:
    for clip in (None, 0.7):
        for follows in (False, True):
            for one in (False, True):
                for offset in (0, 1):
                    made = scheduler(
                        "DDIMScheduler",
                        7,
                        timestep_spacing=spacing,
                        prediction_type=NAMES[prediction],
                        clip_sample=clip is not None,
                        clip_sample_range=clip or 1.0,
                        set_alpha_to_one=one,
                        steps_offset=offset,
                    )
                    expected = run(made, model, draw(1), use_clipped_model_output=follows)
                    table = like(
                        "ddim",
                        7,
                        spacing=spacing,
                        prediction=prediction,
                        clip=clip,
                        keep_eps=not follows,
                        set_alpha_to_one=one,
                        offset=offset,
                    )
                    assert difference(oracles.execute(table, draw(1), model), expected) < 1e-10


def is_right(timesteps: np.ndarray) -> bool:
    """Whether going down by T // steps each time is going to the next timestep, then the data."""
    down = timesteps - T // len(timesteps)
    return np.array_equal(down[:-1], timesteps[1:]) and down[-1] < 0


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_agrees_with_diffusers_exactly_where_its_stride_is_right(spacing: str) -> None:
    right = 0
    for steps in range(1, T + 1):
        timesteps = SCHEDULE.timesteps(steps, spacing)
        made = scheduler("DDIMScheduler", steps, timestep_spacing=spacing, clip_sample=False)
        if emits_minus_one(made):
            continue
        theirs = run(made, model, draw(1))
        ours = oracles.execute(tables.ddim(SCHEDULE, timesteps), draw(1), model)
        abars = SCHEDULE.alphas_cumprod[timesteps].tolist()
        paper = oracles.ddim(draw(1), model, timesteps.tolist(), abars)
        assert difference(ours, paper) < 1e-11
        assert (difference(theirs, paper) < 1e-10) == is_right(timesteps), steps
        right += is_right(timesteps)
    assert right >= {"leading": T, "trailing": 6, "linspace": 1}[spacing]


def test_diffusers_misses_11_of_12_levels_at_13_trailing_steps() -> None:
    """Its step goes to t - T // N, not to the next timestep (its issues 9261, 11347, 12633)."""
    schedule = NoiseSchedule.linear(1000)
    timesteps, options = presets.like(
        "diffusers", "ddim", schedule, 13, spacing="trailing", clip=None
    )
    assert (options["next_timesteps"][:-1] != timesteps[1:]).sum() == 11
    theirs = run(
        scheduler("DDIMScheduler", 13, schedule, timestep_spacing="trailing", clip_sample=False),
        model,
        draw(1),
    )
    preset = tables.ddim(schedule, timesteps, **options)
    assert difference(oracles.execute(preset, draw(1), model), theirs) < 1e-10
    abars = schedule.alphas_cumprod[timesteps].tolist()
    paper = oracles.ddim(draw(1), model, timesteps.tolist(), abars)
    ours = oracles.execute(tables.ddim(schedule, timesteps), draw(1), model)
    assert difference(ours, paper) < 1e-11
    assert difference(theirs, paper) > 1e-3


def test_ddim_with_zero_terminal_snr() -> None:
    """v prediction only: theirs divides by alpha = 0 with eps (its issue 5103), ours refuses."""
    schedule = SCHEDULE.zero_terminal_snr()
    config = {"timestep_spacing": "trailing", "clip_sample": False}
    timesteps = schedule.timesteps(10, "trailing")
    made = scheduler("DDIMScheduler", 10, schedule, prediction_type="v_prediction", **config)
    got = oracles.execute(tables.ddim(schedule, timesteps, prediction="v"), draw(1), model)
    assert difference(got, run(made, model, draw(1))) < 1e-10
    made = scheduler("DDIMScheduler", 10, schedule, **config)
    assert not torch.isfinite(run(made, model, draw(1))).all()
    with pytest.raises(ValueError, match="alpha = 0"):
        tables.ddim(schedule, timesteps)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_preset(spacing: str, prediction: str, variance: str) -> None:
    network: Callable = with_variance if variance == "learned_range" else model
    for steps in (1, 2, 7, 12, T):
        for clip in (None, 1.0):
            made = scheduler(
                "DDPMScheduler",
                steps,
                timestep_spacing=spacing,
                prediction_type=NAMES[prediction],
                variance_type=VARIANCES[variance],
                clip_sample=clip is not None,
            )
            expected = run(made, network, draw(1), generator=torch.Generator().manual_seed(0))
            table = like(
                "ddpm",
                steps,
                spacing=spacing,
                prediction=prediction,
                variance=variance,
                clip=clip,
            )
            assert difference(execute(table, draw(1), network), expected) < 1e-10, steps


@pytest.mark.parametrize("variance", VARIANCES)
def test_ddpm_agrees_with_diffusers_where_the_last_timestep_is_0(variance: str) -> None:
    network: Callable = with_variance if variance == "learned_range" else model
    for steps in (2, 7, 13, T):
        made = scheduler(
            "DDPMScheduler", steps, variance_type=VARIANCES[variance], clip_sample=False
        )
        expected = run(made, network, draw(1), generator=torch.Generator().manual_seed(0))
        table = tables.ddpm(SCHEDULE, SCHEDULE.timesteps(steps), variance=variance)
        assert difference(execute(table, draw(1), network), expected) < 1e-10, steps


def test_diffusers_adds_noise_to_the_finished_image_with_trailing_steps() -> None:
    """Its DDPM leaves the noise out at t = 0 only, which trailing timesteps never reach."""
    theirs = like("ddpm", 5, spacing="trailing", variance="large")
    ours = tables.ddpm(SCHEDULE, SCHEDULE.timesteps(5, "trailing"), variance="large", clip=1.0)
    assert theirs.s[-1] > 0.3
    assert ours.s[-1] == 0
    np.testing.assert_array_equal(theirs.s[:-1], ours.s[:-1])


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_dpmpp_2m_preset_for_every_number_of_steps(
    spacing: str, prediction: str, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling_dpmsolver_multistep, "torch", InFloat64())
    eta = float(algorithm.startswith("sde"))
    for steps in range(1, T):
        made = scheduler(
            "DPMSolverMultistepScheduler",
            steps,
            timestep_spacing=spacing,
            prediction_type=NAMES[prediction],
            algorithm_type=algorithm,
        )
        if emits_minus_one(made):
            continue
        level = (SCHEDULE.sigma / SCHEDULE.alpha)[made.timesteps.numpy()]
        made.sigmas = torch.from_numpy(np.append(level, 0.0))
        table = like("dpmpp_2m", steps, spacing=spacing, prediction=prediction, eta=eta)
        noises, x = drawn(steps), draw(1)
        expected = x
        for t, z in zip(made.timesteps, noises, strict=True):
            expected = made.step(model(expected, int(t)), t, expected, variance_noise=z).prev_sample
        got = oracles.execute(table, x, model, noises[: int((table.s != 0).sum())])
        assert difference(got, expected) < 1e-10, steps


def test_presets_refuse_what_the_peer_does_not_have() -> None:
    for arguments, options, message in [
        (("keras", "ddim", SCHEDULE, 5), {}, "peer='keras': must be one of"),
        (("diffusers", "langevin", SCHEDULE, 5), {}, "solver='langevin': must be one of"),
        (("guided-diffusion", "ddim", SCHEDULE), {}, "steps=None: guided-diffusion needs steps"),
        (("guided-diffusion", "ddim", SCHEDULE, 14), {}, "no integer stride takes 14 steps"),
        (("diffusers", "ddpm", SCHEDULE, 5), {"set_alpha_to_one": False}, "set_alpha_to_one"),
        (("diffusers", "ddim", SCHEDULE), {}, "steps=None: spacing='leading' needs"),
    ]:
        with pytest.raises(ValueError, match=message):
            presets.like(*arguments, **options)


def test_guided_diffusion_preset() -> None:
    """Clipped, eps following the clip, "ddimN" and sectioned timesteps, DDPM with beta."""
    timesteps, options = presets.like("guided-diffusion", "ddim", SCHEDULE, 10)
    assert timesteps.tolist() == SCHEDULE.timesteps(spacing="ddim10").tolist()
    assert options == {"clip": 1.0}
    timesteps, options = presets.like("guided-diffusion", "ddpm", SCHEDULE, 10, clip=None)
    assert timesteps.tolist() == SCHEDULE.timesteps(spacing="10").tolist()
    assert options == {"clip": None, "variance": "large"}
    timesteps, _ = presets.like("guided-diffusion", "ddpm", SCHEDULE, 10, spacing="trailing")
    np.testing.assert_array_equal(timesteps, SCHEDULE.timesteps(10, "trailing"))
    with pytest.raises(ValueError, match="steps=50"):
        presets.like("guided-diffusion", "ddim", SCHEDULE, 50, spacing="ddim15")
    timesteps, _ = presets.like("guided-diffusion", "ddim", SCHEDULE, spacing="ddim15")
    assert len(timesteps) == 15
