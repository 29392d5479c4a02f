"""Generated input to training objectives: right, or a refusal that names the argument."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
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

from fastdiff import losses
from fastdiff.losses import WEIGHTINGS

objects = junk.filter(lambda value: not callable(value))
X0 = torch.linspace(-1, 1, 24).reshape(3, 2, 4)
Z = X0.flip(2)
T = torch.tensor([0, 20, 49])
data = tensors(st.just((3, 2, 4))) | tensors() | junk
times = (
    tensors(st.just((3,)), st.just(torch.int64))
    | st.lists(st.integers(-2, 60), max_size=4).map(lambda t: torch.tensor(t, dtype=torch.int64))
    | junk
)
seeds = st.integers(-3, 2**64) | st.lists(st.integers(0, 9) | anything, max_size=4) | anything
weightings = st.sampled_from([*WEIGHTINGS, "odd"]) | junk
NOISE = {"seed": seeds, "row": counts | anything, "first_index": counts | anything}


def model(x, t, cond=None):
    return x / 2


def expected(x0, z, t, prediction="v"):
    """Mean squared error of x_t / 2, sample by sample, in float64."""
    alpha, sigma = (torch.tensor(column)[t].reshape(-1, *[1] * (x0.dim() - 1))
                    for column in (SCHEDULE.alpha, SCHEDULE.sigma))  # fmt: skip
    x0, z = x0.double(), z.double()
    target = {"v": alpha * z - sigma * x0, "eps": z, "x0": x0, "score": -z / sigma}[prediction]
    return (target - (alpha * x0 + sigma * z) / 2).square().reshape(len(x0), -1).mean(1)


@generated
@given(
    changed(
        schedule=junk,
        prediction=names | junk,
        weighting=weightings,
        learned_variance=st.booleans(),
        model=objects,
        x0=data,
        t=times,
        noise=data,
        **NOISE,
    )
)
def test_the_diffusion_loss(changes):
    made = {"schedule": SCHEDULE, "prediction": "v"}
    made |= {k: v for k, v in changes.items() if k in ("weighting", "learned_variance", *made)}
    called = {"model": model, "x0": X0, "t": T}
    if not changes.keys() & {"noise", *NOISE}:
        called["noise"] = Z
    called |= {k: v for k, v in changes.items() if k not in made}
    loss = refused_clearly(lambda: losses.DiffusionLoss(**made), *made, "learned_variance")
    if loss is None:
        return
    if loss.learned_variance:
        called["model"] = lambda x, t: torch.cat((x / 2, 0 * x), 1)
    found = refused_clearly(lambda: loss.per_sample(**called), *called, "output")
    if found is None:
        return
    assert found.dtype == torch.float32 and found.shape == called["x0"].shape[:1]
    plain = loss.weighting == "simple" and called["x0"].numel() and loss.prediction != "edm"
    if plain and called.get("noise") is not None and called["t"] is not None:
        wanted = expected(called["x0"], called["noise"], called["t"], loss.prediction)
        eps = torch.finfo(called["x0"].dtype).eps
        scale = max(x.abs().max().item() for x in (called["x0"], called["noise"]))
        if scale < 100:
            most = 1 / SCHEDULE.sigma[0] if loss.prediction == "score" else 1.0
            rough = 20 * eps * (1 + most * scale) ** 2
            torch.testing.assert_close(
                found.double(), wanted, rtol=1e-4, atol=rough, equal_nan=True
            )


@generated
@given(changed(model=objects, x0=data, t=times, cond=times, noise=data, schedule=junk, **NOISE))
def test_the_classifier_loss(changes):
    schedule = changes.pop("schedule", SCHEDULE)
    loss = refused_clearly(lambda: losses.ClassifierLoss(schedule), "schedule")
    if loss is None:
        return
    logits = torch.tensor([0.5, -1.0, 2.0])
    called = {
        "model": lambda x, t: logits.expand(len(x), 3), "x0": X0, "t": T,
        "cond": torch.tensor([0, 1, 2]), **changes,
    }  # fmt: skip
    found = refused_clearly(lambda: loss.with_sums(**called), *called, "output")
    if found is not None:
        cond = called["cond"]
        wanted = -F.log_softmax(logits.double(), 0)[cond]
        torch.testing.assert_close(found[0].double(), wanted)
        assert cond.ge(0).all() and found[1][:, 0].sum() == len(cond)


@generated
@given(
    changed(model=objects, x0=data, schedule=junk, t=times, noise=data, projection=data, **NOISE),
    st.booleans(),
)
def test_score_matching(changes, reduced):
    usual = {"model": lambda x, t: -x, "x0": X0, "schedule": SCHEDULE, "t": T}
    variance = torch.tensor(SCHEDULE.sigma**2)
    if "projection" not in changes:
        given = {**usual, **changes}
        out = refused_clearly(lambda: losses.denoising_score_matching(**given), *given, "output")
        if out is not None:
            assert out.shape == given["x0"].shape[:1] and out.dtype == torch.float32
    given = {**usual, "variance_reduction": reduced, **changes}
    out = refused_clearly(lambda: losses.sliced_score_matching(**given), *given, "output")
    if out is None or given.get("noise") is None or given.get("projection") is None:
        return
    x0, z, v, t = (given[name].double() for name in ("x0", "noise", "projection", "t"))
    alpha, sigma = (torch.tensor(c)[t.long()].reshape(-1, *[1] * (x0.dim() - 1))
                    for c in (SCHEDULE.alpha, SCHEDULE.sigma))  # fmt: skip
    x, v = (alpha * x0 + sigma * z).flatten(1), v.flatten(1)
    square = x.square().sum(1) if reduced else (x * v).sum(1) ** 2
    if x.numel() and max(x.abs().max(), v.abs().max()) < 100 and out.isfinite().all():
        wanted = variance[t.long()] * (square / 2 - v.square().sum(1))
        torch.testing.assert_close(out.double(), wanted, rtol=0.05, atol=0.05 * (1 + square.max()))


@generated
@given(
    changed(
        teacher=objects,
        schedule=junk,
        timesteps=st.lists(st.integers(-1, 60), max_size=4) | anything,
        prediction=names | junk,
        target=names | junk,
        weighting=weightings,
        guidance=st.tuples(anything, anything) | anything,
        student=objects,
        x0=data,
        i=times,
        cond=times,
        noise=data,
        **NOISE,
    )
)
def test_the_distillation_loss(changes):
    def teacher(z, t, cond=None):
        return z / 2

    teacher.null_cond = torch.zeros_like
    made = {"teacher": teacher, "schedule": SCHEDULE, "timesteps": [40, 30, 20, 0]}
    options = {*made, "prediction", "target", "weighting", "guidance"}
    made |= {k: v for k, v in changes.items() if k in options}
    called = {"student": lambda z, t, cond=None, w=0: z / 2, "x0": X0, "cond": T}
    called |= {k: v for k, v in changes.items() if k not in options}
    loss = refused_clearly(lambda: losses.DistillationLoss(**made), *made)
    if loss is None:
        return
    found = refused_clearly(lambda: loss.with_sums(**called), *called, "output", "t")
    if found is not None:
        assert found[0].shape == called["x0"].shape[:1] and found[1].shape[1] == 3
        assert found[1][:, 0].sum() == len(called["x0"])


@slowly
@given(
    changed(
        model=objects,
        schedule=junk,
        x0=tensors(st.just((2, 1, 3)), st.just(torch.float32)) | tensors() | junk,
        prediction=names | junk,
        variance=st.sampled_from(["small", "large", "learned_range"]) | junk,
        cond=times,
        clip=st.floats(0, 2) | anything,
        seed=seeds,
        first_index=counts | anything,
        batch_size=counts | anything,
    )
)
def test_bits(changes):
    given = {"model": model, "schedule": SCHEDULE, "x0": X0[:2, :1, :3], **changes}
    found = refused_clearly(lambda: losses.bits_per_dim(**given), *given, "output")
    if found is not None:
        assert found.terms.shape == (50,) and found.samples.shape == given["x0"].shape[:1]
        assert abs(found.prior + found.terms.sum() - found.total) < 1e-3 * abs(found.total)


@generated
@given(
    st.sampled_from([losses.UniformTimesteps, losses.LossAwareTimesteps]),
    changed(
        T=st.integers(1, 60) | counts | junk,
        history=counts.filter(lambda n: n < 70) | junk,
        uniform=st.floats(0, 1) | anything,
        batch=st.integers(-2, 9) | junk,
        seed=seeds,
        row=counts | anything,
        first_index=counts | anything,
        t=times,
        losses=tensors(st.just((3,))) | tensors() | junk,
        state=st.dictionaries(st.sampled_from(["losses", "seen"]), anything) | junk,
    ),
)
def test_drawn_timesteps(kind, changes):
    made = {"T": 50} | {k: v for k, v in changes.items() if k == "T"}
    if kind is losses.LossAwareTimesteps:
        made |= {k: v for k, v in changes.items() if k in ("history", "uniform")}
    drawn = {"batch": 3, "seed": 0}
    drawn |= {k: v for k, v in changes.items() if k in ("batch", "seed", "row", "first_index")}
    sampler = refused_clearly(lambda: kind(**made), *made)
    if sampler is None:
        return
    found = refused_clearly(lambda: sampler.draw(**drawn), *drawn)
    if found is not None:
        t, weights = found
        assert t.shape == weights.shape == (drawn["batch"],) and weights.eq(1).all()
        assert all(0 <= k < made["T"] for k in t)
    learnt = {"t": T, "losses": torch.ones(3)} | {
        k: v for k, v in changes.items() if k in ("t", "losses")
    }
    if kind is losses.LossAwareTimesteps and sampler.T == 50:
        refused_clearly(lambda: sampler.update(**learnt), *learnt)
        counted = sampler.state_dict()["seen"]
        fine = torch.is_tensor(learnt["losses"]) and counted.sum() > 0
        assert not fine or counted.sum() == learnt["losses"].float().isfinite().sum()
    if "state" in changes:
        before = sampler.state_dict()
        refused_clearly(lambda: sampler.load_state_dict(changes["state"]), "state")
        for name, value in sampler.state_dict().items():
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_finite_or_refused(weighting):
    @slowly
    @given(st.integers(1, 60), names, st.booleans(), st.booleans())
    def tried(length, prediction, learned, ends):
        schedule = SCHEDULE.cosine(length)
        if ends and length > 1:
            schedule = schedule.zero_terminal_snr()
        said = "prediction", "weighting", "learned_variance"
        loss = refused_clearly(
            lambda: losses.DiffusionLoss(schedule, prediction, weighting, learned), *said
        )
        assert loss is None or np.isfinite(loss.weights).all()

    tried()
