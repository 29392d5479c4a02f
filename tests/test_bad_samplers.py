"""Generated input to samplers and edits of images: right, or a refusal that names the argument."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from generated import (
    SCHEDULE,
    anything,
    changed,
    counts,
    generated,
    junk,
    names,
    refused_clearly,
    slowly,
    tensors,
)
from hypothesis import given

from fastdiff import (
    DDIMSampler,
    DDPMSampler,
    DPMSolverSampler,
    HeunSampler,
    LangevinSampler,
    Sampler,
    image_to_image,
    inpaint,
    interpolate,
)
from fastdiff.guidance import cfg_plus_plus
from fastdiff.table import COLUMNS

junk_objects = junk.filter(lambda value: not callable(value))
fractions = st.floats(0, 1) | anything
OPTIONS = {
    DDIMSampler: {"eta": fractions, "classifier_scale": anything},
    DDPMSampler: {"variance": st.sampled_from(["small", "large"]) | junk},
    DPMSolverSampler: {"eta": fractions},
    HeunSampler: dict.fromkeys(("S_churn", "S_tmin", "S_tmax", "S_noise"), fractions),
    LangevinSampler: {"inner": st.integers(1, 4) | counts | junk, "step_size": fractions},
}
SHARED = {
    "schedule": junk,
    "steps": st.integers(1, 9) | counts | junk,
    "spacing": st.sampled_from(["leading", "trailing", "ddim5", "3,2"]) | junk,
    "prediction": names | junk,
    "clip": st.floats(0.1, 3) | anything,
    "offset": counts | junk,
}


def x0_model(x, t, cond=None):
    """It has seen one image, 0.25 everywhere, and predicts it."""
    return torch.full_like(x, 0.25)


@pytest.mark.filterwarnings("ignore:step_size")
@pytest.mark.parametrize("kind", OPTIONS)
def test_samplers_end_at_the_image_that_the_model_knows(kind):
    @generated
    @given(changed(**SHARED, **OPTIONS[kind]))
    def tried(changes):
        usual = {"schedule": SCHEDULE, "steps": 3, "prediction": "x0"}
        spacing = changes.get("spacing")
        if isinstance(spacing, str) and spacing in ("ddim5", "3,2"):
            usual.pop("steps")
        given = {**usual, **changes}
        sampler = refused_clearly(lambda: kind(**given), *given, *COLUMNS, "timesteps")
        if sampler is None or sampler.table.classifier or given["prediction"] != "x0":
            return
        if kind is LangevinSampler and sampler.table.a.min() <= -1:
            return  # warned of: it diverges
        x = sampler.sample(x0_model, (2, 1, 4))
        wanted = min(0.25, given.get("clip") or math.inf)
        assert x.dtype == torch.float32 and x.shape == (2, 1, 4)
        torch.testing.assert_close(x, torch.full((2, 1, 4), wanted))

    tried()


@generated
@given(
    st.sampled_from([*OPTIONS]),
    changed(
        peer=st.sampled_from(["guided-diffusion", "diffusers"]) | junk,
        schedule=junk,
        steps=st.integers(1, 50) | counts | junk,
        spacing=SHARED["spacing"],
        offset=counts | junk,
        set_alpha_to_one=st.booleans(),
    ),
)
def test_peers(kind, changes):
    given = {"peer": "diffusers", "schedule": SCHEDULE, "steps": 5, **changes}
    sampler = refused_clearly(lambda: kind.like(**given), *given, "solver", "timesteps")
    if sampler is not None:
        assert (np.diff(sampler.timesteps) < 0).all() and sampler.timesteps[-1] >= 0
        named = {"ddim5": 5, "3,2": 5}
        assert len(sampler.timesteps) == (given["steps"] or named[given["spacing"]])
        assert Sampler(sampler.table).table == sampler.table


SAMPLER = DDIMSampler(SCHEDULE, 3, prediction="x0")
sized = st.lists(st.integers(-1, 3), max_size=4)
seeds = st.integers(-3, 2**64) | st.lists(st.integers(0, 9) | anything, max_size=3) | anything
weights = st.floats(-2, 9) | st.lists(st.floats(-2, 9), max_size=4) | anything


def linear_model(x, t, cond=None):
    told = 0 if cond is None else cond.real.float().reshape(-1, *[1] * (x.dim() - 1))
    return x * 0.1 + told


@generated
@given(
    changed(
        model=junk_objects,
        shape=sized | anything,
        seed=seeds,
        x_T=tensors(st.just((2, 1, 4))) | tensors() | junk,
        cond=tensors(st.just((2,))) | tensors() | junk,
        uncond=tensors(st.just((2,))) | tensors() | junk,
        guidance=weights,
        guidance_interval=st.tuples(st.floats(0, 9), st.floats(0, 9)) | anything,
        callback=junk_objects,
        first_index=counts | anything,
        gradient=junk_objects,
        gradient_at=st.sampled_from(["x", "mean"]) | junk,
    )
)
def test_sampling(changes):
    two = torch.tensor([0.5, -0.5])
    given = {"model": linear_model, "shape": (2, 1, 4), "cond": two, "uncond": 0 * two, **changes}
    if not torch.is_tensor(given["cond"]) or given["cond"].dim() != 1:
        given["model"] = lambda x, t, cond=None: x * 0.1  # of conditions of any shape
    out = refused_clearly(lambda: SAMPLER.sample(**given), *given, "w", "interval")
    if out is None:
        return
    assert list(out.shape) == list(given["shape"]) and out.dtype == torch.float32
    w, cond, started = given.get("guidance"), given["cond"], given.get("x_T")
    if started is not None or given["model"] is not linear_model or "uncond" in changes:
        return
    if cond is None or isinstance(w, list | np.ndarray | torch.Tensor) or w is None:
        return
    # the last row returns the predicted x0, of the state before it
    states = []
    keep = {**given, "callback": lambda row, x, x0: states.append(x.clone())}
    torch.testing.assert_close(SAMPLER.sample(**keep), out, rtol=0, atol=0, equal_nan=True)
    if given.get("guidance_interval") is None and cond.isfinite().all() and abs(float(w)) < 10:
        guided = 0.1 * states[-2] + (float(w) + 1) * cond.real.reshape(-1, 1, 1).float()
        torch.testing.assert_close(out, guided, rtol=1e-4, atol=1e-4)


@generated
@given(
    changed(
        model_output=tensors(st.just((2, 1, 4))) | tensors() | junk,
        i=counts | anything,
        x=tensors(st.just((2, 1, 4))) | tensors() | junk,
        noise=tensors(st.just((2, 1, 4))) | tensors() | junk,
        seed=seeds,
        first_index=counts | anything,
    )
)
def test_steps(changes):
    sampler = DDPMSampler(SCHEDULE, 4, prediction="x0")
    x = torch.linspace(-1, 1, 8).reshape(2, 1, 4)
    given = {"model_output": x / 2, "i": 1, "x": x, **changes}
    out = refused_clearly(lambda: sampler.step(**given), *given, "output", "strides")
    if out is None:
        return
    assert out.shape == given["x"].shape and out.dtype == torch.float32
    z = given.get("noise")
    if z is None:
        z = torch.zeros_like(x) if given["i"] == 3 else None
    if z is not None and "model_output" not in changes and "x" not in changes:
        i, table = given["i"], sampler.table
        wanted = table.a[i] * x + table.b[i] * x / 2 + table.s[i] * z
        torch.testing.assert_close(out, wanted.float(), rtol=1e-5, atol=1e-5, equal_nan=True)


@generated
@given(
    changed(
        x0=tensors(st.just((2, 1, 4))) | tensors() | junk,
        cond=tensors(st.just((2,))) | junk,
        model=junk_objects,
    )
)
def test_inversion(changes):
    given = {"model": x0_model, "x0": torch.full((2, 1, 4), 0.25), **changes}
    out = refused_clearly(lambda: SAMPLER.invert(**given), *given)
    if out is not None:
        assert out.shape == given["x0"].shape
        # eps as it would be where the row goes, told that the data is 0.25
        x, alpha, sigma = given["x0"].double(), 1.0, 0.0
        for t in SAMPLER.timesteps[::-1]:
            up, noisier = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
            eps = (x - up * 0.25) / noisier
            x = up * (x - sigma * eps) / alpha + noisier * eps
            alpha, sigma = up, noisier
        torch.testing.assert_close(out, x.float(), rtol=1e-4, atol=1e-4, equal_nan=True)


IMAGE = torch.linspace(-1, 1, 8).reshape(2, 1, 4)
images = tensors(st.just((2, 1, 4))) | tensors() | junk


@generated
@given(
    st.sampled_from([*OPTIONS]),
    changed(
        sampler=junk,
        model=junk_objects,
        image=images,
        strength=fractions,
        seed=seeds,
        cond=tensors(st.just((2,))) | tensors() | junk,
        first_index=counts | anything,
        guidance=weights,
    ),
)
def test_image_to_image(kind, changes):
    few = {"inner": 2} if kind is LangevinSampler else {}
    given = {
        "sampler": kind(SCHEDULE, 4, prediction="x0", **few), "model": x0_model, "image": IMAGE,
        "strength": 0.5, **changes,
    }  # fmt: skip
    out = refused_clearly(lambda: image_to_image(**given), *given, "w", "uncond")
    if out is not None:
        assert out.shape == given["image"].shape and out.dtype == torch.float32
        if given["image"].isfinite().all() and given["image"].abs().max() < 100:
            torch.testing.assert_close(out, torch.full_like(out, 0.25))


@generated
@given(
    changed(
        sampler=junk,
        model=junk_objects,
        image=images,
        mask=tensors(st.just((2, 1, 4)), st.just(torch.bool)) | tensors() | junk,
        seed=seeds,
        cond=tensors(st.just((2,))) | tensors() | junk,
        guidance=weights,
        uncond=tensors(st.just((2,))) | tensors() | junk,
        jump=counts | anything,
        resamplings=st.integers(1, 4) | counts.filter(lambda n: n < 70) | junk,
        first_index=counts | anything,
    )
)
def test_inpainting(changes):
    given = {
        "sampler": DDPMSampler(SCHEDULE, 4, prediction="x0"), "model": x0_model, "image": IMAGE,
        "mask": IMAGE > 0, "jump": 2, "resamplings": 2, **changes,
    }  # fmt: skip
    out = refused_clearly(lambda: inpaint(**given), *given, "w")
    if out is not None:
        image, mask = given["image"], given["mask"]
        wanted = torch.where(mask, image, torch.full_like(image, 0.25))
        torch.testing.assert_close(out, wanted, equal_nan=True)
        assert torch.equal(out[mask].nan_to_num(), image[mask].nan_to_num())


@generated
@given(
    changed(
        x_a=tensors(st.just((2, 3))) | tensors() | junk,
        x_b=tensors(st.just((2, 3))) | tensors() | junk,
        fractions=st.lists(st.floats(-1, 2), max_size=4) | tensors() | anything,
    )
)
def test_interpolation(changes):
    given = {
        "x_a": torch.tensor([[1.0, 0, 0], [0, 3, 0]]),
        "x_b": torch.tensor([[0, 1.0, 0], [0, 0, 3]]),
        "fractions": [0.0, 0.5, 1.0],
        **changes,
    }
    out = refused_clearly(lambda: interpolate(**given), *given)
    if out is None:
        return
    a, b, f = given["x_a"], given["x_b"], given["fractions"]
    assert out.shape == (len(f), *a.shape) and out.dtype == a.dtype
    if "x_a" in changes or "x_b" in changes:
        return
    for found, fraction in zip(out, f, strict=True):  # a right angle between them
        turn = float(fraction) * math.pi / 2
        torch.testing.assert_close(found, math.cos(turn) * a + math.sin(turn) * b)


@slowly
@given(changed(sampler=junk | st.sampled_from([SAMPLER]), scale=fractions))
def test_cfg_plus_plus(changes):
    given = {"sampler": SAMPLER, "scale": 0.5, **changes}
    w = refused_clearly(lambda: cfg_plus_plus(**given), *given)
    if w is not None:
        u = np.append(SAMPLER.table.sigma, 0.0)
        np.testing.assert_allclose(w, given["scale"] / (1 - u[1:] / u[:-1]) - 1)


@slowly
@given(junk, counts | junk)
def test_samplers_of_tables(table, steps):
    assert refused_clearly(lambda: Sampler(table), "table") is None
    tail = refused_clearly(lambda: SAMPLER.tail(steps), "steps")
    if tail is not None:
        assert tail.timesteps.tolist() == SAMPLER.timesteps.tolist()[3 - steps :]
